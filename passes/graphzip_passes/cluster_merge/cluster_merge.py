"""Cluster-merge: make the filters of a cluster identical, keep one, add up what reads the others.

With the channels of a group partitioned into clusters `H`, every producer and pointwise slice `F^(j)` of a channel is
replaced by the mean over its cluster, `F^(j) <- 1/|H(j)| sum_{k in H(j)} F^(k)`; then one channel per cluster is kept
and the consumers' input slices are summed, `W'_h = sum_{k in h} W_k`. Where the slices of a cluster were identical
before, nothing changes. `graphzip_passes.parts.centripetal` makes them so by training.

Source: Ding et al., "Manipulating Identical Filter Redundancy for Efficient Pruning on Deep and Complicated CNN"
(C-SGD): clusters in section 3.2, pacesetters and followers in section 3.5, the deviation is Eq. 7.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from graphzip.analysis.channels import Analysis
from graphzip.analysis.groups import Analysed, ChannelGroup, ChannelGroups
from graphzip.calibration import Calibration, as_inputs
from graphzip.errors import PlanError, WeightsError
from graphzip.graph.batches import Given, shared
from graphzip.graph.interpreter import Values
from graphzip.graph.state import named_state, own_tensors
from graphzip.graph.traced import Traced
from graphzip.numeric.sharded import agreed, put
from graphzip.plan.passes import RECONSTRUCTION, ClusterMerge
from graphzip.progress import counted
from graphzip.report.outcome import CHANNELS_DIFFER, CHANNELS_LOST, Outcome
from graphzip.rewrite.layout import Layout, Merge
from graphzip.rewrite.merge import merge_channels
from graphzip.rewrite.params import spread_parameters
from graphzip_passes.base import ByTensor, Decision, PassContext, Weights, by_tensor, register_pass
from graphzip_passes.cluster_merge.activations import activations
from graphzip_passes.cluster_merge.elimination import elimination_orders, partition_of
from graphzip_passes.cluster_merge.variance import correct_variances_
from graphzip_passes.parts.by_tensor import held, refitted, shrunk, streams
from graphzip_passes.parts.centripetal import attach
from graphzip_passes.parts.clustering import check_clustering, cluster, cluster_view, is_viewing
from graphzip_passes.parts.compensation import Narrowed, Refit, refit
from graphzip_passes.parts.evidence import Evidence
from graphzip_passes.parts.group_view import GroupView
from graphzip_passes.parts.pacesetter import layers_in_front
from graphzip_passes.parts.score_pairs import groups_of_scores, score_pairs
from graphzip_passes.parts.slices import duplicates
from graphzip_passes.parts.tied_slices import Partition, Place, Slices, Tying, features_of, pull, rows_of, slices_of
from graphzip_passes.parts.widths import Clusters, WidthOptions, resolve

__all__ = ["ClusterMergePass", "Known", "cluster_merge", "known_of"]

logger = logging.getLogger(__name__)

Features = NDArray[np.floating[Any]]

_BLIND = {"even", "imbalanced"}


@dataclass(frozen=True)
class Known:
    """What is known of a model already, for one that is merged again and again.

    By group, and only where they are asked for: the `orders` of elimination, the `features` of its channels.
    """

    analysis: Analysis
    groups: ChannelGroups
    orders: Mapping[str, tuple[int, ...]]
    features: Mapping[str, Features]


@register_pass(ClusterMerge, decides=True, only_reads=True)
def cluster_merge(traced: Traced, options: ClusterMerge, context: PassContext) -> Decision:
    """Decide which channels share a cluster."""
    if context.calibration is not None and not traced.tasks:  # what a joint graph reads is not known
        options = options.for_data()
    merging = ClusterMergePass(
        options, traced, seed=context.seed, where=context.where, analysed=context.known, data=context.calibration
    )
    if merging.wants_data:
        merging.calibrate(context.graph_inputs())
    return Decision(merging.finish, constraint=merging)


class ClusterMergePass(Tying):
    """`ClusterMerge` bound to a model: which channels of each group share a cluster is decided here."""

    def __init__(
        self,
        options: ClusterMerge,
        traced: Traced,
        *,
        seed: int,
        where: str,
        known: Known | None = None,
        analysed: Analysed | None = None,
        data: Calibration | None = None,
    ) -> None:
        if options.clustering != RECONSTRUCTION:
            check_clustering(options.clustering, f"{where}.clustering")
        seen = options.clustering in {*_BLIND, RECONSTRUCTION} or is_viewing(options.clustering)
        if options.features != "weights" and seen:
            raise PlanError(
                f"{where}.features: {options.features!r} means nothing to clustering {options.clustering!r}; leave it "
                "out, or use clustering='kmeans'"
            )
        self.options, self.seed = options, seed
        self.where = where
        self.left_plain: list[str] = []
        self.traced = traced
        self.known = known
        found = known or analysed or Analysed.of(traced)
        self.analysis: Analysis = found.analysis
        self.groups: ChannelGroups = found.groups
        decided = resolve(_widths(options), self.groups, where=where)
        self.clusters: dict[str, Partition] = {}
        self.kept: dict[str, frozenset[int]] = {}
        self._batches: Given = ()
        self._refit: Refit | None = None
        self._corrected: list[str] = []
        counts = {name: width.count for name, width in decided.items() if not isinstance(width, Clusters)}
        self._to_order = counts if options.clustering == RECONSTRUCTION else {}
        self._to_compare = counts if options.features != "weights" else {}
        front, what = _front(options, traced), f"{where}.clustering: {options.clustering!r}"
        for name, width in decided.items():
            if isinstance(width, Clusters):
                self.clusters[name] = width.clusters
            else:
                how = self._first_clustering(name)
                seeing = _Seeing(how, seed, front, Evidence(traced, self.analysis, self.groups, data, seed, what))
                self.clusters[name] = seeing.clustered(self.groups[name], traced, width.count)
            logger.info("%s: %d channels in %d clusters", name, self.groups[name].size, len(self.clusters[name]))
        self._decide()

    def _first_clustering(self, name: str) -> str:
        """What clusters a group until data decides: the cheapest there is, where it is known that data will."""
        if self.known is not None and (name in self.known.orders or name in self.known.features):
            return "even"
        if name in self._turned and len(np.unique(duplicates(group := self.groups[name], self.traced))) == group.size:
            return "even"  # any channels will do, where none are alike
        return "kmeans" if name in self._to_order else self.options.clustering

    @cached_property
    def _turned(self) -> set[str]:
        """The groups of queries and keys, whose basis is changed."""
        if self.options.compensate != "data" or self.options.clustering != RECONSTRUCTION:
            return set()
        return groups_of_scores(score_pairs(self.traced, self.analysis), self.groups)

    def _decide(self) -> None:
        self._slices = slices_of(self.groups, self.clusters, self.traced)
        self._found = None

    @property
    def wants_data(self) -> bool:
        """Whether it makes use of calibration data."""
        options = self.options
        return options.compensate == "data" or options.clustering == RECONSTRUCTION or options.features != "weights"

    def calibrate(self, batches: Given) -> None:
        """Decide with the inputs of the graph on calibration data; raises `PlanError` where there are none."""
        if not batches:
            raise PlanError(_without_data(self.options, self.where))
        self._batches = batches
        names = [*self._to_order, *self._to_compare]
        known = self.known or known_of(
            self.options, self.traced, self.analysis, self.groups, names, batches, least=self._to_order
        )
        for name, count in self._to_order.items():
            if name in known.orders:
                self.clusters[name], kept = partition_of(self.groups[name], known.orders[name], count, self.traced)
                self.kept[name] = frozenset(kept)
        for name, count in self._to_compare.items():
            if name in known.features:
                features, how = known.features[name], self.options.clustering
                self.clusters[name] = _cluster(self.groups[name], features, count, how, self.seed)
        if self.known is None:
            self.clusters, self.kept = shared(batches).processes.agreed((self.clusters, self.kept))
        self._decide()

    def finish(self, traced: Traced, context: PassContext) -> Outcome:
        """Merge them."""
        identical = self._is_collapsed(traced.module)
        return self.outcome(self._slim(traced) if identical else self.convert(traced), identical=identical)

    def outcome(self, result: Traced, *, identical: bool, fitted: Refit | None = None) -> Outcome:
        """What came of it: the slimmer model, of clusters that were `identical` or not, and what was `fitted`."""
        self._refit = fitted or self._refit
        widths = {name: (self.groups[name].size, len(parts)) for name, parts in self.clusters.items()}
        exact = not self.left_plain and all(self.groups[name].exact for name in self.clusters)
        return Outcome(
            result,
            lossless=exact and identical,
            loss=CHANNELS_DIFFER if exact else CHANNELS_LOST,
            proven=True,
            widths=widths,
            details=self._details(),
        )

    def convert(self, traced: Traced) -> Traced:
        """The slimmer model, which stands for `traced` as the options say."""
        if self.options.compensate != "data" or self._is_collapsed(traced.module):
            return self._slim(traced)
        return self._fitted(traced).traced

    @torch.no_grad()
    def collapse_(self, model: nn.Module) -> None:
        """Give `model` the outputs that the slimmer one will have, with equal channels in every cluster.

        With `compensate="data"` consumers are fitted as `convert` would fit them. The graph has the tensors of `model`.
        """
        if self._is_collapsed(model):
            return
        if self.options.compensate == "data":
            merged = self._fitted(self.traced)
            found = spread_parameters(merged.layout, _first_names(merged.traced))
        else:
            self._centre(self.traced)
            found = _first_names(self.traced)
        held = dict(named_state(model))
        for name, value in found.items():
            if name in held:
                put(held[name], value)

    def _is_collapsed(self, model: nn.Module) -> bool:
        """Whether the channels of every cluster are equal, so that nothing is to make up for; `meta` ones are not."""
        found = ((rows, rows.gather(rows.tensors())) for _, rows in rows_of((at, 0) for at in self._places(model)))
        return all(
            not values.is_meta and agreed(torch.equal(values, rows.first(values)), [rows.places[0].tensor])
            for rows, values in found
        )

    def _fitted(self, traced: Traced) -> Narrowed:
        """The slimmer model, compensated with data; `traced` stays as it is."""
        merged = self.merged(traced)
        batches = shared(self._batches).mapped(lambda batch: as_inputs(batch, traced))
        old, new = (Values(each, batches) for each in (traced, merged.traced))
        self._refit = refit(old, new, merged)
        return merged

    @torch.no_grad()
    def _slim(self, traced: Traced, *, proven: bool = True) -> Traced:
        """The slimmer model; `traced` is left with every channel at its centre."""
        self._centre(traced)
        merges = [self._merge(name) for name in self.clusters]
        plain = self.options.norms == "plain"
        result, self.left_plain = merge_channels(traced, self.analysis, merges, plain_norms=plain, proven=proven)
        return result

    @torch.no_grad()
    def merged(self, traced: Traced, *, proven: bool = True) -> Narrowed:
        """The slimmer model before it is compensated with data; `traced` stays as it is."""
        with own_tensors(traced.module):
            result = self._slim(traced, proven=proven)
        merges = [self._merge(name) for name in self.clusters]
        means = [self._merge(name) for name in self.clusters if name not in self.kept]
        turns = self.options.clustering == RECONSTRUCTION
        return Narrowed(result, Layout.of(self.analysis, merges), Layout.of(self.analysis, means), turns)

    def _centre(self, traced: Traced) -> None:
        """Set the channels of a cluster to the one that was chosen to stay; where none was, to their mean."""
        chosen = slices_of(self.groups, {name: self._keepers_first(name) for name in self.kept}, traced)
        for place in (Place.of(traced.module, slices) for slices in chosen):
            source = torch.from_numpy(place.slices.cluster).to(place.tensor.device)
            place.tensor.copy_(place.tensor.index_select(place.slices.dim, source))
        if self.options.compensate == "free":
            self._corrected = correct_variances_(traced, self._slices, lambda: self.pull_(traced.module, 1.0))
        else:
            self.pull_(traced.module, 1.0)

    def layout(self) -> Layout:
        """Where the channels that stay are when the clusters are merged."""
        merges = [self._merge(name) for name in self.clusters]
        return Layout.of(self.analysis, merges, plain_norms=self.options.norms == "plain")

    def centred(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The value of a parameter or buffer with the slices of every cluster at their mean."""
        tied = [each for each in self._slices if each.name == name]
        if not tied:
            return value
        holder = {name: value.clone()}
        pull([Place(holder, name, each) for each in tied], 1.0)
        return holder[name]

    def _merge(self, name: str) -> Merge:
        group = self.groups[name]
        return group.whole_blocks, group.channels, self._keepers_first(name)

    def _keepers_first(self, name: str) -> Partition:
        """The clusters of a group, each with the channel first that stays."""
        kept = self.kept.get(name, frozenset())
        return tuple(
            tuple(sorted(part, key=lambda channel: (channel not in kept, channel))) for part in self.clusters[name]
        )

    @torch.no_grad()
    def residual(self, model: nn.Module) -> float:
        total = 0.0
        for _, rows in rows_of((place, 0) for place in self._places(model) if place.is_kernel):
            gone = rows.of_each(lambda each: (each.owner >= 0) & (each.cluster != np.arange(each.owner.size)))
            squares = rows.gather(rows.tensors()).double().square().sum(1)
            total += float(rows.by_owner(squares, gone.astype(np.int64) - 1, 1)[0])
        return total

    def bind(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, steps: int | None) -> None:
        strength = self.options.strength
        if strength != "auto" and self._is_collapsed(model):
            steps = None  # however short the training is, nothing has to be drawn together
        in_gradient = self.options.pull == "gradient"
        if in_gradient and strength == "auto":
            raise PlanError(
                f"{self.where}.pull: strength 'auto' brings filters together in the planned steps, which a pull inside "
                "the gradient cannot promise; use pull='decoupled', or write a strength, such as the paper's 0.003"
            )
        places = partial(self._places, model)
        attach(optimizer, places, strength=strength, steps=steps, where=self.where, in_gradient=in_gradient)

    def state(self) -> torch.Tensor:
        """The number of the cluster of every channel, group after group: int64, (channels of all clustered groups).

        Where channels were chosen to stay, it is `-1 - number` for those that go.
        """
        numbers = [np.zeros(0, dtype=np.int64)]
        for name, parts in self.clusters.items():
            group = np.empty(self.groups[name].size, dtype=np.int64)
            channels = [channel for part in parts for channel in part]
            group[channels] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            if name in self.kept:
                goes = ~np.isin(np.arange(group.size), list(self.kept[name]))
                group[goes] = -1 - group[goes]
            numbers.append(group)
        return torch.from_numpy(np.concatenate(numbers))

    def load_state(self, state: torch.Tensor) -> None:
        sizes = [self.groups[name].size for name in self.clusters]
        found, kept = {}, {}
        for (name, old), numbers in zip(self.clusters.items(), torch.split(state.cpu(), sizes), strict=True):
            told = numbers.numpy()
            if (told < 0).any() or name in self.kept:
                kept[name] = frozenset(np.flatnonzero(told >= 0).tolist())
            _, number = np.unique(np.where(told < 0, -1 - told, told), return_inverse=True)
            parts = tuple(sorted(tuple(np.flatnonzero(number == n).tolist()) for n in range(int(number.max()) + 1)))
            blocks = [
                sorted(sum(part[0] in block for part in each) for block in self.groups[name].blocks)
                for each in (old, parts)
            ]
            if len(parts) != len(old) or blocks[0] != blocks[1]:
                raise WeightsError(
                    f"group {name!r}: the loaded state has {len(parts)} clusters, the plan {len(old)}; prepare the "
                    "model with the plan that the checkpoint was made with"
                )
            found[name] = parts
        if (found, kept) != (self.clusters, self.kept):
            self.clusters, self.kept = found, kept
            self._decide()

    def _details(self) -> dict[str, Any]:
        clusters = {name: [list(part) for part in parts] for name, parts in self.clusters.items()}
        found: dict[str, Any] = {"clusters": clusters, "plain_norms": self.left_plain}
        if self.kept:
            found["kept"] = {name: sorted(kept) for name, kept in self.kept.items()}
        if self._refit is not None:
            found |= {"fitted": list(self._refit.fitted), "not_fitted": dict(self._refit.left)}
        if self._corrected:
            found["variances_corrected"] = self._corrected
        return found

    def _tied(self) -> Iterable[Slices]:
        return self._slices


