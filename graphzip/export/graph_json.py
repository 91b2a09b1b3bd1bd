"""A traced graph as JSON data, and back.

Only names travel. An operator is looked up in `torch.ops.aten`, or in the short list of functions on sizes below, when
the graph is read; nothing is unpickled, imported or evaluated. Names that end up in generated Python source (arguments,
attributes) are checked, because `torch.fx` turns the graph into source code.

A value is itself where JSON has it, else an object with one key that says what it is: `{"node": "relu"}`,
`{"dtype": "float32"}`, `{"tuple": [...]}`.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

__all__ = ["GraphFormatError", "check_state_name", "graph_from_json", "graph_to_json", "spec_from_json", "spec_to_json"]

_ARITHMETIC = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "abs", "pow")
_LOGIC = ("and_", "or_", "not_", "eq", "ne", "lt", "le", "gt", "ge")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _ARITHMETIC + _LOGIC},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")
        if hasattr(torch, name)
    },
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_REFUSED = {"from_file"}
"""ATen operators that reach outside the model: they open files."""

_ENUMS: dict[str, tuple[type, dict[str, Any]]] = {
    "dtype": (torch.dtype, {}),
    "memory_format": (torch.memory_format, {}),
    "layout": (torch.layout, {}),
}


class GraphFormatError(ValueError):
    """Something that the format cannot hold, or that does not belong in it."""


def graph_to_json(graph: fx.Graph) -> dict[str, Any]:
    """Nodes in order, and the call signature. Raises `GraphFormatError` for what cannot be written."""
    codegen = graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        raise GraphFormatError("the graph has no call signature")
    info = codegen.pytree_info
    return {
        "arguments": list(info.orig_args),
        "inputs": spec_to_json(info.in_spec),
        "outputs": None if info.out_spec is None else spec_to_json(info.out_spec),
        "nodes": [_node_to_json(node) for node in graph.nodes],
    }


def graph_from_json(data: Mapping[str, Any]) -> fx.Graph:
    """The graph, with `owner` and `source` of each node. Raises `GraphFormatError` for anything unexpected."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        node = graph.create_node(
            _choice(entry["op"], ("placeholder", "get_attr", "call_function", "output")),
            _target_from_json(entry["op"], entry["target"]),
            tuple(_value_from_json(value, made) for value in entry.get("args", ())),
            {_identifier(key): _value_from_json(value, made) for key, value in entry.get("kwargs", {}).items()},
            name=_identifier(entry["name"]),
        )
        if node.name != entry["name"]:
            raise GraphFormatError(f"the name of node {entry['name']!r} is taken twice or reserved")
        node.meta.update(owner=str(entry.get("owner", "")), source=str(entry.get("source", "")))
        made[node.name] = node
    graph.set_codegen(_PyTreeCodeGen(_signature_from_json(data)))
    graph.lint()
    return graph


def _signature_from_json(data: Mapping[str, Any]) -> _PyTreeInfo:
    inputs, outputs = spec_from_json(data["inputs"]), data["outputs"]
    if inputs.num_children == 2 and inputs.child(1).type is dict:
        for keyword in inputs.child(1).context:
            _identifier(keyword)
    arguments = [_identifier(name) for name in data["arguments"]]
    return _PyTreeInfo(arguments, inputs, None if outputs is None else spec_from_json(outputs))


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    try:
        entry = {
            "op": node.op,
            "name": node.name,
            "target": _target_to_json(node),
            "args": [_value_to_json(value) for value in node.args],
            "kwargs": {key: _value_to_json(value) for key, value in node.kwargs.items()},
            "owner": node.meta.get("owner", ""),
            "source": node.meta.get("source", ""),
        }
    except GraphFormatError as error:
        source = node.meta.get("source")
        raise GraphFormatError(f"node {node.name!r}{f' ({source})' if source else ''}: {error}") from error
    return {key: value for key, value in entry.items() if value or key == "name"}


def _target_to_json(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._schema.name.partition('::')[2]}.{target._overloadname}"
        if target.namespace != "aten":
            raise GraphFormatError(f"operator {name} is not one of PyTorch's own (aten), so a file cannot name it")
        _aten(name)
        return name
    if target in _NAMES:
        return _NAMES[target]
    raise GraphFormatError(f"function {target!r} is not one that a file can name")


def _target_from_json(op: str, target: Any) -> Any:
    if op == "call_function":
        return _FUNCTIONS[target] if target in _FUNCTIONS else _aten(target)
    if op == "get_attr":
        return check_state_name(target)
    return _identifier(target)


