"""Re-fitting weights that only one task has: what the models shared before cost, they make up for.

A row `w` of a layer that gives `t` in the model as it was given and reads `x` now has the error `E[(t - w x)^2]`. Over
the weights `f` that nobody else has it is least for

    dw_f = (H_ff + lambda I)^-1 E[(t - w x) x_f],    H = E[x x^T].

`lambda` is as large as in the Hessians by which rows are joined: with a smaller one weights grow along directions that
the samples hardly show. What a row would gain is estimated on samples that its change is not fitted to; one that gains
nothing there stays as it is.

So it goes with all rows of a layer before its channels are paired (what is paired are then the rows that fit best, and
Eq. 12 between them is the increase of both tasks' errors over what each has at best), with what stays a task's own of a
layer that is shared in part, and with every layer behind that is not shared, heads included. Once the models are
trained between stages, it is so with the rows that are to be paired alone: what is behind, training brings about better
from where it is. Weights of a sparse layer that are zero stay zero. Nothing is added to the parameters, and no labels
are needed.

MTZ itself ("Multi-Task Zipping via Layer-wise Neuron Sharing", Algorithm 1) leaves these weights as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from graphzip.calibration import Feeds
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.numeric.moments import ChannelMoments
from graphzip_passes.zip.joining import Joining
from graphzip_passes.zip.joint import Inputs, Joint, joins_bias
from graphzip_passes.zip.layers import TaskLayer
from graphzip_passes.zip.readings import Read
from graphzip_passes.zip.solve import LeastSquares
from graphzip_passes.zip.weights import augmented, blocks, write

__all__ = ["Refitting"]


class Refitting:
    """Fits what tasks have alone; `layers` are those that are shared, in the order in which they are."""

    def __init__(self, joint: Joint, joining: Joining, layers: Sequence[str]) -> None:
        self.joint, self.joining, self.layers = joint, joining, tuple(layers)
        self.fitted: list[str] = []
        self.is_trained = False
        """Whether the models are trained between stages: then only what is to be paired is fitted."""

    @property
    def on(self) -> bool:
        return self.joint.options.refit

    def watched(self) -> list[TaskLayer]:
        """The layers that are not shared, whose outputs have to be known from the start."""
        if not self.on:
            return []
        first = {task: self._places(task)[0] for task in self.joint.tasks}
        return [each for each in self._alone() if self._place(each) > first[each.task]]

    def rows(self, traced: Traced, layers: Mapping[str, TaskLayer], inputs: Inputs) -> None:
        """Fit all rows of a layer that is to be shared, for each task by itself."""
        for task, read in inputs.items() if self.on else ():
            layer = layers[task]
            whole = np.arange(layer.shape[0])
            self._improve(traced, layer, read, whole, self._free(layer, np.ones(layer.shape[1], dtype=bool)))

    def rest(self, traced: Traced, layers: Mapping[str, TaskLayer], inputs: Inputs) -> None:
        """Fit what remains of a layer's shared rows: the weights of inputs that are not shared, and biases."""
        keys = self.joint.channels.keys(dict(layers))
        for task, read in inputs.items() if self.on and not self.is_trained else ():
            layer, (rows, columns) = layers[task], keys[task]
            if layer.groups > 1 or columns is None:
                continue
            others = {other: keys[other] for other in layers if other != task}
            held = np.array([np.isin(rows, other[0]) for other in others.values()])
            for pattern in np.unique(held.T, axis=0):
                at = np.flatnonzero((pattern == held.T).all(1))
                shared = [np.asarray(other[1]) for other, has in zip(others.values(), pattern, strict=True) if has]
                alone = ~np.isin(columns, np.concatenate([np.arange(0), *shared]))
                own_bias = not shared or not joins_bias(dict(layers))
                if alone.any() or (own_bias and _fits_bias(layer)):
                    self._improve(traced, layer, read, at, self._free(layer, alone, bias=own_bias))

    def behind(self, traced: Traced, name: str, feeds: Feeds) -> None:
        """Fit the layers that are not shared and run behind a layer, up to the next that is."""
        for task in self.joint.tasks if self.on and feeds and not self.is_trained else ():
            places = self._places(task)
            layer = self.joint.matching.layers[name].get(task)
            if layer is None:
                continue
            start = self._place(layer)
            end = min((place for place in places if place > start), default=len(self.joint.matching.places))
            for each in self._alone():
                if each.task == task and start < self._place(each) < end:
                    self._fit(traced, each, feeds)

    def _fit(self, traced: Traced, layer: TaskLayer, feeds: Feeds) -> None:
        readings = self.joint.readings
        if readings.has_run(layer):
            readings.forget(layer.task)
        read = readings.inputs(traced, layer, feeds)
        free = self._free(layer, np.ones(layer.shape[1], dtype=bool))
        if self._improve(traced, layer, read, np.arange(layer.shape[0]), free):
            self.fitted.append(layer.weight.removesuffix(".weight"))
        self.joining.correct(traced, layer, read)
        readings.done(layer)

    def _improve(self, traced: Traced, layer: TaskLayer, read: Read, rows: IntArray, free: IntArray) -> bool:
        """Fit the features `free` of some rows, those of each part by themselves; whether anything was to be fitted."""
        if isinstance(read, ChannelMoments):
            return False
        changed = False
        for part in range(layer.parts):
            own = rows[rows // layer.height == part]
            fit: LeastSquares | None = None
            for some in blocks(own) if own.size else ():
                lack = self.joint.readings.missed(traced, layer, read, some, free)
                if lack is None:
                    continue
                some, lack = some[lack.any(1).numpy()], lack[lack.any(1)]
                if not some.size:
                    continue
                if fit is None:
                    among = read[part].among(free, np.arange(free.size), free.size)
                    fit = LeastSquares(among, damping=self.joint.options.damping, what=f"layer {layer.name!r}")
                now = augmented(traced, layer, some)[:, free]
                taken = now != 0.0
                taken[:, free == layer.features] = True
                change = fit.change(lack, taken)
                change[~self._serves(traced, layer, fit, some, free, change)] = 0.0
                inner = (free < layer.features) | _fits_bias(layer)
                write(traced, layer, some, free[inner], (now + change)[:, inner])
                changed = True
        return changed

    def _serves(
        self, traced: Traced, layer: TaskLayer, fit: LeastSquares, rows: IntArray, free: IntArray, change: torch.Tensor
    ) -> torch.Tensor:
        """Which of some rows of a part are better off changed, on samples that the change is not fitted to."""
        apart = self.joint.readings.apart(traced, layer, rows)
        if apart is None:
            return torch.ones(len(rows), dtype=torch.bool)
        read, missed = apart
        return fit.serves(change, read[..., torch.from_numpy(free)], missed)

    def _free(self, layer: TaskLayer, columns: NDArray[np.bool_], *, bias: bool = True) -> IntArray:
        """Features of the columns that are true; with the one for the bias where there is one, or a running mean."""
        inner = np.arange(layer.positions)
        features = (np.flatnonzero(columns)[:, None] * layer.positions + inner).ravel()
        return np.append(features, layer.features) if bias and (layer.bias or layer.norm) else features

    def _alone(self) -> list[TaskLayer]:
        """The layers of all tasks that are not shared, in the order in which they run."""
        found = [layer for layer in self.joint.matching.every if not self._is_shared(layer)]
        return sorted(found, key=self._place)

    def _is_shared(self, layer: TaskLayer) -> bool:
        shared = (self.joint.matching.layers[name].get(layer.task) for name in self.layers)
        return any(other is not None and other.weight == layer.weight for other in shared)

    def _places(self, task: str) -> list[int]:
        """Where the shared layers of a task run."""
        shared = (self.joint.matching.layers[name].get(task) for name in self.layers)
        return sorted(self._place(layer) for layer in shared if layer is not None) or [len(self.joint.matching.places)]

    def _place(self, layer: TaskLayer) -> int:
        return self.joint.matching.places[layer.nodes[0]]


def _fits_bias(layer: TaskLayer) -> bool:
    """Whether the bias takes in what outputs lack on average; behind a batch norm that is its running mean."""
    return layer.bias is not None and layer.norm is None
