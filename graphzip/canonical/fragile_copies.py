"""Where a size of one decides that two values share memory: `y.T.reshape(-1)` copies `y`, but for a batch of one.

What is written afterwards is seen under both names then, and under one of them at other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from graphzip.canonical.memory import Memory, plain, writes, written
from graphzip.graph.branches import Branch
from graphzip.graph.torch_private import has_kernel

__all__ = ["shared_at_one"]


def shared_at_one(graph: fx.Graph, memory: Memory) -> Iterator[Branch]:
    """Sizes that decide whether an operator makes a copy or a view, as comparisons.

    Only those that matter: one of the two values is written, and the other one read after that.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    changed: dict[int, list[int]] = {}
    for node in graph.nodes:
        for operand in written(node) if writes(node) else ():
            for number in memory.numbers(operand):
                changed.setdefault(number, []).append(place[node])
    for node in graph.nodes:
        if not _may_be_either(node):
            continue
        for operand in node.all_input_nodes:
            pair = memory.numbers(operand), memory.numbers(node)
            if all(pair) and pair[0] != pair[1] and _matters(memory, place, changed, node, pair[0][0], pair[1][0]):
                source = str(node.meta.get("source") or "")
                found = (symbol for symbol in _symbols(node, operand) if _shares(node, operand, symbol))
                yield from (Branch(sympy.Ne(symbol, 1), True, source) for symbol in found)


def _may_be_either(node: fx.Node) -> bool:
    """Whether an operator is made of others: those may be views."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    if (
        node.op != "call_function"
        or schema is None
        or schema.is_mutable
        or not isinstance(node.meta["val"], torch.Tensor)
    ):
        return False
    is_tensor = isinstance(node.meta["val"], torch.Tensor)
    return is_tensor and has_kernel(target.name(), "CompositeImplicitAutograd")


def _matters(
    memory: Memory, place: dict[fx.Node, int], changed: dict[int, list[int]], node: fx.Node, left: int, right: int
) -> bool:
    """Whether one memory is written after `node` and the other one read later still."""

    def last(number: int) -> int:
        return max(place[user] for each in memory.members[number] for user in each.users)

    pairs = ((left, right), (right, left))
    return any(
        place[node] < write < last(other)
        for one, other in pairs
        for write in changed.get(one, [])
        if memory.members[other]
    )


def _symbols(node: fx.Node, operand: fx.Node) -> set[Any]:
    sizes = [*operand.meta["val"].shape, *node.meta["val"].shape]
    return {symbol for size in map(plain, sizes) if not isinstance(size, int) for symbol in size.free_symbols}


def _shares(node: fx.Node, operand: fx.Node, symbol: Any) -> bool:
    """Whether the result shares the memory of `operand` where the size is one: tried with tensors of these strides."""

    def number(size: Any) -> Any:
        found = plain(size)
        if not isinstance(size, torch.SymInt) or isinstance(found, int):
            return found
        environment: Any = size.node.shape_env
        return int(found.xreplace({**environment.backed_var_to_val, symbol: sympy.Integer(1)}))

    def tensor(found: fx.Node) -> Any:
        value = found.meta["val"]
        if not isinstance(value, torch.Tensor):
            return number(value)
        sizes, strides = ([number(each) for each in those] for those in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")

    try:
        made = {each: tensor(each) for each in node.all_input_nodes}
        args: Any = fx.node.map_arg(node.args, made.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, made.__getitem__)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # the operator does not run at that size
        return False
    return bool(result.untyped_storage()._cdata == made[operand].untyped_storage()._cdata)
