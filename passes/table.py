"""The table of passes: a pass is a file and a line here. Each entry makes a `passes.base.Pass`."""

from __future__ import annotations

from typing import Any

from graphzip.plan import (
    AtomFactorize,
    ClusterMerge,
    CrossDomainShare,
    FoldBatchNorm,
    PassOptions,
    PruneChannels,
    SliceGenerate,
    Zip,
)
from passes.atom_factorize import AtomFactorizePass
from passes.cluster_merge import ClusterMergePass
from passes.cross_domain_share import CrossDomainSharePass
from passes.fold_batch_norm import FoldBatchNormPass
from passes.prune_channels import PruneChannelsPass
from passes.slice_generate import SliceGeneratePass
from passes.zip import ZipPass

__all__ = ["PASSES"]

PASSES: dict[type[PassOptions], Any] = {
    AtomFactorize: AtomFactorizePass,
    ClusterMerge: ClusterMergePass,
    CrossDomainShare: CrossDomainSharePass,
    FoldBatchNorm: FoldBatchNormPass,
    PruneChannels: PruneChannelsPass,
    SliceGenerate: SliceGeneratePass,
    Zip: ZipPass,
}
