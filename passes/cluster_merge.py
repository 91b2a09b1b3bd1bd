"""Cluster-merge: make the filters of a cluster identical, keep one, add up what reads the others.

With the channels of a group partitioned into clusters `H`, every producer and pointwise slice `F^(j)` of a channel is
replaced by the mean over its cluster, `F^(j) <- 1/|H(j)| sum_{k in H(j)} F^(k)`; then one channel per cluster is kept
and the consumers' input slices are summed, `W'_h = sum_{k in h} W_k`. Where the slices of a cluster were identical
before, nothing changes.

Source: Ding et al., "Manipulating Identical Filter Redundancy for Efficient Pruning on Deep and Complicated CNN"
(C-SGD): clusters in section 3.2, pacesetters and followers in section 3.5, the deviation is Eq. 7.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from graphzip.analysis.channels import Analysis, analyse
from graphzip.analysis.groups import ChannelGroup, ChannelGroups, GroupParam, channel_groups_of
from graphzip.errors import WeightsError
from graphzip.graph.state import get_tensor
from graphzip.graph.trace import Traced
from graphzip.plan import ClusterMerge
from graphzip.rewrite.shrink import merge_channels
from passes.clustering import check_clustering, cluster
from passes.widths import Clusters, resolve

__all__ = ["ClusterMergePass"]

logger = logging.getLogger(__name__)

Partition = tuple[tuple[int, ...], ...]


class ClusterMergePass:
    """`ClusterMerge` bound to a model: which channels of each group share a cluster is decided here."""

    stages = ("cluster_merge",)

    def __init__(self, options: ClusterMerge, traced: Traced, *, seed: int, where: str) -> None:
        check_clustering(options.clustering, f"{where}.clustering")
        self.options = options
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

    @torch.no_grad()
    def pull_(self, model: nn.Module, fraction: float) -> None:
        for tensor, part in self._members(model):
            rows = part.rows(tensor)
            centre = part.centres(rows)
            moved = centre if fraction == 1.0 else torch.lerp(rows, centre, fraction)
            tensor.index_copy_(part.dim, part.positions.to(tensor.device), part.columns(tensor, moved))

    @torch.no_grad()
    def deviation(self, model: nn.Module) -> float:
        total = 0.0
        for tensor, part in self._members(model):
            if part.is_kernel and tensor.dim() > 1:
                rows = part.rows(tensor).double()
                total += float((rows - part.centres(rows)).square().sum())
        return total

    def widths(self) -> dict[str, tuple[int, int]]:
        return {name: (self.groups[name].size, len(parts)) for name, parts in self.clusters.items()}

    def summary(self) -> dict[str, Any]:
        clusters = {name: [list(part) for part in parts] for name, parts in self.clusters.items()}
        return {"clusters": clusters, "plain_norms": self.left_plain}

    def _members(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, _Members]]:
        """Every slice that the clusters tie together, parameter by parameter."""
        prefix = f"{self.traced.scope}." if self.traced.scope else ""
        for name, parts in self.clusters.items():
            for param in self.groups[name].params:
                if param.role != "consumer":
                    tensor = get_tensor(model, param.param.removeprefix(prefix))
                    if tensor.is_floating_point():
                        yield tensor, _Members.of(param, parts)


@dataclass(frozen=True)
class _Members:
    """The slices of one parameter that belong to clustered channels, and the cluster of each."""

    dim: int
    positions: torch.Tensor
    segment: torch.Tensor
    counts: torch.Tensor
    is_kernel: bool

    @classmethod
    def of(cls, param: GroupParam, parts: Partition) -> _Members:
        width = param.indices.shape[1]
        shared = [part for part in parts if len(part) > 1]
        channels = np.array([channel for part in shared for channel in part], dtype=np.int64)
        number = np.repeat(np.arange(len(shared)), [len(part) for part in shared])
        segment = (number[:, None] * width + np.arange(width)).ravel()
        counts = np.bincount(segment, minlength=len(shared) * width)
        positions = param.indices[channels].ravel()
        return cls(
            param.dim,
            torch.from_numpy(positions),
            torch.from_numpy(segment),
            torch.from_numpy(counts),
            param.role == "producer",
        )

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slices, one per row: `(slices, everything else)`."""
        return (
            tensor.index_select(self.dim, self.positions.to(tensor.device))
            .movedim(self.dim, 0)
            .reshape(self.positions.numel(), -1)
        )

    def columns(self, tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`rows` in the shape in which `tensor` holds its slices."""
        shape = list(tensor.shape)
        del shape[self.dim]
        return rows.reshape(-1, *shape).movedim(0, self.dim)

    def centres(self, rows: torch.Tensor) -> torch.Tensor:
        """For each row the mean of its cluster (a segment mean, no C x C matrix)."""
        segment = self.segment.to(rows.device)
        sums = rows.new_zeros(self.counts.numel(), rows.shape[1]).index_add_(0, segment, rows)
        return (sums / self.counts.to(rows.device, rows.dtype)[:, None])[segment]


def _cluster(group: ChannelGroup, count: int, how: str, seed: int, traced: Traced) -> Partition:
    """Cluster a group block by block on the flattened kernels of its first producer, the pacesetter."""
    features = _features(group, traced) if how not in {"even", "imbalanced"} else np.zeros((group.size, 1))
    parts: list[tuple[int, ...]] = []
    for block in group.blocks:
        members = np.array(block)
        share = count // len(group.blocks)
        found = cluster(how, features[members], share, seed=seed, what=f"group {group.name!r}")
        parts.extend(tuple(members[part].tolist()) for part in found)
    return tuple(sorted(parts))


def _features(group: ChannelGroup, traced: Traced) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
    leaders = [param for param in group.params if param.role == "producer"] or list(group.params)
    lead = leaders[0]
    prefix = f"{traced.scope}." if traced.scope else ""
    tensor = get_tensor(traced.module, lead.param.removeprefix(prefix)).detach()
    if tensor.is_meta:
        raise WeightsError(
            f"group {group.name!r} has no weights to cluster (they are on the meta device); load them first"
        )
    tensor_rows = tensor.movedim(lead.dim, 0).reshape(tensor.shape[lead.dim], -1).cpu()
    values = (tensor_rows if tensor_rows.dtype == torch.float64 else tensor_rows.float()).numpy()
    rows: np.ndarray[Any, np.dtype[np.floating[Any]]] = values[lead.indices].reshape(group.size, -1)
    return rows
