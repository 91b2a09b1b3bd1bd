"""Models that are being zipped: their layers, the channels that are one already, and a newcomer that joins a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.numeric.moments import ChannelMoments, Moments
from graphzip.plan.passes import Zip
from graphzip_passes.zip.channels import Channels
from graphzip_passes.zip.layers import Matching, TaskLayer
from graphzip_passes.zip.readings import Read, Readings
from graphzip_passes.zip.solve import Solver
from graphzip_passes.zip.weights import augmented, blocks, deviations

__all__ = ["Arrival", "Inputs", "Joint", "Line", "joins_bias"]

Inputs = Mapping[str, Read]
"""What a layer reads, by task; empty without calibration data."""


@dataclass(frozen=True)
class Arrival:
    """A newcomer `task` that joins a layer of the tasks `prior`, on a graph that is changed for it."""

    traced: Traced
    name: str
    layers: Mapping[str, TaskLayer]
    prior: tuple[str, ...]
    task: str
    inputs: Inputs

    @property
    def own(self) -> TaskLayer:
        """The newcomer's layer."""
        return self.layers[self.task]

    @property
    def normed(self) -> bool:
        """Whether a batch norm follows the layer in every task, which makes the scale of its rows free."""
        return all(layer.norm is not None for layer in self.layers.values())

    @property
    def joins_bias(self) -> bool:
        """Whether biases are joined as one more input that is always one."""
        return joins_bias(self.layers)


def joins_bias(layers: Mapping[str, TaskLayer]) -> bool:
    """Whether the layers of all tasks have a bias, and no batch norm that makes up for it."""
    return all(layer.bias is not None and layer.norm is None for layer in layers.values())


@dataclass(frozen=True)
class Line:
    """Rows of a part of a layer that a newcomer shares with `owners`, and the inputs that it shares with each of them.

    `rows[task]` are the rows, in one order for all; `inputs[task]` the features of the task among those that are
    shared, and their places there; `count` of them.
    """

    layer: str
    part: int
    owners: tuple[str, ...]
    rows: dict[str, IntArray]
    inputs: dict[str, tuple[IntArray, IntArray]]
    count: int

    def pieces(self) -> Iterator[Line]:
        """The same, some rows at a time."""
        split = {task: blocks(rows) for task, rows in self.rows.items()}
        for rows in zip(*split.values(), strict=True):
            yield replace(self, rows=dict(zip(split, rows, strict=True)))


@dataclass(frozen=True)
class Joint:
    """What is known of the models: the tasks in the order in which they join, which layers and channels correspond.

    `readings` is what layers read on calibration data, before and after the layers before them were zipped.
    """

    options: Zip
    where: str
    tasks: tuple[str, ...]
    matching: Matching
    channels: Channels
    readings: Readings
    random: np.random.Generator

    def scale(self, task: str) -> float:
        """Its weight in Eq. 5."""
        return self.options.alpha if task == self.tasks[0] else 1.0 - self.options.alpha

    @property
    def solves(self) -> bool:
        """Whether shared weights are solved for on calibration data (Eq. 10 and 11)."""
        return self.options.metric in ("hessian", "correlation")

    def line(self, arrival: Arrival, owners: tuple[str, ...], rows: dict[str, IntArray], part: int) -> Line | None:
        """The inputs that a newcomer shares with at least one of `owners`; nothing where there is none, or no row."""
        layers, task = arrival.layers, arrival.task
        keys = {each: self.channels.columns(layers[each], part) for each in (*owners, task)}
        mine = keys[task]
        shared = np.flatnonzero(np.isin(mine, np.concatenate([keys[owner] for owner in owners])))
        if not shared.size or not all(at.size for at in rows.values()):
            return None
        positions = layers[task].positions
        found: dict[str, tuple[IntArray, IntArray]] = {}
        for each in (*owners, task):
            own = keys[each]
            order = np.argsort(own)
            at = np.searchsorted(own[order], mine[shared]).clip(max=own.size - 1)
            has = own[order[at]] == mine[shared]
            columns, places = order[at][has], np.flatnonzero(has)
            inner = np.arange(positions)
            feature = (columns[:, None] * positions + inner).ravel(), (places[:, None] * positions + inner).ravel()
            if arrival.joins_bias:
                feature = np.append(feature[0], layers[each].features), np.append(feature[1], shared.size * positions)
            found[each] = feature
        count = shared.size * positions + int(arrival.joins_bias)
        return Line(layers[task].name, part, owners, rows, found, count)

    def sides(self, arrival: Arrival, line: Line) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the joint network and of the newcomer over the inputs they share, in units of their deviation."""
        traced, layers, task = arrival.traced, arrival.layers, arrival.task
        joint = torch.zeros(len(line.rows[line.owners[0]]), line.count, dtype=torch.float64)
        own = torch.zeros(len(line.rows[task]), line.count, dtype=torch.float64)
        for side, tasks in ((joint, line.owners[::-1]), (own, (task,))):
            for each in tasks:
                source, place = line.inputs[each]
                for at in blocks(np.arange(len(side))):
                    rows = line.rows[each][at]
                    side[np.ix_(at, place)] = augmented(traced, layers[each], rows)[:, source]
        if arrival.normed:
            joint /= deviations(traced, layers[line.owners[0]])[line.rows[line.owners[0]]].unsqueeze(1)
            own /= deviations(traced, layers[task])[line.rows[task]].unsqueeze(1)
        return joint, own

    def solver(self, arrival: Arrival, line: Line) -> Solver:
        """What compares rows of both sides and joins them."""
        task = arrival.task
        scales = [self.scale(owner) for owner in line.owners], self.scale(task)
        if not self.solves:
            return Solver(None, scales, damping=0.0)
        found: dict[str, Moments] = {}
        for each in (*line.owners, task):
            read = arrival.inputs[each]
            assert not isinstance(read, ChannelMoments)
            found[each] = read[line.part].among(*line.inputs[each], line.count)
        moments = [found[owner] for owner in line.owners], found[task]
        return Solver(moments, scales, damping=self.options.damping, what=f"layer {line.layer!r}")
