"""How different two neurons are, which of them to pair, and what weights a pair shares.

With inputs `x` of a layer, the Hessian of its error is `H = E[x x^T]` (MTZ Eq. 7 and 8). Sharing neuron i of A and j of
B costs `(a_i - b_j)^T P (a_i - b_j) / 2` with the parallel sum `P = H_A (H_A + H_B)^{-1} H_B` (Eq. 12), a squared
Mahalanobis distance; the weights that cost the least are `a_i + (H_A + H_B)^{-1} H_B (b_j - a_i)` (Eq. 10 and 11).
So one factorisation of `H_A + H_B` serves all pairs. Where there are fewer samples than inputs, `H = X^T X / n` is kept
as `X` and the inverse is Woodbury's.

Source: He, Zhou and Thiele, "Multi-Task Zipping via Layer-wise Neuron Sharing" (MTZ), section 3.3.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from graphzip.labels import IntArray
from graphzip.numeric.moments import Moments
from graphzip.numeric.solvers import factorised, relative_damping
from graphzip.ops.spec import FloatArray

__all__ = ["BLOCK", "LeastSquares", "Pairs", "Solver", "pair"]

BLOCK = 512
"""Rows of weights that are worked on at once, so that the memory that takes does not grow with the layer."""

_ROUNDS = 100  # of conjugate gradients, at most
_GAIN = 1e-6  # of what is missed: what a change has to bring, so that rounding changes nothing
_SOLVED = 1e-20  # of the squared right-hand side: what may be left of it

Pairs = tuple[IntArray, IntArray]
"""Positions in A and, pair by pair, positions in B."""


@dataclass
class _Hessian:
    """`sum_k c_k E_k[x x^T] + ridge`, dense or as stacked rows `U` with `U^T U + ridge`."""

    dense: torch.Tensor | None
    rows: torch.Tensor | None
    ridge: float

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        """`H V` for `V` of shape `(inputs, n)`."""
        if self.dense is not None:
            return self.dense @ columns + self.ridge * columns
        assert self.rows is not None
        return self.rows.T @ (self.rows @ columns) + self.ridge * columns


def _hessian(moments: Sequence[Moments], scales: Sequence[float], damping: float) -> _Hessian:
    inputs = moments[0].inputs
    rows = sum(each.count for each in moments)
    if all(each.rows is not None for each in moments) and rows <= inputs:
        parts = [
            each.rows * (scale / max(each.count, 1)) ** 0.5
            for each, scale in zip(moments, scales, strict=True)
            if each.rows is not None
        ]
        stacked = torch.cat(parts)
        return _Hessian(None, stacked, float(relative_damping(float(stacked.square().sum()) / inputs, damping)))
    dense = sum((scale * each.dense() for each, scale in zip(moments, scales, strict=True)), torch.zeros(()))
    return _Hessian(dense, None, float(relative_damping(float(dense.diagonal().sum()) / inputs, damping)))


class _Inverse:
    """The inverse of a sum of Hessians: by one factorisation of it, or by Woodbury's where all are a few rows."""

    def __init__(self, parts: Sequence[_Hessian], what: str) -> None:
        self.ridge = sum(part.ridge for part in parts)
        kept = [part.rows for part in parts if part.rows is not None]
        if len(kept) == len(parts) and sum(map(len, kept)) < kept[0].shape[1]:
            self.rows: torch.Tensor | None = torch.cat(kept)
            self.factor = factorised(self.rows @ self.rows.T, self.ridge, what=what)
            return
        self.rows = None
        self.factor = factorised(sum(map(_dense, parts), torch.zeros(())), self.ridge, what=what)

    def solve(self, columns: torch.Tensor) -> torch.Tensor:
        """`H^{-1} V`."""
        if self.rows is None:
            return self.factor.solve(columns)
        inner = self.factor.solve(self.rows @ columns)
        return (columns - self.rows.T @ inner) / self.ridge


