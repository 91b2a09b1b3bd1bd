"""Narrow groups to given widths, and layers to given ranks, as the passes do for which these are found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from graphzip.analysis.channels import Analysis
from graphzip.analysis.groups import ChannelGroup
from graphzip.calibration import Calibration
from graphzip.graph.batches import Given
from graphzip.graph.interpreter import Values
from graphzip.graph.traced import Traced
from graphzip.plan.passes import ClusterMerge, LowRank, PruneChannels
from graphzip.rewrite.layout import Layout
from graphzip.study.cost_model import ThinLayers
from graphzip_passes.base import PassContext
from graphzip_passes.cluster_merge.cluster_merge import ClusterMergePass, Known
from graphzip_passes.low_rank.low_rank import Cuttable, factorised, low_rank
from graphzip_passes.parts.clustering import is_viewing
from graphzip_passes.parts.compensation import Effort, Narrowed, refit
from graphzip_passes.prune.prune_channels import PruneChannelsPass
from graphzip_passes.prune.ranking import FloatArray

__all__ = ["Factorising", "Merging", "Mixed", "Narrowing", "Narrows", "Pruning", "RankedLayer"]

Narrows = ClusterMerge | PruneChannels


@dataclass(frozen=True)
class RankedLayer:
    """A layer whose rank is found: `ranks` it may have, ascending. Of its `size` parts all are there while it is dense;
    of a thin one as many as its rank, so that `size - rank` are gone (`graphzip.study.cost_model`).
    """

    found: Cuttable
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        """What it is called beside groups, which may have the layer's name."""
        return f"{self.found.name} (rank)"

    @property
    def size(self) -> int:
        return 2 * self.found.full

    @property
    def gone(self) -> tuple[int, ...]:
        """How many parts may go, 0 first, ascending."""
        return (0, *(self.size - rank for rank in reversed(self.ranks)))

    @property
    def thin(self) -> ThinLayers:
        """What it costs."""
        return ThinLayers(self.found.layer.name, self.found.full, self.found.macs, self.found.params)

    @property
    def lost(self) -> dict[int, float]:
        """By rank the share of its energy that is gone."""
        return {rank: self.found.spectrum.lost(rank) for rank in self.ranks}


