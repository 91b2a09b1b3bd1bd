"""Which layers of two models share weights, and into how many clusters their input channels go.

A layer is a convolution or a linear layer that both models have under one name. Its input channels are those of both
models together, n of them: a share keeps `max(1, floor(n * share))` clusters, exactly (0.7 of 10 is 7).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

from graphzip.analysis.layers import Layer, calls_of_layers
from graphzip.graph.traced import Traced
from graphzip.plan.passes import CrossDomainShare
from graphzip.plan.problems import plan_error
from graphzip.report.tables import closest

__all__ = ["Shareable", "SharedLayer", "candidates", "shared_layers", "weights_before"]

logger = logging.getLogger(__name__)

_KINDS = ("Linear", "Conv1d", "Conv2d")


@dataclass(frozen=True)
class Shareable:
    """A layer of one model as a candidate: its weight `(out, in, *kernel)` and why it cannot be shared, if so."""

    shape: tuple[int, ...]
    reason: str | None


@dataclass(frozen=True)
class SharedLayer:
    """A layer whose input channels go into `count` clusters; `sizes` are the channels that each task has."""

    name: str
    tasks: tuple[str, ...]
    sizes: tuple[int, ...]
    outs: int
    kernel: tuple[int, ...]
    count: int

    @property
    def per_channel(self) -> int:
        """Weights that read one input channel."""
        return self.outs * math.prod(self.kernel)

    @property
    def dims(self) -> int:
        """Spatial dimensions: 0 for a linear layer."""
        return len(self.kernel)

    @property
    def channels(self) -> int:
        """Input channels of all tasks."""
        return sum(self.sizes)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of its weight in the joint model."""
        return tuple(f"{task}.{self.name}.weight" for task in self.tasks)


def candidates(traced: Traced) -> dict[str, dict[str, Shareable]]:
    """Convolutions and linear layers of every task of a joint graph, by name, in the order in which they run."""
    found: dict[str, dict[str, Shareable]] = {task.name: {} for task in traced.tasks}
    for layer in calls_of_layers(traced, transposed=False):
        names = [layer.name, *(name for name, first in traced.aliases.items() if first == layer.name)]
        for name in names:
            task, _, inner = name.partition(".")
            if inner.endswith(".weight"):
                kind = traced.module_types.get(name.removesuffix(".weight"), "")
                reason = _reason(layer, kind) if len(names) == 1 else "its weights are shared already"
                found[task].setdefault(inner.removesuffix(".weight"), Shareable(layer.shape, reason))
    return found


def _reason(layer: Layer, kind: str) -> str | None:
    if kind not in _KINDS:
        return "it is not an nn.Linear, nn.Conv1d or nn.Conv2d"
    if len(layer.weight.users) > 1:
        return "its weights are read more than once"
    if layer.groups != 1:
        return "it has groups, so that a channel is read by some outputs only"
    return None


def weights_before(traced: Traced) -> int:
    """Weights of convolutions and linear layers of all tasks, without biases: what Table 1 counts."""
    return sum(math.prod(layer.shape) for layers in candidates(traced).values() for layer in layers.values())


def shared_layers(options: CrossDomainShare, traced: Traced, *, where: str) -> list[SharedLayer]:
    """The layers that share weights, in the order in which they run.

    Raises `PlanError`, with all problems, where a glob matches no layer, a layer that is asked for cannot be shared, a
    count is above the number of its channels, and where no layer is left.
    """
    by_task = candidates(traced)
    first, *others = by_task.values()
    names = list(first)
    problems = [
        f"{where}.{key}: {glob!r} matches no layer; {closest(glob, names)}"
        for key, glob in _globs(options)
        if not any(fnmatchcase(name, glob) for name in names)
    ]
    found = []
    for name in names:
        amount = _amount(options, name, names)
        same = [each.get(name) for each in others]
        if amount is None:
            continue
        reason = _unlike(first[name], same)
        if reason is None and first[name].shape != same[0].shape:  # type: ignore[union-attr]
            if name == names[0]:
                logger.info("%s keeps all its channels: the domains differ in them", name)
                continue
            reason = "its number of input channels differs between the models"
        if reason is not None:
            problems.append(f"{where}: {name!r} cannot be shared: {reason}; leave it out with exclude=[{name!r}]")
            continue
        sizes = tuple(layer.shape[1] for layer in (first[name], *(each for each in same if each)))
        problem = _too_many(amount, sum(sizes))
        if problem is not None:
            problems.append(f"{where}.clusters: {name!r} {problem}")
            continue
        count = _count(amount, sum(sizes))
        if count < sum(sizes):
            outs, _, *kernel = first[name].shape
            found.append(SharedLayer(name, tuple(by_task), sizes, outs, tuple(kernel), count))
    if not found and not problems:
        problems.append(f"{where}: no layer shares weights; name some in clusters (the first and the last one stay)")
    if problems:
        raise plan_error(problems)
    return found


def _globs(options: CrossDomainShare) -> list[tuple[str, str]]:
    keys = list(options.clusters) if isinstance(options.clusters, Mapping) else []
    return [("clusters", glob) for glob in keys] + [
        (f"exclude[{position}]", glob) for position, glob in enumerate(options.exclude)
    ]


def _amount(options: CrossDomainShare, name: str, names: Sequence[str]) -> float | int | None:
    """What the plan says about a layer; nothing where it keeps all its channels."""
    if any(fnmatchcase(name, glob) for glob in options.exclude):
        return None
    if isinstance(options.clusters, Mapping):
        return next((amount for glob, amount in options.clusters.items() if fnmatchcase(name, glob)), None)
    return None if name in (names[0], names[-1]) else options.clusters


def _unlike(layer: Shareable, others: Sequence[Shareable | None]) -> str | None:
    for other in others:
        if other is None:
            return "only one of the models has it"
        if layer.reason or other.reason:
            return layer.reason or other.reason
        if (layer.shape[0], layer.shape[2:]) != (other.shape[0], other.shape[2:]):
            return f"its weights are {list(layer.shape)} in one model and {list(other.shape)} in the other"
    return None


def _too_many(amount: float | int, channels: int) -> str | None:
    if isinstance(amount, int) and amount > channels:
        return f"has {channels} input channels over both models, fewer than {amount} clusters"
    return None


def _count(amount: float | int, channels: int) -> int:
    return amount if isinstance(amount, int) else max(1, math.floor(channels * Fraction(repr(amount))))