class LeastSquares:
    """Damped least squares of rows of weights on what they read; the damping is relative, as in `Solver`."""

    def __init__(self, moments: Moments, *, damping: float, what: str) -> None:
        self.count, self.what = moments.count, what
        self.hessian = _hessian([moments], [1.0], damping)
        self.inverse = _Inverse([self.hessian], what)

    def change(self, missed: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """The change of rows that takes in `missed`, what their outputs lack times the inputs, `(rows, inputs)`.

        What is not `free`, `(rows, inputs)`, stays: such rows are solved for together by conjugate gradients.
        """
        found = self.inverse.solve(missed.T).T
        bound = ~free.all(1)
        if bool(bound.any()):
            found[bound] = self._among_free(missed[bound], free[bound])
        return found

    def serves(self, change: torch.Tensor, read: torch.Tensor, missed: torch.Tensor) -> torch.Tensor:
        """For each row whether a change found here, `(rows, inputs)`, serves samples that it is not fitted to.

        At all places of some samples, `read` `(samples, places, inputs)`, outputs lacked `missed` `(samples, places,
        rows)` before and `e` after it. Fitted to all samples but one, of which `X` is read, it would leave
        `(I - S)^-1 e` of that one with `S = X (n H)^-1 X^T` (Allen, "The Relationship between Variable Selection and
        Data Augmentation and a Method for Prediction", 1974).
        """
        inner = self.inverse.solve(read.flatten(0, 1).T).T.reshape(read.shape)
        inner = read @ inner.transpose(1, 2) / max(self.count, 1)
        eye = torch.eye(read.shape[1], dtype=torch.float64)
        left = factorised(eye - inner, what=self.what).solve(missed - read @ change.T)
        return left.square().sum((0, 1)) < (1.0 - _GAIN) * missed.square().sum((0, 1))

    def _among_free(self, missed: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        found, left = torch.zeros_like(missed), missed * free
        step, size = left.clone(), left.square().sum(1)
        enough = _SOLVED * size
        for _ in range(_ROUNDS):
            if bool((size <= enough).all()):
                break
            turned = self.hessian.times(step.T).T * free
            along = size / (step * turned).sum(1).clamp_min(torch.finfo(torch.float64).tiny)
            found += along[:, None] * step
            left -= along[:, None] * turned
            size, before = left.square().sum(1), size
            step = left + (size / before.clamp_min(torch.finfo(torch.float64).tiny))[:, None] * step
        return found


class Solver:
    """Differences and updates between the joint network (A) and a newcomer (B) for one layer.

    `moments` are those of the tasks in A and that of B, `scales` their weights (alpha and 1 - alpha of Eq. 5),
    `damping` is relative to the mean of each Hessian's diagonal. Without moments the metric is Euclidean. `what` is
    what messages call the layer.
    """

    def __init__(
        self,
        moments: tuple[Sequence[Moments], Moments] | None,
        scales: tuple[Sequence[float], float],
        *,
        damping: float,
        what: str = "a layer",
    ) -> None:
        self.euclidean = (sum(scales[0]), scales[1])
        self.a: _Hessian | None = None
        if moments is not None:
            self.a = _hessian(moments[0], scales[0], damping)
            self.b = _hessian([moments[1]], [scales[1]], damping)
            self.inverse = _Inverse([self.a, self.b], what)

    def update(self, a: torch.Tensor, b: torch.Tensor, missed: torch.Tensor) -> torch.Tensor:
        """Eq. 10 and 11 for rows of weights, pair by pair, `(pairs, inputs)`.

        `missed` is what the weighted outputs lack, times the inputs, because the inputs have moved since: the joint
        weights make up for it.
        """
        if self.a is None:
            first, second = self.euclidean
            return a + (b - a) * (second / (first + second))
        return a + self.inverse.solve(self.b.times((b - a).T) + missed.T).T

    def difference(self, a: torch.Tensor, b: torch.Tensor) -> FloatArray:
        """Eq. 12 for every row of `a`, `(n, inputs)`, and every row of `b`, `(m, inputs)`: `(n, m)`."""
        own = torch.cat([(part * self._parallel(part)).sum(1) for part in torch.split(a, BLOCK)]).unsqueeze(1)
        found = []
        for part in torch.split(b, BLOCK):
            moved = self._parallel(part)
            found.append((own + (part * moved).sum(1)) / 2.0 - a @ moved.T)
        return np.asarray(torch.cat(found, 1).clamp(min=0.0).numpy(), dtype=np.float64)

    def _parallel(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows times the parallel sum."""
        if self.a is None:
            first, second = self.euclidean
            return rows * (first * second / (first + second))
        return self.a.times(self.inverse.solve(self.b.times(rows.T))).T


def _dense(hessian: _Hessian) -> torch.Tensor:
    if hessian.dense is not None:
        return hessian.dense
    assert hessian.rows is not None
    return hessian.rows.T @ hessian.rows


def pair(cost: FloatArray, count: int, how: str) -> Pairs:
    """`count` pairs, at most one per row and column: the cheapest first (`"greedy"`), or least in sum (`"optimal"`)."""
    rows, columns = cost.shape
    count = min(count, rows, columns)
    if how == "greedy":
        return _greedy(cost, count)
    if count == min(rows, columns):
        one, two = linear_sum_assignment(cost)
    else:  # what stays alone is paired with a stand-in at no cost
        whole = np.zeros((rows + columns - count, rows + columns - count))
        whole[:rows, :columns] = cost
        whole[rows:, columns:] = np.abs(cost).sum() + 1.0
        one, two = linear_sum_assignment(whole)
        real = (one < rows) & (two < columns)
        one, two = one[real], two[real]
    return np.asarray(one, dtype=np.int64), np.asarray(two, dtype=np.int64)


def _greedy(cost: FloatArray, count: int) -> Pairs:
    order = np.argsort(cost, axis=1, kind="stable")
    best = [(float(cost[row, order[row, 0]]), row, 0) for row in range(len(cost))]
    heapq.heapify(best)
    taken = np.zeros(cost.shape[1], dtype=bool)
    found: list[tuple[int, int]] = []
    while len(found) < count:
        _, row, place = heapq.heappop(best)
        column = int(order[row, place])
        if not taken[column]:
            taken[column] = True
            found.append((row, column))
        elif place + 1 < cost.shape[1]:
            heapq.heappush(best, (float(cost[row, order[row, place + 1]]), row, place + 1))
    pairs = np.array(sorted(found), dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
