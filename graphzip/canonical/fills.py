"""Tensors that are filled with one number.

Such a tensor takes its width from whatever reads it. So that it couples no two readers, and none of them with the
tensor that it was made like, it is made anew for each, in a size of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphzip.graph.builder import Builder, shape_of
from graphzip.graph.inputs import concrete_shape

__all__ = ["FILLS", "LIKE", "fills_apart"]

aten = torch.ops.aten

FILLS = (
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty.memory_format,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
)

_UNFILLED = {aten.empty.memory_format, aten.new_empty.default}
"""Two of these may hold different numbers."""

_SMALL = 1 << 14
"""Numbers in a tensor that may be made several times: states and not masks."""


def fills_apart(graph: fx.Graph) -> None:
    """Every reader of a small tensor that is filled with a number gets one of its own."""
    for node in list(graph.nodes):
        if (
            node.target in FILLS
            and node.target not in _UNFILLED
            and math.prod(concrete_shape(node.meta["val"])) <= _SMALL
        ):
            for user in list(node.users)[1:]:
                with graph.inserting_before(node):
                    twin = graph.node_copy(node)
                user.replace_input_with(node, twin)


def _of_its_size(target: Any) -> Callable[..., fx.Node]:
    """`zeros_like(x)`: of the size of `x`, but not of its channels."""

    def rule(build: Builder, x: fx.Node, *value: Any, memory_format: Any = None, **options: Any) -> fx.Node:
        return build(target, x, shape_of(build, x), *value, **options)

    return rule


LIKE: dict[Any, Callable[..., fx.Node]] = {
    aten.zeros_like.default: _of_its_size(aten.new_zeros.default),
    aten.ones_like.default: _of_its_size(aten.new_ones.default),
    aten.full_like.default: _of_its_size(aten.new_full.default),
    aten.empty_like.default: _of_its_size(aten.new_empty.default),
}
