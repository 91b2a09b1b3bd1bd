"""Widths and ranks that meet a latency in onnxruntime, which does not depend on what the weights are."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from graphzip.graph.traced import Traced
from graphzip.plan.passes import ClusterMerge, LowRank
from graphzip.process_groups import Processes
from graphzip.progress import counted
from graphzip.runtime.inference import latency_of
from graphzip.study.allocation import Budget, Curve, cheapest
from graphzip.study.amounts import absolute
from graphzip.study.cost_model import Price
from graphzip.study.latency_price import latency_price, layer_times
from graphzip.study.narrowing import Narrows, RankedLayer
from graphzip.study.units import Units
from graphzip_passes.cluster_merge.cluster_merge import ClusterMergePass, Known
from graphzip_passes.low_rank.low_rank import factorised

__all__ = ["Stopwatch", "fast_ranks", "latency_at"]

logger = logging.getLogger(__name__)

_TRIES: Final = 8  # bisections


class Stopwatch:
    """Measures a model at widths and ranks, and finds those that are fast enough. Of several processes the first one
    measures, while the others do nothing.
    """

    def __init__(
        self,
        units: Units,
        merge: Narrows | None,
        thin: LowRank | None,
        known: Known,
        processes: Processes,
        original: Traced,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        """`known` is the analysis, which passes need not repeat, and nothing of the data. `original` is the graph of
        which latencies are shares, `cache` a file for what layers take here.
        """
        self.units, self.merge, self.thin, self.known, self.processes = units, merge, thin, known, processes
        self.original, self.cache = original, cache
        self._taken: dict[tuple[tuple[str, int], ...], float] = {}

    def milliseconds(self, widths: Mapping[str, int]) -> float:
        """For one sample; the same widths are measured once."""
        key = tuple(sorted(widths.items()))
        if key not in self._taken:
            merge = None if self.merge is None else self.units.narrowed(self.merge, widths)
            thin = None if self.thin is None else self.units.thinned(self.thin, widths)
            with self.processes.together("latency"):
                first = self.processes.rank == 0
                found = latency_at(self.units.traced, merge, thin, self.known) if first else 0.0
                self._taken[key] = self.processes.agreed(found)
        return self._taken[key]

    @cached_property
    def whole(self) -> float:
        """Milliseconds of the original."""
        if self.original is self.units.traced:
            return self.milliseconds({})
        with self.processes.together("latency"):
            return self.processes.agreed(latency_of(self.original) if self.processes.rank == 0 else 0.0)

    def least(self) -> dict[str, int]:
        """The widths and ranks with which least is multiplied, where no layer is thin that is slower so."""
        fast = self.units.faster([Curve.through(gone, []) for gone in self.units.choices.values()], self.fast_ranks)
        return self.units.widths(cheapest([curve.gone for curve in fast], self.units.prices.macs))

    @cached_property
    def fast_ranks(self) -> dict[str, list[int]]:
        """By layer how many of its parts may go so that it is faster."""
        if self.thin is None:
            return {}
        found = fast_ranks(self.units.traced, self.units.layers, self.thin) if self.processes.rank == 0 else {}
        return self.processes.agreed(found)

    @cached_property
    def price(self) -> Price:
        """What latency is steered by: times of layers where widths alone are chosen, else multiply-accumulates."""
        if self.units.layers:
            return self.units.prices.macs
        whole = self.milliseconds({})  # all processes meet for that
        with self.processes.together("latency"):
            if self.processes.rank != 0:
                return self.processes.agreed(self.units.prices.macs)
            times = None if self.cache is None else layer_times(self.cache)
            return self.processes.agreed(latency_price(self.units, whole, times))

    def found(self, curves: Sequence[Curve], amount: float) -> dict[str, int]:
        """The widths with the least loss that are measured to take no more: the price they may have is bisected."""
        wanted = absolute(amount, self.whole)
        if wanted >= self.milliseconds({}):
            return {}
        low, high, best = 0.0, 1.0, self.least()
        curves, middle = self.units.faster(curves, self.fast_ranks), wanted / self.milliseconds({})
        for _ in counted(range(_TRIES), "measuring latency"):
            gone = self.units.kinds.allocate(curves, [Budget(self.price, middle * self.price.whole)])
            widths = None if gone is None else self.units.widths(gone)
            taken = 0.0 if widths is None else self.milliseconds(widths)
            logger.info("%.0f %% of the price take %.3f ms", 100 * middle, taken)
            if widths is None or taken <= wanted:
                low, best = middle, best if widths is None else widths
            else:
                high = middle
            middle = (low + high) / 2
        return best


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
