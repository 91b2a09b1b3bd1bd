"""Operators that say in one word what other operators say: stacking, splitting, turning, and second names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from graphzip.graph.builder import Builder, rank_of

__all__ = ["SYNONYMS"]

aten = torch.ops.aten

Rule = Callable[..., fx.Node | None]


def _at_least(build: Builder, x: fx.Node, rank: int) -> fx.Node:
    """`atleast_1d`, `atleast_2d`, `atleast_3d`."""
    own = rank_of(x)
    if own == 0 and rank > 0:
        return build(aten.reshape.default, x, [1] * rank)
    if own == 1 and rank > 1:
        x = build(aten.unsqueeze.default, x, 0)
    return build(aten.unsqueeze.default, x, -1) if rank > 2 and own in (1, 2) else x


def _stacked(rank: int, dim: int) -> Rule:
    """`hstack`, `vstack`, `dstack`: one behind the other, once they have dimensions enough."""

    def rule(build: Builder, tensors: Sequence[fx.Node]) -> fx.Node:
        wide = [_at_least(build, each, rank) for each in tensors]
        return build(aten.cat.default, wide, min(dim, rank_of(wide[0]) - 1))

    return rule


def _columns(build: Builder, tensors: Sequence[fx.Node]) -> fx.Node:
    """Vectors become columns."""
    made = []
    for each in tensors:
        flat = _at_least(build, each, 1)
        made.append(build(aten.unsqueeze.default, flat, 1) if rank_of(flat) == 1 else flat)
    return build(aten.cat.default, made, 1)


def _block_diagonal(build: Builder, tensors: Sequence[fx.Node]) -> fx.Node | None:
    """Matrices, each with zeros to its left and right, below each other."""
    blocks = [_at_least(build, each, 2) for each in tensors]
    widths = [each.meta["val"].shape[1] for each in blocks]
    if any(isinstance(width, torch.SymInt) for width in widths):
        return None
    rows = []
    for number, block in enumerate(blocks):
        before, after = sum(widths[:number]), sum(widths[number + 1 :])
        rows.append(build(aten.constant_pad_nd.default, block, [before, after, 0, 0]))
    return build(aten.cat.default, rows, 0)


def _split_along(dim: int) -> Rule:
    """`hsplit`, `vsplit`, `dsplit`, into as many parts or at these places."""

    def rule(build: Builder, x: fx.Node, where: Any) -> fx.Node:
        target = aten.tensor_split.sections if isinstance(where, int) else aten.tensor_split.indices
        return build(target, x, where, min(dim, rank_of(x) - 1))

    return rule


def _quarter_turns(build: Builder, x: fx.Node, k: int = 1, dims: Sequence[int] = (0, 1)) -> fx.Node:
    """`rot90`."""
    first, second = dims
    if k % 4 == 0:
        return build(aten.clone.default, x)
    if k % 4 == 2:
        return build(aten.flip.default, x, [first, second])
    flipped = build(aten.flip.default, x, [second if k % 4 == 1 else first])
    return build(aten.transpose.int, flipped, first, second)


def _flipped(dim: int) -> Rule:
    return lambda build, x: build(aten.flip.default, x, [dim])


def _adjoint(build: Builder, x: fx.Node) -> fx.Node | None:
    """Transposed; a complex one is another number as well."""
    return None if x.meta["val"].is_complex() or rank_of(x) < 2 else build(aten.mT.default, x)


def _outer(build: Builder, left: fx.Node, right: fx.Node) -> fx.Node:
    return build(aten.mul.Tensor, build(aten.unsqueeze.default, left, 1), right)


def _inner(build: Builder, left: fx.Node, right: fx.Node) -> fx.Node:
    """Products over the last dimensions; a number scales."""
    if not rank_of(left) or not rank_of(right):
        return build(aten.mul.Tensor, left, right)
    return _tensordot(build, left, right, [-1], [-1])


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _tensordot(
    build: Builder, left: fx.Node, right: fx.Node, dims_self: Sequence[int], dims_other: Sequence[int]
) -> fx.Node:
    one, other = list(_LETTERS[: rank_of(left)]), list(_LETTERS[rank_of(left) :][: rank_of(right)])
    summed = {one[dim] for dim in dims_self}
    for dim, place in zip(dims_self, dims_other, strict=True):
        other[place] = one[dim]
    kept = "".join(letter for letter in (*one, *other) if letter not in summed)
    return build(aten.einsum.default, f"{''.join(one)},{''.join(other)}->{kept}", [left, right])


def _vecdot(build: Builder, left: fx.Node, right: fx.Node, *, dim: int = -1) -> fx.Node | None:
    if left.meta["val"].is_complex() or right.meta["val"].is_complex():
        return None
    return build(aten.sum.dim_IntList, build(aten.mul.Tensor, left, right), [dim])


def _sum_to_size(build: Builder, x: fx.Node, size: Sequence[Any]) -> fx.Node:
    """Sums over the dimensions that `size` lacks, and over those where it has one position."""
    shape, missing = x.meta["val"].shape, rank_of(x) - len(size)
    lone = [dim for dim in range(missing, len(shape)) if _is_one(size[dim - missing]) and not _is_one(shape[dim])]
    if not missing and not lone:
        return build(aten.alias.default, x)
    total = build(aten.sum.dim_IntList, x, [*range(missing), *lone], True)
    for dim in reversed(range(missing)):
        total = build(aten.squeeze.dim, total, dim)
    return total


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _as(target: Any) -> Rule:
    """Another name of an operator."""
    return lambda build, *args, **options: build(target, *args, **options)


_SECOND_NAMES = {
    "absolute": "abs", "arccos": "acos", "arccosh": "acosh", "arcsin": "asin", "arcsinh": "asinh", "arctan": "atan",
    "arctan2": "atan2", "arctanh": "atanh", "clip": "clamp", "fix": "trunc", "greater": "gt", "greater_equal": "ge",
    "less": "lt", "less_equal": "le", "negative": "neg", "not_equal": "ne", "special_erf": "erf",
    "special_exp2": "exp2", "special_expm1": "expm1", "special_log1p": "log1p", "special_sinc": "sinc",
}  # fmt: skip


def _second_names() -> Iterator[tuple[Any, Rule]]:
    for second, first in _SECOND_NAMES.items():
        own, other = getattr(aten, second), getattr(aten, first)
        for kind in set(own.overloads()) & set(other.overloads()):
            if not any(argument.is_out for argument in getattr(own, kind)._schema.arguments):
                yield getattr(own, kind), _as(getattr(other, kind))


SYNONYMS: dict[Any, Rule] = {
    aten.hstack.default: _stacked(1, 1),
    aten.vstack.default: _stacked(2, 0),
    aten.row_stack.default: _stacked(2, 0),
    aten.dstack.default: _stacked(3, 2),
    aten.column_stack.default: _columns,
    aten.block_diag.default: _block_diagonal,
    aten.atleast_1d.default: lambda build, x: _at_least(build, x, 1),
    aten.atleast_2d.default: lambda build, x: _at_least(build, x, 2),
    aten.atleast_3d.default: lambda build, x: _at_least(build, x, 3),
    **{getattr(packet, kind): _split_along(dim)
       for packet, dim in ((aten.hsplit, 1), (aten.vsplit, 0), (aten.dsplit, 2)) for kind in ("int", "array")},
    aten.unsafe_chunk.default: _as(aten.chunk.default),
    aten.unsafe_split.Tensor: _as(aten.split.Tensor),
    aten.unsafe_split_with_sizes.default: _as(aten.split_with_sizes.default),
    aten.narrow_copy.default: _as(aten.narrow.default),
    aten.select_copy.int: _as(aten.select.int),
    aten.expand_copy.default: _as(aten.expand.default),
    aten.ravel.default: lambda build, x: build(aten.reshape.default, x, [-1]),
    aten.fliplr.default: _flipped(1),
    aten.flipud.default: _flipped(0),
    aten.rot90.default: _quarter_turns,
    aten.adjoint.default: _adjoint,
    aten.mH.default: _adjoint,
    aten.matrix_H.default: _adjoint,
    aten.outer.default: _outer,
    aten.ger.default: _outer,
    aten.inner.default: _inner,
    aten.tensordot.default: _tensordot,
    aten.linalg_vecdot.default: _vecdot,
    aten.sum_to_size.default: _sum_to_size,
    **dict(_second_names()),
}  # fmt: skip
