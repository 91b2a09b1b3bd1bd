"""Narrow groups to given widths as the pass does whose widths are found: by merging channels, or by pruning them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from graphzip.analysis.groups import ChannelGroup
from graphzip.graph.traced import Traced
from graphzip.plan.passes import ClusterMerge, PruneChannels
from graphzip_passes.base import PassContext
from graphzip_passes.cluster_merge.cluster_merge import ClusterMergePass, Known
from graphzip_passes.parts.compensation import Narrowed
from graphzip_passes.prune.prune_channels import PruneChannelsPass
from graphzip_passes.prune.ranking import FloatArray

__all__ = ["Merging", "Narrowing", "Narrows", "Pruning"]

Narrows = ClusterMerge | PruneChannels


class Narrowing(ABC):
    """A pass that is carried out again and again, at other widths each time; the model stays as it is."""

    def __init__(self, options: Narrows, traced: Traced) -> None:
        self.options, self.traced = options, traced

    @property
    def refits(self) -> bool:
        """Whether what is left is re-fitted on calibration data."""
        return self.options.compensate == "data"

    @abstractmethod
    def group(self, name: str) -> ChannelGroup:
        """The group of that name."""

    @abstractmethod
    def narrowed(self, widths: Mapping[str, int]) -> Narrowed:
        """The slimmer model before anything is re-fitted."""

    @abstractmethod
    def carried_out(self, widths: Mapping[str, int]) -> Traced:
        """The slimmer model as the options say."""

    def _at(self, widths: Mapping[str, int]) -> dict[str, Any]:
        return self.options.to_dict() | {"keep": dict(widths), "round_to": 1}


class Merging(Narrowing):
    """By `ClusterMerge`; `known` is what calibration data says, once and for all."""

    options: ClusterMerge

    def __init__(
        self, options: ClusterMerge, traced: Traced, known: Known, batches: Sequence[tuple[Any, ...]], seed: int
    ) -> None:
        super().__init__(options, traced)
        self.known, self.batches, self.seed = known, batches, seed

    def group(self, name: str) -> ChannelGroup:
        return self.known.groups[name]

    def narrowed(self, widths: Mapping[str, int]) -> Narrowed:
        return self._bound(widths).merged(self.traced)

    def carried_out(self, widths: Mapping[str, int]) -> Traced:
        merging = self._bound(widths)
        return merging.convert(self.traced) if self.refits else merging.merged(self.traced).traced

    def _bound(self, widths: Mapping[str, int]) -> ClusterMergePass:
        options = ClusterMerge(**self._at(widths))
        found = ClusterMergePass(options, self.traced, seed=self.seed, where="cluster_merge", known=self.known)
        if found.wants_data:
            found.calibrate(self.batches)
        return found


class Pruning(Narrowing):
    """By `PruneChannels`; channels are scored once."""

    options: PruneChannels

    def __init__(self, options: PruneChannels, traced: Traced, context: PassContext) -> None:
        super().__init__(options, traced)
        self.context = context

    def group(self, name: str) -> ChannelGroup:
        assert self.context.known is not None
        return self.context.known.groups[name]

    def narrowed(self, widths: Mapping[str, int]) -> Narrowed:
        return self._bound(widths).narrowed(self.traced)

    def carried_out(self, widths: Mapping[str, int]) -> Traced:
        return self._bound(widths).finish(self.traced, self.context).traced

    def _bound(self, widths: Mapping[str, int]) -> PruneChannelsPass:
        return PruneChannelsPass(PruneChannels(**self._at(widths)), self.traced, self.context, scores=self._scores)

    @cached_property
    def _scores(self) -> dict[str, FloatArray]:
        """Those of every group that may shrink."""
        return PruneChannelsPass(self.options, self.traced, self.context).scores
