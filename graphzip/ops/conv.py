"""Convolutions: the input's channels are the weight's inputs, the output's channels its outputs.

With groups, row `(g, o)` of a weight sees the input channels `(g, i)` only, so dimension 1 of the weight has other
labels in every group: `blocked_weights` finds those weights, and `Site.blocked` holds their labels as `(g, i)`.
The outputs of a grouped transposed convolution are one channel `o` in all groups.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import fx

from graphzip.labels import IntArray, support
from graphzip.ops.rules import merge, mixing, split_axes
from graphzip.ops.site import Site, bind
from graphzip.ops.spec import OpSpec, Patch, Result

__all__ = ["SPECS", "blocked_weights"]

aten = torch.ops.aten

_PLAIN = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def blocked_weights(graph: fx.Graph) -> dict[fx.Node, int]:
    """Parameters that are the weight of a grouped convolution and of nothing else, with the number of groups."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.target in _PLAIN:
            args = bind(node)
            weight, groups = args["weight"], args["groups"]
            if (
                groups > 1
                and weight.op == "get_attr"
                and all(_is_weight_of(user, weight, groups) for user in weight.users)
            ):
                found[weight] = groups
    return found


def _is_weight_of(user: fx.Node, weight: fx.Node, groups: int) -> bool:
    if user.target not in _PLAIN:
        return False
    args = bind(user)
    return (
        not args.get("transposed")
        and args["weight"] is weight
        and args["input"] is not weight
        and args["groups"] == groups
    )


def _is_transposed(site: Site) -> bool:
    return site.node.target in _TRANSPOSED or bool(site.args.get("transposed"))


def convolution(site: Site) -> Result:
    weight, rank = site.args["weight"], len(site.shape())
    channel = rank - (len(site.shape(weight)) - 1)
    spatial = range(channel + 1, rank)
    touching, rest = split_axes(site.axes(site.args["input"]), [channel])
    others = mixing(site, tuple(rest), spatial, "mixes positions")
    inputs = [site.tie(axis, [dim for dim in support(axis) if dim != channel]) for axis in touching]
    incoming, outgoing = _ends(site, weight)

    def along(labels: IntArray) -> IntArray:
        return labels.reshape((1,) * channel + (-1,) + (1,) * (rank - channel - 1))

    if incoming.size > 1:
        if inputs:
            site.unify(inputs[0], along(incoming))
        else:
            site.pin(incoming, "reads channels that are fixed")
    if outgoing.size == 1:
        return others
    made = along(outgoing)
    bias = site.args["bias"]
    if bias is not None:
        shape = site.shape()
        wide = tuple(axis.reshape(made.shape) for axis in site.axes(bias))
        size = (1,) * channel + (shape[channel],) + (1,) * (rank - channel - 1)
        return (*others, *merge(site, [((made,), size), (wide, size)]))
    return (*others, made)


def _ends(site: Site, weight: fx.Node) -> tuple[IntArray, IntArray]:
    """Labels of the incoming and of the outgoing channels, each `(groups, channels of a group)`."""
    groups, shape = site.args["groups"], site.shape(weight)
    rows = _labels(site, weight, 0, shape[0]).reshape(groups, -1)
    columns = site.blocked.get(weight)
    if columns is None:
        columns = np.broadcast_to(_labels(site, weight, 1, shape[1]), (groups, shape[1]))
    for axis in site.axes(weight):
        if support(axis) not in {(0,), (1,)}:
            site.pin(axis, "slides over it")
    incoming, outgoing = (rows, columns) if _is_transposed(site) else (columns, rows)
    if groups > 1 and incoming.shape[1] == 1:  # depthwise: all outputs of a group are the channel of its input
        channel = site.tie(rows, [1])
        return channel, np.broadcast_to(channel, outgoing.shape)
    site.consume(incoming)
    site.produce(outgoing)
    if not site.is_raw(weight):
        site.pin(incoming, "sums over a computed weight")
    if groups > 1:
        site.block(incoming)
        site.block(outgoing)
    return incoming, outgoing


def _labels(site: Site, weight: fx.Node, dim: int, size: int) -> IntArray:
    for axis in site.axes(weight):
        if support(axis) == (dim,):
            return axis.ravel()
    labels = site.fresh([size])
    if size > 1:
        site.pin(labels, "has a weight with a fixed dimension")
    return labels


def macs(site: Site) -> int:
    """Multiply-accumulates: every output element sums over one group's inputs and the kernel."""
    weight = site.shape(site.args["weight"])
    positions = site.shape(site.args["input"]) if _is_transposed(site) else site.shape()
    return math.prod(positions) * math.prod(weight[1:])


def patch_groups(patch: Patch) -> None:
    """As many groups as the input has channels, by what a group of the weight takes."""
    groups = patch.args["groups"]
    if groups == 1:
        return
    weight, rank = patch.args["weight"], len(patch.node.meta["val"].shape)
    channel = rank - (len(weight.meta["val"].shape) - 1)
    transposed = patch.node.target in _TRANSPOSED or bool(patch.args.get("transposed"))
    per_group = patch.size(weight, 0) // groups if transposed else patch.size(weight, 1)
    if int(weight.meta["val"].shape[0]) == groups and (transposed or int(weight.meta["val"].shape[1]) == 1):
        per_group = 1
    patch.set("groups", patch.size(patch.args["input"], channel) // per_group)


SPECS = (OpSpec(_PLAIN + _TRANSPOSED, convolution, macs=macs, patch=patch_groups),)
