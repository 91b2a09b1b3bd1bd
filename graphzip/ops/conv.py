"""Convolutions: the input's channels are the weight's inputs, the output's channels its outputs.

With groups, row `(g, o)` of a weight sees the input channels `(g, i)` only, so dimension 1 of the weight has other
labels in every group: `grouped_weights` finds those weights, and `Site.grouped` holds their labels as `(g, i)`.
The outputs of a grouped transposed convolution are one channel `o` in all groups.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import fx

from graphzip.graph.inputs import hint
from graphzip.graph.operators import CONVOLUTIONS, TRANSPOSED, arguments_of
from graphzip.graph.sizes import is_open, same_size
from graphzip.labels import IntArray, support
from graphzip.ops.rules import meet, mixing, split_axes, uncut, weight_labels
from graphzip.ops.site import Site
from graphzip.ops.spec import OpSpec, Patch, Result

__all__ = ["SPECS", "grouped_weights"]

aten = torch.ops.aten

_PLAIN = (*CONVOLUTIONS, aten.convolution.default)


def grouped_weights(graph: fx.Graph) -> dict[fx.Node, int]:
    """Parameters that are the weight of a grouped convolution and of nothing else, with the number of groups."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.target in _PLAIN:
            args = arguments_of(node)
            weight, groups = args["weight"], args["groups"]
            if (
                isinstance(groups, int)
                and groups > 1
                and weight.op == "get_attr"
                and all(_is_weight_of(user, weight, groups) for user in weight.users)
            ):
                found[weight] = groups
    return found


def _is_weight_of(user: fx.Node, weight: fx.Node, groups: int) -> bool:
    if user.target not in _PLAIN:
        return False
    args = arguments_of(user)
    return (
        not args.get("transposed")
        and args["weight"] is weight
        and args["input"] is not weight
        and args["groups"] == groups
    )


def _is_transposed(site: Site) -> bool:
    return site.node.target in TRANSPOSED or bool(site.args.get("transposed"))


def convolution(site: Site) -> Result:
    weight, rank = site.args["weight"], len(site.shape())
    channel = rank - (len(site.shape(weight)) - 1)
    spatial = range(channel + 1, rank)
    axes = site.axes(site.args["input"])
    if not site.is_open(site.args["groups"]) and site.size(site.args["groups"]) > 1:
        axes = uncut(site, axes, [channel], site.args["input"])
    touching, rest = split_axes(axes, [channel])
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
        return (*others, *meet(site, [((made,), size), (wide, size)]))
    return (*others, made)


def _ends(site: Site, weight: fx.Node) -> tuple[IntArray, IntArray]:
    """Labels of the incoming and of the outgoing channels, each `(groups, channels of a group)`."""
    groups, shape = site.size(site.args["groups"]), site.shape(weight)
    rows = weight_labels(site, weight, 0).reshape(groups, -1)
    columns = site.grouped.get(weight)
    if columns is None and shape[1] == 1:
        columns = site.fresh((groups, 1))
    elif columns is None:
        columns = np.broadcast_to(weight_labels(site, weight, 1), (groups, shape[1]))
    for axis in site.axes(weight):
        if support(axis) not in {(0,), (1,)}:
            site.pin(axis, "slides over it")
    incoming, outgoing = (rows, columns) if _is_transposed(site) else (columns, rows)
    depthwise = groups > 1 and incoming.shape[1] == outgoing.shape[1] == 1
    if groups > 1 and incoming is columns and incoming.shape[1] == 1 and weight not in site.grouped:
        channel = site.tie(rows, [1])  # one input per group: all its outputs are the channel of that input
        return channel, np.broadcast_to(channel, outgoing.shape)
    if site.is_raw(weight) and not depthwise:
        site.consume(incoming)
        site.produce(outgoing)
    if site.is_open(site.args["groups"]) or (groups > 1 and 0 in site.open(weight)):
        _alike_in_groups(site, rows)
    elif groups > 1:
        held = site.fresh((groups, 1))
        for side in (incoming, outgoing):
            site.contain(held, side)
            if side.shape[1] > 1:
                site.block(side)
    return incoming, outgoing


def _alike_in_groups(site: Site, rows: IntArray) -> None:
    """Where the inputs decide the number of groups, all groups have the same channels, one behind the other."""
    if not (rows == rows[:1]).all():
        site.pin(rows, "has a group for every part of a size that the inputs decide, and channels that differ there")


def macs(site: Site) -> int:
    """Multiply-accumulates: every output element sums over one group's inputs and the kernel."""
    weight = site.shape(site.args["weight"])
    positions = site.shape(site.args["input"]) if _is_transposed(site) else site.shape()
    return math.prod(positions) * math.prod(weight[1:])


def patch_convolution(patch: Patch) -> None:
    """Adapt the number of groups, and scale the input where the weight's slices have not been added up."""
    weight, rank = patch.args["weight"], len(patch.node.meta["val"].shape)
    source, channel = patch.args["input"], rank - (len(weight.meta["val"].shape) - 1)
    given = patch.args["groups"]
    number = given if isinstance(given, int) else given.meta["val"]
    groups = hint(number)
    transposed = patch.node.target in TRANSPOSED or bool(patch.args.get("transposed"))
    if is_open(number):
        if same_size(number, source.meta["val"].shape[channel]):
            patch.set_node("groups", patch.call(aten.sym_size.int, patch.operand("input"), channel))
            return
    elif groups > 1:
        width = patch.before(source, channel) // groups
        kept = patch.kept(source, channel)
        patch.set("groups", kept.size if width == 1 else int(np.unique(kept // width).size))
        if width == 1:
            return
    if not patch.consumes(weight, 0 if transposed else 1):
        counts = patch.multiplicity(source, [channel], blocks=groups)
        if counts is not None:
            scaled = patch.call(aten.mul.Tensor, patch.operand("input"), patch.values(counts, source))
            patch.set_node("input", scaled)


SPECS = (OpSpec(_PLAIN + TRANSPOSED, convolution, macs=macs, patch=patch_convolution),)
