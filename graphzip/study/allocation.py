"""Split budgets over groups: the widths with the least loss whose costs are within the budgets. Plain numbers.

Every group has a curve, the loss at each number of channels that may go, and the losses add up; a cost is a `Price`, in
which widths multiply. For a price `mu` of a budget, widths are chosen group by group to minimise

    sum over groups of loss_g(r_g) + mu * cost(r) / budget,

over and over until none changes, each time over all widths of the group at once; the curves need not be convex. A group
is looked at again once another one has moved that has a part in the same terms, so that the work grows with the number
of groups. `mu` is found by bisection (Everett, "Generalized Lagrange Multiplier Method", 1963). What is left of the
budget is then spent where it lowers the loss most; what a channel that comes back saves for its cost only falls as
others come back, so the largest saving is looked for among few (Minoux, 1978).

Several budgets are one, the costs relative to them weighted and added up. A budget that alone leads to widths that meet
all of them is enough; otherwise weights are multiplied by how far each of the costs is up (Arora, Hazan and Kale, "The
Multiplicative Weights Update Method", 2012).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from graphzip.study.cost_model import Point, Price

__all__ = ["Budget", "Curve", "allocate", "cheapest"]

Vector = NDArray[np.float64]
Chosen = NDArray[np.int64]

_BISECTIONS: Final = 28
_RATES: Final = (-12.0, 12.0)  # powers of ten
_SWEEPS: Final = 50
_ROUNDS: Final = 8  # of weights
_POWER: Final = 4.0  # of how far a cost is up, that its weight is multiplied by
_NOTHING: Final = 1e-12  # a share of a budget that is none
_ROUNDING: Final = 1e-12  # of a sum of costs that is added up in another order, relative to it


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


@dataclass(frozen=True)
class Budget:
    """A kind of cost, and how much of it there may be."""

    price: Price
    most: float

    @property
    def limit(self) -> float:
        """What is spent at most: rounding of the sum aside, for widths that meet the budget exactly meet it."""
        return self.most * (1.0 + _ROUNDING)


def allocate(curves: Sequence[Curve], budgets: Sequence[Budget]) -> NDArray[np.int64] | None:
    """How many channels go of every group, so that all budgets are met, or None where that cannot be."""
    if not _are_met(budgets, _gone(curves, _cheapest(curves, _together(budgets, np.ones(len(budgets)))))):
        return None
    alone = (_bisected(curves, [budget], np.ones(1)) for budget in budgets)
    found = next((each for each in alone if _are_met(budgets, _gone(curves, each))), None)
    if found is None:
        found = _weighted(curves, budgets)
    gone: NDArray[np.int64] = _gone(curves, _spent(curves, budgets, found)).astype(np.int64)
    return gone


def cheapest(choices: Sequence[Sequence[int] | Vector], price: Price) -> NDArray[np.int64]:
    """How many channels go of every group where the cost is the lowest that these numbers of them lead to."""
    curves = [Curve(np.array(each, dtype=np.float64), np.zeros(len(each))) for each in choices]
    gone: NDArray[np.int64] = _gone(curves, _cheapest(curves, price)).astype(np.int64)
    return gone


def _cheapest(curves: Sequence[Curve], price: Price) -> Chosen:
    """The widths with the lowest cost: the smallest ones, but thin layers may cost more than a narrow dense one."""
    narrowest = np.array([len(curve.gone) - 1 for curve in curves], dtype=np.int64)
    free = [Curve(curve.gone, np.zeros_like(curve.loss)) for curve in curves]
    return _settled(free, price, narrowest, 1.0)


def _together(budgets: Sequence[Budget], weights: Vector) -> Price:
    return Price.total([(weight / budget.most, budget.price) for weight, budget in zip(weights, budgets, strict=True)])


def _gone(curves: Sequence[Curve], chosen: Chosen) -> Vector:
    return np.array([curve.gone[at] for curve, at in zip(curves, chosen, strict=True)], dtype=np.float64)


def _loss(curves: Sequence[Curve], chosen: Chosen) -> float:
    return float(sum(curve.loss[at] for curve, at in zip(curves, chosen, strict=True)))


def _are_met(budgets: Sequence[Budget], gone: Vector) -> bool:
    return all(budget.price.at(gone) <= budget.limit for budget in budgets)


def _weighted(curves: Sequence[Curve], budgets: Sequence[Budget]) -> Chosen:
    """The best of several weights of the budgets."""
    weights = np.ones(len(budgets))
    tried = []
    for _ in range(_ROUNDS):
        tried.append(_bisected(curves, budgets, weights / weights.sum()))
        gone = _gone(curves, tried[-1])
        weights = weights * [(budget.price.at(gone) / budget.most) ** _POWER for budget in budgets]
    return min(tried, key=lambda each: _loss(curves, each))


def _bisected(curves: Sequence[Curve], budgets: Sequence[Budget], weights: Vector) -> Chosen:
    """The widths with the least loss that meet the budgets, of those that a rate for their weighted sum leads to."""
    price = _together(budgets, weights)
    widest = np.zeros(len(curves), dtype=np.int64)
    found = narrowest = _cheapest(curves, _together(budgets, np.ones(len(budgets))))
    low, high = _RATES
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        options = [_settled(curves, price, start, 10.0**middle) for start in (widest, narrowest)]
        fitting = [each for each in options if _are_met(budgets, _gone(curves, each))]
        if fitting:
            found = min([found, *fitting], key=lambda each: _loss(curves, each))
            high = middle
        else:
            low = middle
    return found


def _settled(curves: Sequence[Curve], price: Price, start: Chosen, rate: float) -> Chosen:
    """No group alone can do better any more."""
    chosen: Chosen = start.copy()
    point = Point(price, _gone(curves, chosen))
    open_ = np.ones(len(curves), dtype=bool)
    for _ in range(_SWEEPS):
        for number in np.flatnonzero(open_).tolist():
            open_[number] = False
            curve = curves[number]
            at = int(np.argmin(curve.loss + rate * point.varying(number, curve.gone)))
            if at != chosen[number]:
                chosen[number] = at
                point.move(number, curve.gone[at])
                open_[price.neighbours[number]] = True
        if not open_.any():
            break
    return chosen


def _spent(curves: Sequence[Curve], budgets: Sequence[Budget], chosen: Chosen) -> Chosen:
    """Give channels back, those that lower the loss most for what they cost first, until nothing fits any more."""
    chosen = chosen.copy()
    points = [Point(budget.price, _gone(curves, chosen)) for budget in budgets]

    def best(number: int) -> tuple[float, int]:
        """What a group saves at most for each share of the budgets, and where on its curve."""
        curve, at = curves[number], int(chosen[number])
        shares, fits = np.zeros(at), np.ones(at, dtype=bool)
        for point, budget in zip(points, budgets, strict=True):
            costs = point.varying(number, curve.gone[:at])
            shares = np.maximum(shares, (costs - point.cost) / budget.most)
            fits &= costs <= budget.limit
        saved = np.where(fits, (curve.loss[at] - curve.loss[:at]) / np.maximum(shares, _NOTHING), 0.0)
        return (float(saved.max()), int(saved.argmax())) if at else (0.0, 0)

    waiting = [(-best(number)[0], number) for number in range(len(curves))]
    heapq.heapify(waiting)
    while waiting:
        _, number = heapq.heappop(waiting)
        saved, at = best(number)
        if saved <= 0.0:
            continue
        if waiting and saved < -waiting[0][0]:
            heapq.heappush(waiting, (-saved, number))
            continue
        chosen[number] = at
        for point in points:
            point.move(number, curves[number].gone[at])
        heapq.heappush(waiting, (-best(number)[0], number))
    return chosen
