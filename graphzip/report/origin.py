"""What a result came of: what reproduces it, how training went, and what was measured to find its widths."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from graphzip.plan.plan import Plan
from graphzip.training.history import Record
from graphzip.version import __version__

__all__ = ["COSTS", "Origin", "Study", "TrainingCurve"]

COSTS: Final[Mapping[str, str]] = {"macs": "multiply-accumulates", "params": "parameters", "bytes": "bytes"}
"""What budgets are of, in words."""

_POINTS: Final = 200  # of a curve


@dataclass(frozen=True)
class TrainingCurve:
    """One curve of a training: values by optimizer step."""

    title: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Origin:
    """The `plan` (as a plan file has it), `seed` and `versions` that reproduce a result, and `curves` of training."""

    plan: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    curves: tuple[TrainingCurve, ...] = ()

    @classmethod
    def of(cls, plan: Plan, seed: int, history: Sequence[Record]) -> Origin:
        """That of a result which is made now."""
        versions = {"graphzip": __version__, "torch": torch.__version__, "Python": platform.python_version()}
        deviations = TrainingCurve("kernel deviation", _thinned([(each.step, each.deviation) for each in history]))
        losses = TrainingCurve("loss", _thinned([(each.step, each.loss) for each in history if each.loss is not None]))
        return cls(plan.to_dict(), seed, versions, tuple(each for each in (deviations, losses) if len(each.points) > 1))


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """The first, the last and at most so many of those between."""
    every = max(1, -(-len(points) // _POINTS))
    return tuple(point for number, point in enumerate(points) if number % every == 0 or number == len(points) - 1)


@dataclass(frozen=True)
class Study:
    """How widths were found: for each group its size and pairs of a width and how far it alone moves the outputs; pairs
    of a cost, a share of the original's `what`, and the loss that is expected there; and the pair that was chosen.
    """

    sensitivities: tuple[tuple[str, int, tuple[tuple[int, float], ...]], ...]
    what: str
    frontier: tuple[tuple[float, float], ...]
    chosen: tuple[float, float] | None = None
