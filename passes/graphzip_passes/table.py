"""The table of passes: a pass is a file and a line here. Each entry makes a `graphzip_passes.base.Pass`."""

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
from graphzip_passes.atom_factorize import AtomFactorizePass
from graphzip_passes.cluster_merge import ClusterMergePass
from graphzip_passes.cross_domain_share import CrossDomainSharePass
from graphzip_passes.fold_batch_norm import FoldBatchNormPass
from graphzip_passes.prune_channels import PruneChannelsPass
from graphzip_passes.slice_generate import SliceGeneratePass
from graphzip_passes.zip import ZipPass

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
