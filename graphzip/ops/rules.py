"""The few ways in which labels pass through operators; the rows of the table are made of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graphzip.graph.sizes import content, open_dims
from graphzip.labels import IntArray, lies_outside, support
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, Result

__all__ = [
    "after_sum",
    "align",
    "alike",
    "at_numbers",
    "broadcast_dims",
    "followed",
    "meet",
    "mixing",
    "moved",
    "opaque",
    "pointwise",
    "same",
    "shape_along",
    "split_axes",
    "uncut",
]


def same(site: Site) -> Result:
    """The result is the first operand, position by position, whatever else is passed."""
    return site.axes(site.tensors()[0])


def opaque(site: Site) -> Result:
    """Nothing is known about the operator: every label that reaches it stays."""
    for operand in site.tensors():
        for axis in site.axes(operand):
            site.pin(axis, "is not understood; add an OpSpec for it in graphzip/ops/")
    return ()


def align(axis: IntArray, rank: int) -> IntArray:
    """Broadcasting adds leading dimensions."""
    return axis.reshape((1,) * (rank - axis.ndim) + axis.shape)


def pointwise(site: Site) -> Result:
    """Each output position depends on the same position of every operand (after broadcasting)."""
    rank = len(site.shape())
    operands = [
        (
            tuple(align(axis, rank) for axis in site.axes(value)),
            (1,) * (rank - len(site.shape(value))) + site.extent(value),
        )
        for value in site.tensors()
        if len(site.shape(value)) <= rank
    ]
    return meet(site, operands)


def meet(site: Site, operands: Sequence[tuple[Axes, tuple[int, ...]]]) -> Axes:
    """Meet the axes of operands of equal rank; each operand is its axes and its shape.

    Axes over the same dimensions are unified. An axis over fewer dimensions than another is unified with it when it
    has the innermost of them (a scale per head width), otherwise it contains it (a scale per head). Where an operand
    extends along the innermost dimension without labels, the others are pinned; along an outer one, their blocks are.
    """
    remaining = [axis for axes, _ in operands for axis in axes if support(axis)]
    remaining.sort(key=site.is_derived)  # the labels of parameters stand for those of what is filled or copied
    result: list[IntArray] = []
    while remaining:
        cluster = [remaining.pop(0)]
        dims = set(support(cluster[0]))
        grew = True
        while grew:
            overlapping = [axis for axis in remaining if dims & set(support(axis))]
            remaining = [axis for axis in remaining if not dims & set(support(axis))]
            cluster += overlapping
            dims |= {dim for axis in overlapping for dim in support(axis)}
            grew = bool(overlapping)
        result += _met_over(site, cluster, dims, operands)
    return tuple(result)


def _met_over(
    site: Site, cluster: list[IntArray], dims: set[int], operands: Sequence[tuple[Axes, tuple[int, ...]]]
) -> list[IntArray]:
    bare = {
        dim
        for axes, shape in operands
        for dim in dims
        if shape[dim] > 1 and not any(dim in support(axis) for axis in axes)
    }
    widest = _widest(cluster, dims)
    if widest is None or bare & {support(wide)[-1] for wide in widest}:
        why = "combines axes that cut across each other" if not bare else _FIXED
        for axis in cluster:
            site.pin(axis, why)
        return []
    if bare or len(widest) > 1:
        outer = support(widest[0])[:-1]
        block = site.fresh([size if dim in outer else 1 for dim, size in enumerate(widest[0].shape)])
        for wide in widest:
            site.contain(block, wide)
        if bare:
            site.pin(block, _FIXED)
    for axis in cluster:
        for wide in widest:
            _join(site, axis, wide, shared=not bare)
    return widest


_FIXED = "combines it with a tensor whose channels are fixed"


def _widest(cluster: list[IntArray], dims: set[int]) -> list[IntArray] | None:
    """The axis that extends along all of `dims`; or several that differ in the innermost dimension only.

    Those are the widths of two operands in the same blocks: `(heads, d)` and `(heads, e)` of `(heads, d, e)`.
    """
    largest = max(len(support(axis)) for axis in cluster)
    found: dict[tuple[int, ...], IntArray] = {}
    for axis in cluster:
        if len(support(axis)) == largest:
            found.setdefault(support(axis), axis)
    outer = {along[:-1] for along in found}
    inner = {along[-1] for along in found}
    blocks = len(found) == 1 or (len(outer) == 1 and all(outer) and not inner & set(*outer))
    inside = all(any(set(support(axis)) <= set(along) for along in found) for axis in cluster)
    if not blocks or not inside or set().union(*found) != dims:
        return None
    return list(found.values())


def _join(site: Site, axis: IntArray, widest: IntArray, *, shared: bool) -> None:
    """What the labels of one axis have to do with those of one that extends at least as far.

    Without `shared` blocks cannot come and go without the narrower one.
    """
    along, inner = set(support(axis)), support(widest)[-1]
    if axis is widest or not along <= set(support(widest)):
        return
    if inner not in along:
        site.contain(axis, widest)
    elif shared and len(along) < len(support(widest)):
        site.tie_blocks(axis, widest)
    else:
        site.unify(axis, widest)


def split_axes(axes: Axes, dims: Sequence[int]) -> tuple[list[IntArray], list[IntArray]]:
    """Axes that extend along one of `dims`, and the others."""
    touching = [axis for axis in axes if set(support(axis)) & set(dims)]
    return touching, [axis for axis in axes if not set(support(axis)) & set(dims)]


def mixing(site: Site, axes: Axes, dims: Sequence[int], why: str) -> Axes:
    """Positions along `dims` are mixed or treated unevenly.

    An axis along those dimensions only is pinned; one that also extends along others becomes one channel per position
    of those others.
    """
    touching, result = split_axes(axes, dims)
    for axis in touching:
        if set(support(axis)) <= set(dims):
            site.pin(axis, why)
        else:
            result.append(site.tie(axis, [dim for dim in support(axis) if dim in dims]))
    return tuple(result)


def alike(site: Site, axes: Axes, dims: Sequence[int], held: frozenset[int]) -> Axes:
    """Channels along `dims` are treated alike, each by how often it occurs; the axes pass.

    `held` are the dimensions whose sizes the inputs decide.
    """
    result = []
    for axis in axes:
        inside = set(support(axis)) & set(dims)
        if inside:
            axis = _alone(site, axis, held)
            outer = axis
            for dim in inside:
                outer = np.take(outer, [0], axis=dim)
            if support(outer):
                site.contain(site.fresh(outer.shape), axis)
        result.append(axis)
    return tuple(result)


def _alone(site: Site, axis: IntArray, held: frozenset[int]) -> IntArray:
    """A dimension whose size the inputs decide cannot carry counts of its own per position: its labels are tied."""
    along = [dim for dim in support(axis) if dim in held]
    return site.tie(axis, along) if along and len(along) < len(support(axis)) else axis


def after_sum(site: Site, axes: Axes, dims: Sequence[int], held: frozenset[int]) -> Axes:
    """What is left of axes once channels along `dims` have been summed over, all of them alike.

    An axis that extends along other dimensions as well leaves labels of its own there, which contain the channels.
    `held` are the dimensions whose sizes the inputs decide.
    """
    touching, result = split_axes(axes, dims)
    for axis in touching:
        _alone(site, axis, held)
        inside = [dim for dim in support(axis) if dim in dims]
        outer = axis
        for dim in inside:
            outer = np.take(outer, [0], axis=dim)
        if support(outer):
            held_by = site.derive(outer.shape)
            site.contain(held_by, axis)
            wider = [other for other in result if set(support(held_by)) <= set(support(other))]
            for other in wider:
                (site.unify if support(held_by) == support(other) else site.contain)(held_by, other)
            if not wider:
                result.append(held_by)
    return tuple(result)


def uncut(site: Site, axes: Axes, dims: Sequence[int], value: Any = None) -> Axes:
    """Axes that may be cut along `dims`: channels that share one of them with a size that the inputs decide may not.

    `value` is the operand that is cut, the first one where it is left out.
    """
    value = site.tensors()[0] if value is None else value
    return mixing(site, axes, sorted(site.open(value) & set(dims)), "cuts along a size that the inputs decide")


def followed(site: Site, found: Result) -> Result:
    """Axes of the result that are laid out alike for all inputs; the channels of others stay.

    Channels may share a dimension with a size that the inputs decide, as in `(batch * channels)`, if either varies
    faster than the other.
    """
    value = site.node.meta["val"]
    if isinstance(found, list):
        return [_followed(site, axes, each) for axes, each in zip(found, value, strict=True)]
    return _followed(site, found, value)


def _followed(site: Site, axes: Axes, value: Any) -> Axes:
    held = open_dims(value) if axes and isinstance(value, torch.Tensor) else frozenset()
    kept = []
    for axis in axes:
        along = held.intersection(support(axis))
        if all(lies_outside(axis, dim, content(value.shape[dim])) is not None for dim in along):
            kept.append(axis)
        else:
            site.pin(axis, "lays it along a size that the inputs decide")
    return tuple(kept)


def at_numbers(site: Site, value: Any, dim: int, numbered: IntArray, index: Axes = ()) -> Axes:
    """What is left of an operand that is read along `dim` at numbers that are places of the labels `numbered`.

    `index` are axes of the numbers themselves, of which nothing is known.
    """
    rest = []
    for axis in site.axes(value):
        if support(axis) == (dim,) and axis.size == numbered.size:
            site.unify(axis.ravel(), numbered)
        else:
            rest.append(axis)
    if len(rest) == len(site.axes(value)):
        site.pin(numbered, "reads positions that are fixed by them")
    for axis in index:
        site.pin(axis, "is used as an index")
    return mixing(site, tuple(rest), [dim], "picks positions by an index")


def weight_labels(site: Site, weight: Any, dim: int) -> IntArray:
    """Labels along one dimension of a weight; pinned ones where it has none."""
    for axis in site.axes(weight):
        if support(axis) == (dim,):
            return axis.ravel()
    size = site.shape(weight)[dim]
    labels = site.fresh((size,))
    if size > 1:
        site.pin(labels, "has a weight with a fixed dimension")
    return labels


def moved(site: Site, axes: Axes, run: Any) -> Axes:
    """Rearrange every axis of one operand by the same numpy function."""
    result = tuple(site.move([axis], lambda arrays: run(arrays[0])) for axis in axes)
    return tuple(axis for axis in result if support(axis))


def broadcast_dims(axis: IntArray, sizes: dict[int, int]) -> IntArray:
    """The axis spelled out along some dimensions."""
    shape = tuple(sizes.get(dim, size) for dim, size in enumerate(axis.shape))
    return np.broadcast_to(axis, shape)


def shape_along(dim: int, shape: Sequence[int]) -> list[int]:
    """The shape of an axis along one dimension of a tensor."""
    return [size if position == dim else 1 for position, size in enumerate(shape)]
