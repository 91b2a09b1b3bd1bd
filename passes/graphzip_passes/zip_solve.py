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
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment

from graphzip.labels import IntArray
from graphzip.numeric import factorised
from graphzip.ops.spec import FloatArray

__all__ = ["BLOCK", "ChannelMoments", "CrossMoments", "Moments", "Pairs", "Solver", "Spread", "gathered", "pair"]

BLOCK = 512
"""Rows of weights that are worked on at once, so that the memory that takes does not grow with the layer."""

Pairs = tuple[IntArray, IntArray]
"""Positions in A and, pair by pair, positions in B."""


def gathered(value: Any) -> list[Any]:
    """What every process of `torch.distributed` has, in order of rank; `value` alone where there is one process."""
    if not dist.is_available() or not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class Moments:
    """Second moments of a layer's inputs, from rows of samples that come in pieces; float64.

    The rows themselves are kept as long as they are fewer than the inputs.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.count = 0
        self.total = torch.zeros(inputs, dtype=torch.float64)
        self.rows: torch.Tensor | None = torch.zeros(0, inputs, dtype=torch.float64)
        self.gram: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Count rows of shape `(samples, inputs)`."""
        rows = rows.detach().to("cpu", torch.float64)
        self.count += len(rows)
        self.total += rows.sum(0)
        if self.rows is not None and self.count <= self.inputs:
            self.rows = torch.cat([self.rows, rows])
        elif self.rows is not None:
            self.gram, self.rows = self.rows.T @ self.rows + rows.T @ rows, None
        else:
            assert self.gram is not None
            self.gram.addmm_(rows.T, rows)

    def add_up(self) -> None:
        """Count what all processes of `torch.distributed` counted, each on its part of the data."""
        parts = gathered((self.count, self.total, self.rows, self.gram))
        if len(parts) == 1:
            return
        self.count = sum(part[0] for part in parts)
        self.total = sum((part[1] for part in parts), torch.zeros(()))
        kept = [part[2] for part in parts if part[2] is not None]
        if len(kept) == len(parts) and self.count <= self.inputs:
            self.rows = torch.cat(kept)
            return
        grams = (part[3] if part[2] is None else part[2].T @ part[2] for part in parts)
        self.rows, self.gram = None, sum(grams, torch.zeros(()))

    def dense(self) -> torch.Tensor:
        """`E[x x^T]`, `(inputs, inputs)`."""
        if self.gram is not None:
            return self.gram / max(self.count, 1)
        assert self.rows is not None
        return self.rows.T @ self.rows / max(self.count, 1)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / max(self.count, 1)

    def spread(self, weight: torch.Tensor) -> Spread:
        """Mean and variance of `W x` for each row of `W`."""
        mean = weight @ self.mean
        if self.rows is not None:
            square = (self.rows @ weight.T).square().sum(0) / max(self.count, 1)
        else:
            square = ((weight @ self.dense()) * weight).sum(1)
        return Spread.of(mean, square)

    def products(self, weight: torch.Tensor, columns: IntArray) -> torch.Tensor:
        """`E[(W x) x^T]` for some of the inputs, `(rows of W, columns)`."""
        chosen = torch.from_numpy(columns)
        if self.gram is not None:
            return weight @ self.gram[:, chosen] / max(self.count, 1)
        assert self.rows is not None
        return (self.rows @ weight.T).T @ self.rows[:, chosen] / max(self.count, 1)

    def among(self, columns: IntArray, positions: IntArray, inputs: int) -> Moments:
        """The same for some of the inputs, `columns`, put to `positions` among `inputs` that are zero otherwise."""
        made = Moments(inputs)
        made.count = self.count
        source, target = torch.from_numpy(columns), torch.from_numpy(positions)
        made.total[target] = self.total[source]
        if self.rows is not None and self.count <= inputs:
            made.rows = torch.zeros(len(self.rows), inputs, dtype=torch.float64)
            made.rows[:, target] = self.rows[:, source]
        else:
            made.rows, made.gram = None, torch.zeros(inputs, inputs, dtype=torch.float64)
            made.gram[target.unsqueeze(1), target] = self._among(source)
        return made

    def _among(self, columns: torch.Tensor) -> torch.Tensor:
        if self.gram is not None:
            return self.gram[columns.unsqueeze(1), columns]
        assert self.rows is not None
        chosen = self.rows[:, columns]
        return chosen.T @ chosen


