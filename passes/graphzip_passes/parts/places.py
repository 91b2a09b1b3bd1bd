"""Where the values of a graph hold the channels of a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from graphzip.analysis.channels import Analysis
from graphzip.analysis.groups import ChannelGroup, ChannelGroups
from graphzip.analysis.layers import Layer
from graphzip.labels import IntArray, support
from graphzip_passes.parts.holders import axes_of, holders, is_read_by_layer

__all__ = ["Holder", "places_of"]


@dataclass(frozen=True)
class Holder:
    """A node, the dimensions of its value that hold channels, and where each channel stands along them, (n, slots)."""

    node: fx.Node
    dims: tuple[int, ...]
    positions: IntArray

    def gathered(self, value: Tensor) -> Tensor:
        """(n, samples, ..) of a value of the node; slots come last where there are several."""
        others = [dim for dim in range(value.dim()) if dim not in self.dims]
        flat = value.permute(*self.dims, *others).flatten(0, len(self.dims) - 1)
        found = flat[torch.from_numpy(self.positions).to(flat.device)]
        found = found if others else found[..., None]
        return found[:, 0] if found.shape[1] == 1 else found.movedim(1, -1)


def places_of(
    groups: ChannelGroups, analysis: Analysis, layers: Mapping[str, Layer], order: Mapping[fx.Node, int]
) -> dict[str, Holder]:
    """For each group the input of the first layer that reads it; where none does, the last node that holds it.

    `layers` are the model's own by the names of their weights, `order` numbers the nodes. Groups that no value holds
    are left out.
    """
    held = holders(groups, analysis)
    found: dict[str, Holder] = {}
    for group in groups:
        read = [layers[each.param].input for each in group.params if is_read_by_layer(each, layers)]
        nodes = [*sorted(read, key=order.__getitem__), *reversed(held[group.name])]
        place = next((each for node in nodes if (each := _place(group, analysis, node)) is not None), None)
        if place is not None:
            found[group.name] = place
    return found


def _place(group: ChannelGroup, analysis: Analysis, node: fx.Node) -> Holder | None:
    level = analysis.coarse if group.whole_blocks else analysis.fine
    value = node.meta.get("val")
    if level is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    for axis in axes_of(analysis, node):
        classes = level.classes[axis].ravel()
        order = np.argsort(classes, kind="stable")
        start, end = (np.searchsorted(classes[order], group.channels, side=side) for side in ("left", "right"))
        counts = end - start
        if counts[0] and (counts == counts[0]).all():
            return Holder(node, tuple(support(axis)), order[start[:, None] + np.arange(counts[0])])
    return None
