"""Which of the layers that make a group's channels decides how they are divided; the others follow.

In a residual network the first layer of a stage or the projection at its beginning makes the feature maps that all
blocks add to. It is the one with the fewest layers in front of it: a projection stands beside the layers of its block.

Source: Ding et al., "Manipulating Identical Filter Redundancy for Efficient Pruning on Deep and Complicated CNN"
(C-SGD), section 3.5.
"""

from __future__ import annotations

from torch import fx

from graphzip.analysis.groups import ChannelGroup, GroupParam
from graphzip.analysis.layers import calls_of_layers
from graphzip.graph.traced import Traced

__all__ = ["layers_in_front", "pacesetter_of"]


def layers_in_front(traced: Traced) -> dict[str, int]:
    """For every parameter how many layers there are, at most, on a way from the inputs to what reads it first."""
    layers = {layer.node for layer in calls_of_layers(traced)}
    depth: dict[fx.Node, int] = {}
    found: dict[str, int] = {}
    for node in traced.graph.nodes:
        depth[node] = max((depth[each] + (each in layers) for each in node.all_input_nodes), default=0)
        for each in node.all_input_nodes:
            if each.op == "get_attr":
                found.setdefault(str(each.target), depth[node])
    return found


def pacesetter_of(group: ChannelGroup, traced: Traced, front: dict[str, int] | None = None) -> GroupParam:
    """The producer that decides: the first one to run, or with `front` the one with the fewest layers in front."""
    leaders = [param for param in group.params if param.role == "producer"] or list(group.params)
    if front is None:
        return leaders[0]
    return min(leaders, key=lambda param: front.get(traced.local(param.param), len(traced.graph.nodes)))
