"""The table of the passes that graphzip brings: a pass is a file and a line here, `kind: "module:its options"`.

A file is imported when a plan first names its pass, and registers it then (`graphzip_passes.base.register_pass`). The
class of the options is a public name of `graphzip`.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BUILT_IN"]

BUILT_IN: Final = {
    "atom_factorize": "graphzip_passes.factorize.atom_factorize:AtomFactorize",
    "cluster_merge": "graphzip_passes.cluster_merge.cluster_merge:ClusterMerge",
    "cross_domain_share": "graphzip_passes.cross_domain.share:CrossDomainShare",
    "drop_blocks": "graphzip_passes.drop_blocks:DropBlocks",
    "fold_batch_norm": "graphzip_passes.fold_batch_norm:FoldBatchNorm",
    "low_rank_factors": "graphzip_passes.low_rank.low_rank:LowRank",
    "minimize": "graphzip_passes.minimize.minimize:Minimize",
    "prune_channels": "graphzip_passes.prune.prune_channels:PruneChannels",
    "slice_generate": "graphzip_passes.factorize.slice_generate:SliceGenerate",
    "zip": "graphzip_passes.zip.zip:Zip",
}
