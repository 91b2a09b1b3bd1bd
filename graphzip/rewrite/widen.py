"""Widen channel groups: the way back from a merge.

A channel of which `copies` are made stands that many times in every tensor: producer and pointwise slices are repeated,
and the consumers' input slices are split among the copies, `sum_k W'_k = W`, so that the outputs stay what they are
(Net2WiderNet: Chen, Goodfellow and Shlens, "Net2Net", 2016, section 2.2.1). The split is random and uneven: with equal
shares the copies would have equal gradients for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from graphzip.analysis.channels import CONSUMER, Analysis
from graphzip.analysis.propagate import ParamAxis
from graphzip.errors import RewriteError
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.state import get_tensor, like
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray, support
from graphzip.ops.spec import FloatArray
from graphzip.rewrite.layout import Layout, product_of, without_repeats
from graphzip.rewrite.merge import rewritten
from graphzip.rewrite.params import check_roles

__all__ = ["grow_channels"]

UNEVEN = 0.3
"""Spread of the copies' shares, relative to an equal share."""


def grow_channels(
    traced: Traced, analysis: Analysis, copies: Mapping[int, int], *, seed: int = 0, preserves: bool = True
) -> Traced:
    """Make `copies[channel]` of each named channel (of the fine level); every other one stays single.

    Whatever sums over channels without a parameter (the products of an attention, a softmax, a norm) counts each copy
    by its share, unless nothing needs to be preserved. Norms stay as they are, whatever the shares of their channels.
    Returns a new graph; the given one and its tensors stay as they are. Raises `RewriteError` where the copies find no
    place, because the blocks of a group would grow differently, and where a norm would not be preserved, because its
    channels have unequal shares.
    """
    counts = np.ones(analysis.fine.solution.count, dtype=np.int64)
    counts[list(copies)] = list(copies.values())
    classes, itself = analysis.fine.classes, np.arange(counts.size)
    layout = WideLayout(analysis, classes, itself, plain_norms=True, copies=counts, preserves=preserves)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for axis in sorted(analysis.propagation.params, key=lambda axis: axis.labels.ndim, reverse=True):
        if layout.grows(axis.labels):
            check_roles(layout, axis, counts[layout.classes[axis.labels]] > 1)
            old = get_tensor(traced.module, axis.param)
            made[axis.param] = _grow(layout, axis, made.get(axis.param, old.detach()), generator)
    changed = {name: like(value.contiguous(), get_tensor(traced.module, name)) for name, value in made.items()}
    grown = rewritten(traced, layout, changed)
    if preserves and layout.left_plain:
        raise RewriteError(
            f"{layout.left_plain[0]} is a norm over channels of which some would have more copies than others, so that "
            "it would compute something else; use a whole factor, exclude the groups that pass it, or start anew with "
            "init='fresh'"
        )
    return grown


@dataclass
class WideLayout(Layout):
    """Where every copy stands: right behind the channel, or, where the channel has a run of places, behind the run."""

    copies: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    preserves: bool = True

    def grows(self, axis: IntArray) -> bool:
        """Whether any channel of an axis has copies."""
        return bool((self.copies[self.classes[axis]] > 1).any())

    def order(self, axis: IntArray) -> tuple[int, IntArray]:
        """The dimension along which an axis grows, and the old position of each new one, in the new axis's shape."""
        classes = self.classes[axis]
        varying = [dim for dim in support(axis) if (np.diff(classes, axis=dim) != 0).any()]
        block = self.analysis.fine.block[classes]
        inner = [dim for dim in varying if not (np.diff(block, axis=dim) != 0).any()] if len(varying) > 1 else varying
        if len(inner) != 1:
            raise RewriteError("its channels lie along several dimensions; leave the group as wide as it is")
        lines = np.moveaxis(classes, inner[0], -1)
        orders = [_repeated(line, self.copies) for line in lines.reshape(-1, lines.shape[-1])]
        if len({len(order) for order in orders}) != 1:
            raise RewriteError("its blocks would have different widths; leave the group as wide as it is")
        order = np.stack(orders).reshape(*lines.shape[:-1], -1)
        return inner[0], np.moveaxis(order, -1, inner[0])

    def after(self, axis: IntArray) -> IntArray:
        if not self.grows(axis):
            return axis
        if id(axis) not in self._compact:
            dim, order = self.order(axis)
            self._compact[id(axis)] = axis, np.take_along_axis(axis, order, axis=dim)
        return self._compact[id(axis)][1]

    def kept(self, value: fx.Node, dim: int) -> IntArray:
        """For every new position along `dim` the old one, in ascending order."""
        axis = self.axis_along(value, dim)
        if axis is None or not self.grows(axis):
            return np.arange(concrete_shape(value.meta["val"])[dim])
        along, order = self.order(axis)
        if along != dim:
            return np.arange(axis.shape[dim])
        first: IntArray = np.moveaxis(order, dim, -1).reshape(-1, order.shape[dim])[0]
        return first

    def multiplicity(self, value: fx.Node, dims: Sequence[int], blocks: int = 1) -> FloatArray | None:
        """The share that a copy has of its channel, where the outputs are to stay what they are."""
        if not self.preserves:
            return None
        found = []
        for axis in self.axes_along(value, dims):
            if self.grows(axis) and self.order(axis)[0] in dims:
                classes = self.classes[self.after(axis)]
                alike = without_repeats(classes, [dim for dim in range(axis.ndim) if dim not in dims])
                found.append(1.0 / self.copies[alike])
        return product_of(found)


def _repeated(line: IntArray, copies: IntArray) -> IntArray:
    """Old positions in their new order; neighbours of one channel are repeated as one."""
    starts = np.flatnonzero(np.r_[True, line[1:] != line[:-1]])
    runs = np.split(np.arange(line.size), starts[1:])
    return np.concatenate([np.tile(run, copies[line[run[0]]]) for run in runs])


def _grow(layout: WideLayout, axis: ParamAxis, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    labels = axis.labels
    along, order = layout.order(labels)
    if labels.ndim == 1:
        return _grow_dim(layout, labels, order, value, axis.dim, generator)
    if along == 0:
        return value  # one input for each group: the rows grow along dimension 0
    height = value.shape[0] // labels.shape[0]
    grown = [
        _grow_dim(layout, labels[group], order[group], part, axis.dim, generator)
        for group, part in enumerate(torch.split(value, height))
    ]
    return torch.cat(grown)


def _grow_dim(
    layout: WideLayout,
    labels: IntArray,
    order: IntArray,
    value: torch.Tensor,
    dim: int,
    generator: torch.Generator,
) -> torch.Tensor:
    place = torch.from_numpy(order).to(value.device)
    grown = value.index_select(dim, place)
    consumed = (layout.analysis.roles[labels] & CONSUMER > 0)[order]
    counts = layout.copies[layout.classes[labels]][order]
    if not (consumed & (counts > 1)).any():
        return grown
    rows = grown.movedim(dim, 0)
    share = 1.0 / torch.from_numpy(np.where(consumed, counts, 1)).to(rows.device, torch.float64)
    share = share.view(-1, *(1,) * (rows.dim() - 1))
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows.device) * UNEVEN * share
    sums = torch.zeros(value.movedim(dim, 0).shape, dtype=torch.float64, device=rows.device)
    means = sums.index_add_(0, place, noise)[place] / torch.from_numpy(counts).to(share).view_as(share)
    spread = share + torch.where(torch.from_numpy(consumed).to(rows.device).view_as(share), noise - means, 0.0)
    return (rows.double() * spread).to(value.dtype).movedim(0, dim)
