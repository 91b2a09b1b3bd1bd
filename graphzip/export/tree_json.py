"""The structure of nested arguments and results as JSON data, and back.

A structure is `{"type": name, "context": text, "children_spec": [...]}`, a leaf has the type `None`. Types come from a
short list; a class of results must have been registered with `torch.utils._pytree` by whoever reads it, and can only
have the names of its fields as context. Nothing is imported, and no decoder but this one sees the file's text.
"""

from __future__ import annotations

import collections
import json
from typing import Any

from torch.fx.immutable_collections import immutable_dict, immutable_list

from graphzip.graph.torch_private import pytree

__all__ = ["GraphFormatError", "spec_from_json", "spec_to_json"]

_VERSION = 1
_DEEPEST = 64
_SEQUENCES: dict[str, type] = {
    "builtins.tuple": tuple,
    "builtins.list": list,
    "torch.fx.immutable_collections.immutable_list": immutable_list,
}
_MAPPINGS: dict[str, type] = {
    "builtins.dict": dict,
    "collections.OrderedDict": collections.OrderedDict,
    "torch.fx.immutable_collections.immutable_dict": immutable_dict,
}
_NAMES = {kind: name for name, kind in (*_SEQUENCES.items(), *_MAPPINGS.items())}
_LEAF = pytree.tree_structure(0)


class GraphFormatError(ValueError):
    """Something that the format cannot hold, or that does not belong in it."""


def spec_to_json(spec: pytree.TreeSpec) -> list[Any]:
    """A structure as JSON data. Raises `GraphFormatError` for a type or a key that a file cannot name."""
    data = [_VERSION, _to_json(spec)]
    spec_from_json(data)
    return data


def _to_json(spec: pytree.TreeSpec) -> dict[str, Any]:
    if spec.is_leaf():
        return {"type": None, "context": None, "children_spec": []}
    if spec.type is collections.namedtuple:
        raise GraphFormatError(
            f"the model takes or returns a named tuple ({spec.context.__name__}), whose class a file cannot hold; take "
            "and return plain tuples, lists and dicts"
        )
    name = _NAMES.get(spec.type) or _registered_name(spec.type)
    try:
        context = json.dumps(spec.context)
    except TypeError as error:
        raise GraphFormatError(f"the model takes or returns a {name} whose keys are no text ({error})") from error
    return {"type": name, "context": context, "children_spec": [_to_json(child) for child in spec.children()]}


def _registered_name(kind: Any) -> str:
    known = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    name = getattr(known, "serialized_type_name", None)
    nameless = name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND
    if not isinstance(name, str) or nameless or pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name) is not kind:
        raise GraphFormatError(
            f"the model takes or returns a type that cannot be named in a file ({kind.__name__}); take and return "
            "tuples, lists and dicts, or register the type with a serialized_type_name"
        )
    return name


def spec_from_json(data: Any) -> pytree.TreeSpec:
    """The structure again. Raises `GraphFormatError` for what is not on the list of types, or badly formed."""
    if not isinstance(data, list) or len(data) != 2 or data[0] != _VERSION:
        raise GraphFormatError("the structure of the arguments or results is not in a known form")
    return _from_json(data[1], 0)


def _from_json(data: Any, depth: int) -> pytree.TreeSpec:
    if depth > _DEEPEST:
        raise GraphFormatError(f"arguments or results are nested more than {_DEEPEST} deep")
    if not isinstance(data, dict) or set(data) != {"type", "context", "children_spec"}:
        raise GraphFormatError("the structure of the arguments or results is not in a known form")
    name, children = data["type"], data["children_spec"]
    if not isinstance(children, list) or not isinstance(name, str | None):
        raise GraphFormatError("the structure of the arguments or results is not in a known form")
    if name is None:
        if children or data["context"] is not None:
            raise GraphFormatError("a single value has no parts")
        return _LEAF
    specs = [_from_json(child, depth + 1) for child in children]
    context = _context_of(name, data["context"])
    if name in _SEQUENCES:
        if context is not None:
            raise GraphFormatError(f"a {name} has no keys")
        return pytree.TreeSpec(_SEQUENCES[name], None, specs)
    if name in _MAPPINGS:
        return pytree.TreeSpec(_MAPPINGS[name], _keys(name, context, len(specs)), specs)
    return pytree.TreeSpec(_registered(name), _fields(name, context, 0), specs)


def _context_of(name: str, text: Any) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise GraphFormatError(f"the keys of a {name} cannot be read ({error})") from error


def _keys(name: str, context: Any, count: int) -> list[Any]:
    fine = isinstance(context, list) and all(isinstance(key, str) or type(key) is int for key in context)
    if not fine or len(context) != count or len(set(context)) != count:
        raise GraphFormatError(f"the model takes or returns a {name} whose keys are not distinct texts or numbers")
    keys: list[Any] = context
    return keys


def _registered(name: str) -> type:
    """A class of results that this process has registered as plain data."""
    kind = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name)
    if name.startswith(("builtins.", "collections.", "torch.")) or name == "NO_SERIALIZED_TYPE_NAME_FOUND":
        raise GraphFormatError(f"the model takes or returns a {name}, which a file cannot hold; use a plain dict")
    if kind is None:
        raise GraphFormatError(
            f"the model takes or returns a {name}, which this process does not know; first import the package that "
            "defines it and registers it with torch.utils._pytree"
        )
    if pytree.SUPPORTED_SERIALIZED_TYPES[kind].from_dumpable_context is not None:
        raise GraphFormatError(
            f"the model takes or returns a {name}, which decodes itself by code of its own; return a plain dict"
        )
    made: type = kind
    return made


def _fields(name: str, context: Any, depth: int) -> Any:
    """The context of registered data: names of fields, in lists, or nothing."""
    if context is None or isinstance(context, str):
        return context
    if isinstance(context, list) and depth < 3:
        return [_fields(name, item, depth + 1) for item in context]
    raise GraphFormatError(f"the model takes or returns a {name} that is described by more than names of fields")