class CrossMoments:
    """`E[y x^T]`, `(outputs, inputs)`, from samples of `y` and `x` that come in pieces; float64.

    The samples themselves are kept as long as they take less memory.
    """

    def __init__(self, outputs: int, inputs: int) -> None:
        self.shape = outputs, inputs
        self.count = 0
        self.samples: tuple[torch.Tensor, torch.Tensor] | None = (
            torch.zeros(0, outputs, dtype=torch.float64),
            torch.zeros(0, inputs, dtype=torch.float64),
        )
        self.product: torch.Tensor | None = None

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Count samples of shape `(samples, outputs)` and `(samples, inputs)`."""
        self.count += len(y)
        if self.samples is None:
            assert self.product is not None
            self.product.addmm_(y.T, x)
            return
        self._keep(torch.cat([self.samples[0], y]), torch.cat([self.samples[1], x]))

    def _keep(self, y: torch.Tensor, x: torch.Tensor) -> None:
        if len(y) * sum(self.shape) <= math.prod(self.shape):
            self.samples = y, x
        else:
            self.samples, self.product = None, y.T @ x

    def add_up(self) -> None:
        """Count what all processes of `torch.distributed` counted, each on its part of the data."""
        parts = gathered((self.count, self.samples, self.product))
        if len(parts) == 1:
            return
        self.count = sum(part[0] for part in parts)
        kept = [part[1] for part in parts if part[1] is not None]
        if len(kept) == len(parts):
            self._keep(*(torch.cat(each) for each in zip(*kept, strict=True)))
            return
        products = (part[2] if part[1] is None else part[1][0].T @ part[1][1] for part in parts)
        self.samples, self.product = None, sum(products, torch.zeros(()))

    def among(self, outputs: IntArray, inputs: IntArray) -> torch.Tensor:
        """The same for some outputs and inputs."""
        rows, columns = torch.from_numpy(outputs), torch.from_numpy(inputs)
        if self.samples is not None:
            y, x = self.samples
            return y[:, rows].T @ x[:, columns] / max(self.count, 1)
        assert self.product is not None
        return self.product[rows.unsqueeze(1), columns] / max(self.count, 1)

    def reordered(self, source: IntArray) -> CrossMoments:
        """Output `i` is what output `source[i]` was."""
        order = torch.from_numpy(source)
        return self._changed(lambda y: y[:, order])

    def scaled(self, scale: torch.Tensor) -> CrossMoments:
        """Each output times a number of its own."""
        return self._changed(lambda y: y * scale)

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> CrossMoments:
        """`change` takes and gives outputs, `(samples, outputs)`."""
        made = CrossMoments(*self.shape)
        made.count = self.count
        made.samples = None if self.samples is None else (change(self.samples[0]), self.samples[1])
        made.product = None if self.product is None else change(self.product.T).T
        return made


class ChannelMoments:
    """Second moments of what each channel of a depthwise convolution reads, `(channels, positions, positions)`."""

    def __init__(self, channels: int, positions: int) -> None:
        self.count = 0
        self.total = torch.zeros(channels, positions, dtype=torch.float64)
        self.gram = torch.zeros(channels, positions, positions, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        """Count rows of shape `(samples, channels, positions)`."""
        self.count += len(rows)
        self.total += rows.sum(0)
        self.gram += torch.einsum("ncp,ncq->cpq", rows, rows)

    def add_up(self) -> None:
        """Count what all processes of `torch.distributed` counted, each on its part of the data."""
        parts = gathered((self.count, self.total, self.gram))
        self.count = sum(part[0] for part in parts)
        self.total, self.gram = (sum((part[place] for part in parts), torch.zeros(())) for place in (1, 2))

    def spread(self, weight: torch.Tensor) -> Spread:
        """Mean and variance of each output of kernels `(channels, positions)`."""
        count = max(self.count, 1)
        mean = (weight * self.total).sum(1) / count
        return Spread.of(mean, torch.einsum("cp,cpq,cq->c", weight, self.gram, weight) / count)

    def hessian(self, scale: float, damping: float) -> torch.Tensor:
        """The Hessian of each channel, damped by the mean of its diagonal."""
        found = self.gram * (scale / max(self.count, 1))
        mean = found.diagonal(dim1=1, dim2=2).mean(1)
        ridge = damping * torch.where(mean > 0.0, mean, 1.0)
        return found + ridge.reshape(-1, 1, 1) * torch.eye(found.shape[1], dtype=torch.float64)


@dataclass
class Spread:
    """Mean and variance of outputs."""

    mean: torch.Tensor
    var: torch.Tensor

    @classmethod
    def of(cls, mean: torch.Tensor, square: torch.Tensor) -> Spread:
        return cls(mean, (square - mean.square()).clamp(min=0.0))


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
        return _Hessian(None, stacked, _ridge(float(stacked.square().sum()), inputs, damping))
    dense = sum((scale * each.dense() for each, scale in zip(moments, scales, strict=True)), torch.zeros(()))
    return _Hessian(dense, None, _ridge(float(dense.diagonal().sum()), inputs, damping))


def _ridge(trace: float, inputs: int, damping: float) -> float:
    """`damping` times the mean of the diagonal; something where the data say nothing."""
    return damping * (trace / inputs if trace > 0.0 else 1.0)


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
            self._factor(what)

    def _factor(self, what: str) -> None:
        assert self.a is not None
        one, two = self.a, self.b
        self.ridge = one.ridge + two.ridge
        if one.rows is not None and two.rows is not None and len(one.rows) + len(two.rows) < one.rows.shape[1]:
            self.rows: torch.Tensor | None = torch.cat([one.rows, two.rows])
            self.factor = factorised(self.rows @ self.rows.T, self.ridge, what=what)
            return
        self.rows = None
        self.factor = factorised(_dense(one) + _dense(two), self.ridge, what=what)

    def solve(self, columns: torch.Tensor) -> torch.Tensor:
        """`(H_A + H_B)^{-1} V`."""
        if self.rows is None:
            return self.factor.solve(columns)
        inner = self.factor.solve(self.rows @ columns)
        return (columns - self.rows.T @ inner) / self.ridge

    def update(self, a: torch.Tensor, b: torch.Tensor, missed: torch.Tensor) -> torch.Tensor:
        """Eq. 10 and 11 for rows of weights, pair by pair, `(pairs, inputs)`.

        `missed` is what the weighted outputs lack, times the inputs, because the inputs have moved since: the joint
        weights make up for it.
        """
        if self.a is None:
            first, second = self.euclidean
            return a + (b - a) * (second / (first + second))
        return a + self.solve(self.b.times((b - a).T) + missed.T).T

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
        return self.a.times(self.solve(self.b.times(rows.T))).T


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
