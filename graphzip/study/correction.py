"""The correction round of a budget: losses of groups narrowed alone are bent until what they lead to does best.

Losses that were found for each group alone do not add up where all are narrowed: errors meet, and layers behind make up
for errors of several groups at once. How they fail to is the same for many groups, so two numbers say much of it. With
the place `s` of a group in the depth of the network, from -1 to 1, its loss is taken as

    loss^power * exp(tilt * s),

and the widths that this leads to are carried out together and judged. From a usual power and `tilt = 0` on, the one and
then the other is changed by a step, up or down, as long as that does better (coordinate search; Hooke and Jeeves,
"Direct Search", 1961). Steps are halved where neither direction does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from graphzip.study.allocation import Curve

__all__ = ["bent", "corrected"]

Widths = NDArray[np.int64]

_STEPS: Final = (math.log(1.4), 0.7)
_BEGIN: Final = (math.log(1.4), 0.0)  # the logarithm of the power, and the tilt
_LEAST: Final = 0.2  # of the first steps


def bent(curves: Sequence[Curve], power: float, tilt: float, order: Sequence[float] | None = None) -> list[Curve]:
    """The curves with other losses. Groups run in this `order`, by default one after the other."""
    depth = np.arange(len(curves), dtype=np.float64) if order is None else np.array(order, dtype=np.float64)
    span = np.ptp(depth) if depth.size else 0.0
    places = 2.0 * (depth - depth.min()) / span - 1.0 if span else np.zeros(len(curves))
    return [
        Curve(curve.gone, curve.loss**power * math.exp(tilt * place))
        for curve, place in zip(curves, places.tolist(), strict=True)
    ]


def corrected(
    curves: Sequence[Curve],
    allocate: Callable[[Sequence[Curve]], Widths | None],
    judge: Callable[[Widths, int], float],
    *,
    most: int,
    order: Sequence[float] | None = None,
) -> Widths | None:
    """How many channels go of each group: those of `allocate` that `judge` finds best.

    It is asked `most` times and told how many it was asked for before. Nothing where nothing can be allocated.
    """
    first = allocate(bent(curves, math.exp(_BEGIN[0]), _BEGIN[1], order))
    if first is None or most < 1:
        return allocate(curves)
    search = _Search(curves, allocate, judge, most, order)
    search.run(first)
    return search.best


class _Search:
    def __init__(
        self,
        curves: Sequence[Curve],
        allocate: Callable[[Sequence[Curve]], Widths | None],
        judge: Callable[[Widths, int], float],
        most: int,
        order: Sequence[float] | None,
    ) -> None:
        self.curves, self.allocate, self.judge, self.most, self.order = curves, allocate, judge, most, order
        self.known: dict[tuple[int, ...], float] = {}
        self.best: Widths | None = None
        self.loss = math.inf

    def run(self, first: Widths) -> None:
        at, share = np.array(_BEGIN), 1.0
        self._tried(first)
        while share >= _LEAST and len(self.known) < self.most:
            moved = False
            for axis, step in enumerate(_STEPS):
                for direction in (step, -step):
                    further = at + share * direction * np.eye(2)[axis]
                    while self._does_better(further):
                        at, moved = further, True
                        further = at + share * direction * np.eye(2)[axis]
            share = share if moved else share / 2

    def _does_better(self, at: NDArray[np.float64]) -> bool:
        found = self.allocate(bent(self.curves, math.exp(at[0]), float(at[1]), self.order))
        return found is not None and self._tried(found)

    def _tried(self, gone: Widths) -> bool:
        """Whether this is better than all before; what was judged once is not judged again."""
        key = tuple(gone.tolist())
        if key in self.known or len(self.known) >= self.most:
            return False
        self.known[key] = self.judge(gone, len(self.known))
        if self.known[key] < self.loss:
            self.best, self.loss = gone, self.known[key]
            return True
        return False
