"""The table of passes: a pass is a file and a line here. Each entry makes a `passes.base.Pass`."""

from __future__ import annotations

from typing import Any

from graphzip.plan import ClusterMerge, FoldBatchNorm, PassOptions
from passes.cluster_merge import ClusterMergePass
from passes.fold_batch_norm import FoldBatchNormPass

__all__ = ["PASSES"]

PASSES: dict[type[PassOptions], Any] = {
    ClusterMerge: ClusterMergePass,
    FoldBatchNorm: FoldBatchNormPass,
}
