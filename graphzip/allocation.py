"""Split a budget over groups: the widths with the least loss whose cost is within the budget. Plain numbers.

Every group has a curve, the loss at each number of channels that may go, and the losses add up; the cost is a `Price`,
in which widths multiply. For a price `mu` of the budget, widths are chosen group by group to minimise

    sum over groups of loss_g(r_g) + mu * cost(r) / cost(0),

over and over until none changes, each time over all widths of the group at once; the curves need not be convex.
`mu` is found by bisection (Everett, "Generalized Lagrange Multiplier Method", 1963). What is left of the budget is then
spent where it lowers the loss most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curve", "allocate"]

Vector = NDArray[np.float64]

_BISECTIONS = 40
_SWEEPS = 50


class Cost(Protocol):
    """What a number of channels gone of every group costs."""

    def at(self, gone: Vector) -> float: ...
    def varying(self, gone: Vector, group: int, counts: Vector) -> Vector: ...


@dataclass(frozen=True)
class Curve:
    """One group: numbers of channels that may go, from 0 on, and the loss at each."""

    gone: Vector
    loss: Vector

    @classmethod
    def through(cls, gone: Sequence[int], measured: Sequence[tuple[int, float]]) -> Curve:
        """Straight lines through measured points, made to rise with the channels that go."""
        known = sorted([(0, 0.0), *measured])
        height = np.maximum.accumulate([max(loss, 0.0) for _, loss in known])
        counts = np.array(gone, dtype=np.float64)
        return cls(counts, np.interp(counts, [count for count, _ in known], height))


def allocate(curves: Sequence[Curve], cost: Cost, budget: float) -> NDArray[np.int64] | None:
    """How many channels go of every group, or None where the budget cannot be met."""
    narrowest = np.array([len(curve.gone) - 1 for curve in curves])
    if _cost(curves, cost, narrowest) > budget:
        return None
    widest = np.zeros(len(curves), dtype=np.int64)
    whole = max(_cost(curves, cost, widest), 1e-12)
    found = narrowest
    low, high = -12.0, 12.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        options = [_settled(curves, cost, start, 10.0**middle / whole) for start in (widest, narrowest)]
        fitting = [each for each in options if _cost(curves, cost, each) <= budget]
        if fitting:
            for option in fitting:
                found = option if _loss(curves, option) < _loss(curves, found) else found
            high = middle
        else:
            low = middle
    found = _spent(curves, cost, found, budget)
    gone: NDArray[np.int64] = _gone(curves, found).astype(np.int64)
    return gone


def _gone(curves: Sequence[Curve], chosen: NDArray[np.int64]) -> Vector:
    return np.array([curve.gone[at] for curve, at in zip(curves, chosen, strict=True)], dtype=np.float64)


def _cost(curves: Sequence[Curve], cost: Cost, chosen: NDArray[np.int64]) -> float:
    return cost.at(_gone(curves, chosen))


def _loss(curves: Sequence[Curve], chosen: NDArray[np.int64]) -> float:
    return float(sum(curve.loss[at] for curve, at in zip(curves, chosen, strict=True)))


def _settled(curves: Sequence[Curve], cost: Cost, start: NDArray[np.int64], rate: float) -> NDArray[np.int64]:
    """No group alone can do better any more."""
    chosen: NDArray[np.int64] = start.copy()
    for _ in range(_SWEEPS):
        before = chosen.copy()
        for number, curve in enumerate(curves):
            chosen[number] = int(np.argmin(curve.loss + rate * cost.varying(_gone(curves, chosen), number, curve.gone)))
        if (chosen == before).all():
            break
    return chosen


def _spent(curves: Sequence[Curve], cost: Cost, chosen: NDArray[np.int64], budget: float) -> NDArray[np.int64]:
    """Give channels back, those that lower the loss most for what they cost first, until nothing fits any more."""
    chosen = chosen.copy()
    while True:
        now, gone = _cost(curves, cost, chosen), _gone(curves, chosen)
        best, move = 0.0, (-1, 0)
        for number, curve in enumerate(curves):
            at = int(chosen[number])
            costs = cost.varying(gone, number, curve.gone[:at])
            gain = (curve.loss[at] - curve.loss[:at]) / np.maximum(costs - now, 1e-9)
            gain[costs > budget] = -1.0
            if gain.size and gain.max() > best:
                best, move = float(gain.max()), (number, int(gain.argmax()))
        if move[0] < 0:
            return chosen
        chosen[move[0]] = move[1]