class Narrowing(ABC):
    """A pass that is carried out again and again, at other widths each time; the model stays as it is."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced

    @property
    @abstractmethod
    def refits(self) -> bool:
        """Whether what is left is re-fitted on calibration data."""

    def ready(self) -> bool:
        """Find out what is asked of the calibration data; whether `narrowed` asks nothing of it any more then."""
        return True

    @abstractmethod
    def params(self, name: str, *roles: str) -> set[str]:
        """The tensors of the graph in which something of this name has one of these roles."""

    @abstractmethod
    def narrowed(self, widths: Mapping[str, int]) -> Narrowed:
        """The slimmer model before anything is re-fitted."""

    @abstractmethod
    def carried_out(self, widths: Mapping[str, int]) -> Traced:
        """The slimmer model as the options say."""

    def fitted(self, widths: Mapping[str, int], batches: Given, effort: Effort) -> Traced:
        """The slimmer model, re-fitted on these inputs of the graph where the options say so."""
        found = self.narrowed(widths)
        if self.refits:
            old, new = (Values(each, batches) for each in (self.traced, found.traced))
            refit(old, new, found, effort=effort)
        return found.traced


class _OfChannels(Narrowing):
    """Of groups of channels."""

    def __init__(self, options: Narrows, traced: Traced) -> None:
        super().__init__(traced)
        self.options = options

    @property
    def refits(self) -> bool:
        return self.options.compensate == "data"

    @abstractmethod
    def group(self, name: str) -> ChannelGroup:
        """The group of that name."""

    def params(self, name: str, *roles: str) -> set[str]:
        return {self.traced.local(each.param) for each in self.group(name).params if each.role in roles}

    def _at(self, widths: Mapping[str, int]) -> dict[str, Any]:
        return self.options.to_dict() | {"keep": dict(widths), "round_to": 1}


class Merging(_OfChannels):
    """By `ClusterMerge`; `known` is what calibration data says, once and for all."""

    options: ClusterMerge

    def __init__(
        self,
        options: ClusterMerge,
        traced: Traced,
        known: Known,
        batches: Given,
        seed: int,
        data: Calibration | None = None,
    ) -> None:
        super().__init__(options, traced)
        self.known, self.batches, self.seed, self.data = known, batches, seed, data

    def ready(self) -> bool:
        return not is_viewing(self.options.clustering)

    def group(self, name: str) -> ChannelGroup:
        return self.known.groups[name]

    def narrowed(self, widths: Mapping[str, int]) -> Narrowed:
        return self._bound(widths).merged(self.traced, proven=False)

    def carried_out(self, widths: Mapping[str, int]) -> Traced:
        merging = self._bound(widths)
        return merging.convert(self.traced) if self.refits else merging.merged(self.traced).traced

    def _bound(self, widths: Mapping[str, int]) -> ClusterMergePass:
        options = ClusterMerge(**self._at(widths))
        found = ClusterMergePass(
            options, self.traced, seed=self.seed, where="cluster_merge", known=self.known, data=self.data
        )
        if found.wants_data:
            found.calibrate(self.batches)
        return found


class Pruning(_OfChannels):
    """By `PruneChannels`; channels are scored once."""

    options: PruneChannels

    def __init__(self, options: PruneChannels, traced: Traced, context: PassContext) -> None:
        super().__init__(options, traced)
        self.context = context

    def ready(self) -> bool:
        _ = self._scores
        return True

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


class Factorising(Narrowing):
    """By `LowRank`; `layers` have the names that ranks are given for, `batches` are what layers give values on."""

    def __init__(
        self,
        options: LowRank,
        traced: Traced,
        analysis: Analysis,
        context: PassContext,
        layers: Mapping[str, RankedLayer],
        batches: Given,
    ) -> None:
        super().__init__(traced)
        self.options, self.analysis, self.context = options, analysis, context
        self.layers, self.batches = layers, batches

    @property
    def refits(self) -> bool:
        return self.options.compensate != "none" and self.context.calibration is not None

    def params(self, name: str, *roles: str) -> set[str]:
        return {self.layers[name].found.layer.name} if "consumer" in roles else set()

    def narrowed(self, widths: Mapping[str, int]) -> Narrowed:
        nothing = Layout.of(self.analysis, [])
        return Narrowed(self._cut(widths, self.batches), nothing, nothing)

    def carried_out(self, widths: Mapping[str, int]) -> Traced:
        return low_rank(self.traced, self.at(widths), self.context).traced

    def fitted(self, widths: Mapping[str, int], batches: Given, effort: Effort) -> Traced:
        found, nothing = self._cut(widths, batches), Layout.of(self.analysis, [])
        if self.refits and found is not self.traced:
            old, new = (Values(each, batches) for each in (self.traced, found))
            refit(old, new, Narrowed(found, nothing, nothing), effort=effort)
        return found

    def at(self, widths: Mapping[str, int]) -> LowRank:
        """The options with ranks for all layers that are not dense."""
        chosen = {self.layers[name]: width for name, width in widths.items() if name in self.layers}
        ranks = {layer.found.name: width for layer, width in chosen.items() if width < layer.size}
        return self.options.model_copy(update={"rank": ranks})

    def of(self, traced: Traced) -> Factorising:
        """The same of a model with other widths."""
        context = replace(self.context, known=None)
        return Factorising(self.options, traced, self.analysis, context, self.layers, self.batches)

    def _cut(self, widths: Mapping[str, int], batches: Given) -> Traced:
        return factorised(self.traced, self.at(widths), self.context.where, batches)


class Mixed(Narrowing):
    """Widths first, and then ranks of what is left."""

    def __init__(self, channels: Narrowing, ranks: Factorising) -> None:
        super().__init__(channels.traced)
        self.channels, self.ranks = channels, ranks

    @property
    def refits(self) -> bool:
        return self.channels.refits or self.ranks.refits

    def ready(self) -> bool:
        return self.channels.ready() and self.ranks.ready()

    def params(self, name: str, *roles: str) -> set[str]:
        return self._own(name).params(name, *roles)

    def narrowed(self, widths: Mapping[str, int]) -> Narrowed:
        """Of one group, or of one layer."""
        ((name, width),) = widths.items()
        return self._own(name).narrowed({name: width})

    def carried_out(self, widths: Mapping[str, int]) -> Traced:
        return self.ranks.of(self.channels.carried_out(self._groups(widths))).carried_out(widths)

    def fitted(self, widths: Mapping[str, int], batches: Given, effort: Effort) -> Traced:
        return self.ranks.of(self.channels.fitted(self._groups(widths), batches, effort)).fitted(
            widths, batches, effort
        )

    def _own(self, name: str) -> Narrowing:
        return self.ranks if name in self.ranks.layers else self.channels

    def _groups(self, widths: Mapping[str, int]) -> dict[str, int]:
        return {name: width for name, width in widths.items() if name not in self.ranks.layers}
