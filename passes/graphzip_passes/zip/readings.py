"""What the layers of several tasks read on their calibration data, and what they gave in the models as they were."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphzip.analysis.layers import calls_of_layers
from graphzip.calibration import Feeds
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.numeric.moments import ChannelMoments, CrossMoments, Moments, Spread
from graphzip.numeric.solvers import check_finite
from graphzip.process_groups import ALONE
from graphzip_passes.parts.streamed import Workspace
from graphzip_passes.zip.inputs import Feed, Kept, rows_of, values_of
from graphzip_passes.zip.layers import TaskLayer
from graphzip_passes.zip.weights import augmented, matrix, outputs, parted

__all__ = ["Read", "Readings"]

logger = logging.getLogger(__name__)

_ROUNDING = 1e-12  # of the largest product with an output: what is taken for nothing
_APART = 512  # rows, about, that changes of a layer are tried on

Read = list[Moments] | ChannelMoments
"""Moments of what a layer reads, with a one for the bias: of each of its parts, or of each channel by itself."""


@dataclass
class _Given:
    """A layer's outputs on the calibration data, `(samples, outputs)`, in the models as they were given."""

    spread: Spread
    outputs: torch.Tensor


class Readings:
    """Layers run on the calibration data, of which `places` of every sample count; of several `processes` each has a
    share of it.
    """

    def __init__(self, tasks: Sequence[str], *, places: int, seed: int) -> None:
        self.tasks, self.places, self.seed = tuple(tasks), places, seed
        self.processes = ALONE
        self.workspace: Workspace | None = None
        self._kept = {task: Kept() for task in tasks}
        self._given: dict[str, _Given] | None = None
        self._wanted: dict[str, list[CrossMoments]] = {}
        self._apart: dict[str, tuple[list[torch.Tensor], torch.Tensor]] = {}
        self._together: dict[str, int] = {}  # rows of one sample
        self._batches: dict[str, list[float]] = {}
        self._batches_given: dict[str, list[float]] = {}
        self._batches_of_all: dict[str, int] = {}

    def forget(self, task: str | None = None) -> None:
        """Compute values anew from here on, of one task or of all."""
        for each in self.tasks if task is None else (task,):
            self._kept[each].clear()

    def has_run(self, layer: TaskLayer) -> bool:
        """Whether values are known that depend on what the layer gave."""
        return any(node in self._kept[layer.task].done for node in layer.nodes)

    def done(self, layer: TaskLayer) -> None:
        """Nothing more will be asked of a layer."""
        if self._given is not None:
            self._given.pop(layer.weight, None)
        self._wanted.pop(layer.weight, None)
        self._apart.pop(layer.weight, None)

    def note_given(self, traced: Traced, layers: Sequence[TaskLayer], feeds: Feeds) -> None:
        """Remember the outputs of layers in the models as they are given; once."""
        if self._given is not None:
            return
        pieces: dict[str, list[torch.Tensor]] = {}
        for task in self.tasks if feeds else ():
            own = [layer for layer in layers if layer.task == task]
            for layer, read in self._read(traced, own, feeds, Kept()) if own else ():
                pieces.setdefault(layer.weight, []).append(self._held(_outputs(traced, layer, read)))
            self._batches_given[task] = list(self._batches.get(task, []))
            self._batches_of_all[task] = sum(self.processes.gathered(len(self._batches_given[task])))
        for known in self.processes.gathered(self._together):
            self._together |= known
        self._given = {}
        for key in list(pieces):
            out = torch.cat(pieces.pop(key))
            rows = torch.tensor(float(len(out)), dtype=torch.float64)
            total, square, count = self.processes.summed(out.sum(0), out.square().sum(0), rows)
            self._given[key] = _Given(Spread.of(total / count, square / count), self._held(out))
            if self.workspace is not None:
                self.workspace.files.rest()

    def inputs(self, traced: Traced, layer: TaskLayer, feeds: Feeds) -> Read:
        """What a layer reads in the models as they are now."""
        pieces = (rows for _, rows in self._read(traced, [layer], feeds, self._kept[layer.task]))
        if layer.depthwise:
            apart = ChannelMoments(layer.shape[0], layer.positions)
            for rows in pieces:
                apart.add(rows.repeat_interleave(layer.shape[0] // layer.groups, 1))
            apart.add_up(self.processes)
            return apart
        found = [Moments(layer.features + 1) for _ in range(layer.parts)]
        wanted = [CrossMoments(layer.height, layer.features + 1) for _ in range(layer.parts)]
        given = (self._given or {}).get(layer.weight)
        tried: list[list[torch.Tensor]] = [[] for _ in found]
        places: list[torch.Tensor] = []
        for rows in pieces:
            start = found[0].count
            few = self._few(layer, len(rows))
            places.append(torch.arange(start, start + few))
            known = None if given is None else given.outputs[start : start + len(rows)]
            for part, flat in enumerate(parted(layer, rows)):
                if known is not None and len(known) == len(flat):
                    wanted[part].add(known[:, part * layer.height : (part + 1) * layer.height], flat)
                found[part].add(flat)
                tried[part].append(flat[:few].clone())
        for moments, cross in zip(found, wanted, strict=True):
            moments.add_up(self.processes)
            cross.add_up(self.processes)
        if not self.processes.every(self._batches[layer.task] == self._batches_given[layer.task]):
            logger.warning("task %r: its calibration batches differ from pass to pass; do not shuffle them", layer.task)
        elif wanted[0].count == found[0].count:
            self._wanted[layer.weight] = wanted
            self._apart[layer.weight] = [torch.cat(each) for each in tried], torch.cat(places)
        return found

    def _few(self, layer: TaskLayer, rows: int) -> int:
        """How many of the rows of a batch are kept: those of whole samples."""
        together = self._together.get(layer.weight, 1)
        share = _APART // (together * max(self._batches_of_all.get(layer.task, 0), 1))
        return min(together * max(share, 1), rows)

    def missed(
        self, traced: Traced, layer: TaskLayer, read: Read, rows: IntArray, columns: IntArray
    ) -> torch.Tensor | None:
        """What rows of one part lack of their outputs at first, times some of the inputs; nothing where none is known.

        `columns` are features of the part, the last of them the one.
        """
        wanted = self._wanted.get(layer.weight)
        if wanted is None or isinstance(read, ChannelMoments):
            return None
        part = int(rows[0]) // layer.height
        now = read[part].products(augmented(traced, layer, rows), columns)
        aim = wanted[part].among(rows - part * layer.height, columns)
        lack = aim - now
        return torch.where(lack.abs() > _ROUNDING * aim.abs().amax(1, keepdim=True), lack, 0.0)

    def apart(self, traced: Traced, layer: TaskLayer, rows: IntArray) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Some of what a part of a layer reads, `(samples, places, features + 1)`, and what its `rows` lack there of
        their outputs at first, `(samples, places, rows)`; behind a batch norm, which takes in their mean, without that.
        """
        if layer.weight not in self._apart or self._given is None:
            return None
        read, places = self._apart[layer.weight]
        own = read[int(rows[0]) // layer.height]
        wanted = self._given[layer.weight].outputs[places][:, torch.from_numpy(rows)]
        missed = wanted - own @ augmented(traced, layer, rows).T
        both = [torch.cat(found) for found in zip(*self.processes.gathered((own, missed)), strict=True)]
        if layer.norm is not None:
            both[1] -= both[1].mean(0)
        together = self._together.get(layer.weight, 1)
        one, other = (each.reshape(-1, together, each.shape[1]) for each in both)
        return one, other

    def spread(self, layer: TaskLayer) -> Spread | None:
        """Mean and variance of a layer's outputs at first, where they are known."""
        given = (self._given or {}).get(layer.weight)
        return None if given is None else given.spread

    def same_inputs(self) -> bool:
        """Whether all tasks were given the same batches."""
        first, *others = self._batches_given.values()
        return self.processes.every(all(first == each for each in others))

    def correlations(self, one: tuple[TaskLayer, IntArray], other: tuple[TaskLayer, IntArray]) -> NDArray[np.float64]:
        """Pearson's correlation of the outputs at first of some rows of two layers, whose inputs are the same samples,
        `(rows, rows of the other)`; zero where an output is always the same.
        """
        sides, spreads = [], []
        for layer, rows in (one, other):
            given = (self._given or {})[layer.weight]
            spread = Spread(given.spread.mean[rows], given.spread.var[rows])
            sides.append(given.outputs[:, torch.from_numpy(rows)] - spread.mean)
            spreads.append(spread.var.sqrt())
        count = torch.tensor(float(len(sides[0])), dtype=torch.float64)
        products, count = self.processes.summed(sides[0].T @ sides[1], count)
        sizes = count * spreads[0].unsqueeze(1) * spreads[1]
        found = torch.where(sizes > 0.0, products / sizes.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        return np.asarray(found.clamp(-1.0, 1.0).numpy(), dtype=np.float64)

    def follow(self, layer: TaskLayer, source: IntArray) -> None:
        """Row `i` of a layer has become what row `source[i]` was, within its part."""
        given = (self._given or {}).get(layer.weight)
        if given is not None:
            given.spread = Spread(given.spread.mean[source], given.spread.var[source])
            given.outputs = self._held(given.outputs[:, source])
        if layer.weight in self._wanted:
            parts = source.reshape(layer.parts, layer.height) % layer.height
            self._wanted[layer.weight] = [
                each.reordered(part) for each, part in zip(self._wanted[layer.weight], parts, strict=True)
            ]

    def rescale(self, layer: TaskLayer, scale: torch.Tensor) -> None:
        """Every output of a layer has been multiplied by a number of its own."""
        given = (self._given or {}).get(layer.weight)
        if given is not None:
            given.spread = Spread(given.spread.mean * scale, given.spread.var * scale.square())
            given.outputs = self._held(given.outputs * scale)
        if layer.weight in self._wanted:
            scales = torch.chunk(scale, layer.parts)
            self._wanted[layer.weight] = [
                each.scaled(part) for each, part in zip(self._wanted[layer.weight], scales, strict=True)
            ]

    def _held(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs if self.workspace is None else self.workspace.spilled(outputs)

    def _read(
        self, traced: Traced, layers: Sequence[TaskLayer], feeds: Feeds, kept: Kept
    ) -> Iterator[tuple[TaskLayer, torch.Tensor]]:
        """What layers of one task read, in pieces of rows `(samples, channels, positions)`, in one pass."""
        by_name = {name: layer for layer in layers for name in layer.nodes}
        calls = [(by_name[each.node.name], each) for each in calls_of_layers(traced) if each.node.name in by_name]
        sources = [call.input for _, call in calls]
        task = layers[0].task
        sums: list[float] = []
        if self.processes.size > 1:  # one of them may have no batch, and has to know the shapes
            yield from ((layer, torch.zeros(0, *_read_shape(layer), dtype=torch.float64)) for layer in layers)
        batches = values_of(traced, sources, task, partial(_watched, feeds[task], sums), kept, self.workspace)
        for number, values in enumerate(batches):
            draw = self.seed + self.processes.rank + number * self.processes.size  # the same wherever the batch is
            draws = {layer.name: torch.Generator().manual_seed(draw) for layer in layers}
            for (layer, call), value in zip(calls, values, strict=True):
                rows = rows_of(call, value, self.places, draws[layer.name])
                check_finite(layer.name, rows)
                together = 1 if call.is_linear else len(rows) // max(len(value), 1)
                if self._together.setdefault(layer.weight, together) != together:
                    self._together[layer.weight] = 1  # calls with other places
                yield layer, rows.detach().to("cpu", torch.float64)
        self._batches[task] = sums or self._batches.get(task, sums)


def _read_shape(layer: TaskLayer) -> tuple[int, int]:
    return layer.groups * layer.shape[1], layer.positions


def _outputs(traced: Traced, layer: TaskLayer, rows: torch.Tensor) -> torch.Tensor:
    if layer.depthwise:
        return (rows.repeat_interleave(layer.shape[0] // layer.groups, 1) * matrix(traced, layer)).sum(2)
    return outputs(traced, layer, rows)


def _watched(feed: Feed, sums: list[float]) -> Iterator[tuple[Any, ...]]:
    """The batches, with a number of each noted that tells it from others."""
    for batch in feed():
        tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        sums.append(sum(float(tensor.double().sum()) for tensor in tensors))
        yield batch
