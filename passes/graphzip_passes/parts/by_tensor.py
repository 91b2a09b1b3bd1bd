"""Rewriting a model tensor by tensor: its graph is on the meta device, and weights are read when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from graphzip.analysis.groups import ChannelGroup
from graphzip.graph.batches import Given
from graphzip.graph.state import attach, get_tensor, is_persistent
from graphzip.graph.traced import Traced
from graphzip.rewrite.layout import Layout
from graphzip.rewrite.params import shrink_parameter, shrinking_axes
from graphzip_passes.base import PassContext, Weights
from graphzip_passes.parts.compensation import Narrowed, Refit, refit
from graphzip_passes.parts.streamed import Streamed

__all__ = ["held", "refitted", "shrunk", "streams"]


@contextmanager
def held(traced: Traced, group: ChannelGroup, weights: Weights) -> Iterator[None]:
    """Let the graph hold the parameters of a group meanwhile."""
    before = {name: get_tensor(traced.module, name) for name in {traced.local(each.param) for each in group.params}}
    persistent = {name: is_persistent(traced.module, name) for name in before}
    try:
        for name, old in before.items():
            value = weights(name)
            if isinstance(old, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            attach(traced.module, name, value, persistent=persistent[name])
        yield
    finally:
        for name, old in before.items():
            attach(traced.module, name, old, persistent=persistent[name])


def shrunk(
    layout: Layout, weights: Weights, centred: Callable[[str, torch.Tensor], torch.Tensor] | None = None
) -> Weights:
    """The weights of the model that a layout leaves; those that lose slices are `centred` before."""
    axes = shrinking_axes(layout)

    def read(name: str) -> torch.Tensor:
        value = weights(name)
        if centred is not None:
            value = centred(name, value)
        return shrink_parameter(layout, axes[name], value) if name in axes else value

    return read


def streams(context: PassContext, weights: Weights) -> Callable[[Traced, Given], Streamed]:
    """What makes the values of a graph that has these weights, and reads them when they are needed."""
    assert context.workspace is not None
    workspace = context.workspace
    return lambda traced, batches: Streamed(traced, batches, weights, workspace)


def refitted(
    traced: Traced,
    found: Narrowed,
    weights: tuple[Weights, Weights],
    context: PassContext,
    batches: Given,
) -> tuple[Refit, Weights]:
    """Fit the layers of a slimmer model one after the other, with the `weights` of both read one at a time.

    Gives what was fitted, and the weights of the slimmer model from then on.
    """
    assert context.workspace is not None
    kept = context.workspace.kept()
    old = Streamed(traced, batches, weights[0], context.workspace)
    new = Streamed(found.traced, batches, weights[1], context.workspace, kept)
    done = refit(old, new, found)
    return done, kept.over(weights[1])