def check_state_name(name: Any) -> str:
    """A dotted name of a parameter or buffer that is safe in generated source."""
    if not isinstance(name, str) or not name or any(not part for part in name.split(".")):
        raise GraphFormatError(f"{name!r} is not the name of a parameter or buffer")
    if not name.isprintable() or any(mark in name for mark in "\"'\\"):
        raise GraphFormatError(f"the name {name!r} holds a quote, a backslash or a control character")
    return name


def _aten(name: Any) -> torch._ops.OpOverload:
    parts = str(name).split(".")
    if len(parts) != 3 or parts[0] != "aten" or not all(part.isidentifier() for part in parts):
        raise GraphFormatError(f"{name!r} is not an operator that a file can name")
    found = getattr(getattr(torch.ops.aten, parts[1], None), parts[2], None)
    if not isinstance(found, torch._ops.OpOverload):
        raise GraphFormatError(f"torch {torch.__version__} has no operator {name}; update torch")
    if found._schema.is_mutable or parts[1] in _REFUSED:
        raise GraphFormatError(f"operator {name} writes to its arguments or to files, which a saved model may not do")
    return found


def _value_to_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_value_to_json(item) for item in value]
    for kind, (enum, _) in _ENUMS.items():
        if isinstance(value, enum):
            return {kind: str(value).removeprefix("torch.")}
    special = _special_to_json(value)
    if special is None:
        raise GraphFormatError(f"a {type(value).__name__} cannot be written")
    return special


def _special_to_json(value: Any) -> dict[str, Any] | None:
    if isinstance(value, tuple):
        return {"tuple": [_value_to_json(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [_value_to_json(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, dict):
        return {"dict": [[_value_to_json(key), _value_to_json(item)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [_value_to_json(value.real), _value_to_json(value.imag)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    return {"ellipsis": True} if value is ... else None


def _value_from_json(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """A Python value again; `nodes` are those made so far, by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_value_from_json(item, nodes) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise GraphFormatError(f"{value!r} is not a value")
    ((kind, content),) = value.items()
    if kind == "node":
        if content not in nodes:
            raise GraphFormatError(f"node {content!r} is used before it is defined")
        return nodes[content]
    if kind in _ENUMS:
        found = getattr(torch, _identifier(content), None)
        if not isinstance(found, _ENUMS[kind][0]):
            raise GraphFormatError(f"torch has no {kind} {content!r}")
        return found
    return _special_from_json(kind, content, nodes)


def _special_from_json(kind: str, content: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if kind == "float":
        return float(_choice(content, ("inf", "-inf", "nan")))
    if kind == "device":
        return torch.device("cpu")
    if kind == "ellipsis":
        return ...
    if not isinstance(content, list):
        raise GraphFormatError(f"{kind!r} needs a list")
    if kind == "dict":
        return {_value_from_json(key, nodes): _value_from_json(item, nodes) for key, item in content}
    items = [_value_from_json(item, nodes) for item in content]
    makers: dict[str, Callable[..., Any]] = {"tuple": lambda *parts: parts, "slice": slice, "complex": complex}
    return makers[_choice(kind, tuple(makers))](*items)


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise GraphFormatError(f"{value!r} is none of {', '.join(choices)}")
    return str(value)


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise GraphFormatError(f"{name!r} is not a name")
    return name


def spec_to_json(spec: pytree.TreeSpec) -> Any:
    """The structure of nested arguments or results."""
    try:
        data = json.loads(pytree.treespec_dumps(spec))
    except (NotImplementedError, TypeError) as error:
        raise GraphFormatError(
            f"the model takes or returns a type that cannot be named in a file ({error}); take and return tuples, "
            "lists and dicts, or register the type with a serialized_type_name"
        ) from error
    _check_spec(data[1])
    return data


def spec_from_json(data: Any) -> pytree.TreeSpec:
    """The structure again; its types must be registered with `torch.utils._pytree` in this process."""
    _check_spec(data[1])
    spec: pytree.TreeSpec = pytree.treespec_loads(json.dumps(data))
    return spec


def _check_spec(data: Mapping[str, Any]) -> None:
    """Known types only, and no context that would import something."""
    name = data["type"]
    if name == "collections.defaultdict" or "__enum__" in str(data["context"]):
        raise GraphFormatError(f"the model takes or returns a {name} that names Python code; use a plain dict")
    if name is not None and name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        raise GraphFormatError(
            f"the model takes or returns a {name}, which this process does not know; first import the package that "
            "defines it and registers it with torch.utils._pytree"
        )
    for child in data["children_spec"]:
        _check_spec(child)
