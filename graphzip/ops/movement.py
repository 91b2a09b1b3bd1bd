"""Data movement: the operator itself runs on the numbered positions of each axis.

Concatenation offsets, packed projections, patch merging and channel permutations need no special case that way.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graphzip.errors import RewriteError
from graphzip.graph.meta import meta_of
from graphzip.graph.sizes import same_size
from graphzip.labels import IntArray, ranks, support
from graphzip.ops.routing import is_gate, patch_gate
from graphzip.ops.rules import broadcast_dims, meet, mixing, moved, same, shape_along, split_axes, uncut
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, OpSpec, Patch, Result

__all__ = ["SPECS"]

aten = torch.ops.aten


def permute(site: Site) -> Result:
    rank = len(site.shape())
    order = [dim % rank for dim in site.args["dims"]]
    site.carry(site.args["self"])
    return moved(site, site.axes(site.args["self"]), lambda array: array.transpose(order))


def transpose(site: Site) -> Result:
    rank = len(site.shape())
    if rank < 2:
        return same(site)
    site.carry(site.args["self"])
    given = [site.args[name] % rank for name in ("dim0", "dim1", "axis0", "axis1") if name in site.args]
    first, second = given or (rank - 2, rank - 1)
    return moved(site, site.axes(site.args["self"]), lambda array: np.swapaxes(array, first, second))


def movedim(site: Site) -> Result:
    source, destination = site.args["source"], site.args["destination"]
    return moved(site, site.axes(site.args["self"]), lambda array: np.moveaxis(array, source, destination))


def unsqueeze(site: Site) -> Result:
    dim = site.dim(site.args["dim"])
    site.carry(site.args["self"])
    return moved(site, site.axes(site.args["self"]), lambda array: np.expand_dims(array, dim))


def select(site: Site) -> Result:
    source = site.args["self"]
    site.carry(source)
    dim = site.dim(site.args["dim"], len(site.shape(source)))
    index = site.size(site.args["index"])

    def pick(array: IntArray) -> IntArray:
        picked: IntArray = np.take(array, index if array.shape[dim] > 1 else 0, axis=dim)
        return picked

    return moved(site, _unique_position(site, _bounded(site, site.axes(source), dim, ("index",)), dim), pick)


def _unique_position(site: Site, axes: Axes, dim: int) -> Axes:
    """Taking one position along an axis of its own would let the choice depend on what is merged."""
    alone = [axis for axis in axes if support(axis) == (dim,)]
    for axis in alone:
        if site.node.target in {aten.select.int, aten.slice.Tensor} and is_gate(site.node):
            site.pick(axis, 1)
        else:
            site.pin(axis, "picks single channels")
    return tuple(axis for axis in axes if not any(axis is other for other in alone))


def slice_(site: Site) -> Result:
    source = site.args["self"]
    site.carry(source)
    shape = site.shape(source)
    dim = site.dim(site.args["dim"], len(shape))
    if same_size(source.meta["val"].shape[dim], site.node.meta["val"].shape[dim]) and site.args.get("step", 1) == 1:
        return site.axes(source)
    axes = _bounded(site, site.axes(source), dim, ("start", "end", "length", "step"))
    start, end, step = _slice_bounds(site, shape[dim])
    if len(range(start, end, step)) == 1:
        axes = _unique_position(site, axes, dim)
    return moved(site, axes, lambda array: _cut(array, dim, slice(start, end, step)))


def _bounded(site: Site, axes: Axes, dim: int, names: Sequence[str]) -> Axes:
    """Axes that may be cut along `dim`: neither its size nor one of these arguments is for the inputs to decide."""
    given = [site.args.get(name) for name in names]
    values = [value for each in given for value in (each if isinstance(each, list | tuple) else [each])]
    if any(site.is_open(value) for value in values):
        return mixing(site, axes, [dim], "cuts at a place that the inputs decide")
    return uncut(site, axes, [dim])


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
    if same_size(source.meta["val"].shape[dim], patch.node.meta["val"].shape[dim]) and patch.args.get("step", 1) == 1:
        patch.replace(aten.slice.Tensor, (source, dim, 0, sys.maxsize))
        return
    if same_size(patch.node.meta["val"].shape[dim], 1) and is_gate(patch.node):
        patch_gate(patch)
        return
    size = patch.before(source, dim)
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
    base = site.args["self"]
    shape, extent = site.shape(base), site.extent(base)
    dim = site.dim(site.args["dim"], len(shape))
    part, size = _part(site, dim)
    whole = "index" not in site.args and same_size(base.meta["val"].shape[dim], site.args["src"].meta["val"].shape[dim])
    if whole:
        return meet(site, [(site.axes(base), extent), (part, size)])
    along = [split_axes(axes, [dim])[0] for axes in (site.axes(base), part)]
    if not any(along):
        return meet(site, [(site.axes(base), _without(extent, dim)), (part, _without(size, dim))])
    if not _writes_channels(site, base, dim) or not all(along) or any(support(found[0]) != (dim,) for found in along):
        rest = [mixing(site, axes, [dim], "writes into some of the channels") for axes in (site.axes(base), part)]
        return meet(site, [(rest[0], _without(extent, dim)), (rest[1], _without(size, dim))])
    start, end, _ = _slice_bounds(site, shape[dim])
    across = meet(
        site,
        [
            (tuple(split_axes(axes, [dim])[1]), _without(sizes, dim))
            for axes, sizes in ((site.axes(base), extent), (part, size))
        ],
    )

    place = (slice(None),) * dim + (slice(start, end),)
    site.unify(along[0][0][place], along[1][0])  # what is written over goes with what takes its place

    def written(arrays: list[IntArray]) -> IntArray:
        whole: IntArray = arrays[0].copy()
        whole[place] = arrays[1]
        return whole

    return (*across, site.move([along[0][0], along[1][0]], written))


def _part(site: Site, dim: int) -> tuple[Axes, tuple[int, ...]]:
    """Axes and sizes of what is written, with the dimension that a `select` takes away."""
    part = site.args["src"]
    axes, size = site.axes(part), site.extent(part)
    if "index" not in site.args:
        return axes, size
    return moved(site, axes, lambda array: np.expand_dims(array, dim)), _with(size, dim, 1)


def _writes_channels(site: Site, base: Any, dim: int) -> bool:
    """Whether a run of positions is written, at a place that does not depend on the inputs."""
    given = [site.args.get(name) for name in ("start", "end", "step")]
    return (
        "index" not in site.args and given[2] == 1 and dim not in site.open(base) and not any(map(site.is_open, given))
    )


def patch_scatter(patch: Patch) -> None:
    base = patch.args["self"]
    dim = patch.args["dim"] % len(base.meta["val"].shape)
    if not patch.shrinks(base, dim):
        return
    if same_size(base.meta["val"].shape[dim], patch.args["src"].meta["val"].shape[dim]):
        patch.set("start", 0)
        patch.set("end", sys.maxsize)
        return
    start, _, _ = slice(patch.args["start"], patch.args["end"]).indices(patch.before(base, dim))
    before = int((patch.kept(base, dim) < start).sum())
    patch.set("start", before)
    patch.set("end", before + patch.size(patch.args["src"], dim))


def _diagonal(site: Site) -> tuple[int, int]:
    rank = len(site.shape(site.args["self"]))
    return site.args["dim1"] % rank, site.args["dim2"] % rank


def diagonal(site: Site) -> Result:
    """The diagonal of two dimensions, as the last one."""
    dims = _diagonal(site)
    axes = mixing(site, site.axes(site.args["self"]), dims, "takes a diagonal")
    return moved(site, axes, lambda array: np.expand_dims(np.squeeze(array, axis=dims), -1))


def diagonal_scatter(site: Site) -> Result:
    """The diagonal of two dimensions is replaced by the second operand, which has it as its last."""
    base, part, dims = site.args["self"], site.args["src"], _diagonal(site)
    axes = mixing(site, site.axes(base), dims, "writes into a diagonal")
    written = mixing(site, site.axes(part), [len(site.shape(part)) - 1], "is written into a diagonal")
    spread = moved(site, written, lambda array: np.expand_dims(np.squeeze(array, axis=-1), sorted(dims)))
    sizes = tuple(1 if dim in dims else size for dim, size in enumerate(site.extent(base)))
    return meet(site, [(axes, sizes), (spread, sizes)])


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
    names = ("split_size", "split_sizes", "sections", "indices")
    axes = _bounded(site, site.axes(source), dim, names)
    axes = _unique_position(site, axes, dim) if drop else axes
    for value in site.node.meta["val"]:
        size = 1 if drop else site.size(value.shape[dim])

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
    across = meet(
        site, [(tuple(split_axes(site.axes(value), [dim])[1]), _without(site.extent(value), dim)) for value in values]
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
    return meet(
        site,
        [(tuple(along[ends[k] : ends[k + 1]]), _with(site.extent(value), dim, 1)) for k, value in enumerate(values)],
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
    computed = [rank - 1 - k // 2 for k, amount in enumerate(site.args["pad"]) if site.is_open(amount)]
    axes = mixing(site, site.axes(source), computed, "pads it by as much as the inputs decide")
    axes = uncut(site, axes, list(padded))
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
            size = patch.before(source, dim)
            amounts[k : k + 2] = [int((kept < amounts[k]).sum()), int((kept >= amounts[k] + size).sum())]
            changed = True
    if changed:
        patch.set("pad", amounts)


def index_select(site: Site) -> Result:
    source, index = site.args["self"], site.args["index"]
    dim = site.dim(site.args["dim"], len(site.shape(source)))
    if meta_of(index).get("choice"):
        return _chosen(site, source, index, dim)
    positions = numbers_of(index)
    for axis in site.axes(index):
        site.pin(axis, "uses it as an index")
    if positions is None:
        return mixing(site, site.axes(source), [dim], "picks channels by an index that is computed")
    axes = uncut(site, site.axes(source), [dim])
    if np.unique(positions).size == 1:  # however often: what comes out has no channels along it
        for axis in axes:
            if support(axis) == (dim,):
                site.pin(np.take(axis, positions[:1], axis=dim), "picks single channels")
    if (np.diff(positions) < 0).any():
        axes = tuple(_in_every_line_alike(site, axis, dim) for axis in axes)
    return moved(site, axes, lambda array: np.take(array, positions, axis=dim) if array.shape[dim] > 1 else array)


def _chosen(site: Site, source: Any, index: Any, dim: int) -> Axes:
    """A table that several read stays whole, and what each of them takes from it are channels of its own."""
    axes = mixing(site, site.axes(source), [dim], "reads a table that others read, too,")
    shape = [-1 if place == dim else 1 for place in range(len(site.shape()))]
    return (*axes, *(axis.reshape(shape) for axis in site.axes(index)))


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
    if "numbers" in meta_of(value):
        return np.asarray(meta_of(value)["numbers"], dtype=np.int64)
    found: Any = value.graph.owning_module
    for part in value.target.split("."):
        found = getattr(found, part)
    if found.is_meta or found.is_floating_point() or isinstance(found, torch.nn.Parameter):
        return None
    numbers: IntArray = found.detach().cpu().numpy().astype(np.int64).ravel()
    return numbers


def patch_index_select(patch: Patch) -> None:
    source = patch.args["self"]
    dim = patch.args["dim"] % len(source.meta["val"].shape)
    if not patch.shrinks(source, dim):
        return
    numbers = numbers_of(patch.args["index"])
    assert numbers is not None
    old, wanted = patch.kept(source, dim), patch.kept(patch.node, dim)
    order = np.argsort(old, kind="stable")
    copy = ranks(wanted)  # a position may have copies, not always one right behind the other
    found = np.searchsorted(old[order], numbers[wanted]) + (0 if copy is None else copy)
    if found.size and (found.max() >= old.size or (old[order][found] != numbers[wanted]).any()):
        raise RewriteError("it picks positions that are gone; nothing was changed")
    patch.replace(aten.index_select.default, (source, dim, patch.constant(order[found])))


def flip(site: Site) -> Result:
    dims = [site.dim(dim) for dim in site.args["dims"]]
    return moved(site, site.axes(site.args["self"]), lambda array: np.flip(array, tuple(dims)))


def roll(site: Site) -> Result:
    source = site.args["self"]
    shifts, dims = list(site.args["shifts"]), [site.dim(dim) for dim in site.args["dims"]]
    if not dims:
        return mixing(site, site.axes(source), range(len(site.shape())), "rolls over all positions")
    computed = [dim for dim, shift in zip(dims, shifts, strict=True) if site.is_open(shift)]
    axes = mixing(site, site.axes(source), computed, "rolls by as much as the inputs decide")
    axes = uncut(site, axes, dims)

    def run(array: IntArray) -> IntArray:
        for shift, dim in zip(shifts, dims, strict=True):
            array = np.roll(array, site.size(shift), axis=dim)
        return array

    for dim in dims:
        axes = tuple(_in_every_line_alike(site, axis, dim) for axis in axes)
    return moved(site, axes, run)


def patch_roll(patch: Patch) -> None:
    source = patch.args["self"]
    rank = len(source.meta["val"].shape)
    shifts, dims = list(patch.args["shifts"]), [dim % rank for dim in patch.args["dims"]]
    for position, dim in enumerate(dims):
        if patch.shrinks(source, dim):
            size = patch.before(source, dim)
            shifts[position] = int((patch.kept(source, dim) >= size - shifts[position] % size).sum())
    patch.set("shifts", shifts)


SPECS = (
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
    OpSpec((aten.select.int,), select, patch=patch_gate),
    OpSpec((aten.slice.Tensor, aten.narrow.default), slice_, patch=patch_slice),
    OpSpec((aten.slice_scatter.default,), scatter, patch=patch_scatter),
    OpSpec((aten.select_scatter.default,), scatter),
    OpSpec((aten.diagonal.default,), diagonal),
    OpSpec((aten.diagonal_scatter.default,), diagonal_scatter),
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
    OpSpec((aten.flip.default,), flip),
    OpSpec((aten.roll.default,), roll, patch=patch_roll),
)
