"""Picking and writing positions by tensors of indices and masks, and what only the values of tensors decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphzip.labels import IntArray, support
from graphzip.ops.rules import align, at_numbers, meet, mixing, moved
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, OpSpec, Patch, Result

__all__ = ["INDEX", "SPECS"]

aten = torch.ops.aten

_MASKS = {torch.bool, torch.uint8}


def _is_mask(value: fx.Node) -> bool:
    return value.meta["val"].dtype in _MASKS


class _Picked:
    """`x[i, :, mask]`: which dimensions of `x` are indexed, and where they are in the result.

    A mask takes as many dimensions as it has. All that is indexed becomes `added` dimensions of the result: in its
    place where the indices stand together, else in front.
    """

    def __init__(self, site: Site, source: Any, indices: Sequence[Any]) -> None:
        self.rank = len(site.shape(source))
        self.taken: list[int] = []
        ranks, runs, dim, inside = [0], 0, 0, False
        for value in indices:
            if value is not None:
                runs += not inside
                ranks.append(1 if _is_mask(value) else len(site.shape(value)))
            inside = value is not None
            width = len(site.shape(value)) if value is not None and _is_mask(value) else 1
            self.taken += range(dim, dim + width) if inside else ()
            dim += width
        self.added = max(ranks)
        self.front = self.taken[0] if self.taken and runs == 1 else 0
        self.known = bool(self.taken) and not any(
            value is not None and _is_mask(value) and not site.shape(value) for value in indices
        )

    @property
    def places(self) -> range:
        """The dimensions of the result that came for those taken."""
        return range(self.front, self.front + self.added)

    def result(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape behind the index of one that is 1 along all dimensions taken."""
        kept = [size for dim, size in enumerate(shape) if dim not in self.taken]
        return (*kept[: self.front], *(1,) * self.added, *kept[self.front :])

    def source(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The way back."""
        kept = iter([size for dim, size in enumerate(shape) if dim not in self.places])
        return tuple(1 if dim in self.taken else next(kept) for dim in range(self.rank))


def _pin_indices(site: Site, indices: Sequence[Any]) -> None:
    for value in indices:
        for axis in site.axes(value):
            site.pin(axis, "uses it as an index")


def _pinned(site: Site, axes: Axes, why: str) -> Axes:
    for axis in axes:
        site.pin(axis, why)
    return ()


def index(site: Site) -> Result:
    """Dimensions that are indexed are picked from, the others pass."""
    source, indices = site.args["self"], site.args["indices"]
    site.carry(source)
    given = [value for value in indices if value is not None]
    numbered = site.labels_numbered(given[0]) if len(given) == 1 else None
    _pin_indices(site, indices)
    picked = _Picked(site, source, indices)
    if not picked.known:
        return _pinned(site, site.axes(source), "picks positions by no dimension")
    if numbered is not None:
        axes = at_numbers(site, source, picked.taken[0], numbered)
    else:
        axes = mixing(site, site.axes(source), picked.taken, "picks positions by an index")
    return moved(site, axes, lambda array: array.reshape(picked.result(array.shape)))


def index_put(site: Site) -> Result:
    """`x[i, :, mask] = values`: along what is not indexed each channel is written from the same channel."""
    source, indices, values = site.args["self"], site.args["indices"], site.args["values"]
    if _is_where(site, indices, values):
        return _where(site, source, indices[0])
    _pin_indices(site, indices)
    picked = _Picked(site, source, indices)
    if not picked.known:
        return _pinned(site, site.axes(source) + site.axes(values), "writes positions by no dimension")
    shape = picked.result([1 if dim in picked.taken else size for dim, size in enumerate(site.shape(source))])
    base = mixing(site, site.axes(source), picked.taken, "is written at some positions")
    given = align_shape(site.shape(values), len(shape))
    written = mixing(
        site,
        tuple(align(axis, len(shape)) for axis in site.axes(values)),
        picked.places,
        "is written to some positions",
    )
    met = meet(
        site,
        [
            (moved(site, base, lambda array: array.reshape(picked.result(array.shape))), shape),
            (written, tuple(1 if dim in picked.places else size for dim, size in enumerate(given))),
        ],
    )
    return moved(site, met, lambda array: array.reshape(picked.source(array.shape)))


def align_shape(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Broadcasting adds leading dimensions."""
    return (1,) * (rank - len(shape)) + tuple(shape)


def _is_where(site: Site, indices: Sequence[Any], values: Any) -> bool:
    """`x[mask] = number`, with one mask over the first dimensions."""
    alone = len(indices) == 1 and indices[0] is not None and _is_mask(indices[0])
    return alone and bool(site.shape(indices[0])) and math.prod(site.shape(values)) == 1


def _where(site: Site, source: Any, mask: Any) -> Result:
    shape, given = site.shape(source), site.shape(mask)
    behind = (1,) * (len(shape) - len(given))
    axes = tuple(axis.reshape(axis.shape + behind) for axis in site.axes(mask))
    return meet(site, [(site.axes(source), shape), (axes, given + behind)])


def write_rows(site: Site) -> Result:
    """`index_add`, `index_copy`, `index_fill`: whole slices along `dim` are written by their number."""
    source, rows, dim = site.args["self"], site.args.get("source"), site.dim(site.args["dim"])
    _pin_indices(site, [site.args["index"]])
    operands = []
    for value in (source, rows):
        if isinstance(value, fx.Node):
            shape = align_shape(site.shape(value), len(site.shape()))
            axes = mixing(site, site.axes(value), [dim], "writes positions by an index")
            operands.append((axes, tuple(1 if place == dim else size for place, size in enumerate(shape))))
    return meet(site, operands)


def scatter(site: Site) -> Result:
    """`out[index[i, j], j] = src[i, j]`: passes where the same index is used for all channels."""
    dim = site.dim(site.args["dim"])
    numbered = site.labels_numbered(site.args["index"])
    if numbered is not None:
        return _scatter_at(site, dim, numbered)
    operands = []
    for name in ("self", "index", "src"):
        value = site.args.get(name)
        if isinstance(value, fx.Node):
            why = "is used as an index" if name == "index" else "writes channels by an index that is computed"
            sizes = tuple(1 if place == dim else size for place, size in enumerate(site.shape(value)))
            operands.append((mixing(site, site.axes(value), [dim], why), sizes))
    if any(sizes != operands[0][1] for _, sizes in operands):
        return _pinned(site, tuple(axis for axes, _ in operands for axis in axes), "writes some of the positions")
    return meet(site, operands)


def _scatter_at(site: Site, dim: int, numbered: IntArray) -> Result:
    """What is written at numbers of channels: weights of those that were chosen, among zeros."""
    base, index, source = site.args["self"], site.args["index"], site.args.get("src")
    along = [axis for axis in site.axes(base) if support(axis) == (dim,) and axis.size == numbered.size]
    rest = tuple(axis for axis in site.axes(base) if not any(axis is other for other in along))
    written = site.axes(source) if isinstance(source, fx.Node) else ()
    _pinned(site, (*rest, *written, *site.axes(index)), "is written at places that are computed")
    if not along:
        site.pin(numbered, "writes positions that are fixed")
        return ()
    site.unify(along[0].ravel(), numbered)
    return (along[0],)


def masked_scatter(site: Site) -> Result:
    """Values are taken in a row: whole rows of channels, where the mask is the same for all channels of a row."""
    source, mask, values = site.args["self"], site.args["mask"], site.args["source"]
    axes, written = site.axes(source), site.axes(values)
    last = len(site.shape()) - 1
    rows = _is_spread(mask) and site.shape(values)[-1:] == site.shape()[-1:] and len(site.shape(source)) == last + 1
    inner = all(support(axis) == (last,) for axis in axes)
    if not rows or not inner or not all(support(axis) == (len(site.shape(values)) - 1,) for axis in written):
        return _pinned(site, axes + written + site.axes(mask), "takes values in a row that channels are part of")
    behind = tuple(axis.reshape((1,) * last + (-1,)) for axis in written)
    size = (1,) * last + site.shape()[-1:]
    for axis in site.axes(mask):
        if support(axis) != (last,):
            site.pin(axis, "decides which values are taken")
    spread = tuple(axis for axis in site.axes(mask) if support(axis) == (last,))
    return meet(site, [(axes, size), (behind, size), (spread, size if spread else (1,) * (last + 1))])


def _is_spread(mask: Any) -> bool:
    """Whether a mask is one column spread over the last dimension."""
    while isinstance(mask, fx.Node) and mask.target in {aten.to.device, aten.to.dtype, aten.contiguous.default}:
        mask = mask.args[0]
    if not isinstance(mask, fx.Node):
        return False
    column = mask.args[0] if mask.target in {aten.expand.default, aten.expand_as.default} else mask
    assert isinstance(column, fx.Node)
    shape = column.meta["val"].shape
    return len(shape) == len(mask.meta["val"].shape) and isinstance(shape[-1], int) and shape[-1] == 1


def by_values(site: Site) -> Result:
    """`nonzero`, `masked_select`, `unique` ...: the values of channels decide what comes out, and how much."""
    for operand in site.tensors():
        _pinned(site, site.axes(operand), "depends on the values that the channels have")
    return [() for _ in site.node.meta["val"]] if isinstance(site.node.meta.get("val"), list | tuple) else ()


def repeat_rows(site: Site) -> Result:
    """Every position along `dim` as often as a tensor says."""
    source, dim = site.args["self"], site.args["dim"]
    _pin_indices(site, [site.args["repeats"]])
    dims: Sequence[int] = range(len(site.shape(source))) if dim is None else [site.dim(dim, len(site.shape(source)))]
    axes = mixing(site, site.axes(source), dims, "repeats positions unevenly")
    return axes if dim is not None else ()


def buckets(site: Site) -> Result:
    """The number of the interval that each value is in."""
    for axis in site.axes(site.args["boundaries"]):
        site.pin(axis, "is a boundary")
    return site.axes(site.args["self"])


def one_hot(site: Site) -> Result:
    """Every number becomes a row of zeros with a one, in the place of the channel that it is the number of."""
    source, count = site.args["self"], site.shape()[-1]
    axes = moved(site, site.axes(source), lambda array: array[..., None])
    numbered = site.labels_numbered(source)
    if numbered is None:
        return axes
    if numbered.size != count or axes:
        site.pin(numbered, "has another number of places")
        return axes
    return (numbered.reshape((1,) * (len(site.shape()) - 1) + (-1,)),)


def patch_one_hot(patch: Patch) -> None:
    last = len(patch.node.meta["val"].shape) - 1
    if patch.shrinks(patch.node, last):
        patch.set("num_classes", patch.size(patch.node, last))


def histogram(site: Site) -> Result:
    """How often each number occurs; where these are numbers of channels, a count for every channel."""
    source, args = site.args["self"], site.args
    count = site.shape()[0]
    numbered = site.labels_numbered(source)
    if numbered is None or site.axes(source):
        return by_values(site)
    if (numbered.size, 0, count - 1) != (count, args["min"], args["max"]):
        site.pin(numbered, "counts other numbers")
        return ()
    return (numbered,)


def patch_histogram(patch: Patch) -> None:
    if patch.shrinks(patch.node, 0):
        patch.set("bins", patch.size(patch.node, 0))
        patch.set("max", patch.size(patch.node, 0) - 1)


def _overloads(*names: str) -> tuple[Any, ...]:
    """Those of the named overloads that this version of torch has."""
    found = []
    for name in names:
        packet, _, kind = name.partition(".")
        found.append(getattr(getattr(aten, packet, None), kind or "default", None))
    return tuple(target for target in found if target is not None)


INDEX = OpSpec((aten.index.Tensor,), index)

SPECS = (
    INDEX,
    OpSpec((aten.index_put.default,), index_put),
    OpSpec(
        _overloads("index_add", "index_copy", "index_fill.int_Scalar", "index_fill.int_Tensor", "index_reduce"),
        write_rows,
    ),
    OpSpec(
        _overloads(
            *("scatter.src", "scatter.value", "scatter.reduce", "scatter.value_reduce"),
            *("scatter_add", "scatter_reduce.two"),
        ),
        scatter,
    ),
    OpSpec((aten.masked_scatter.default,), masked_scatter),
    OpSpec((aten.repeat_interleave.self_Tensor,), repeat_rows),
    OpSpec(_overloads("bucketize.Tensor"), buckets),
    OpSpec(_overloads("one_hot"), one_hot, patch=patch_one_hot),
    OpSpec(_overloads("histc"), histogram, patch=patch_histogram),
    OpSpec(
        _overloads(
            *("nonzero", "nonzero_static", "masked_select", "take"),
            *("_unique2", "unique_dim", "unique_consecutive", "bincount"),
            *("repeat_interleave.Tensor", "count_nonzero", "searchsorted.Tensor"),
        ),
        by_values,
    ),
)
