"""Where the channels of a group run: the operators that hold them, and what reads each of them by itself."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from graphzip.analysis.groups import Analysed, ChannelGroup, GroupParam
from graphzip.analysis.layers import Layer, layer_of, layers_by_weight
from graphzip.graph.operators import arguments_of
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray, support
from graphzip.ops import MOVES, OPS, linear, norm, pointwise, recurrent, reductions, rules

__all__ = ["WINDOWS", "Region", "regions_of"]

aten = torch.ops.aten

WINDOWS: Final = {target for spec in reductions.WINDOWS for target in spec.targets}
"""Pooling and resampling."""

_APART: Final = {rules.same, rules.pointwise, reductions.reduction, norm.batch_norm, norm.prelu, pointwise.glu}
"""Ways in which labels pass that keep every channel to itself, where the result has all of them."""

_HEADS: Final = {linear.matmul, linear.attention, linear.baddbmm, reductions.softmax}
"""Those that keep whole blocks, such as heads, to themselves where the result has all of them."""

_NORMS: Final = {norm.layer_norm, norm.group_norm}

_SUMS: Final = {aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default}
"""Operators over channels in which one that holds zeros has no part, if what they divide by stays."""

_RECURRENT: Final = {target for spec in recurrent.SPECS for target in spec.targets}

Reader = tuple[Layer, IntArray]
"""A layer, and the columns (n, slots) of its inputs in which it reads each channel; -1 where a channel has fewer."""


@dataclass(frozen=True)
class Region:
    """A group whose channels run apart from each other.

    - `nodes`: what holds them, in order, each with the position of the channel at every place, or -1, as an array that
      broadcasts with its value; `None` of several values, and of weights with channels along two dimensions.
    - `readers`: the layers that read them and whose inputs have numbers of their own to take what is constant.
    - `deaf`: parameters that are summed over the channels elsewhere: of recurrent layers, and those used in two places.
    - `counting`: of the nodes those whose channels a norm or a mean runs over.
    - `steady`: whether what holds one number everywhere holds it at inputs of every size.
    """

    group: ChannelGroup
    nodes: Mapping[fx.Node, IntArray | None]
    readers: tuple[Reader, ...]
    deaf: tuple[GroupParam, ...]
    counting: frozenset[fx.Node]
    steady: bool


def regions_of(traced: Traced, known: Analysed, groups: Sequence[ChannelGroup]) -> list[Region]:
    """The regions of those of the groups that nothing reads but one channel at a time."""
    by_weight = layers_by_weight(traced)
    held = _held(known, groups)
    regions = (_region(traced, group, held[group.name], by_weight) for group in groups)
    return [region for region in regions if region is not None]


def _held(known: Analysed, groups: Sequence[ChannelGroup]) -> dict[str, dict[fx.Node, list[IntArray]]]:
    """By group what holds its channels, with their positions on every axis of every value."""
    analysis = known.analysis
    found: dict[str, dict[fx.Node, list[IntArray]]] = {group.name: {} for group in groups}
    for whole_blocks, level in ((False, analysis.fine), (True, analysis.coarse)):
        mine = [group for group in groups if group.whole_blocks is whole_blocks]
        if level is None or not mine:
            continue
        owner = np.full(level.solution.count, -1)
        place = np.full(level.solution.count, -1)
        for number, group in enumerate(mine):
            owner[group.channels], place[group.channels] = number, np.arange(group.size)
        for node, axes in analysis.propagation.axes.items():
            for axis in _axes(axes):
                classes = level.classes[axis]
                for number in np.unique(owner[classes]):
                    if number >= 0:
                        spots = np.where(owner[classes] == number, place[classes], -1)
                        found[mine[number].name].setdefault(node, []).append(spots)
    return found


def _axes(axes: Any) -> Iterator[IntArray]:
    """The labelled axes of a node's value, or of all its values."""
    for each in axes:
        if isinstance(each, tuple):
            yield from _axes(each)
        elif isinstance(each, np.ndarray) and support(each):
            yield each


def _region(
    traced: Traced, group: ChannelGroup, held: dict[fx.Node, list[IntArray]], by_weight: Mapping[str, Layer]
) -> Region | None:
    nodes: dict[fx.Node, IntArray | None] = {}
    for node, spots in held.items():
        if len(spots) > 1 and node.op != "get_attr" and not isinstance(node.meta["val"], tuple | list):
            return None  # along two dimensions
        nodes[node] = spots[0] if len(spots) == 1 else None
    columns = {traced.local(each.param): each for each in group.params if each.role == "consumer"}
    own = {traced.local(each.param) for each in group.params if each.role != "consumer"}
    readers: list[Reader] = []
    counting, heard = set[fx.Node](), set[str]()
    for node in nodes:
        if node.op == "get_attr":
            if node.target in own and not all(_uses(user, nodes) for user in node.users):
                return None  # their sum, say, has no channels
            continue
        for user in node.users:
            names = _summed(user, node, columns)
            if names is not None:
                heard |= names
                readers += [
                    (layer, columns[name].indices.reshape(group.size, -1))
                    for name in names
                    if (layer := by_weight.get(traced.qualified(name))) is not None and layer.node is user
                ]
            elif _counts(user, nodes):
                counting.add(node)
            elif user not in nodes or not _apart(user, whole_blocks=group.whole_blocks):
                return None
    if heard != columns.keys():
        return None
    taken = {layer.name for layer, _ in readers}
    deaf = tuple(param for name, param in columns.items() if name not in taken)
    steady = not any(_counts_places(node) for node in nodes)
    return Region(group, nodes, tuple(readers), deaf, frozenset(counting), steady)


def _summed(user: fx.Node, node: fx.Node, columns: Mapping[str, GroupParam]) -> set[str] | None:
    """The weights that an operator sums over the channels of a node with; `None` where it does something else."""
    if user.target in _RECURRENT:
        return {str(each.target) for each in user.all_input_nodes if each.op == "get_attr"} & columns.keys()
    layer = layer_of(user)
    if layer is None or layer.depthwise or layer.input is not node or layer.weight.op != "get_attr":
        return None
    reads = layer.name in columns and columns[layer.name].dim == layer.input_dim
    return {layer.name} if reads else None


def _uses(user: fx.Node, nodes: Mapping[fx.Node, Any]) -> bool:
    """Whether an operator makes, moves or holds the channels, or is a layer."""
    return user in nodes or layer_of(user) is not None or user.target in _RECURRENT


def _rule(node: fx.Node) -> Any:
    spec = OPS.get(node.target) if node.op == "call_function" else None
    return None if spec is None else spec.propagate


def _counts(node: fx.Node, nodes: Mapping[fx.Node, Any]) -> bool:
    """Whether an operator runs over the channels in such a way that zeros have no part in it."""
    return _rule(node) in _NORMS if node in nodes else node.target in _SUMS


def _apart(node: fx.Node, *, whole_blocks: bool) -> bool:
    """Whether an operator that keeps the channels computes each from itself."""
    if node.target in MOVES or node.target in WINDOWS or node.target is operator.getitem:
        return True
    layer = layer_of(node)
    if layer is not None:
        return layer.depthwise and layer.weight.op == "get_attr"
    rule = _rule(node)
    return rule in _APART or (whole_blocks and rule in _HEADS)


def _counts_places(node: fx.Node) -> bool:
    """Whether what it makes of a number that is the same everywhere depends on how many places there are."""
    name = str(node.target)
    return name.startswith("aten.sum") or ("avg_pool" in name and any(arguments_of(node).get("padding") or ()))