@by_tensor(ClusterMerge)
def merge_by_tensor(traced: Traced, options: ClusterMerge, context: PassContext, weights: Weights) -> ByTensor:
    """Cluster a group at a time, merge slices of a parameter at a time, and re-fit a layer at a time.

    Raises `PlanError` for what looks at several layers together.
    """
    if context.calibration is not None:
        options = options.for_data()
    for key, wrong, instead in (
        ("compensate", {"free"}, "'none' or 'data'"),
        ("features", {"activations", "both"}, "'weights'"),
        ("clustering", {RECONSTRUCTION}, "'kmeans'"),
    ):
        if (value := getattr(options, key)) in wrong:
            raise PlanError(f"{context.where}.{key}: {value!r} looks at several layers together; write {instead}")
    known = context.known or Analysed.of(traced)
    what = f"{context.where}.clustering: {options.clustering!r}"
    evidence = Evidence(traced, known.analysis, known.groups, context.calibration, context.seed, what)
    evidence.streams = streams(context, weights)
    seeing = _Seeing(options.clustering, context.seed, _front(options, traced), evidence)
    clusters: dict[str, Partition] = {}
    widths = resolve(_widths(options), known.groups, where=context.where)
    for name, width in counted(widths.items(), "clustering", widths):
        group = known.groups[name]
        if isinstance(width, Clusters):
            clusters[name] = width.clusters
            continue
        check_clustering(options.clustering, f"{context.where}.clustering")
        with held(traced, group, weights):
            clusters[name] = seeing.clustered(group, traced, width.count)
    found = options.model_copy(update={"clusters": clusters, "keep": {}})
    merging = ClusterMergePass(found, traced, seed=context.seed, where=context.where, analysed=known)
    slim = shrunk(merging.layout(), weights, merging.centred)
    if options.compensate != "data" or not clusters:
        return ByTensor(merging.finish(traced, context), slim)
    batches = context.graph_inputs()
    if not batches:
        raise PlanError(_without_data(options, context.where))
    merged = merging.merged(traced)
    fitted, slim = refitted(traced, merged, (weights, slim), context, batches)
    return ByTensor(merging.outcome(merged.traced, identical=False, fitted=fitted), slim)


