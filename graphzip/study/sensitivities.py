"""How far the outputs move when one group alone is narrowed, at what effort.

- `"thorough"`: every group is measured at five widths. The cost grows with the square of the depth.
- `"normal"`: losses to first order (`first_order`) give the shape of every curve. Layers behind a group make up for
  some of what they say, for more of it the earlier and the larger an error is, so that losses grow as a power of them:
  `loss = scale * estimate ** exponent`. Two measurements say which, on half the data. No more than so many groups are
  measured, evenly spread over the depth; scale and exponent of the others lie between those of their neighbours. The
  cost grows with the depth.
- `"fast"`: the estimates alone, to a power that was found to be usual.

Where what reads a group cannot be re-fitted (the width of queries and keys), and where channels are pruned, there is no
first-order loss. It is taken to grow as a power of the share of channels that go, and two measurements say which, as
above; that of the rank of a layer as a power of the energy that is lost.

Where a score of the user's judges, or clusters are not found by reconstruction, groups are measured as for
`"thorough"`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from torch import nn

from graphzip.analysis.channels import Analysis
from graphzip.analysis.groups import ChannelGroups
from graphzip.graph.batches import Batches, leading, samples_in
from graphzip.graph.interpreter import Values
from graphzip.graph.traced import Traced
from graphzip.plan.passes import RECONSTRUCTION, ClusterMerge, LowRank, PruneChannels
from graphzip.process_groups import Processes
from graphzip.progress import counted, duration, step, told, unwatched
from graphzip.study.first_order import first_order_losses
from graphzip.study.laboratory import Laboratory
from graphzip.study.measurements import Measurements
from graphzip.study.narrowing import Factorising, Merging, Mixed, Narrowing, Narrows, Pruning, RankedLayer
from graphzip_passes.base import PassContext
from graphzip_passes.cluster_merge.cluster_merge import Known, known_of
from graphzip_passes.cluster_merge.elimination import eliminations, readable_groups

__all__ = ["CHECKS", "EFFORTS", "FRACTIONS", "Sensitivity", "Subject", "Survey", "measured_on"]

logger = logging.getLogger(__name__)

EFFORTS: Final = ("fast", "normal", "thorough")

FRACTIONS: Final = (0.75, 0.5, 0.25, 0.125)
"""Widths that a loss is found at, and the smallest one of a group; in between, losses lie on straight lines."""

_SHARE: Final = 1 / 3  # of all samples
_FEWEST: Final = 64  # samples
_FITTED_AT: Final = (0.5, 0.125)
_FITTED: Final = 12  # groups of all kinds, about
_LEAST: Final = 3  # of a kind
_PASSES: Final = {"estimates": 17.0, "measurement": 1.6, "try": 8.5}
"""What they were seen to take on a ResNet-20, an EfficientNet-Lite0 and an encoder of sentences, in forward passes."""
_FIXED: Final = 0.3  # seconds of a measurement, however few the data are
_SAMPLES: Final = 128  # of the calibration data, for losses to first order
_MEASURED_ON: Final = {"fast": 192, "normal": 192, "thorough": 384}
"""Samples of the calibration data for a measurement; a plan is carried out with all of it."""

CHECKS: Final = {"fast": 0, "normal": 4, "thorough": 12}
"""How many ways to split a budget are tried on a part of the data."""

_SHAPE: Final = 3.0  # the power of the share of channels that go, for groups without an estimate
_NOTHING: Final = 1e-9  # a loss that is none, relative to the variance of the outputs
_USUAL: Final = 0.75
_EXPONENTS: Final = (0.3, 1.2)

"""`(done, all, what is next)`."""


@dataclass(frozen=True)
class Sensitivity:
    """How far the outputs move when one `group` of `size` channels alone is narrowed, or one layer of that full rank is
    stored as two thin ones.

    `points` are pairs of a width, or a rank, and a loss: the mean square of the change of the outputs relative to their
    variance, or what `evaluate` loses.
    """

    group: str
    size: int
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Subject:
    """A model, how much may go of each of its groups and layers (0 first, ascending), and how they are narrowed.

    What all of them together do is judged by the outputs of the `original`, of which other passes have made the model.
    `options` are for its groups and `low_rank` for its `layers`, by name, either of which there may be none of.
    `batches` are the inputs of its graph on the calibration data, or the example where there is none.
    """

    traced: Traced
    original: Traced
    analysis: Analysis
    groups: ChannelGroups
    choices: Mapping[str, tuple[int, ...]]
    options: Narrows | None
    low_rank: LowRank | None
    layers: Mapping[str, RankedLayer]
    context: PassContext
    batches: Batches
    evaluate: Callable[[nn.Module], float] | None
    seed: int

    @property
    def processes(self) -> Processes:
        """Those that have the batches."""
        return self.batches.processes

    def size(self, name: str) -> int:
        """How much there is of a group or a layer, of which `choices` may go."""
        return self.layers[name].size if name in self.layers else self.groups[name].size

    def full(self, name: str) -> int:
        """Its width, or its rank."""
        return self.layers[name].found.full if name in self.layers else self.groups[name].size

    def near(self, name: str, shares: Sequence[float]) -> list[int]:
        """Widths that a group may have next to these shares of its size, the largest first."""
        widths = np.array([self.size(name) - gone for gone in self.choices[name][1:]])
        wanted = [share * self.full(name) for share in shares]
        return sorted({int(widths[np.abs(widths - each).argmin()]) for each in wanted}, reverse=True)

    def widths(self, name: str) -> list[int]:
        """The widths of a group that losses are found at, the largest first."""
        return self.near(name, (*FRACTIONS, 0.0))


def measured_on(effort: str, batches: Batches) -> int:
    """How many samples of the data measurements take: some, so that others are left to judge plans by."""
    most = _MEASURED_ON[effort]
    return most if effort == "thorough" else max(min(most, int(_SHARE * batches.samples)), _FEWEST)


class Survey:
    """The sensitivities of all groups of a subject."""

    def __init__(self, subject: Subject, effort: str, cache: Measurements | None) -> None:
        self.subject, self.effort, self.cache = subject, effort, cache
        self._kept: dict[tuple[str, int], float] = {}
        self._orders: dict[str, tuple[int, ...]] | None = None  # once they were found for estimates

    def run(self) -> tuple[Sensitivity, ...]:
        """Estimate and measure what is not kept."""
        self._say_time()
        estimates = self._estimates()
        powers = [self._shapes(estimates)] if estimates or self._shapes_alone else []
        kinds = [estimates, *powers, self._energies]
        fitted = kinds[1:] if self.effort == "fast" else kinds
        measured = self._measured(self._to_measure(kinds, fitted))
        curves = dict(measured)
        for kind in kinds:
            fits = _between([_fit(kind[name], measured[name]) for name in kind])
            curves |= {name: fit.curve(kind[name], measured[name]) for name, fit in zip(kind, fits, strict=True)}
        return tuple(
            Sensitivity(name, self.subject.full(name), tuple(curves[name].items())) for name in self.subject.choices
        )

    def together(self, widths: Mapping[str, int], number: int = 0) -> float:
        """The loss with all groups at these widths at once; it is measured where it is not kept."""
        key = hashlib.sha256(json.dumps(sorted(widths.items())).encode()).hexdigest()
        name, total = f"together {key}", sum(widths.values())
        loss = self._get(name, total)
        if loss is None:
            told(number, CHECKS[self.effort], f"all groups together, try {number + 1}")
            with unwatched():
                loss = self._laboratory.loss_together(widths)
            logger.info("all groups together, %d channels: the outputs move by %.3g", total, loss)
            self._put(name, total, loss)
        return loss

    def _say_time(self) -> None:
        """About how long it takes: what was seen to, in forward passes over the data that measurements are made on.

        Of a study that goes on from where one was stopped nothing is said.
        """
        if self.subject.evaluate is not None or not self.subject.batches.here or self.cache:
            return
        start = time.perf_counter()
        batch = self.subject.batches.here[0]
        Values(self.subject.traced, [batch]).outputs()
        samples = sum(samples_in(each) for each in self._some.here)
        once = (time.perf_counter() - start) * samples / samples_in(batch)
        groups = len(self.subject.choices)
        count = {"fast": 0, "normal": 2 * min(groups, _FITTED), "thorough": (len(FRACTIONS) + 1) * groups}[self.effort]
        tries = CHECKS[self.effort]
        first = 0.0 if self.effort == "thorough" else _PASSES["estimates"]
        passes = first + _PASSES["measurement"] * count + _PASSES["try"] * tries
        seconds = passes * once + _FIXED * (count + 4 * tries)
        step(f"measuring {count} times and trying {tries} plans, in about {duration(seconds)}")

    # --------------------------------------------------------------------------------------------- measurements

    def _measured(self, wanted: Sequence[tuple[str, int]]) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {name: {} for name in self.subject.choices}
        kept = {key: loss for key in wanted if (loss := self._get(*key)) is not None}
        missing = [key for key in wanted if key not in kept]
        for keys in counted(turns := self._turns(missing), "measuring", map(_said, turns)):
            with unwatched():
                losses = self._losses(keys)
            for (name, width), loss in zip(keys, losses, strict=True):
                kept[name, width] = loss
                logger.info("%s: %d of %d move the outputs by %.3g", name, width, self.subject.full(name), loss)
                self._put(name, width, loss)
        for name, width in wanted:
            found[name][width] = kept[name, width]
        return found

    def _turns(self, missing: Sequence[tuple[str, int]]) -> list[Sequence[tuple[str, int]]]:
        """What is measured at once: one by every process, where it can do that by itself."""
        if not missing:
            return []
        step = self.subject.processes.size if self._laboratory.by_itself else 1
        return [missing[start : start + step] for start in range(0, len(missing), step)]

    def _losses(self, keys: Sequence[tuple[str, int]]) -> list[float]:
        if self._laboratory.by_itself:
            return self.subject.processes.divided(keys, lambda key: self._laboratory.loss(*key))
        return [self._laboratory.loss(*key) for key in keys]

    def _to_measure(
        self, kinds: Sequence[Mapping[str, Any]], fitted: Sequence[Mapping[str, Any]]
    ) -> list[tuple[str, int]]:
        """Two widths of some of each kind that is `fitted`, and all widths of what is of no kind."""
        known: set[str] = set().union(*kinds)
        some: set[str] = set()
        every = sum(map(len, fitted))
        for kind in fitted:
            names, share = list(kind), round(_FITTED * len(kind) / max(every, 1))
            chosen = np.linspace(0, len(names) - 1, min(max(share, _LEAST), len(names))).round().astype(int)
            some |= {names[number] for number in chosen}
        found = []
        for name in self.subject.choices:
            widths = self.subject.near(name, _FITTED_AT) if name in known else self.subject.widths(name)
            found += [(name, width) for width in widths if name in some or name not in known]
        return found

    def _shapes(self, estimates: Mapping[str, Any]) -> dict[str, dict[int, float]]:
        """By group without an estimate, and by width, what its loss is taken to be a power of."""
        found = {}
        for name in self._groups:
            if name not in estimates:
                size = self.subject.groups[name].size
                found[name] = {width: (1.0 - width / size) ** _SHAPE for width in self.subject.widths(name)}
        return found

    @property
    def _groups(self) -> list[str]:
        return [name for name in self.subject.choices if name not in self.subject.layers]

    @property
    def _energies(self) -> dict[str, dict[int, float]]:
        """By layer and rank the energy that is lost, where losses are taken to be a power of that."""
        if self.effort == "thorough" or self.subject.evaluate is not None:
            return {}
        return {name: layer.lost for name, layer in self.subject.layers.items()}

    @property
    def _shapes_alone(self) -> bool:
        """Whether losses of all groups are taken to grow as a power of the channels that go."""
        subject = self.subject
        return isinstance(subject.options, PruneChannels) and self.effort != "thorough" and subject.evaluate is None

    @cached_property
    def _laboratory(self) -> Laboratory:
        subject = self.subject
        samples = measured_on(self.effort, subject.batches)
        return Laboratory(
            self._narrowing, subject.batches, original=subject.original, evaluate=subject.evaluate, samples=samples
        )

    @property
    def _narrowing(self) -> Narrowing:
        subject, low_rank = self.subject, self.subject.low_rank
        ranks = None
        if low_rank is not None:
            batches = leading(subject.batches, measured_on(self.effort, subject.batches))
            known = subject.traced, subject.analysis, subject.context
            ranks = Factorising(low_rank, *known, subject.layers, batches)
        if subject.options is None:
            assert ranks is not None
            return ranks
        channels: Narrowing
        if isinstance(subject.options, PruneChannels):
            channels = Pruning(subject.options, subject.traced, subject.context)
        else:
            data = subject.context.calibration
            channels = Merging(subject.options, subject.traced, self._known, subject.batches, subject.seed, data)
        return channels if ranks is None else Mixed(channels, ranks)

    @cached_property
    def _known(self) -> Known:
        subject = self.subject
        assert isinstance(subject.options, ClusterMerge)
        if self._orders is not None:
            return Known(subject.analysis, subject.groups, self._orders, {})
        names = self._groups
        least = {name: min(subject.widths(name)) for name in names}
        return known_of(
            subject.options, subject.traced, subject.analysis, subject.groups, names, self._some, least=least
        )

    @property
    def _some(self) -> Batches:
        """As much of the data as a measurement takes; all of it where effort is no matter."""
        if self.effort == "thorough":
            return self.subject.batches
        return self.subject.batches.cut(measured_on(self.effort, self.subject.batches))

    def _get(self, name: str, width: int) -> float | None:
        return self._kept.get((name, width)) if self.cache is None else self.cache.get(name, width)

    def _put(self, name: str, width: int, loss: float) -> None:
        if self.cache is None:
            self._kept[name, width] = loss
        else:
            self.cache.put(name, width, loss)

    # --------------------------------------------------------------------------------------------- to first order

    def _estimates(self) -> dict[str, dict[int, float]]:
        """By group and width the loss to first order, where there is one."""
        subject, options = self.subject, self.subject.options
        eliminates = isinstance(options, ClusterMerge) and options.clustering == RECONSTRUCTION
        if self.effort == "thorough" or subject.evaluate is not None or not eliminates:
            return {}
        names = readable_groups(subject.traced, subject.groups, self._groups)
        wanted = [(name, width) for name in names for width in subject.widths(name)]
        kept = {key: loss for key in wanted if (loss := self._get(_first(key[0]), key[1])) is not None}
        if len(kept) < len(wanted):
            step("which channels every group needs least")
            widths = {name: subject.widths(name) for name in names}
            eliminated = eliminations(subject.traced, subject.groups, self._some, names, widths)
            self._orders = {name: each.order for name, each in eliminated.items()}
            batches = leading(subject.batches, _SAMPLES)
            kept = first_order_losses(
                subject.traced, eliminated, batches, seed=subject.seed, processes=subject.processes
            )
            for (name, width), loss in kept.items():
                self._put(_first(name), width, loss)
        found: dict[str, dict[int, float]] = {}
        for name, width in wanted:
            if (name, width) in kept:
                found.setdefault(name, {})[width] = kept[name, width]
        return found


def _said(keys: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} at {width}" for name, width in keys)


def _first(name: str) -> str:
    """What an estimate of a group is kept under."""
    return f"{name} (first order)"


@dataclass(frozen=True)
class _Fit:
    """`loss = scale * estimate ** exponent`."""

    scale: float
    exponent: float

    def curve(self, estimates: Mapping[int, float], measured: Mapping[int, float]) -> dict[int, float]:
        """Losses by width; down to the last width that was measured to lose nothing there are none."""
        free = min((width for width, loss in measured.items() if loss <= _NOTHING), default=math.inf)
        return {
            width: 0.0 if width >= free else self.scale * estimate**self.exponent
            for width, estimate in estimates.items()
        }


def _fit(estimates: Mapping[int, float], measured: Mapping[int, float]) -> _Fit | None:
    """Through what was measured; nothing where nothing was, or where nothing is lost."""
    points = [
        (math.log(estimates[width]), math.log(loss))
        for width, loss in measured.items()
        if loss > _NOTHING and estimates[width] > _NOTHING
    ]
    if not points:
        return None
    (x, y), (other_x, other_y) = points[0], points[-1]
    exponent = _USUAL if other_x - x < _NOTHING else float(np.clip((other_y - y) / (other_x - x), *_EXPONENTS))
    return _Fit(math.exp(y - exponent * x), exponent)


def _between(fits: Sequence[_Fit | None]) -> list[_Fit]:
    """Fits that are not known lie between those of the nearest groups that are."""
    known = [(number, fit) for number, fit in enumerate(fits) if fit is not None]
    if not known:
        return [_Fit(1.0, _USUAL)] * len(fits)
    places = [number for number, _ in known]
    logs = np.interp(np.arange(len(fits)), places, [math.log(fit.scale) for _, fit in known])
    exponents = np.interp(np.arange(len(fits)), places, [fit.exponent for _, fit in known])
    return [
        fit or _Fit(math.exp(log), float(exponent)) for fit, log, exponent in zip(fits, logs, exponents, strict=True)
    ]
