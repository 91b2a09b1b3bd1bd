"""Weights that layers share, by least squares: what their models gave before is given again as well as can be.

Layer after layer, in the order in which they run. With calibration data, let `X_d` (rows, channels of model d * kernel)
be what the layer reads in model `d` now that the layers before it share weights, `T_d` what it gave before and `P_d`
what it gives now. `S_d` adds up the columns of the channels of a cluster. The change of the shared weight and of the
biases is

    dW, db = argmin  sum_d || T_d - P_d - X_d S_d dW - 1 db_d^T ||^2 + n lambda || dW ||^2,

n being the number of rows: one system of normal equations for both models. Where the weights were the centres of their
clusters, those are what the damping draws to, and they stay where they are best.

Then the clusters themselves are looked at, as k-means does, with what is lost by sharing in place of the distance of
features. `R` being what is missing still, channel i would best be read by `g_i = g_c + (X_i^T X_i)^-1 X_i^T R`, and by
the weights of a cluster c' loses `D(c') = || X_i (g_i - g_c') ||^2`. It leaves its cluster c where

    D(c) m_c / (m_c - m_i) > D(c') m_c' / (m_c' + m_i),     m_c = sum over i in c of m_i = || X_i ||^2,

the factors being what the centres give way (they are exact where channels are not correlated). The weights are solved
for after every round, and of all rounds the best counts (`graphzip_passes.cross_domain.shared_moves`). It is done on
second moments, which do not grow with the data, or on the rows themselves where they are fewer than what is read
(`graphzip_passes.cross_domain.shared_moments`).

Sources: Gao, Deng and Huang, "Cross Domain Model Compression by Structurally Weight Sharing" (2019), section 3.4, for
weights that are shared; He et al., "Channel Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017), section
3.1, for layers fitted one after the other; Hartigan, "Clustering Algorithms" (1975), for the factors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from graphzip.calibration import Calibration
from graphzip.labels import IntArray
from graphzip.numeric.im2col import Window
from graphzip.numeric.moments import CrossMoments, Moments
from graphzip.numeric.solvers import factorised, ridge
from graphzip.process_groups import Processes
from graphzip_passes.cross_domain.shared_layers import SharedLayer
from graphzip_passes.cross_domain.shared_moments import Side, SideProducts, SideRows
from graphzip_passes.cross_domain.shared_moves import Regrouping

__all__ = ["fit_shared"]

logger = logging.getLogger(__name__)

_FEATURES: Final = 8192  # of a layer in one model, at most: their second moments are a matrix of the square of them
_PLACES: Final = 16  # of the output of one sample that count
_CHUNK: Final = 16  # samples whose patches are laid out at once
_PRECISION: Final = 2.0**-23  # of what layers read, relative
_ROUNDS: Final = 10  # in which channels change their clusters
_ENOUGH: Final = 1e-3  # of what was gained so far: a round that gains less is the last one

_See = Callable[[str, nn.Module, Tensor, Tensor, Tensor], None]
"""Told of every call of a layer: the task, the layer, what it reads, what it gives and what it gave before."""


@torch.no_grad()
def fit_shared(
    layer: SharedLayer, number: IntArray, model: nn.Module, before: nn.Module, data: Calibration, *, move: bool
) -> IntArray:
    """Fit a layer of `model`, whose clusters have equal weights, to what it gives in `before`, in place.

    `number` is the cluster of every input channel, of the first task before those of the second. With `move` channels
    may change it; what they have in the end is given. `data` is of the tasks of `model`.
    """
    features = max(layer.sizes) * math.prod(layer.kernel)
    if features > _FEATURES:
        logger.info("%s keeps the centres of its clusters: it has %d inputs, too many to fit", layer.name, features)
        return number
    seen = _Seen(layer, data.processes, intercept=_own_biases(layer, model))
    with _watched(layer, model, before.eval(), seen.add):
        data.run(seen.begin)
    intercept, fit = seen.intercept, _Fit.of(seen, number, _centres(layer, number, model))
    del seen  # its moments are as large as those of the fit
    fit.solve()
    best = fit.found()
    for _ in range(_ROUNDS if move else 0):
        if not fit.moved():
            break
        fit.solve()
        last, best = best, min(best, fit.found(), key=lambda each: each.lost)
        if best.lost > last.lost * (1.0 + _ENOUGH):  # both are below zero
            break
    chosen, weights, biases = data.processes.agreed((best.number, best.weights, best.biases))
    numbers = np.split(chosen, np.cumsum(layer.sizes)[:-1])
    for task, own, change in zip(layer.tasks, numbers, biases, strict=True):
        module = model.get_submodule(f"{task}.{layer.name}")
        weight = module.get_parameter("weight")
        part = weights.to(weight.dtype)[torch.from_numpy(own)]
        weight.copy_(part.reshape(len(own), *layer.kernel, layer.outs).movedim(-1, 0))
        if intercept:
            module.get_parameter("bias").add_(change.to(module.get_parameter("bias")))
    return chosen


def _own_biases(layer: SharedLayer, model: nn.Module) -> bool:
    """Whether the layer has a bias in every task that nothing else has."""
    held = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    biases = [model.get_submodule(f"{task}.{layer.name}").bias for task in layer.tasks]
    return all(bias is not None and held.count(id(bias)) == 1 for bias in biases)


def _centres(layer: SharedLayer, number: IntArray, model: nn.Module) -> Tensor:
    """The weights of all clusters, (clusters, kernel, outs), in float64: those of the first channel of each."""
    first, start = np.unique(number, return_index=True)[1], 0
    found = torch.empty(layer.count, math.prod(layer.kernel), layer.outs, dtype=torch.float64)
    for task, size in zip(layer.tasks, layer.sizes, strict=True):
        weight = model.get_submodule(f"{task}.{layer.name}").get_parameter("weight")
        own = np.flatnonzero((first >= start) & (first < start + size))
        rows = weight[:, torch.from_numpy(first[own] - start)].cpu()
        rows = rows.reshape(layer.outs, len(own), math.prod(layer.kernel))
        found[torch.from_numpy(own)] = rows.permute(1, 2, 0).double()
        start += size
    return found


@contextmanager
def _watched(layer: SharedLayer, model: nn.Module, before: nn.Module, see: _See) -> Iterator[None]:
    """Inside, `see` is told of every call of the layer: `before` runs along with `model`, batch by batch."""
    hooks: list[Any] = []
    wanted: dict[str, Tensor] = {}

    def watch(task: str) -> None:
        original, inner = before.get_submodule(task), f"{task}.{layer.name}"

        def along(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            original(*args, **kwargs)

        def remember(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            wanted[task] = output

        def compare(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            see(task, module, args[0], output, wanted.pop(task))

        hooks.append(model.get_submodule(task).register_forward_pre_hook(along, with_kwargs=True))
        hooks.append(before.get_submodule(inner).register_forward_hook(remember))
        hooks.append(model.get_submodule(inner).register_forward_hook(compare))

    try:
        for task in layer.tasks:
            watch(task)
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Seen:
    """Second moments of what a layer reads and of what it lacks, by task; with `intercept` a one goes with the read."""

    def __init__(self, layer: SharedLayer, processes: Processes, *, intercept: bool) -> None:
        self.layer, self.processes, self.intercept = layer, processes, intercept
        sizes = [size * math.prod(layer.kernel) + intercept for size in layer.sizes]
        self.read = {task: Moments(size) for task, size in zip(layer.tasks, sizes, strict=True)}
        self.missing = {task: CrossMoments(layer.outs, size) for task, size in zip(layer.tasks, sizes, strict=True)}
        self._random = torch.Generator().manual_seed(0)

    def begin(self, number: int) -> None:
        """The batch of that number comes next."""
        self._random.manual_seed(number)

    def add(self, task: str, module: nn.Module, x: Tensor, given: Tensor, wanted: Tensor) -> None:
        """Count what a layer reads, and what it lacks."""
        lacking, dims = wanted - given, self.layer.dims
        if dims == 0:
            self._count(task, x.reshape(-1, x.shape[-1]), lacking.reshape(-1, self.layer.outs))
            return
        batch = [each.reshape(-1, *each.shape[-dims - 1 :]) for each in (x, lacking)]
        for read, lack in zip(*(torch.split(each, _CHUNK) for each in batch), strict=True):
            places = torch.randperm(lack[0, 0].numel(), generator=self._random)[:_PLACES].to(x.device)
            rows = Window.of_module(module).patches(read)[..., places].movedim(3, 1).flatten(0, 1).flatten(1)
            self._count(task, rows, lack.flatten(2)[..., places].transpose(1, 2).flatten(0, 1))

    def _count(self, task: str, rows: Tensor, lacking: Tensor) -> None:
        """Rows of what is read (n, channels * kernel) and of what is missing (n, outs)."""
        rows, lacking = (each.to("cpu", torch.float64) for each in (rows, lacking))
        if self.intercept:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        self.read[task].add(rows)
        self.missing[task].add(lacking, rows)

    def side(self, task: str) -> Side:
        """What is known of one task, of all processes; it is held here no longer."""
        read, missing = self.read.pop(task), self.missing.pop(task)
        read.add_up(self.processes)
        missing.add_up(self.processes)
        if read.rows is not None and missing.samples is not None:
            return SideRows(read.rows, missing.samples[0])
        cross = missing.among(np.arange(self.layer.outs), np.arange(read.inputs))
        gram = read.dense().mul_(read.count) if read.gram is None else read.gram
        return SideProducts(gram, cross.mul_(read.count).t())


@dataclass(frozen=True)
class _Found:
    """What was lost in a round, less what it was to begin with, and the clusters, weights and biases it ended with."""

    lost: float
    number: IntArray
    weights: Tensor
    biases: list[Tensor]


@dataclass
class _Fit:
    """The shared weights of one layer and the clusters of its channels, on second moments.

    `sides` has what is known of each task. `weights` (clusters, kernel, outs); `biases` is by how much those of each
    task changed. `lost` is `sum_d ||R_d||^2`, less what it was to begin with.
    """

    layer: SharedLayer
    sides: list[Side]
    rows: int
    intercept: bool
    number: IntArray
    weights: Tensor
    biases: list[Tensor]
    lost: float = 0.0

    @classmethod
    def of(cls, seen: _Seen, number: IntArray, weights: Tensor) -> _Fit:
        """Begin with the weights that the clusters have."""
        layer, counts = seen.layer, []
        sides: list[Side] = []
        for task in layer.tasks:
            read = seen.read[task]
            sides.append(seen.side(task))
            counts.append(read.count)
        if any(isinstance(side, SideProducts) for side in sides):
            sides = [side.products() if isinstance(side, SideRows) else side for side in sides]
        biases = [torch.zeros(layer.outs, dtype=torch.float64) for _ in layer.tasks]
        return cls(layer, sides, sum(counts), seen.intercept, number.copy(), weights, biases)

    def found(self) -> _Found:
        """The clusters and the weights as they are now."""
        return _Found(self.lost, self.number.copy(), self.weights, list(self.biases))

    @property
    def columns(self) -> list[IntArray]:
        """The cluster of every channel, by task."""
        return np.split(self.number, np.cumsum(self.layer.sizes)[:-1])

    def solve(self) -> None:
        """Bring weights and biases to the least squares for the clusters as they are."""
        spread = [self._spread(task) for task in range(len(self.sides))]
        rows = [side for side in self.sides if isinstance(side, SideRows)]
        change = self._from_rows(rows, spread) if rows else self._from_products(spread)
        count = self.weights.shape[0] * self.weights.shape[1]
        self.weights = self.weights + change[:count].reshape(self.weights.shape)
        for task, (side, to) in enumerate(zip(self.sides, spread, strict=True)):
            self.lost -= side.followed(change, to)
            if self.intercept:
                self.biases[task] = self.biases[task] + change[count + task]

    def _from_products(self, spread: Sequence[Tensor]) -> Tensor:
        """The change of all unknowns, (weights and biases, outs)."""
        count, size = self.weights.shape[0] * self.weights.shape[1], self._size
        gram = torch.zeros(size, size, dtype=torch.float64)
        left = torch.zeros(size, self.layer.outs, dtype=torch.float64)
        for side, to in zip(self.sides, spread, strict=True):
            assert isinstance(side, SideProducts)
            side.add_to(gram, left, to)
        damping = torch.zeros(size, dtype=torch.float64)
        damping[:count] = self._damping(gram.diagonal()[:count], gram[count:, :count], gram.diagonal()[count:])
        return factorised(gram, damping, what=f"layer {self.layer.name!r}").solve(left)

    def _from_rows(self, sides: Sequence[SideRows], spread: Sequence[Tensor]) -> Tensor:
        """The same by a system of the size of the rows."""
        count = self.weights.shape[0] * self.weights.shape[1]
        read = [side.summed(to, self._size)[:, :count] for side, to in zip(sides, spread, strict=True)]
        rest = [side.rest for side in sides]
        square = sum((each.square().sum(0) for each in read), torch.zeros(()))
        if not self.intercept:
            (x, y), means = (torch.cat(read), torch.cat(rest)), []
            damping = self._damping(square, read[0][:0], square[:0])
        else:
            means = [(each.mean(0), lack.mean(0)) for each, lack in zip(read, rest, strict=True)]
            ones = torch.tensor([float(len(each)) for each in read], dtype=torch.float64)
            damping = self._damping(square, torch.stack([each.sum(0) for each in read]), ones)
            x = torch.cat([each.sub_(mean) for each, (mean, _) in zip(read, means, strict=True)])
            y = torch.cat([lack - mean for lack, (_, mean) in zip(rest, means, strict=True)])
        change = x.new_empty(self._size, self.layer.outs)
        inner = factorised(x @ x.t(), damping, what=f"layer {self.layer.name!r}").solve(y)
        torch.matmul(x.t(), inner, out=change[:count])
        for task, (mean, lack) in enumerate(means):
            change[count + task] = lack - mean @ change[:count]
        return change

    def _damping(self, square: Tensor, sums: Tensor, ones: Tensor) -> Tensor:
        """Of the weights: `square` (weights,) and `sums` (tasks, weights) of what is read in `ones` (tasks,) rows."""
        about = square - (sums.square() / ones.clamp_min(1.0)[:, None]).sum(0)
        return ridge(square, about.clamp_min(0.0), self.rows, precision=_PRECISION)

    @property
    def _size(self) -> int:
        """How many unknowns there are."""
        return self.weights.shape[0] * self.weights.shape[1] + (len(self.sides) if self.intercept else 0)

    def _spread(self, task: int) -> Tensor:
        """The unknown that each column of `X_d` is multiplied by."""
        clusters, kernel, _ = self.weights.shape
        number = torch.from_numpy(self.columns[task])
        own = (number[:, None] * kernel + torch.arange(kernel)).flatten()
        return torch.cat([own, torch.tensor([clusters * kernel + task])]) if self.intercept else own

    def moved(self) -> int:
        """Let channels go to the clusters whose weights suit them best, one after the other; how many went."""
        kernel, first = self.weights.shape[1], 0
        masses = [side.square()[: size * kernel] for side, size in zip(self.sides, self.layer.sizes, strict=True)]
        mass = torch.cat(masses).reshape(-1, kernel).sum(1)
        moves = Regrouping(self.weights, self.number, mass, self.layer.name)
        for task, size in enumerate(self.layer.sizes):
            moves.go_through(self.sides[task], range(first, first + size))
            first += size
        self.lost -= moves.gained
        return moves.made