def _widths(options: ClusterMerge) -> WidthOptions:
    return WidthOptions(options.keep, options.exclude, options.round_to, options.clusters, options.min_width)


@dataclass(frozen=True)
class _Seeing:
    """What a clustering `how` is given of a group; `front` as in `pacesetter_of`."""

    how: str
    seed: int
    front: dict[str, int] | None
    evidence: Evidence

    def clustered(self, group: ChannelGroup, traced: Traced, count: int) -> Partition:
        """Cluster a group by what the graph has of it."""
        if is_viewing(self.how):
            return _cluster(group, GroupView(group, self.evidence), count, self.how, self.seed)
        rows = np.zeros((group.size, 1)) if self.how in _BLIND else features_of(group, traced, self.front)
        return _cluster(group, rows, count, self.how, self.seed)


def _front(options: ClusterMerge, traced: Traced) -> dict[str, int] | None:
    return layers_in_front(traced) if options.pacesetter == "projection" else None


def _first_names(traced: Traced) -> dict[str, torch.Tensor]:
    """Every tensor of a graph under the first of its names."""
    return {name: value for name, value in named_state(traced.module) if name not in traced.aliases}


def known_of(
    options: ClusterMerge,
    traced: Traced,
    analysis: Analysis,
    groups: ChannelGroups,
    names: Collection[str],
    batches: Given,
    *,
    least: Mapping[str, int] | None = None,
) -> Known:
    """What calibration data says of the named groups, as far as the options ask for it.

    `least` has, by group, how few of its channels stay at least, where that is known.
    """
    orders, features = {}, {}
    if options.clustering == RECONSTRUCTION:
        orders = elimination_orders(traced, groups, batches, list(names), least)
    if options.features != "weights":
        features = activations(traced, groups, batches, names, with_kernels=options.features == "both")
    return Known(analysis, groups, orders, features)


def _without_data(options: ClusterMerge, where: str) -> str:
    """What is said where there is no calibration data: the option that needs it, and the way out."""
    if options.compensate == "data":
        key, way_out = "compensate: 'data'", "compensate='free'"
    elif options.clustering == RECONSTRUCTION:
        key, way_out = f"clustering: {RECONSTRUCTION!r}", "clustering='kmeans'"
    else:
        key, way_out = f"features: {options.features!r}", "features='weights'"
    return f"{where}.{key} needs calibration data; pass calibration=, a list of batches, or use {way_out}"


def _cluster(group: ChannelGroup, features: Features | GroupView, count: int, how: str, seed: int) -> Partition:
    """Cluster a group block by block on a row of features per channel, or on a view of it."""
    parts: list[tuple[int, ...]] = []
    for block in group.blocks:
        share = count // len(group.blocks)
        what = f"group {group.name!r}"
        if isinstance(features, GroupView):
            parts.extend(map(tuple, cluster_view(how, features, block, share, seed=seed, what=what)))
            continue
        found = cluster(how, features[np.array(block)], share, seed=seed, what=what)
        parts.extend(tuple(block[place] for place in part) for part in found)
    return tuple(sorted(parts))
