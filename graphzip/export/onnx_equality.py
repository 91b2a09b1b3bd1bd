"""Are two ONNX models the same graph with the same constants? Names inside, and the order of nodes, do not matter."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from graphzip.export.optional_packages import require

__all__ = ["constant_of", "constants", "difference", "interface", "rest"]

_ROUNDING = 16.0


def interface(model: Any) -> tuple[list[str], list[str]]:
    """What a model takes and gives: name, type and shape of each, as text; free sizes show as such."""
    return (
        [_described(value) for value in model.graph.inputs if value.name not in model.graph.initializers],
        [f"{value.name}: {value.dtype}" for value in model.graph.outputs],
    )


def _described(value: Any) -> str:
    sizes = ["?" if not isinstance(size, int) else str(size) for size in value.shape or ()]
    return f"{value.name}: {value.dtype}[{', '.join(sizes)}]"


def constant_of(value: Any) -> Any:
    """The tensor that a value always is: an initializer, or what a `Constant` node gives; `None` for other values."""
    return require("onnx_ir").convenience.get_const_tensor(value)


def rest(tensor: Any) -> None:
    """Give the memory back that a constant was read into from a file beside the model; it can be read again."""
    mapped = getattr(tensor, "raw", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def constants(model: Any) -> Iterator[tuple[str, Any]]:
    """Name and tensor of every constant that an output can read, subgraphs included; each rests before the next."""
    seen: set[int] = set()
    waiting = list(model.graph.outputs)
    while waiting:
        value = waiting.pop()
        if value is None or id(value) in seen:
            continue
        seen.add(id(value))
        tensor = constant_of(value)
        if tensor is not None:
            yield str(value.name), tensor
            rest(tensor)
        elif (node := value.producer()) is not None:
            waiting.extend(node.inputs)
            for graph in _subgraphs(node):
                waiting.extend(graph.outputs)


def _subgraphs(node: Any) -> list[Any]:
    kinds = require("onnx_ir").AttributeType
    found: list[Any] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == kinds.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == kinds.GRAPHS:
            found += attribute.as_graphs()
    return found


def difference(expected: Any, found: Any, computed: Collection[str] = (), *, weights: bool = True) -> str | None:
    """What is first found to differ, in words; `None` where nothing does.

    Constants of `expected` whose names are in `computed` may differ by rounding: another machine computed them. Where
    the `weights` are not compared, constants of several floats may hold other numbers.
    """
    try:
        _Comparison(computed, weights=weights).models(expected, found)
    except _Differs as differs:
        return str(differs)
    return None


class _Differs(Exception):
    """Two graphs are not the same."""


class _Comparison:
    """Walks both graphs side by side, from the outputs up: every operand has one place in either."""

    def __init__(self, computed: Collection[str], *, weights: bool) -> None:
        self.computed = computed
        self.weights = weights
        self.partner: dict[int, Any] = {}
        self.taken: set[int] = set()
        self.waiting: list[tuple[Any, Any]] = []

    def models(self, expected: Any, found: Any) -> None:
        self.graphs(expected.graph, found.graph)
        if {*expected.functions} != {*found.functions}:
            raise _Differs("it defines other functions")
        for name, function in expected.functions.items():
            self.graphs(function, found.functions[name])

    def graphs(self, expected: Any, found: Any) -> None:
        if len(expected.inputs) != len(found.inputs) or len(expected.outputs) != len(found.outputs):
            raise _Differs("a graph in it has another number of inputs or outputs")
        for one, other in zip(expected.inputs, found.inputs, strict=True):
            self.pair(one, other)
        self.waiting.extend(zip(expected.outputs, found.outputs, strict=True))
        while self.waiting:
            self.values(*self.waiting.pop())

    def pair(self, one: Any, other: Any) -> bool:
        """Whether the two were not known as partners before."""
        if id(one) in self.partner or id(other) in self.taken:
            if self.partner.get(id(one)) is not other:
                raise _Differs(f"{_place(other)} stands where {_place(one)} should")
            return False
        self.partner[id(one)] = other
        self.taken.add(id(other))
        return True

    def values(self, one: Any, other: Any) -> None:
        if one is None or other is None:
            if one is not other:
                raise _Differs("an operator in it has an operand too many or too few")
            return
        wanted, there = constant_of(one), constant_of(other)
        if wanted is not None and there is not None:
            free = not self.weights and wanted.dtype.is_floating_point() and wanted.size > 1
            _same_tensor(str(one.name), wanted, there, rounded=one.name in self.computed, free=free)
            rest(wanted)
            rest(there)
            return
        if not self.pair(one, other):
            return
        first, second = one.producer(), other.producer()
        if first is None or second is None or one.index() != other.index():
            raise _Differs(f"{_place(other)} stands where {_place(one)} should")
        self.nodes(first, second)

    def nodes(self, one: Any, other: Any) -> None:
        if (one.domain, one.op_type) != (other.domain, other.op_type):
            raise _Differs(f"it has {_named(other)} where {_named(one)} should be")
        if len(one.inputs) != len(other.inputs) or len(one.outputs) != len(other.outputs):
            raise _Differs(f"{_named(other)} has other operands than {_named(one)}")
        if {*one.attributes} != {*other.attributes}:
            raise _Differs(
                f"{_named(other)} has the attributes {sorted(other.attributes)}, not {sorted(one.attributes)}"
            )
        for name, attribute in one.attributes.items():
            self.attributes(f"{name!r} of {_named(other)}", attribute, other.attributes[name])
        self.waiting.extend(zip(one.inputs, other.inputs, strict=True))

    def attributes(self, what: str, one: Any, other: Any) -> None:
        kinds = require("onnx_ir").AttributeType
        if one.type != other.type or one.is_ref() != other.is_ref():
            raise _Differs(f"attribute {what} is of another type")
        if one.is_ref():
            if one.ref_attr_name != other.ref_attr_name:
                raise _Differs(f"attribute {what} refers to another")
        elif one.type in (kinds.GRAPH, kinds.GRAPHS):
            pairs = [(one.as_graph(), other.as_graph())] if one.type == kinds.GRAPH else []
            pairs += zip(one.as_graphs(), other.as_graphs(), strict=False) if one.type == kinds.GRAPHS else []
            for first, second in pairs:
                self.graphs(first, second)
        elif one.type in (kinds.TENSOR, kinds.TENSORS):
            several = one.type == kinds.TENSORS
            tensors = (one.as_tensors(), other.as_tensors()) if several else ([one.as_tensor()], [other.as_tensor()])
            for first, second in zip(*tensors, strict=False):
                _same_tensor(what, first, second)
        elif _plain(one) != _plain(other):
            raise _Differs(f"attribute {what} is {_plain(other)}, not {_plain(one)}")


def _plain(attribute: Any) -> Any:
    """The value as a file holds it: floats in single precision."""
    kinds = require("onnx_ir").AttributeType
    value = attribute.value
    if attribute.type in (kinds.FLOAT, kinds.FLOATS):
        return np.asarray(value, np.float32).tolist()
    return list(value) if isinstance(value, list | tuple) else value


def _same_tensor(name: str, one: Any, other: Any, *, rounded: bool = False, free: bool = False) -> None:
    if one.dtype != other.dtype or list(one.shape) != list(other.shape):
        kinds = [f"{each.dtype}{list(each.shape)}" for each in (other, one)]
        raise _Differs(f"{name!r} is {kinds[0]}, not {kinds[1]}")
    if free or one is other or one.tobytes() == other.tobytes():
        return
    if one.dtype.is_string():
        raise _Differs(f"{name!r} holds other strings")
    wanted, there = (np.asarray(each.numpy()).astype(np.float64).ravel() for each in (one, other))
    off = np.abs(there - wanted)
    off[np.isnan(wanted) & np.isnan(there)] = 0.0
    if rounded and one.dtype.is_floating_point() and off.max() <= _ROUNDING * one.dtype.eps * np.abs(wanted).max():
        return
    worst = int(np.nanargmax(np.where(np.isnan(off), np.inf, off)))
    count = int((there != wanted).sum())
    raise _Differs(
        f"{count} of {wanted.size} numbers of {name!r} differ: there is {there[worst]:.6g} instead of "
        f"{wanted[worst]:.6g}"
    )


def _named(node: Any) -> str:
    return f"{node.op_type} ({node.outputs[0].name})" if node.outputs else str(node.op_type)


def _place(value: Any) -> str:
    if constant_of(value) is not None:
        return f"the constant {value.name!r}"
    node = value.producer()
    return f"the result of {_named(node)}" if node is not None else f"the input {value.name!r}"
