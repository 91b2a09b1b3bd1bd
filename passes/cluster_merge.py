"""Cluster-merge: make the filters of a cluster identical, keep one, add up what reads the others.

With the channels of a group partitioned into clusters `H`, every producer and pointwise slice `F^(j)` of a channel is
replaced by the mean over its cluster, `F^(j) <- 1/|H(j)| sum_{k in H(j)} F^(k)`; then one channel per cluster is kept
and the consumers' input slices are summed, `W'_h = sum_{k in h} W_k`. Where the slices of a cluster were identical
before, nothing changes. `passes.centripetal` makes them so by training.

Source: Ding et al., "Manipulating Identical Filter Redundancy for Efficient Pruning on Deep and Complicated CNN"
(C-SGD): clusters in section 3.2, pacesetters and followers in section 3.5, the deviation is Eq. 7.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from graphzip.analysis.channels import Analysis, analyse
from graphzip.analysis.groups import ChannelGroup, ChannelGroups, channel_groups_of
from graphzip.errors import WeightsError
from graphzip.graph.trace import Traced
from graphzip.plan import ClusterMerge
from graphzip.rewrite.shrink import merge_channels
from passes.centripetal import attach
from passes.clustering import check_clustering, cluster
from passes.segments import Partition, Place, features_of, pull, rows_of, slices_of, squared_deviations
from passes.widths import Clusters, resolve

__all__ = ["ClusterMergePass"]

logger = logging.getLogger(__name__)


class ClusterMergePass:
    """`ClusterMerge` bound to a model: which channels of each group share a cluster is decided here."""

    stages = ("cluster_merge",)

    def __init__(self, options: ClusterMerge, traced: Traced, *, seed: int, where: str) -> None:
        check_clustering(options.clustering, f"{where}.clustering")
        self.options = options
        self.where = where
        self.left_plain: list[str] = []
        self.traced = traced
        self.analysis: Analysis = analyse(traced.graph)
        self.groups: ChannelGroups = channel_groups_of(traced, self.analysis)
        decided = resolve(options, self.groups, where=where)
        self.clusters: dict[str, Partition] = {}
        for name, width in decided.items():
            group = self.groups[name]
            if isinstance(width, Clusters):
                self.clusters[name] = width.clusters
            else:
                self.clusters[name] = _cluster(group, width.count, options.clustering, seed, traced)
            logger.info("%s: %d channels in %d clusters", name, group.size, len(self.clusters[name]))
        self._slices = slices_of(self.groups, self.clusters, traced)
        self._found: tuple[nn.Module, list[Place]] | None = None

    def convert(self, traced: Traced) -> Traced:
        self.collapse_(traced.module)
        merges = [
            (group.whole_blocks, group.channels, parts)
            for group, parts in ((self.groups[name], parts) for name, parts in self.clusters.items())
        ]
        result, self.left_plain = merge_channels(
            traced, self.analysis, merges, plain_norms=self.options.norms == "plain"
        )
        return result

    def collapse_(self, model: nn.Module) -> None:
        self.pull_(model, 1.0)

    def pull_(self, model: nn.Module, fraction: float) -> None:
        pull(self._places(model), fraction)

    def deviation(self, model: nn.Module) -> float:
        return sum(self.deviations(model).values())

    def deviations(self, model: nn.Module) -> dict[str, float]:
        return squared_deviations(self._places(model), list(self.clusters))

    @torch.no_grad()
    def residual(self, model: nn.Module) -> float:
        total = 0.0
        for _, rows in rows_of((place, 0) for place in self._places(model) if place.is_kernel):
            slices = [place.slices for place in rows.places]
            gone = np.concatenate([(each.owner >= 0) & (each.cluster != np.arange(each.owner.size)) for each in slices])
            chosen = torch.from_numpy(np.flatnonzero(gone)).to(rows.order.device)
            total += float(rows.gather(rows.tensors())[chosen].double().square().sum())
        return total

    def regularizer(self, model: nn.Module) -> torch.Tensor | None:
        return None

    def bind(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, steps: int | None) -> None:
        attach(optimizer, lambda: self._places(model), strength=self.options.strength, steps=steps, where=self.where)

    def state(self) -> torch.Tensor:
        """The number of the cluster of every channel, group after group: int64, (channels of all clustered groups)."""
        numbers = [np.zeros(0, dtype=np.int64)]
        for name, parts in self.clusters.items():
            group = np.empty(self.groups[name].size, dtype=np.int64)
            for number, part in enumerate(parts):
                group[list(part)] = number
            numbers.append(group)
        return torch.from_numpy(np.concatenate(numbers))

    def load_state(self, state: torch.Tensor) -> None:
        sizes = [self.groups[name].size for name in self.clusters]
        found = {}
        for (name, old), numbers in zip(self.clusters.items(), torch.split(state.cpu(), sizes), strict=True):
            _, number = np.unique(numbers.numpy(), return_inverse=True)
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
        if found != self.clusters:
            self.clusters = found
            self._slices, self._found = slices_of(self.groups, found, self.traced), None

    def widths(self) -> dict[str, tuple[int, int]]:
        return {name: (self.groups[name].size, len(parts)) for name, parts in self.clusters.items()}

    def summary(self) -> dict[str, Any]:
        clusters = {name: [list(part) for part in parts] for name, parts in self.clusters.items()}
        return {"clusters": clusters, "plain_norms": self.left_plain}

    def _places(self, model: nn.Module) -> list[Place]:
        """Every slice that the clusters tie together; the same list for the same model until the clusters change."""
        if self._found is None or self._found[0] is not model:
            self._found = model, [Place.of(model, slices) for slices in self._slices]
        return self._found[1]


def _cluster(group: ChannelGroup, count: int, how: str, seed: int, traced: Traced) -> Partition:
    """Cluster a group block by block on the flattened kernels of its first producer, the pacesetter."""
    features = features_of(group, traced) if how not in {"even", "imbalanced"} else np.zeros((group.size, 1))
    parts: list[tuple[int, ...]] = []
    for block in group.blocks:
        members = np.array(block)
        share = count // len(group.blocks)
        found = cluster(how, features[members], share, seed=seed, what=f"group {group.name!r}")
        parts.extend(tuple(members[part].tolist()) for part in found)
    return tuple(sorted(parts))
