"""Time in onnxruntime at given widths and ranks, which does not depend on what the weights are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphzip.graph.traced import Traced
from graphzip.plan.passes import ClusterMerge, LowRank
from graphzip.runtime.inference import latency_of
from graphzip.study.narrowing import Narrows, RankedLayer
from graphzip_passes.cluster_merge.cluster_merge import ClusterMergePass, Known
from graphzip_passes.low_rank.low_rank import factorised

__all__ = ["fast_ranks", "latency_at"]


def latency_at(traced: Traced, merge: Narrows | None, thin: LowRank | None, known: Known) -> float:
    """Milliseconds for one sample with these widths and ranks."""
    if merge is not None:
        keep: Any = merge.keep
        even = ClusterMerge(keep=dict(keep), clustering="even", norms=merge.norms)
        traced = ClusterMergePass(even, traced, seed=0, where=even.kind, known=known).merged(traced).traced
    if thin is not None:
        shapes = {"method": "svd"} if thin.method == "data-svd" else {}
        traced = factorised(traced, thin.model_copy(update=shapes), thin.kind, [])
    return latency_of(traced)


def fast_ranks(traced: Traced, layers: Mapping[str, RankedLayer], options: LowRank) -> dict[str, list[int]]:
    """For each layer how many of its parts may go so that its thin layers are measured to be faster than it is.

    Layers of one shape are measured once.
    """
    known: dict[Any, tuple[int, ...]] = {}
    found = {}
    for name, layer in layers.items():
        call = layer.found.layer
        key = (call.shape, tuple(map(str, call.input.meta["val"].shape)), str(call.node.args[3:]), layer.ranks)
        if key not in known:
            known[key] = layer.found.faster(traced, options.method, layer.ranks)
        found[name] = [layer.size - rank for rank in known[key]]
    return found
