"""The table of passes: a pass is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from graphzip.plan import ClusterMerge, FoldBatchNorm, PassOptions
from passes.base import Pass
from passes.cluster_merge import ClusterMergePass
from passes.fold_batch_norm import FoldBatchNormPass

__all__ = ["PASSES"]

PASSES: dict[type[PassOptions], Callable[..., Pass]] = {
    ClusterMerge: ClusterMergePass,
    FoldBatchNorm: FoldBatchNormPass,
}

