"""Prune channels: the small ones go, instead of being made identical. The baselines that C-SGD is compared with.

Which channels go is decided when the pass is made: in every block of a group those whose pacesetter kernels have the
smallest sum of absolute values (Li et al., "Pruning Filters for Efficient ConvNets", 2017). With a `strength` their
kernels are drawn to zero while the model trains, by group lasso (Wen et al., "Learning Structured Sparsity in Deep
Neural Networks", 2016), a term of the loss:

    strength * sum over layers and channels j to go of ||K_j||_2.

What is left of them is the sum of squared kernel residuals, `phi = sum ||K_j||^2` (Ding et al., "Manipulating Identical
Filter Redundancy ...", Eq. 22).
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from graphzip.analysis.channels import Analysis, analyse
from graphzip.analysis.groups import ChannelGroup, channel_groups_of
from graphzip.graph.torch_private import foreach_copy_
from graphzip.graph.trace import Traced
from graphzip.labels import IntArray
from graphzip.plan import ClusterMerge, PruneChannels
from graphzip.rewrite.shrink import drop_channels
from graphzip_passes.segments import Place, Rows, features_of, rows_of, slices_of
from graphzip_passes.widths import resolve

__all__ = ["PruneChannelsPass"]

logger = logging.getLogger(__name__)

_TINY = 1e-12  # keeps the gradient of a norm finite at zero


class PruneChannelsPass:
    """`PruneChannels` bound to a model: which channels of each group go is decided here."""

    stages = ("prune_channels",)

    def __init__(self, options: PruneChannels, traced: Traced, *, seed: int, where: str) -> None:
        self.options = options
        self.traced = traced
        self.analysis: Analysis = analyse(traced.graph)
        self.groups = channel_groups_of(traced, self.analysis)
        widths = ClusterMerge(keep=options.keep, exclude=options.exclude, round_to=options.round_to)
        decided = resolve(widths, self.groups, where=where)
        self.gone: dict[str, tuple[int, ...]] = {}
        for name, width in decided.items():
            self.gone[name] = _smallest(self.groups[name], width.count, traced)
            logger.info("%s: %d of %d channels go", name, len(self.gone[name]), self.groups[name].size)
        self._decide()

    def _decide(self) -> None:
        singles = {name: tuple((channel,) for channel in gone) for name, gone in self.gone.items()}
        self._slices = slices_of(self.groups, singles, self.traced)

    def convert(self, traced: Traced) -> Traced:
        drops = []
        for name, gone in self.gone.items():
            group = self.groups[name]
            drops.append((group.whole_blocks, group.channels, _parts(group, gone)))
        return drop_channels(traced, self.analysis, drops)

    def collapse_(self, model: nn.Module) -> None:
        self.pull_(model, 1.0)

    @torch.no_grad()
    def pull_(self, model: nn.Module, fraction: float) -> None:
        for rows, chosen, _ in self._rows(model, kernels=False):
            tensors = rows.tensors()
            values = rows.gather(tensors)
            values[chosen] *= 1.0 - fraction
            foreach_copy_(tensors, rows.parts(values, tensors))

    def deviation(self, model: nn.Module) -> float:
        return self.residual(model)

    @torch.no_grad()
    def deviations(self, model: nn.Module) -> dict[str, float]:
        total = np.zeros(len(self.gone))
        for rows, chosen, owner in self._rows(model, kernels=True):
            squares = rows.gather(rows.tensors())[chosen].double().square().sum(1).cpu().numpy()
            total += np.bincount(owner, weights=squares, minlength=total.size)
        return dict(zip(self.gone, total.tolist(), strict=True))

    def residual(self, model: nn.Module) -> float:
        return sum(self.deviations(model).values())

    def regularizer(self, model: nn.Module) -> torch.Tensor | None:
        if not self.options.strength:
            return None
        terms = [
            (rows.gather([place.tensor for place in rows.places])[chosen].square().sum(1) + _TINY).sqrt().sum()
            for rows, chosen, _ in self._rows(model, kernels=True)
        ]
        return self.options.strength * torch.stack(terms).sum() if terms else None

    def bind(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, steps: int | None) -> None:
        """The loss term does the work."""

    def state(self) -> torch.Tensor:
        """One where a channel goes and zero where it stays, group after group."""
        flags = [np.isin(np.arange(self.groups[name].size), gone) for name, gone in self.gone.items()]
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *flags]).astype(np.int64))

    def load_state(self, state: torch.Tensor) -> None:
        parts = torch.split(state.cpu(), [self.groups[name].size for name in self.gone])
        self.gone = {
            name: tuple(np.flatnonzero(part.numpy()).tolist()) for name, part in zip(self.gone, parts, strict=True)
        }
        self._decide()

    def widths(self) -> dict[str, tuple[int, int]]:
        return {name: (self.groups[name].size, self.groups[name].size - len(gone)) for name, gone in self.gone.items()}

    def summary(self) -> dict[str, Any]:
        return {"dropped": {name: list(gone) for name, gone in self.gone.items()}}

    def _rows(self, model: nn.Module, *, kernels: bool) -> list[tuple[Rows, torch.Tensor, IntArray]]:
        """Matrices of slices, the rows of channels that go, and the number of the group of each of those rows."""
        places = [Place.of(model, slices) for slices in self._slices]
        found = []
        for _, rows in rows_of((place, 0) for place in places if place.is_kernel or not kernels):
            owner = np.concatenate([place.slices.owner for place in rows.places])
            chosen = np.flatnonzero(owner >= 0)
            found.append((rows, torch.from_numpy(chosen).to(rows.order.device), owner[chosen]))
        return found


def _smallest(group: ChannelGroup, count: int, traced: Traced) -> tuple[int, ...]:
    """The channels that go: in every block the same number, those with the smallest sums of absolute values."""
    size = np.abs(features_of(group, traced)).sum(axis=1)
    share = count // len(group.blocks)
    gone = [
        np.array(block)[np.argsort(size[list(block)], kind="stable")[: len(block) - share]] for block in group.blocks
    ]
    return tuple(sorted(np.concatenate(gone).tolist()))


def _parts(group: ChannelGroup, gone: tuple[int, ...]) -> list[list[int]]:
    """A partition in which every channel that goes is behind one of its block that stays."""
    parts = []
    for block in group.blocks:
        stay = [channel for channel in block if channel not in gone]
        parts += [[stay[0], *(channel for channel in block if channel in gone)], *([channel] for channel in stay[1:])]
    return parts
