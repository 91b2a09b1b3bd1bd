"""Operators that treat channels alike and mix other positions: pooling, resampling, reductions, softmax."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from graphzip.errors import RewriteError
from graphzip.graph.sizes import same_size
from graphzip.labels import IntArray, support
from graphzip.ops.norm import weighted_moments
from graphzip.ops.rules import after_sum, alike, at_numbers, meet, mixing, moved
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, OpSpec, Patch, Result

__all__ = ["SPECS"]

aten = torch.ops.aten


def window(spatial: int) -> Callable[[Site], Result]:
    """Pooling and resampling over the last `spatial` dimensions."""

    def rule(site: Site) -> Result:
        source = site.tensors()[0]
        rank = len(site.shape(source))
        dims = [rank - spatial + place for place in range(spatial) if not _one_wide(site, place)]
        return _each(site, mixing(site, site.axes(source), dims, "mixes positions"))

    return rule


def _one_wide(site: Site, place: int) -> bool:
    """Whether a window is a single position along a dimension, every one of which is given on in its turn."""
    if "kernel_size" not in site.args or isinstance(site.node.meta["val"], tuple | list):
        return False  # places of the largest are counted through all dimensions

    def at(name: str, otherwise: int) -> Any:
        given = site.args.get(name)
        listed = list(given) if isinstance(given, list | tuple) else [otherwise if given is None else given]
        return listed[place % len(listed)] if listed else otherwise

    return (at("kernel_size", 0), at("stride", 1), at("padding", 0), at("dilation", 1)) == (1, 1, 0, 1)


def _each(site: Site, axes: Axes) -> Result:
    """The same axes for every output of an operator with several."""
    value = site.node.meta["val"]
    return [axes for _ in value] if isinstance(value, tuple | list) else axes


def _reduced(args: Any, rank: int) -> list[int]:
    given = args.get("dim")
    listed = [given] if isinstance(given, int) else list(given or range(rank))
    return sorted(int(dim) % max(rank, 1) for dim in listed)


def reduction(site: Site) -> Result:
    """`sum`, `mean`, `amax` ... over `dim` (over everything where none is given): all positions count alike."""
    source = site.tensors()[0]
    dims = _reduced(site.args, len(site.shape(source)))
    return _each(site, _without(site, after_sum(site, site.axes(source), dims, site.open(source)), dims))


def choice(site: Site) -> Result:
    """`prod`, `median`: the answer depends on where channels stand or how many there are."""
    source = site.tensors()[0]
    dims = _reduced(site.args, len(site.shape(source)))
    axes = mixing(site, site.axes(source), dims, "tells positions or counts of channels apart")
    return _each(site, _without(site, axes, dims))


def place(site: Site) -> Result:
    """`argmax`, `argmin`: the place of one channel, of those that are told apart by nothing but their values."""
    return _placed(site, 0)


def extreme(site: Site) -> Result:
    """`max` and `min` with indices: where nobody reads these, all positions count alike."""
    indices_read = any(user.args[1] != 0 and user.users for user in site.node.users)
    return _placed(site, 1) if indices_read else reduction(site)


def _placed(site: Site, output: int) -> Result:
    """The numbers in an output are places along `dim`; what is read by them may lose channels together with them."""
    source = site.tensors()[0]
    dims = [] if site.args.get("dim") is None else _reduced(site.args, len(site.shape(source)))
    picked = [axis for axis in site.axes(source) if support(axis) == tuple(dims)]
    if not picked:
        return choice(site)
    site.pick(picked[0], 1)
    site.numbers[output] = picked[0].ravel()
    others = mixing(site, tuple(axis for axis in site.axes(source) if axis is not picked[0]), dims, "picks positions")
    return _each(site, _without(site, others, dims))


def _without(site: Site, axes: Axes, dims: list[int]) -> Axes:
    if site.args.get("keepdim", False):
        return axes

    def squeeze(array: IntArray) -> IntArray:
        return np.squeeze(array, axis=tuple(dims))

    return moved(site, axes, squeeze)


def patch_sum(patch: Patch) -> None:
    _scale(patch, lambda counts: counts)


def patch_mean(patch: Patch) -> None:
    """The mean of what is left, each value weighted by how much it stands for: `n' / n sum_c m_c x_c / n'`."""
    source = patch.args["self"]
    lost = patch.lost(source, _reduced(patch.args, len(source.meta["val"].shape)))
    if lost:
        patch.then(aten.mul.Tensor, 1.0 - lost)
        return
    fraction = float(patch.fraction(source, _reduced(patch.args, len(source.meta["val"].shape))))
    _scale(patch, lambda counts: counts * fraction)


def _order(args: Any) -> float:
    order = args.get("ord", args.get("p"))
    return 2.0 if order is None else float(order)


def norm(site: Site) -> Result:
    """`(sum_c |x_c|^p)^(1/p)`; the norm of order 0 counts channels."""
    return reduction(site) if _order(site.args) else choice(site)


def patch_norm(patch: Patch) -> None:
    order = _order(patch.args)
    if math.isfinite(order) and order:
        _scale(patch, lambda counts: counts ** (1 / order))


def _scale(patch: Patch, weight: Callable[[Any], Any]) -> None:
    source = patch.args["self"]
    counts = patch.multiplicity(source, _reduced(patch.args, len(source.meta["val"].shape)))
    if counts is not None and not np.allclose(weight(counts), 1.0, rtol=0, atol=1e-15):
        kind = source if source.meta["val"].is_floating_point() else patch.node  # truth values and integers are counted
        weights = patch.values(weight(counts), source, kind)
        patch.set_node("self", patch.call(aten.mul.Tensor, patch.operand("self"), weights))


def patch_logsumexp(patch: Patch) -> None:
    source = patch.args["self"]
    counts = patch.multiplicity(source, _reduced(patch.args, len(source.meta["val"].shape)))
    if counts is not None:
        shifted = patch.call(aten.add.Tensor, patch.operand("self"), patch.values(np.log(counts), source))
        patch.set_node("self", shifted)


def variance(site: Site) -> Result:
    """`sum_c |x_c - mean|^2 / (n - correction)`; no mean of complex numbers is taken over a size that is open."""
    source = site.args["self"]
    held = site.open(source) & set(_reduced(site.args, len(site.shape(source))))
    return choice(site) if held and source.meta["val"].is_complex() else reduction(site)


def patch_variance(patch: Patch) -> None:
    """Values that all stand for equally many, `r`, have the variance `sum (x - mean)^2 / (n' - correction / r)`."""
    source = patch.args["self"]
    dims = _reduced(patch.args, len(source.meta["val"].shape))
    counts = patch.multiplicity(source, dims)
    if counts is None and not any(patch.shrinks(source, dim) for dim in dims):
        return
    correction = patch.args.get("correction", 1 if patch.args.get("unbiased", True) else 0)
    correction = 1 if correction is None else correction
    fraction, keepdim = patch.fraction(source, dims), bool(patch.args.get("keepdim", False))
    is_std, lost = "std" in str(patch.node.target), patch.lost(source, dims)
    if not lost and (counts is None or np.ptp(counts) == 0):
        target = aten.std.correction if is_std else aten.var.correction
        scaled = float(correction * fraction)
        patch.become(patch.call(target, patch.operand("self"), dims, correction=scaled, keepdim=keepdim))
        return
    weights: Any = 1.0 - lost if counts is None else patch.values(counts * float(fraction), source, patch.node)
    is_complex = source.meta["val"].is_complex()
    _, variance = weighted_moments(patch, patch.operand("self"), weights, dims, is_complex=is_complex, missing=lost)
    variance = _corrected(patch, variance, patch.count(source, dims), correction)
    if is_std:
        variance = patch.call(aten.sqrt.default, variance)
    for dim in () if keepdim else reversed(dims):
        variance = patch.call(aten.squeeze.dim, variance, dim)
    patch.become(variance)


def _corrected(patch: Patch, variance: fx.Node, count: Any, correction: float) -> fx.Node:
    """`n / (n - correction)` times a variance; as in torch, nothing is left of a divisor below zero."""
    if not correction:
        return variance
    if isinstance(count, int):
        left: Any = max(0, count - correction)
    else:
        left = patch.call(operator.sub, count, correction)
        if correction > 1:
            left = patch.call(torch.sym_max, left, 0)
    return patch.call(aten.div.Tensor, patch.call(aten.mul.Tensor, variance, count), left)


def softmax(site: Site) -> Result:
    """`exp(x_c) / sum_k exp(x_k)`: channels along `dim` are treated alike."""
    source = site.tensors()[0]
    rank = len(site.shape(source))
    return alike(site, site.axes(source), [int(site.args["dim"]) % max(rank, 1)], site.open(source))


def patch_softmax(patch: Patch) -> None:
    """`softmax(x + log m) / m` is what each of `m` equal channels had."""
    source = patch.args["self"]
    counts = patch.multiplicity(source, [int(patch.args["dim"]) % max(len(source.meta["val"].shape), 1)])
    if counts is None:
        return
    shift = patch.values(np.log(counts), source)
    patch.set_node("self", patch.call(aten.add.Tensor, patch.operand("self"), shift))
    if "log" in str(patch.node.target):
        patch.then(aten.sub.Tensor, shift)
    else:
        patch.then(aten.div.Tensor, patch.values(counts, source))


def along_dim(site: Site) -> Result:
    """`cumsum`, `sort`, `topk` ...: positions along `dim` are treated unevenly."""
    source = site.tensors()[0]
    rank = len(site.shape(source))
    dim = int(site.args.get("dim", -1)) % max(rank, 1)
    return _each(site, mixing(site, site.axes(source), [dim], "depends on the order of the channels"))


def largest(site: Site) -> Result:
    """`topk` of channels that are told apart by nothing but their values, such as experts of a router.

    Where their places are read, all that is read by them may lose channels together with them.
    """
    source, count = site.args["self"], site.args["k"]
    dim = int(site.args["dim"]) % max(len(site.shape(source)), 1)
    picked = [axis for axis in site.axes(source) if support(axis) == (dim,)]
    places = [user for user in site.node.users if user.args[1] == 1 and user.users]
    if not picked or not places or site.is_open(count):
        return along_dim(site)
    site.pick(picked[0], site.size(count))
    site.numbers[1] = picked[0].ravel()
    others = tuple(axis for axis in site.axes(source) if axis is not picked[0])
    return [others, others]


def patch_largest(patch: Patch) -> None:
    source, count = patch.args["self"], patch.args["k"]
    dim = int(patch.args["dim"]) % max(len(source.meta["val"].shape), 1)
    if patch.shrinks(source, dim) and patch.size(source, dim) < count:
        raise RewriteError(f"{count} are picked of {patch.size(source, dim)}; keep at least {count}")


def sort(site: Site) -> Result:
    """Numbers of channels keep their order where channels go."""
    site.carry(site.args["self"])
    return along_dim(site)


def running_sum(site: Site) -> Result:
    """Along counts of numbers of channels: what goes was never counted."""
    return site.axes(site.args["self"]) if is_count(site.args["self"]) else along_dim(site)


def is_count(value: Any) -> bool:
    """Whether a tensor says how often each number occurs."""
    while isinstance(value, fx.Node) and value.target in {aten.to.dtype, aten._to_copy.default}:
        value = value.args[0]
    return isinstance(value, fx.Node) and value.target is aten.histc.default


def gather(site: Site) -> Result:
    """`out[i, j] = x[index[i, j], j]`: passes where the same index is used for all channels."""
    source, index = site.args["self"], site.args["index"]
    dim = int(site.args["dim"]) % max(len(site.shape()), 1)
    fits = all(
        same_size(one, other) or place == dim
        for place, (one, other) in enumerate(zip(source.meta["val"].shape, index.meta["val"].shape, strict=True))
    )
    if fits and (numbered := site.labels_numbered(index)) is not None:
        return at_numbers(site, source, dim, numbered, site.axes(index))
    axes = mixing(site, site.axes(source), [dim], "picks channels by an index that is computed")
    kept = mixing(site, site.axes(index), [dim], "is used as an index")
    if not fits:
        for axis in axes + kept:
            site.pin(axis, "picks some of the positions")
        return ()
    sizes = tuple(1 if place == dim else size for place, size in enumerate(site.extent(source)))
    return meet(site, [(axes, sizes), (kept, sizes)])


def sampling_at_points(site: Site) -> Result:
    """`input (B, C, *S)` at the points `grid (B, *T, d)`, `-> (B, C, *T)`: every channel at the same points."""
    source, grid = site.args["input"], site.args["grid"]
    places = len(site.shape(source)) - 2
    axes = mixing(site, site.axes(source), range(2, places + 2), "reads positions at points that are computed")
    for axis in site.axes(grid):
        site.pin(axis, "tells where to read")
    return axes


_POOLS = {
    1: "max_pool1d max_pool1d_with_indices avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d",
    2: "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d",
    3: "max_pool3d max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d",
}
_RESAMPLINGS = {
    1: "upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d",
    2: "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa",
    3: "upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d",
}


def _window_targets(dims: int) -> tuple[Any, ...]:
    pools = [getattr(aten, name).default for name in _POOLS[dims].split()]
    resamplings = [getattr(aten, name) for name in _RESAMPLINGS[dims].split()]
    return tuple(pools) + tuple(getattr(packet, kind) for packet in resamplings for kind in ("vec", "default"))


WINDOWS = tuple(OpSpec(_window_targets(dims), window(dims)) for dims in (1, 2, 3))

SPECS = (
    *WINDOWS,
    OpSpec((aten.sum.dim_IntList, aten.sum.default), reduction, patch=patch_sum),
    OpSpec((aten.mean.dim, aten.mean.default), reduction, patch=patch_mean),
    OpSpec((aten.amax.default, aten.amin.default, aten.max.default, aten.min.default), reduction),
    OpSpec((aten.any.dim, aten.all.dim, aten.any.default, aten.all.default), reduction),
    OpSpec((aten.logsumexp.default,), reduction, patch=patch_logsumexp),
    OpSpec((aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim), norm, patch=patch_norm),
    OpSpec(
        (aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim),
        variance,
        patch=patch_variance,
    ),
    OpSpec(
        (aten.prod.dim_int, aten.median.dim),
        choice,
    ),
    OpSpec((aten.argmax.default, aten.argmin.default), place),
    OpSpec((aten.max.dim, aten.min.dim), extreme),
    OpSpec((aten.grid_sampler.default,), sampling_at_points),
    OpSpec((aten.softmax.int, aten.log_softmax.int), softmax, patch=patch_softmax),
    OpSpec(
        (
            aten.cumprod.default,
            aten.cummax.default,
            aten.cummin.default,
            aten.logcumsumexp.default,
            aten.argsort.default,
        ),
        along_dim,
    ),
    OpSpec((aten.cumsum.default,), running_sum),
    OpSpec((aten.sort.default, aten.sort.stable), sort),
    OpSpec((aten.topk.default,), largest, patch=patch_largest),
    OpSpec((aten.gather.default,), gather),
)
