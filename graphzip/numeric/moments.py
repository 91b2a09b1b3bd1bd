"""Second moments of what layers read and give, from samples that come in pieces, over several processes; float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from graphzip.numeric.solvers import products, relative_damping
from graphzip.process_groups import Processes

__all__ = ["ChannelMoments", "CrossMoments", "Moments", "Spread", "SteadySum", "mean_products"]

IntArray = NDArray[np.int64]

_EXACT = 50  # binary digits of the largest sum that are added up without rounding


class SteadySum:
    """A sum in float64 with the same bits in whatever order its parts come, and whichever process adds which of them.

    For what magnifies rounding: directions in which hardly anything varies. Every part is cut at one place: what stands
    before it is added up without rounding, and what stands behind it is so small that its rounding does not show.
    `bound` is that of all processes: no sum of parts is larger.

    Source: Demmel and Nguyen, "Fast Reproducible Floating-Point Summation" (ARITH 2013), the pre-rounding.
    """

    def __init__(self, bound: float, *shape: int) -> None:
        self._shift = math.ldexp(1.5, math.frexp(bound)[1] + 52 - _EXACT)
        self._parts = torch.zeros(2, *shape, dtype=torch.float64)

    def add(self, part: torch.Tensor) -> None:
        """Add a tensor of the sum's shape."""
        part = part.detach().to("cpu", torch.float64)
        before = part.add(self._shift).sub_(self._shift)
        self._parts[0] += before
        self._parts[1] += part.sub(before)

    def total(self, processes: Processes) -> torch.Tensor:
        """What all processes added, in each of them."""
        (parts,) = processes.summed(self._parts)
        found: torch.Tensor = parts[0] + parts[1]
        return found


def mean_products(rows: Sequence[torch.Tensor], size: int, processes: Processes) -> torch.Tensor:
    """`E[y y^T]`, `(size, size)`, over rows `(samples, size)` of every batch here and in other processes."""
    own = max((float(each.abs().max()) for each in rows if each.numel()), default=0.0)
    largest, counts = zip(*processes.gathered((own, sum(map(len, rows)))), strict=True)
    found = SteadySum(max(largest) ** 2 * sum(counts), size, size)
    for each in rows:
        found.add(each.T @ each)
    mean: torch.Tensor = found.total(processes) / max(sum(counts), 1)
    return mean


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
        """Count rows of shape `(samples, inputs)`; many that lie on a device are multiplied there."""
        rows = rows.detach()
        if self.gram is not None and rows.device.type != "cpu":
            self.count += len(rows)
            self.total += rows.sum(0, dtype=torch.float64).cpu()
            self.gram += products(rows[None], rows[None])[0].cpu()
            return
        rows = rows.to("cpu", torch.float64)
        self.count += len(rows)
        self.total += rows.sum(0)
        if self.rows is not None and self.count <= self.inputs:
            self.rows = torch.cat([self.rows, rows])
        elif self.rows is not None:
            self.gram, self.rows = self.rows.T @ self.rows + rows.T @ rows, None
        else:
            assert self.gram is not None
            self.gram.addmm_(rows.T, rows)

    def add_up(self, processes: Processes) -> None:
        """Count what all processes counted, each on its share of the data."""
        if processes.size == 1:
            return
        self.count = sum(processes.gathered(self.count))
        (self.total,) = processes.summed(self.total)
        if self.count <= self.inputs:  # then all of them have kept their rows
            self.rows = torch.cat([rows for rows in processes.gathered(self.rows) if rows is not None])
            return
        gram = self.gram if self.rows is None else self.rows.T @ self.rows
        assert gram is not None
        self.rows, (self.gram,) = None, processes.summed(gram)

    def dense(self) -> torch.Tensor:
        """`E[x x^T]`, `(inputs, inputs)`."""
        if self.gram is not None:
            return self.gram / max(self.count, 1)
        assert self.rows is not None
        return (self.rows.T @ self.rows).div_(max(self.count, 1))

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

    def add_up(self, processes: Processes) -> None:
        """Count what all processes counted, each on its share of the data."""
        if processes.size == 1:
            return
        self.count = sum(processes.gathered(self.count))
        if self.count * sum(self.shape) <= math.prod(self.shape):  # then all of them have kept their samples
            kept = [samples for samples in processes.gathered(self.samples) if samples is not None]
            self._keep(*(torch.cat(each) for each in zip(*kept, strict=True)))
            return
        product = self.product if self.samples is None else self.samples[0].T @ self.samples[1]
        assert product is not None
        self.samples, (self.product,) = None, processes.summed(product)

    def among(self, outputs: IntArray, inputs: IntArray) -> torch.Tensor:
        """The same for some outputs and inputs."""
        rows, columns = torch.from_numpy(outputs), torch.from_numpy(inputs)
        if self.samples is not None:
            y, x = self.samples
            return (y[:, rows].T @ x[:, columns]).div_(max(self.count, 1))
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

    def add_up(self, processes: Processes) -> None:
        """Count what all processes counted, each on its share of the data."""
        self.count = sum(processes.gathered(self.count))
        self.total, self.gram = processes.summed(self.total, self.gram)

    def spread(self, weight: torch.Tensor) -> Spread:
        """Mean and variance of each output of kernels `(channels, positions)`."""
        count = max(self.count, 1)
        mean = (weight * self.total).sum(1) / count
        return Spread.of(mean, torch.einsum("cp,cpq,cq->c", weight, self.gram, weight) / count)

    def hessian(self, scale: float, damping: float) -> torch.Tensor:
        """The Hessian of each channel, damped by the mean of its diagonal."""
        found = self.gram * (scale / max(self.count, 1))
        diagonal = found.diagonal(dim1=1, dim2=2)
        diagonal.add_(relative_damping(diagonal.mean(1, keepdim=True), damping))
        return found


@dataclass
class Spread:
    """Mean and variance of outputs."""

    mean: torch.Tensor
    var: torch.Tensor

    @classmethod
    def of(cls, mean: torch.Tensor, square: torch.Tensor) -> Spread:
        return cls(mean, (square - mean.square()).clamp(min=0.0))
