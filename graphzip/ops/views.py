"""Views: the same positions under another shape.

A view acts on runs of dimensions with equal products. Products are compared as expressions of the inputs' sizes, and
channels that would be laid out together with such a size are followed only where that is right for every size.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from graphzip.canonical.squeezes import squeezed_dims
from graphzip.graph.sizes import content, stand_ins
from graphzip.labels import IntArray, lies_outside, support
from graphzip.ops.rules import broadcast_dims, moved
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, OpSpec, Patch, Result

__all__ = ["SPECS", "patch_sizes", "regroup", "reshape_axis"]

aten = torch.ops.aten

Runs = Sequence[tuple[list[int], list[int]]]
"""Dimensions before and after a view that hold the same positions."""


def regroup(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Minimal runs of dimensions with equal products: a view acts on each run alone."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(left), j + len(right)
        have, want = math.prod(before[d] for d in left), math.prod(after[d] for d in right)
        while have != want:
            if have < want and i < len(before):
                left.append(i)
                have, i = have * before[i], i + 1
            elif j < len(after):
                right.append(j)
                want, j = want * after[j], j + 1
            else:
                left += range(i, len(before))
                have, i = want, len(before)
        runs.append((left, right))
    return runs


def reshape_axis(axis: IntArray, before: Sequence[int], after: Sequence[int], runs: Runs | None = None) -> IntArray:
    """The axis under a view; only runs of dimensions along which it extends are spelled out."""
    sizes: dict[int, int] = {}
    shape = [1] * len(after)
    for left, right in regroup(before, after) if runs is None else runs:
        if any(axis.shape[dim] > 1 for dim in left):
            sizes.update({dim: before[dim] for dim in left})
            for dim in right:
                shape[dim] = after[dim]
    return broadcast_dims(axis, sizes).reshape(shape)


def view(site: Site) -> Result:
    source = site.tensors()[0]
    site.carry(source)
    numbers = stand_ins(source.meta["val"].shape, site.node.meta["val"].shape)
    runs = _runs(*numbers)
    axes = _separable(site, _apart(site, site.axes(source), runs, *numbers), runs)
    before, after = site.shape(source), site.shape()
    return moved(site, axes, lambda array: reshape_axis(array, before, after, runs))


def _runs(before: tuple[int, ...], after: tuple[int, ...]) -> Runs:
    """The runs; all dimensions are one where it is not known how the sizes hang together."""
    if math.prod(before) != math.prod(after):
        return [(list(range(len(before))), list(range(len(after))))]
    return regroup(before, after)


def _apart(site: Site, axes: Axes, runs: Runs, before: tuple[int, ...], after: tuple[int, ...]) -> Axes:
    """Axes that a view moves in the same way whatever the sizes are that the inputs decide; others are pinned.

    `before` and `after` are shapes with stand-ins for those sizes.
    """
    source = site.tensors()[0]
    open_before, open_after = site.open(source), site.open()
    gone: list[IntArray] = []
    for left, right in runs:
        met = [axis for axis in axes if set(support(axis)) & set(left)]
        if not met or not (open_before & set(left) or open_after & set(right)) or len(left) == len(right) == 1:
            continue
        for axis in met:
            inside = {dim: _inner_width(site, axis, source, dim, before[dim]) for dim in open_before & set(left)}
            edges = [_edges(left, before, open_before, inside), _edges(right, after, open_after, {})]
            if not _nested(*edges):
                gone.append(axis)
    for axis in gone:
        site.pin(axis, "lays it out together with a size that the inputs decide")
    return tuple(axis for axis in axes if not any(axis is other for other in gone))


def _inner_width(site: Site, axis: IntArray, value: Any, dim: int, size: int) -> tuple[int, bool] | None:
    """Positions of the faster of the two that share a dimension, and whether the inputs decide their number."""
    width = content(value.meta["val"].shape[dim])
    if axis.shape[dim] == 1:
        return None
    return (width, False) if lies_outside(axis, dim, width) else (size // width, True)


def _edges(
    dims: Sequence[int], sizes: Sequence[int], held: frozenset[int], inside: dict[int, tuple[int, bool] | None]
) -> tuple[int, list[int]]:
    """Where the parts of a run begin, counted in positions from its end: the last fixed place, and all others."""
    fixed, others, place, known = 1, list[int](), 1, True
    for dim in reversed(dims):
        within = inside.get(dim)
        if within is not None:
            width, decided = within
            if known and not decided:
                fixed = place * width
            else:
                others.append(place * width)
        known = known and dim not in held
        place *= sizes[dim]
        if known:
            fixed = place
        else:
            others.append(place)
    return fixed, others


def _nested(left: tuple[int, list[int]], right: tuple[int, list[int]]) -> bool:
    """Whether both shapes of a run are made of the same parts: every place is a multiple of those before it."""
    places = [math.lcm(left[0], right[0]), *sorted({*left[1], *right[1]})]
    return 0 not in places and all(later % earlier == 0 for earlier, later in pairwise(places))


def _separable(site: Site, axes: Axes, runs: Runs) -> Axes:
    """Of two axes that a view would lay into each other the first stays that a parameter makes.

    In front of positions stand channels, in activations as in kernels.
    """
    gone: list[IntArray] = []
    for left, right in runs:
        met = [axis for axis in axes if set(support(axis)) & set(left)] if right else []
        if len(met) > 1:
            made = [axis for axis in met if not site.is_derived(axis)]
            stays = min(made, key=support, default=None)
            gone += [axis for axis in met if axis is not stays]
    for axis in gone:
        site.pin(axis, "merges two labelled dimensions")
    return tuple(axis for axis in axes if not any(axis is other for other in gone))


def squeeze(site: Site) -> Result:
    source, after = site.args["self"], site.shape()
    site.carry(source)
    before, runs = site.shape(source), _runs(*stand_ins(source.meta["val"].shape, site.node.meta["val"].shape))
    return moved(site, site.axes(source), lambda array: reshape_axis(array, before, after, runs))


def patch_squeeze(patch: Patch) -> None:
    """A dimension that shrinks to one stays where it is; an open size may be one and goes as before."""
    source = patch.args["self"]
    shape = source.meta["val"].shape
    dims = squeezed_dims(patch.node)
    left = [dim for dim in dims if isinstance(shape[dim], torch.SymInt) or shape[dim] == 1]
    if any(patch.size(source, dim) == 1 for dim in dims if dim not in left):
        patch.replace(aten.squeeze.dims, (source, left))


def _resized(patch: Patch, sizes: list[Any], first: int) -> list[Any]:
    """Sizes of the dimensions from `first` on: those that shrink get their new size.

    A size that is computed is left to the operator, or computed anew from the old one where another is left to it.
    """
    made = list(sizes)
    for place, old in enumerate(sizes):
        dim = first + place
        if old == -1 or not patch.shrinks(patch.node, dim):
            continue
        if isinstance(old, int):
            made[place] = patch.size(patch.node, dim)
        elif -1 not in made:
            made[place] = -1
        else:
            fraction = patch.fraction(patch.node, [dim])
            times = patch.call(operator.mul, patch.copied(old), fraction.numerator)
            made[place] = patch.call(operator.floordiv, times, fraction.denominator)
    return made


def patch_sizes(name: str) -> Any:
    """Patch a list of sizes: dimensions that shrink get their new size."""

    def patch_view(patch: Patch) -> None:
        rank = len(patch.node.meta["val"].shape)
        if any(patch.shrinks(patch.node, dim) for dim in range(rank)):
            given = list(patch.args[name])
            patch.set(name, _resized(patch, given, rank - len(given)))

    return patch_view


def patch_unflatten(patch: Patch) -> None:
    dim = patch.args["dim"] % len(patch.args["self"].meta["val"].shape)
    patch.set("sizes", _resized(patch, list(patch.args["sizes"]), dim))


SPECS = (
    OpSpec(
        (aten.view.default, aten.reshape.default, aten._unsafe_view.default),
        view,
        patch=lambda patch: patch_sizes("size" if "size" in patch.args else "shape")(patch),
    ),
    OpSpec((aten.flatten.using_ints,), view),
    OpSpec((aten.unflatten.int,), view, patch=patch_unflatten),
    OpSpec((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), squeeze, patch=patch_squeeze),
)
