"""Normalisation layers and per-channel parameters of activations.

Statistics over channels count every channel once. Where merged channels stood for different numbers of channels, the
norm becomes a weighted one: with `m_c` channels behind channel `c` of `n`, the mean is `1/n sum_c m_c x_c` and the
variance `1/n sum_c m_c (x_c - mean)^2`. Where channels were dropped, `n` still counts them, as zeros: the mean is
`1/n sum_c x_c` and the variance `1/n sum_c (x_c - mean)^2 + (1 - n'/n) mean^2`, with `n'` that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from graphzip.labels import IntArray, support
from graphzip.ops.rules import align, alike, meet, split_axes, uncut
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, FloatArray, OpSpec, Patch, Result

__all__ = ["SPECS", "weighted_moments"]

aten = torch.ops.aten


def per_channel(site: Site, axes: Axes, parameters: Sequence[Any], channel: int) -> Axes:
    """Meet the axes of an activation with parameters that have one entry per channel."""
    rank = len(site.shape())

    def lift(axis: IntArray) -> IntArray:
        return axis.reshape((1,) * channel + (-1,) + (1,) * (rank - channel - 1))

    size = tuple(size if dim == channel else 1 for dim, size in enumerate(site.extent()))
    operands = [(axes, site.extent())]
    for value in parameters:
        if value is not None:
            operands.append((tuple(lift(axis) for axis in site.axes(value)), size))
    return meet(site, operands)


def _channels_only(site: Site, axes: Axes) -> Axes:
    """Axes along dimension 1; those along other dimensions are pinned."""
    touching, rest = split_axes(axes, [1])
    for axis in rest:
        site.pin(axis, "normalises over it")
    return tuple(site.tie(axis, [dim for dim in support(axis) if dim != 1]) for axis in touching)


def batch_norm(site: Site) -> Result:
    """Each channel is normalised on its own over the batch and all positions (Ioffe and Szegedy, 2015)."""
    axes = _channels_only(site, site.axes(site.args["input"]))
    names = ("weight", "bias", "running_mean", "running_var")
    return per_channel(site, axes, [site.args[name] for name in names], 1)


def group_norm(site: Site) -> Result:
    """Statistics run over the channels of a group (Wu and He, 2018): what is merged stays inside it."""
    groups, width = site.args["num_groups"], site.shape()[1] // site.args["num_groups"]
    axes = uncut(site, _channels_only(site, site.axes(site.args["input"])), [1])
    if groups > 1 and width > 1:
        for axis in axes:
            rows = axis.reshape(groups, width)
            site.norm(rows)
            site.contain(site.fresh((groups, 1)), rows)
    return per_channel(site, axes, [site.args["weight"], site.args["bias"]], 1)


def patch_group_norm(patch: Patch) -> None:
    groups, kept = patch.args["num_groups"], patch.kept(patch.node, 1)
    of_group = kept // (patch.before(patch.node, 1) // groups)
    _, group, sizes = np.unique(of_group, return_inverse=True, return_counts=True)
    rank = len(patch.node.meta["val"].shape)
    counts = _uneven(patch, patch.multiplicity(patch.args["input"], list(range(1, rank)), blocks=groups))
    width = patch.before(patch.node, 1) // groups
    patch.set("num_groups", sizes.size)
    if patch.lost(patch.args["input"], [1]) and (sizes < width).any():
        y = _of_groups(patch, _laid_out(group, sizes), np.full(kept.size, 1.0 / width), 1.0 - sizes / width)
        patch.become(_affine(patch, y, ["weight", "bias"], (-1, *(1,) * (rank - 2))))
        return
    if counts is None and not np.ptp(sizes):
        return
    stands_for = np.ones(kept.size) if counts is None else np.broadcast_to(counts.ravel(), kept.shape)
    shares = stands_for / np.bincount(group, stands_for)[group]
    y = _of_groups(patch, _laid_out(group, sizes), shares)
    patch.become(_affine(patch, y, ["weight", "bias"], (-1, *(1,) * (rank - 2))))


def _laid_out(group: IntArray, sizes: IntArray) -> IntArray:
    """The channels of every group in a row of its own, which is filled up with -1."""
    laid = np.full((sizes.size, int(sizes.max())), -1)
    laid[group, np.arange(group.size) - (np.cumsum(sizes) - sizes)[group]] = np.arange(group.size)
    return laid


def _of_groups(patch: Patch, laid: IntArray, shares: FloatArray, missing: FloatArray | None = None) -> fx.Node:
    """The input normalised over groups of channels; `shares` are those of the channels in the mean of their group, and
    `missing` those of zeros that are gone.

    Groups are made as wide as the widest by channels of no weight.
    """
    x, uneven, rank = patch.operand("input"), (laid < 0).any(), len(patch.node.meta["val"].shape)
    if uneven:
        filled = np.where(laid < 0, laid[:, :1], laid).ravel()
        x = patch.call(aten.index_select.default, x, 1, patch.constant(filled))
    x = patch.call(aten.unflatten.int, x, 1, list(laid.shape))
    weights = np.where(laid < 0, 0.0, shares[laid]) * laid.shape[1]
    made = patch.values(weights.reshape(1, *laid.shape, *(1,) * (rank - 2)), patch.args["input"])
    zeros: Any = 0.0
    if missing is not None:
        zeros = patch.values(missing.reshape(1, -1, *(1,) * (rank - 1)), patch.args["input"])
    centred, variance = weighted_moments(patch, x, made, list(range(2, rank + 1)), missing=zeros)
    y = patch.call(aten.mul.Tensor, centred, _inverse_root(patch, variance, patch.args["eps"]))
    y = patch.call(aten.flatten.using_ints, y, 1, 2)
    if not uneven:
        return y
    return patch.call(aten.index_select.default, y, 1, patch.constant(np.flatnonzero(laid.ravel() >= 0)))


def weighted_moments(
    patch: Patch,
    x: fx.Node,
    weights: fx.Node | float,
    dims: list[int],
    *,
    is_complex: bool = False,
    missing: fx.Node | float = 0.0,
) -> tuple[fx.Node, fx.Node]:
    """`x - mean` and the variance over `dims`, with `weights` whose average over all that was there is one.

    `weights` says how many of the original values each one that is left stands for, times the fraction that is left.
    `missing` is the fraction of zeros that are gone.
    """
    mean = patch.call(aten.mean.dim, patch.call(aten.mul.Tensor, x, weights), dims, True)
    centred = patch.call(aten.sub.Tensor, x, mean)
    length = patch.call(aten.abs.default, centred) if is_complex else centred
    squares = patch.call(aten.mul.Tensor, patch.call(aten.mul.Tensor, length, length), weights)
    variance = patch.call(aten.mean.dim, squares, dims, True)
    if isinstance(missing, fx.Node) or missing:
        far = patch.call(aten.abs.default, mean) if is_complex else mean
        zeros = patch.call(aten.mul.Tensor, patch.call(aten.mul.Tensor, far, far), missing)
        variance = patch.call(aten.add.Tensor, variance, zeros)
    return centred, variance


def _inverse_root(patch: Patch, variance: fx.Node, eps: float) -> fx.Node:
    return patch.call(aten.rsqrt.default, patch.call(aten.add.Tensor, variance, eps))


def _affine(patch: Patch, y: fx.Node, names: Sequence[str], shape: tuple[int, ...] | None) -> fx.Node:
    for name, target in zip(names, (aten.mul.Tensor, aten.add.Tensor), strict=False):
        value = patch.operand(name)
        if value is not None:
            spread = value if shape is None else patch.call(aten.view.default, value, list(shape))
            y = patch.call(target, y, spread)
    return y


def layer_norm(site: Site) -> Result:
    """Statistics run over the trailing dimensions (Ba et al., 2016; `rms_norm`: Zhang and Sennrich, 2019)."""
    rank = len(site.shape())
    dims = range(rank - len(site.args["normalized_shape"]), rank)
    axes = alike(site, site.axes(site.args["input"]), dims, site.open())
    operands = [(axes, site.extent())]
    for value in (site.args.get("weight"), site.args.get("bias")):
        if value is not None:
            given = site.extent(value)
            operands.append((tuple(align(a, rank) for a in site.axes(value)), (1,) * (rank - len(given)) + given))
    return meet(site, operands)


def _normalized(patch: Patch) -> tuple[list[int], fx.Node | float | None]:
    """Dimensions that are normalised, and weights for the channels there, where what is left is no norm of its own."""
    rank = len(patch.node.meta["val"].shape)
    dims = list(range(rank - len(patch.args["normalized_shape"]), rank))
    source = patch.args["input"]
    lost = patch.lost(source, dims)
    if lost:
        return dims, 1.0 - lost
    counts = _uneven(patch, patch.multiplicity(source, dims))
    return dims, None if counts is None else patch.values(counts * float(patch.fraction(source, dims)), source)


def _set_shape(patch: Patch, dims: list[int]) -> None:
    given = patch.args["normalized_shape"]
    sizes = [patch.size(patch.node, dim) if isinstance(old, int) else old for dim, old in zip(dims, given, strict=True)]
    patch.set("normalized_shape", sizes)


def _uneven(patch: Patch, counts: FloatArray | None) -> FloatArray | None:
    """Averages stay what they are where every channel stands for the same number of channels."""
    return None if counts is None or np.ptp(counts) == 0 or patch.may_stay_plain() else counts


def patch_layer_norm(patch: Patch) -> None:
    dims, weights = _normalized(patch)
    if weights is None:
        _set_shape(patch, dims)
        return
    lost = patch.lost(patch.args["input"], dims)
    centred, variance = weighted_moments(patch, patch.operand("input"), weights, dims, missing=lost)
    y = patch.call(aten.mul.Tensor, centred, _inverse_root(patch, variance, patch.args["eps"]))
    patch.become(_affine(patch, y, ["weight", "bias"], None))


def patch_rms_norm(patch: Patch) -> None:
    dims, weights = _normalized(patch)
    if weights is None:
        _set_shape(patch, dims)
        return
    x = patch.operand("input")
    squares = patch.call(aten.mul.Tensor, patch.call(aten.mul.Tensor, x, x), weights)
    mean = patch.call(aten.mean.dim, squares, dims, True)
    given = patch.args["eps"]
    eps = torch.finfo(patch.node.meta["val"].dtype).eps if given is None else given
    patch.become(_affine(patch, patch.call(aten.mul.Tensor, x, _inverse_root(patch, mean, eps)), ["weight"], None))


def prelu(site: Site) -> Result:
    """`weight` has one slope for all channels or one per channel (dimension 1)."""
    weight = site.args["weight"]
    if site.shape(weight) in {(), (1,)}:
        return site.axes(site.args["self"])
    return per_channel(site, site.axes(site.args["self"]), [weight], min(1, len(site.shape()) - 1))


SPECS = (
    OpSpec((aten.batch_norm.default, aten.instance_norm.default), batch_norm),
    OpSpec((aten.group_norm.default,), group_norm, patch=patch_group_norm),
    OpSpec((aten.layer_norm.default,), layer_norm, patch=patch_layer_norm),
    OpSpec((aten.rms_norm.default,), layer_norm, patch=patch_rms_norm),
    OpSpec((aten.prelu.default,), prelu),
)
