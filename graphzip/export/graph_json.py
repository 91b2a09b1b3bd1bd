"""A traced graph as JSON data, and back.

Only names travel. An operator is looked up in the lists of `operators` when the graph is read; nothing is unpickled,
imported, evaluated or run. Names that end up in generated Python source (arguments, attributes) are checked, because
`torch.fx` turns the graph into source code.

A value is itself where JSON has it, else an object with one key that says what it is: `{"node": "relu"}`,
`{"dtype": "float32"}`, `{"tuple": [...]}`.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import fx

from graphzip.export.archive_schema import GraphEntry
from graphzip.export.operators import FUNCTION_NAMES, FUNCTIONS, aten_operators
from graphzip.export.tree_json import GraphFormatError, spec_from_json, spec_to_json
from graphzip.graph.inputs import CallCode, concrete_shape
from graphzip.graph.meta import Factored, meta_of
from graphzip.graph.operators import argument_of
from graphzip.graph.torch_private import OpOverload, PyTreeCodeGen, PyTreeInfo

__all__ = ["check_state_name", "dtype_named", "graph_from_json", "graph_to_json", "identifier"]

_ENUMS: dict[str, dict[str, Any]] = {
    kind: {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, enum)}
    for kind, enum in (("dtype", torch.dtype), ("memory_format", torch.memory_format), ("layout", torch.layout))
}
_LARGEST = 2**63
_DEEPEST = 32
_LARGEST_POWER = 64
_LONGEST = 1024


def graph_to_json(graph: fx.Graph) -> dict[str, Any]:
    """Nodes in order, and the call signature. Raises `GraphFormatError` for what cannot be written."""
    codegen = graph._codegen
    if not isinstance(codegen, PyTreeCodeGen):
        raise GraphFormatError("the graph has no call signature")
    info = codegen.pytree_info
    return {
        "arguments": list(info.orig_args),
        "inputs": spec_to_json(info.in_spec),
        "outputs": None if info.out_spec is None else spec_to_json(info.out_spec),
        "nodes": [_node_to_json(node) for node in graph.nodes],
    }


def graph_from_json(data: GraphEntry, state: Container[str] | None = None) -> fx.Graph:
    """The graph, with `owner` and `source` of each node; no operator runs.

    With `state`, the names of parameters and buffers, nothing else can be fetched. Raises `GraphFormatError` for
    anything unexpected.
    """
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for entry in data.nodes:
        node = graph.create_node(
            entry.op,
            _target_from_json(entry.op, entry.target),
            tuple(_value_from_json(value, made) for value in entry.args),
            {identifier(key): _value_from_json(value, made) for key, value in entry.kwargs.items()},
            name=identifier(entry.name),
        )
        if node.name != entry.name:
            raise GraphFormatError(f"the name of node {entry.name!r} is taken twice or reserved")
        if node.op == "get_attr" and state is not None and node.target not in state:
            raise GraphFormatError(f"node {node.name!r} reads {node.target!r}, which is no parameter or buffer")
        _check_power(node)
        node.meta.update(owner=entry.owner, source=entry.source)
        if entry.factored is not None:
            mark = entry.factored
            meta_of(node)["factored"] = Factored(mark.layer, mark.drop, tuple(mark.size))
        if entry.shape is not None:
            node.meta["val"] = torch.empty(entry.shape, device="meta")
        made[node.name] = node
    if [entry.op for entry in data.nodes].count("output") != 1 or data.nodes[-1].op != "output":
        raise GraphFormatError("the graph does not end in its output")
    graph.set_codegen(CallCode(_signature_from_json(data)))
    graph.lint()
    return graph


def _check_power(node: fx.Node) -> None:
    """A power of whole numbers has as many digits as its exponent says; those of sizes are small."""
    if node.target is operator.pow and not (
        len(node.args) == 2 and isinstance(node.args[1], int | float) and abs(node.args[1]) <= _LARGEST_POWER
    ):
        raise GraphFormatError(f"node {node.name!r} raises a size to a power above {_LARGEST_POWER}")


def _signature_from_json(data: GraphEntry) -> PyTreeInfo:
    inputs = spec_from_json(data.inputs)
    if inputs.num_children == 2 and inputs.child(1).type is dict:
        for name in inputs.child(1).context:
            identifier(name)
    arguments = [identifier(name) for name in data.arguments]
    return PyTreeInfo(arguments, inputs, None if data.outputs is None else spec_from_json(data.outputs))


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
            "shape": _shape_that_counts(node),
            "factored": asdict(mark) if (mark := meta_of(node).get("factored")) is not None else None,
        }
    except GraphFormatError as error:
        source = node.meta.get("source")
        raise GraphFormatError(f"node {node.name!r}{f' ({source})' if source else ''}: {error}") from error
    return {key: value for key, value in entry.items() if value or key == "name"}


def _shape_that_counts(node: fx.Node) -> tuple[int, ...]:
    """The shape of a result that decides what module an operator becomes: of some dropouts, and of built kernels."""
    is_kernel = any("factored" in meta_of(user) and argument_of(user, "weight") is node for user in node.users)
    counts = is_kernel or node.target is torch.ops.aten.feature_dropout.default
    return concrete_shape(node.meta["val"]) if counts and "val" in node.meta else ()


def _target_to_json(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    target = node.target
    if isinstance(target, OpOverload):
        if target.namespace != "aten" and str(target) not in aten_operators():
            raise GraphFormatError(f"operator {target} is not one of PyTorch's own (aten), so a file cannot name it")
        _aten(str(target))
        return str(target)
    if target in FUNCTION_NAMES:
        return FUNCTION_NAMES[target]
    raise GraphFormatError(f"function {target!r} is not one that a file can name")


def _target_from_json(op: str, target: Any) -> Any:
    if op == "call_function":
        return FUNCTIONS[target] if isinstance(target, str) and target in FUNCTIONS else _aten(target)
    if op == "get_attr":
        return check_state_name(target)
    return identifier(target)


def check_state_name(name: Any) -> str:
    """A dotted name of a parameter or buffer that is safe in generated source."""
    parts = name.split(".") if isinstance(name, str) else []
    if not all(parts) or not 0 < len(parts) <= _DEEPEST or len(name) > _LONGEST:
        raise GraphFormatError(f"{str(name)[:80]!r} is not the name of a parameter or buffer")
    text = str(name)
    if not text.isprintable() or any(mark in text for mark in "\"'\\"):
        raise GraphFormatError(f"the name {text!r} holds a quote, a backslash or a control character")
    return text


def _aten(name: Any) -> OpOverload:
    found = aten_operators().get(name) if isinstance(name, str) else None
    if found is None:
        raise GraphFormatError(
            f"{str(name)[:80]!r} is not an operator that a file can name: only functions of tensors are, as torch "
            f"{torch.__version__} has them"
        )
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
    for kind, members in _ENUMS.items():
        if type(value) is type(next(iter(members.values()))):
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


def _value_from_json(value: Any, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    """A Python value again; `nodes` are those made so far, by name."""
    if value is None or isinstance(value, bool | int | float | str):
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise GraphFormatError("a number is too large for an argument of an operator")
        return value
    if depth > _DEEPEST:
        raise GraphFormatError(f"arguments of an operator are nested more than {_DEEPEST} deep")
    if isinstance(value, list):
        return [_value_from_json(item, nodes, depth + 1) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise GraphFormatError(f"{value!r} is not a value")
    ((kind, content),) = value.items()
    if kind == "node":
        if not isinstance(content, str) or content not in nodes:
            raise GraphFormatError(f"node {content!r} is used before it is defined")
        return nodes[content]
    if kind in _ENUMS:
        return _member(kind, content)
    return _special_from_json(kind, content, nodes, depth + 1)


def _special_from_json(kind: str, content: Any, nodes: Mapping[str, fx.Node], depth: int) -> Any:
    if kind == "float":
        return float(_choice(content, ("inf", "-inf", "nan")))
    if kind == "device":
        return torch.device("cpu")
    if kind == "ellipsis":
        return ...
    if not isinstance(content, list):
        raise GraphFormatError(f"{kind!r} needs a list")
    if kind == "dict":
        pairs = [(_value_from_json(key, nodes, depth), _value_from_json(item, nodes, depth)) for key, item in content]
        if not all(isinstance(key, str | int) for key, _ in pairs):
            raise GraphFormatError("the keys of a dictionary are texts or numbers")
        return dict(pairs)
    items = [_value_from_json(item, nodes, depth) for item in content]
    makers: dict[str, Callable[..., Any]] = {"tuple": lambda *parts: parts, "slice": slice, "complex": complex}
    return makers[_choice(kind, tuple(makers))](*items)


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise GraphFormatError(f"{value!r} is none of {', '.join(choices)}")
    return str(value)


def identifier(name: Any) -> str:
    """A name of an argument, a node or a task that is safe in generated source."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or len(name) > _LONGEST:
        raise GraphFormatError(f"{str(name)[:80]!r} is not a name")
    return name


def dtype_named(name: Any) -> torch.dtype:
    """The dtype that is called so (`float32`)."""
    return _member("dtype", name)  # type: ignore[no-any-return]


def _member(kind: str, name: Any) -> Any:
    if not isinstance(name, str) or name not in _ENUMS[kind]:
        raise GraphFormatError(f"torch has no {kind} {name!r}")
    return _ENUMS[kind][name]
