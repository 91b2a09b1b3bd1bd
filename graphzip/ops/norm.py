"""Normalisation layers and per-channel parameters of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphzip.labels import IntArray, support
from graphzip.ops.rules import align, merge, mixing, split_axes
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, OpSpec, Patch, Result

__all__ = ["SPECS"]

aten = torch.ops.aten


def per_channel(site: Site, axes: Axes, parameters: Sequence[Any], channel: int) -> Axes:
    """Meet the axes of an activation with parameters that have one entry per channel."""
    rank = len(site.shape())

    def lift(axis: IntArray) -> IntArray:
        return axis.reshape((1,) * channel + (-1,) + (1,) * (rank - channel - 1))

    size = tuple(size if dim == channel else 1 for dim, size in enumerate(site.shape()))
    operands = [(axes, site.shape())]
    for value in parameters:
        if value is not None:
            operands.append((tuple(lift(axis) for axis in site.axes(value)), size))
    return merge(site, operands)


def batch_norm(site: Site) -> Result:
    """Each channel is normalised on its own over the batch and all positions (Ioffe and Szegedy, 2015)."""
    source = next(value for name, value in site.args.items() if name in {"input", "self"})
    rank = len(site.shape())
    others = [dim for dim in range(rank) if dim != 1]
    touching, rest = split_axes(site.axes(source), [1])
    for axis in rest:
        site.pin(axis, "normalises over it")
    axes = tuple(site.tie(axis, [dim for dim in support(axis) if dim in others]) for axis in touching)
    names = ("weight", "bias", "running_mean", "running_var")
    return per_channel(site, axes, [site.args[name] for name in names], 1)


def group_norm(site: Site) -> Result:
    """Statistics run over the channels of a group: whole groups are the channels that can go."""
    source, groups = site.args["input"], site.args["num_groups"]
    touching, rest = split_axes(site.axes(source), [1])
    for axis in rest:
        site.pin(axis, "normalises over it")
    axes: Axes = ()
    if touching:
        axis = site.tie(touching[0], [dim for dim in support(touching[0]) if dim != 1])
        if groups == 1:
            site.pin(axis, "normalises over all channels")
        else:
            site.tie(axis.reshape(groups, -1), [1])
            axes = (axis,)
    return per_channel(site, axes, [site.args["weight"], site.args["bias"]], 1)


def patch_group_norm(patch: Patch) -> None:
    before = int(patch.node.meta["val"].shape[1])
    groups = patch.args["num_groups"]
    patch.set("num_groups", patch.size(patch.node, 1) * groups // before)


def layer_norm(site: Site) -> Result:
    """Statistics run over the trailing dimensions."""
    source, shape = site.args["input"], site.args["normalized_shape"]
    rank = len(site.shape())
    dims = range(rank - len(shape), rank)
    axes = mixing(site, site.axes(source), dims, "normalises over all channels")
    for name in ("weight", "bias"):
        value = site.args.get(name)
        if value is not None:
            axes = merge(
                site,
                [(axes, site.shape()), (tuple(align(a, rank) for a in site.axes(value)), _lead(site, value, rank))],
            )
    return axes


def _lead(site: Site, value: Any, rank: int) -> tuple[int, ...]:
    given = site.shape(value)
    return (1,) * (rank - len(given)) + given


def prelu(site: Site) -> Result:
    """`weight` has one slope for all channels or one per channel (dimension 1)."""
    weight = site.args["weight"]
    if site.shape(weight) in {(), (1,)}:
        return site.axes(site.args["self"])
    return per_channel(site, site.axes(site.args["self"]), [weight], min(1, len(site.shape()) - 1))


SPECS = (
    OpSpec((aten.batch_norm.default, aten.instance_norm.default), batch_norm),
    OpSpec((aten.group_norm.default,), group_norm, patch=patch_group_norm),
    OpSpec((aten.layer_norm.default, aten.rms_norm.default), layer_norm),
    OpSpec((aten.prelu.default,), prelu),
)
