"""Leave out what is computed for nothing once values are known to be zero: the terms of experts that are gone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from graphzip.graph.operators import arguments_of
from graphzip.graph.sizes import same_size

__all__ = ["leave_out"]

aten = torch.ops.aten

_PASSES = {
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.permute.default,
    aten.transpose.int,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.clone.default,
    aten.contiguous.default,
    aten.neg.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.any.dim,
    aten.mul.Scalar,
}
"""What is zero where its operand is."""

_HANDS_ON = {
    aten.select.int,
    aten.squeeze.dim,
    aten.unsqueeze.default,
}
"""What hands on the places of values that are not zero."""


def leave_out(graph: fx.Graph, zeros: Iterable[fx.Node]) -> None:
    """Let readers of sums read what is left of them; nodes that nobody reads then stay until dead code goes."""
    zero, nowhere = set(zeros), set[Any]()
    for node in list(graph.nodes):
        if node.op != "call_function" or node in zero:
            continue
        source = node.args[0] if node.args else None
        factors = node.all_input_nodes if node.target is aten.mul.Tensor else [source]
        if (node.target is aten.mul.Tensor or node.target in _PASSES) and not zero.isdisjoint(factors):
            zero.add(node)
        elif source in (zero if node.target is aten.nonzero.default else nowhere if node.target in _HANDS_ON else ()):
            nowhere.add(node)
        elif node.target is aten.add.Tensor:
            _leave_out_of_sum(node, zero)
        elif node.target is aten.index_add.default:
            args = arguments_of(node)
            if args["index"] in nowhere or args["source"] in zero:
                node.replace_all_uses_with(args["self"])
        elif node.target is aten.index_put.default:
            args = arguments_of(node)
            masks = {each for each in args["indices"] if each in zero and each.meta["val"].dtype is torch.bool}
            if masks or not nowhere.isdisjoint(args["indices"]):
                node.replace_all_uses_with(args["self"])
        elif node.target is aten.where.self and source in zero and _looks_like(node.args[2], node):
            node.replace_all_uses_with(node.args[2])


def _leave_out_of_sum(node: fx.Node, zero: set[fx.Node]) -> None:
    one, other = node.args[:2]
    if (one in zero and other in zero) or (one in zero and not isinstance(other, fx.Node) and other == 0):
        zero.add(node)
    elif other in zero and _looks_like(one, node):
        node.replace_all_uses_with(one)  # type: ignore[arg-type]
    elif one in zero and _looks_like(other, node) and node.kwargs.get("alpha", 1) == 1:
        node.replace_all_uses_with(other)  # type: ignore[arg-type]


def _looks_like(value: Any, node: fx.Node) -> bool:
    """Whether a summand has the shape and the dtype of the sum."""
    if not isinstance(value, fx.Node):
        return False
    one, other = value.meta["val"], node.meta["val"]
    shapes = len(one.shape) == len(other.shape) and all(map(same_size, one.shape, other.shape))
    return shapes and one.dtype == other.dtype
