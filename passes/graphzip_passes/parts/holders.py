"""What holds the channels of a group in a graph, and which layers read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import fx

from graphzip.analysis.channels import Analysis
from graphzip.analysis.groups import ChannelGroup, GroupParam
from graphzip.analysis.layers import Layer
from graphzip.labels import IntArray, support

__all__ = ["axes_of", "holders", "is_read_by_layer", "readers_of"]


def holders(groups: Iterable[ChannelGroup], analysis: Analysis) -> dict[str, list[fx.Node]]:
    """By group the operators whose result has its channels, which all have or none, in order."""
    listed = [*groups]
    found: dict[str, list[fx.Node]] = {group.name: [] for group in listed}
    for whole_blocks, level in ((False, analysis.fine), (True, analysis.coarse)):
        mine = [group for group in listed if group.whole_blocks is whole_blocks]
        if level is None or not mine:
            continue
        owner = np.full(level.solution.count, -1)
        for number, group in enumerate(mine):
            owner[group.channels] = number
        for node in analysis.propagation.axes:
            held = [owner[np.unique(level.classes[axis])] for axis in axes_of(analysis, node) if support(axis)]
            numbers = np.unique(np.concatenate(held)) if held and node.op == "call_function" else ()
            for number in numbers:
                if number >= 0:
                    found[mine[number].name].append(node)
    return found


def axes_of(analysis: Analysis, node: fx.Node) -> Iterator[IntArray]:
    """The labelled axes of a node that gives one tensor."""
    axes: Any = analysis.propagation.axes.get(node, ())
    yield from axes if isinstance(axes, tuple) else ()


def readers_of(group: ChannelGroup, layers: Mapping[str, Layer]) -> list[GroupParam]:
    """The layers that read the group, if those are all that do."""
    found = [param for param in group.params if param.role == "consumer"]
    usable = all(is_read_by_layer(param, layers) for param in found)
    return found if usable and not group.whole_blocks else []


def is_read_by_layer(param: GroupParam, layers: Mapping[str, Layer]) -> bool:
    """Whether it is the side of a layer's weight that is multiplied by what the layer reads."""
    return param.role == "consumer" and param.param in layers and param.dim == layers[param.param].input_dim
