"""Norms under other names, and what is measured or bounded by a norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphzip.graph.builder import Builder, rank_of

__all__ = ["NORMS"]

aten = torch.ops.aten

_BESIDE_ZERO = 1e-7
"""What torch adds to a norm that it divides by."""


def _norm(
    build: Builder,
    x: fx.Node,
    order: Any = None,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> fx.Node | None:
    """`linalg.norm` where it is one of vectors; those of matrices of another order than Frobenius' are none."""
    dims = [dim] if isinstance(dim, int) else dim
    plain = order is None or (order == "fro" and len(dims or "xx") == 2)
    taken = rank_of(x) if dims is None else len(dims)
    if not plain and taken != 1:
        return None
    number = 2.0 if plain else order
    return build(aten.linalg_vector_norm.default, x, number, None if dims is None else list(dims), keepdim, dtype=dtype)


def _matrix_norm(
    build: Builder,
    x: fx.Node,
    order: Any = "fro",
    dim: Sequence[int] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> fx.Node | None:
    return _norm(build, x, order, dim, keepdim, dtype=dtype)


def _pairwise_distance(
    build: Builder, one: fx.Node, other: fx.Node, order: float = 2, eps: float = 1e-6, keepdim: bool = False
) -> fx.Node:
    apart = build(aten.add.Scalar, build(aten.sub.Tensor, one, other), eps)
    return build(aten.linalg_vector_norm.default, apart, order, [-1], keepdim)


def _distance(build: Builder, one: fx.Node, other: fx.Node, order: float = 2) -> fx.Node:
    return build(aten.linalg_vector_norm.default, build(aten.sub.Tensor, one, other), order)


def _bounded(build: Builder, x: fx.Node, order: float, dim: int, most: float) -> fx.Node | None:
    """`renorm`: what stands at a place of `dim` has at most this norm. Half precision is summed up in float32."""
    if x.meta["val"].dtype not in {torch.float32, torch.float64}:
        return None
    others = [place for place in range(rank_of(x)) if place != dim % rank_of(x)]
    size = build(aten.linalg_vector_norm.default, x, order, others, True)
    factor = build(aten.mul.Tensor, build(aten.reciprocal.default, build(aten.add.Scalar, size, _BESIDE_ZERO)), most)
    return build(aten.mul.Tensor, x, build(aten.where.ScalarOther, build(aten.gt.Scalar, size, most), factor, 1.0))


NORMS: dict[Any, Callable[..., fx.Node | None]] = {
    aten.linalg_norm.default: _norm,
    aten.linalg_norm.ord_str: _norm,
    aten.linalg_matrix_norm.str_ord: _matrix_norm,
    aten.pairwise_distance.default: _pairwise_distance,
    aten.dist.default: _distance,
    aten.renorm.default: _bounded,
}
