"""Data movement: the operator itself runs on the numbered positions of each axis.

Concatenation offsets, packed projections, patch merging and channel permutations need no special case that way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graphzip.graph.squeezes import squeezed_dims
from graphzip.labels import IntArray, support
from graphzip.ops.rules import broadcast_dims, merge, mixing, moved, same, shape_along, split_axes
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, OpSpec, Patch, Result

__all__ = ["SPECS", "patch_sizes"]

aten = torch.ops.aten


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


def reshape_axis(axis: IntArray, before: Sequence[int], after: Sequence[int]) -> IntArray:
    """The axis under a view; only runs of dimensions along which it extends are spelled out."""
    sizes: dict[int, int] = {}
    shape = [1] * len(after)
    for left, right in regroup(before, after):
        if any(axis.shape[dim] > 1 for dim in left):
            sizes.update({dim: before[dim] for dim in left})
            for dim in right:
                shape[dim] = after[dim]
    return broadcast_dims(axis, sizes).reshape(shape)


def view(site: Site) -> Result:
    source = site.tensors()[0]
    before, after = site.shape(source), site.shape()
    axes = _separable(site, site.axes(source), regroup(before, after))
    return moved(site, axes, lambda array: reshape_axis(array, before, after))


def _separable(site: Site, axes: Axes, runs: Sequence[tuple[list[int], list[int]]]) -> Axes:
    """Of two axes that a view would lay into each other one stays, if that is the only one that a parameter makes.

    Of a parameter itself the first stays: in front of the kernel's positions stand its channels.
    """
    gone: list[IntArray] = []
    for left, right in runs:
        met = [axis for axis in axes if set(support(axis)) & set(left)] if right else []
        if len(met) > 1:
            made = [axis for axis in met if not site.is_derived(axis)]
            if len(made) > 1 and site.is_raw(site.tensors()[0]):
                made = [min(made, key=lambda axis: support(axis))]
            gone += [axis for axis in met if len(made) != 1 or axis is not made[0]]
    for axis in gone:
        site.pin(axis, "merges two labelled dimensions")
    return tuple(axis for axis in axes if not any(axis is other for other in gone))


def permute(site: Site) -> Result:
    rank = len(site.shape())
    order = [dim % rank for dim in site.args["dims"]]
    return moved(site, site.axes(site.args["self"]), lambda array: array.transpose(order))


def transpose(site: Site) -> Result:
    rank = len(site.shape())
    if rank < 2:
        return same(site)
    given = [site.args[name] % rank for name in ("dim0", "dim1", "axis0", "axis1") if name in site.args]
    first, second = given or (rank - 2, rank - 1)
    return moved(site, site.axes(site.args["self"]), lambda array: np.swapaxes(array, first, second))


def movedim(site: Site) -> Result:
    source, destination = site.args["source"], site.args["destination"]
    return moved(site, site.axes(site.args["self"]), lambda array: np.moveaxis(array, source, destination))


def unsqueeze(site: Site) -> Result:
    dim = site.dim(site.args["dim"])
    return moved(site, site.axes(site.args["self"]), lambda array: np.expand_dims(array, dim))


def squeeze(site: Site) -> Result:
    source, after = site.args["self"], site.shape()
    return moved(site, site.axes(source), lambda array: reshape_axis(array, site.shape(source), after))


def patch_squeeze(patch: Patch) -> None:
    """A dimension that shrinks to one stays where it is; an open size may be one and goes as before."""
    source = patch.args["self"]
    shape = source.meta["val"].shape
    dims = squeezed_dims(patch.node)
    left = [dim for dim in dims if isinstance(shape[dim], torch.SymInt) or shape[dim] == 1]
    if any(patch.size(source, dim) == 1 for dim in dims if dim not in left):
        patch.replace(aten.squeeze.dims, (source, left))


def select(site: Site) -> Result:
    source = site.args["self"]
    dim = site.dim(site.args["dim"], len(site.shape(source)))
    index = site.size(site.args["index"])

    def pick(array: IntArray) -> IntArray:
        picked: IntArray = np.take(array, index if array.shape[dim] > 1 else 0, axis=dim)
        return picked

    return moved(site, _unique_position(site, site.axes(source), dim), pick)


def _unique_position(site: Site, axes: Axes, dim: int) -> Axes:
    """Taking one position along an axis of its own would let the choice depend on what is merged."""
    alone = [axis for axis in axes if support(axis) == (dim,)]
    for axis in alone:
        site.pin(axis, "picks single channels")
    return tuple(axis for axis in axes if not any(axis is other for other in alone))


def slice_(site: Site) -> Result:
    source = site.args["self"]
    shape = site.shape(source)
    dim = site.dim(site.args["dim"], len(shape))
    start, end, step = _slice_bounds(site, shape[dim])
    axes = site.axes(source)
    if len(range(start, end, step)) == 1:
        axes = _unique_position(site, axes, dim)
    return moved(site, axes, lambda array: _cut(array, dim, slice(start, end, step)))


def _slice_bounds(site: Site, size: int) -> tuple[int, int, int]:
    start = 0 if site.args["start"] is None else site.size(site.args["start"])
    if "length" in site.args:
        return start % size, start % size + site.size(site.args["length"]), 1
    end = size if site.args["end"] is None else site.size(site.args["end"])
    return slice(start, end, site.size(site.args["step"])).indices(size)


def _cut(array: IntArray, dim: int, part: slice) -> IntArray:
    if array.shape[dim] == 1:
        return array
    return array[(slice(None),) * dim + (part,)]


def patch_slice(patch: Patch) -> None:
    source = patch.args["self"]
    rank = len(source.meta["val"].shape)
    dim = patch.args["dim"] % rank
    if not patch.shrinks(source, dim):
        return
    size = int(source.meta["val"].shape[dim])
    if "length" in patch.args:
        start, end, step = patch.args["start"] % size, patch.args["start"] % size + patch.args["length"], 1
    else:
        start, end, step = slice(patch.args["start"], patch.args["end"], patch.args["step"]).indices(size)
    kept = patch.kept(source, dim)
    chosen = np.flatnonzero(np.isin(kept, np.arange(start, end, step)))
    if chosen.size and np.array_equal(chosen, np.arange(chosen[0], chosen[0] + chosen.size)):
        patch.replace(aten.slice.Tensor, (source, dim, int(chosen[0]), int(chosen[0] + chosen.size)))
    else:
        patch.replace(aten.index_select.default, (source, dim, patch.constant(chosen.astype(np.int64))))


def scatter(site: Site) -> Result:
    """`slice_scatter`, `select_scatter`: part of the first operand is replaced by the second."""
    base, part = site.args["self"], site.args["src"]
    shape = site.shape(base)
    dim = site.dim(site.args["dim"], len(shape))
    if "index" in site.args:
        index = site.size(site.args["index"]) % shape[dim]
        start, end, step = index, index + 1, 1
    else:
        start, end, step = _slice_bounds(site, shape[dim])
    if (start, end, step) == (0, shape[dim], 1):
        return merge(site, [(site.axes(base), shape), (site.axes(part), site.shape(part))])
    along = [split_axes(site.axes(value), [dim])[0] for value in (base, part)]
    if not any(along):
        sizes = _without(shape, dim), _without(site.shape(part), dim)
        return merge(site, [(site.axes(base), sizes[0]), (site.axes(part), sizes[1])])
    if "index" in site.args or step != 1 or not all(along) or any(support(a[0]) != (dim,) for a in along):
        for axis in site.axes(base) + site.axes(part):
            site.pin(axis, "writes into some of the channels")
        return ()
    across = merge(
        site,
        [(tuple(split_axes(site.axes(v), [dim])[1]), _without(site.shape(v), dim)) for v in (base, part)],
    )

    place = (slice(None),) * dim + (slice(start, end),)
    site.unify(along[0][0][place], along[1][0])  # what is written over goes with what takes its place

    def written(arrays: list[IntArray]) -> IntArray:
        whole: IntArray = arrays[0].copy()
        whole[place] = arrays[1]
        return whole

    return (*across, site.move([along[0][0], along[1][0]], written))


def patch_scatter(patch: Patch) -> None:
    base = patch.args["self"]
    dim = patch.args["dim"] % len(base.meta["val"].shape)
    if not patch.shrinks(base, dim):
        return
    size = int(base.meta["val"].shape[dim])
    start, _, _ = slice(patch.args["start"], patch.args["end"]).indices(size)
    before = int((patch.kept(base, dim) < start).sum())
    patch.set("start", before)
    patch.set("end", before + patch.size(patch.args["src"], dim))


def _without(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return tuple(1 if position == dim else size for position, size in enumerate(shape))


def parts(site: Site) -> list[Axes]:
    """`split`, `chunk`, `tensor_split`, `unbind`: the list of slices along one dimension."""
    source = site.args["self"]
    shape = site.shape(source)
    dim = site.dim(site.args["dim"], len(shape))
    results: list[Axes] = []
    start = 0
    drop = not {"split_size", "split_sizes", "chunks", "sections", "indices"} & set(site.args)
    axes = _unique_position(site, site.axes(source), dim) if drop else site.axes(source)
    for value in site.node.meta["val"]:
        size = 1 if drop else int(value.shape[dim])

        def cut(array: IntArray, part: slice = slice(start, start + size)) -> IntArray:
            piece = _cut(array, dim, part)
            return np.take(piece, 0, axis=dim) if drop else piece

        single = [cut(axis) for axis in axes if size == 1 and support(axis) == (dim,)]
        for piece in single:
            site.pin(piece, "picks single channels")
        results.append(moved(site, axes, cut))
        start += size
    return results


def patch_parts(patch: Patch) -> None:
    source = patch.args["self"]
    dim = patch.args["dim"] % len(source.meta["val"].shape)
    if not patch.shrinks(source, dim):
        return
    sizes = [int(value.shape[dim]) for value in patch.node.meta["val"]]
    ends = np.cumsum(sizes)
    counts = np.bincount(np.searchsorted(ends, patch.kept(source, dim), side="right"), minlength=len(sizes))
    patch.replace(aten.split_with_sizes.default, (source, [int(count) for count in counts], dim))


def cat(site: Site) -> Result:
    shape = site.shape()
    dim = site.dim(site.args["dim"], len(shape))
    values = [value for value in site.args["tensors"] if len(site.shape(value)) == len(shape)]
    along = [split_axes(site.axes(value), [dim])[0] for value in values]
    across = merge(
        site, [(tuple(split_axes(site.axes(value), [dim])[1]), _without(site.shape(value), dim)) for value in values]
    )
    if not any(along):
        return across
    pieces = []
    for value, found in zip(values, along, strict=True):
        if found:
            pieces.append(broadcast_dims(found[0], {dim: site.shape(value)[dim]}))
        else:
            bare = site.fresh(shape_along(dim, site.shape(value)))
            site.pin(bare, "joins channels that are fixed")
            pieces.append(bare)
    wide = {d: max(piece.shape[d] for piece in pieces) for d in range(len(shape)) if d != dim}
    joined = site.move(pieces, lambda arrays: np.concatenate([broadcast_dims(a, wide) for a in arrays], axis=dim))
    crossing = [axis for axis in across if set(support(axis)) & set(support(joined))]
    for axis in crossing:
        site.pin(axis, "joins axes that cut across each other")
    if crossing:
        site.pin(joined, "joins axes that cut across each other")
        return tuple(axis for axis in across if not any(axis is other for other in crossing))
    return (*across, joined)


def stack(site: Site) -> Result:
    """New positions along a new dimension; the operands must agree on all others."""
    shape = site.shape()
    dim = site.dim(site.args["dim"], len(shape))
    values = site.args["tensors"]
    along = [
        site.move([axis], lambda arrays: np.expand_dims(arrays[0], dim))
        for value in values
        for axis in site.axes(value)
    ]
    counts = [len(site.axes(value)) for value in values]
    ends = np.cumsum([0, *counts])
    return merge(
        site,
        [(tuple(along[ends[k] : ends[k + 1]]), _with(site.shape(value), dim, 1)) for k, value in enumerate(values)],
    )


def _with(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim:])


def pad(site: Site) -> Result:
    """Constant padding along channels makes channels that are constant; other modes mix positions."""
    source = site.args["self"]
    rank = len(site.shape(source))
    amounts = [site.size(amount) for amount in site.args["pad"]]
    padded = {
        rank - 1 - k // 2: (amounts[k], amounts[k + 1]) for k in range(0, len(amounts), 2) if any(amounts[k : k + 2])
    }
    axes = site.axes(source)
    if site.args.get("mode", "constant") != "constant" or any(low < 0 or high < 0 for low, high in padded.values()):
        return mixing(site, axes, list(padded), "pads it with values of other positions")

    def run(array: IntArray) -> IntArray:
        widths = [padded.get(dim, (0, 0)) if array.shape[dim] > 1 else (0, 0) for dim in range(rank)]
        return np.pad(array, widths, constant_values=-1)

    return moved(site, axes, run)


def patch_pad(patch: Patch) -> None:
    source = patch.args["self"]
    rank = len(source.meta["val"].shape)
    amounts = list(patch.args["pad"])
    changed = False
    for k in range(0, len(amounts), 2):
        dim = rank - 1 - k // 2
        if (amounts[k] or amounts[k + 1]) and patch.shrinks(patch.node, dim):
            kept = patch.kept(patch.node, dim)
            size = int(source.meta["val"].shape[dim])
            amounts[k : k + 2] = [int((kept < amounts[k]).sum()), int((kept >= amounts[k] + size).sum())]
            changed = True
    if changed:
        patch.set("pad", amounts)


def index_select(site: Site) -> Result:
    source, index = site.args["self"], site.args["index"]
    dim = site.dim(site.args["dim"], len(site.shape(source)))
    positions = numbers_of(index)
    for axis in site.axes(index):
        site.pin(axis, "uses it as an index")
    if positions is None:
        return mixing(site, site.axes(source), [dim], "picks channels by an index that is computed")
    axes = site.axes(source)
    if (np.diff(positions) < 0).any():
        axes = tuple(_in_every_line_alike(site, axis, dim) for axis in axes)
    return moved(site, axes, lambda array: np.take(array, positions, axis=dim) if array.shape[dim] > 1 else array)


def _in_every_line_alike(site: Site, axis: IntArray, dim: int) -> IntArray:
    """What changes the order of channels in all lines at once needs the same channels to stay in all of them."""
    others = [other for other in support(axis) if other != dim]
    if support(axis)[-1:] == (dim,) and others:
        site.tie(axis, others)
    return axis


def numbers_of(value: Any) -> IntArray | None:
    """The numbers of an integer constant of the model."""
    if getattr(value, "op", "") != "get_attr":
        return None
    if "numbers" in value.meta:
        return np.asarray(value.meta["numbers"], dtype=np.int64)
    found: Any = value.graph.owning_module
    for part in value.target.split("."):
        found = getattr(found, part)
    if found.is_meta or found.is_floating_point() or isinstance(found, torch.nn.Parameter):
        return None
    numbers: IntArray = found.detach().cpu().numpy().astype(np.int64).ravel()
    return numbers


def index(site: Site) -> Result:
    """`x[i, :, j]`: dimensions that are indexed are picked from, the others pass where the indices stand together."""
    source, indices = site.args["self"], site.args["indices"]
    rank = len(site.shape(source))
    for value in indices:
        for axis in site.axes(value):
            site.pin(axis, "uses it as an index")
    taken = [dim for dim, value in enumerate(indices) if value is not None]
    axes = mixing(site, site.axes(source), taken, "picks positions by an index")
    masks = any(value is not None and value.meta["val"].dtype in {torch.bool, torch.uint8} for value in indices)
    if masks or taken != list(range(taken[0], taken[-1] + 1)):
        for axis in axes:
            site.pin(axis, "picks positions by several indices")
        return ()
    added = len(site.shape()) - (rank - len(taken))

    def run(array: IntArray) -> IntArray:
        return array.reshape(array.shape[: taken[0]] + (1,) * added + array.shape[taken[-1] + 1 :])

    return moved(site, axes, run)


def factory(site: Site) -> Result:
    """A new tensor that takes only dtype and device from its operand."""
    return ()


def patch_index_select(patch: Patch) -> None:
    source = patch.args["self"]
    dim = patch.args["dim"] % len(source.meta["val"].shape)
    if not patch.shrinks(source, dim):
        return
    numbers = numbers_of(patch.args["index"])
    assert numbers is not None
    old = patch.kept(source, dim)
    place = np.full(int(source.meta["val"].shape[dim]), -1, dtype=np.int64)
    first = np.flatnonzero(np.r_[True, old[1:] != old[:-1]])  # a position may have copies, one behind the other
    place[old[first]] = first
    wanted = patch.kept(patch.node, dim)
    starts = np.flatnonzero(np.r_[True, wanted[1:] != wanted[:-1]])
    copy = np.arange(wanted.size) - np.repeat(starts, np.diff(np.r_[starts, wanted.size]))
    moved_to = place[numbers[wanted]] + copy
    patch.replace(aten.index_select.default, (source, dim, patch.constant(moved_to)))


def flip(site: Site) -> Result:
    dims = [site.dim(dim) for dim in site.args["dims"]]
    return moved(site, site.axes(site.args["self"]), lambda array: np.flip(array, tuple(dims)))


def roll(site: Site) -> Result:
    shifts, dims = list(site.args["shifts"]), [site.dim(dim) for dim in site.args["dims"]]
    if not dims:
        return mixing(site, site.axes(site.args["self"]), range(len(site.shape())), "rolls over all positions")

    def run(array: IntArray) -> IntArray:
        for shift, dim in zip(shifts, dims, strict=True):
            array = np.roll(array, shift, axis=dim)
        return array

    axes = site.axes(site.args["self"])
    for dim in dims:
        axes = tuple(_in_every_line_alike(site, axis, dim) for axis in axes)
    return moved(site, axes, run)


def patch_roll(patch: Patch) -> None:
    source = patch.args["self"]
    rank = len(source.meta["val"].shape)
    shifts, dims = list(patch.args["shifts"]), [dim % rank for dim in patch.args["dims"]]
    for position, dim in enumerate(dims):
        if patch.shrinks(source, dim):
            size = int(source.meta["val"].shape[dim])
            shifts[position] = int((patch.kept(source, dim) >= size - shifts[position] % size).sum())
    patch.set("shifts", shifts)


def patch_sizes(name: str) -> Any:
    """Patch a list of sizes: dimensions that shrink get their new size."""

    def patch_view(patch: Patch) -> None:
        rank = len(patch.node.meta["val"].shape)
        given = list(patch.args[name])
        if not any(patch.shrinks(patch.node, dim) for dim in range(rank)):
            return
        offset = rank - len(given)
        for dim in range(offset, rank):
            old = given[dim - offset]
            if patch.shrinks(patch.node, dim) and old != -1:
                given[dim - offset] = patch.size(patch.node, dim) if isinstance(old, int) else -1
        patch.set(name, given)

    return patch_view


def patch_unflatten(patch: Patch) -> None:
    dim = patch.args["dim"] % len(patch.args["self"].meta["val"].shape)
    sizes = list(patch.args["sizes"])
    for position in range(len(sizes)):
        if patch.shrinks(patch.node, dim + position) and sizes[position] != -1:
            sizes[position] = patch.size(patch.node, dim + position)
    patch.set("sizes", sizes)


SPECS = (
    OpSpec(
        (aten.view.default, aten.reshape.default, aten._unsafe_view.default),
        view,
        patch=lambda patch: patch_sizes("size" if "size" in patch.args else "shape")(patch),
    ),
    OpSpec((aten.flatten.using_ints,), view),
    OpSpec((aten.unflatten.int,), view, patch=patch_unflatten),
    OpSpec((aten.permute.default,), permute),
    OpSpec(
        (
            aten.transpose.int,
            aten.t.default,
            aten.mT.default,
            aten.numpy_T.default,
            aten.swapaxes.default,
            aten.swapdims.default,
        ),
        transpose,
    ),
    OpSpec((aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist), movedim),
    OpSpec((aten.unsqueeze.default,), unsqueeze),
    OpSpec((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), squeeze, patch=patch_squeeze),
    OpSpec((aten.select.int,), select),
    OpSpec((aten.slice.Tensor, aten.narrow.default), slice_, patch=patch_slice),
    OpSpec((aten.slice_scatter.default,), scatter, patch=patch_scatter),
    OpSpec((aten.select_scatter.default,), scatter),
    OpSpec(
        (
            aten.split.Tensor,
            aten.split.sizes,
            aten.split_with_sizes.default,
            aten.chunk.default,
            aten.unbind.int,
            aten.tensor_split.sections,
            aten.tensor_split.indices,
        ),
        parts,
        patch=patch_parts,
    ),
    OpSpec((aten.cat.default, aten.concat.default, aten.concatenate.default), cat),
    OpSpec((aten.stack.default,), stack),
    OpSpec((aten.pad.default, aten.constant_pad_nd.default), pad, patch=patch_pad),
    OpSpec((aten.index_select.default,), index_select, patch=patch_index_select),
    OpSpec((aten.index.Tensor,), index),
    OpSpec((aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default), factory),
    OpSpec((aten.flip.default,), flip),
    OpSpec((aten.roll.default,), roll, patch=patch_roll),
)
