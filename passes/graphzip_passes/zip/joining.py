"""Joining weights: what several tasks share gets one value, and batch norms follow (MTZ, Eq. 10 and 11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.numeric.moments import ChannelMoments, Spread
from graphzip.numeric.solvers import factorised
from graphzip.rewrite.edit import put
from graphzip_passes.zip.joint import Arrival, Joint, Line
from graphzip_passes.zip.layers import TaskLayer
from graphzip_passes.zip.readings import Read
from graphzip_passes.zip.solve import Solver
from graphzip_passes.zip.weights import augmented, deviations, double, matrix, write

__all__ = ["Joining"]


class Joining:
    """Joins the weights of layers whose channels are paired."""

    def __init__(self, joint: Joint) -> None:
        self.joint = joint

    def merge(self, arrival: Arrival) -> None:
        """Give the shared weights of the joint network and a newcomer one value."""
        joint, task = self.joint, arrival.task
        layers = {each: arrival.layers[each] for each in (*arrival.prior, task)}
        keys = {each: rows for each, (rows, _) in joint.channels.keys(layers).items()}
        held = {owner: set(keys[owner][keys[owner] >= 0].tolist()) for owner in arrival.prior}
        for owners, found in _by_holders(keys[task].tolist(), held).items():
            rows = {task: np.array(found)}
            for owner in owners:
                order = np.argsort(keys[owner])
                rows[owner] = order[np.searchsorted(keys[owner][order], keys[task][rows[task]])]
            if arrival.own.depthwise:
                self._join_depthwise(arrival, owners, rows)
                continue
            for part in range(arrival.own.parts):
                inside = rows[task] // arrival.own.height == part
                line = joint.line(arrival, owners, {each: at[inside] for each, at in rows.items()}, part)
                if line is not None:
                    solver = None if joint.options.metric == "random" else joint.solver(arrival, line)
                    for piece in line.pieces():
                        self._join(arrival, piece, solver)

    def _join(self, arrival: Arrival, line: Line, solver: Solver | None) -> None:
        traced, layers, task = arrival.traced, arrival.layers, arrival.task
        a, b = self.joint.sides(arrival, line)
        weights = int(line.count - arrival.joins_bias)
        one, two = (side[:, :weights] != 0.0 for side in (a, b))
        if solver is None:
            chosen = torch.from_numpy(self.joint.random.random(len(a)) < 0.5)
            joined = torch.where(chosen.unsqueeze(1), a, b)
        else:
            joined = solver.update(
                a, b, torch.zeros_like(a) if self.joint.options.paper else self._missed(arrival, line)
            )
        fuller = one.sum(1, keepdim=True) >= two.sum(1, keepdim=True)
        joined[:, :weights] *= torch.where(fuller, one, two)  # section 3.6: the mask with more ones
        if arrival.normed:
            deviation = deviations(traced, layers[line.owners[0]])[line.rows[line.owners[0]]]
            joined = joined * deviation.unsqueeze(1)
            self._rescale(traced, layers[task], line.rows[task], deviation)
        for each in (*line.owners, task):
            source, place = line.inputs[each]
            common = np.isin(place, line.inputs[task][1])
            write(traced, layers[each], line.rows[each], source[common], joined[:, place[common]])

    def _missed(self, arrival: Arrival, line: Line) -> torch.Tensor:
        """What the outputs of the rows lack since the inputs were zipped, times the inputs: `(rows, inputs)`."""
        traced, inputs = arrival.traced, arrival.inputs
        total = torch.zeros(len(line.rows[arrival.task]), line.count, dtype=torch.float64)
        for each in () if self.joint.options.paper else (*line.owners, arrival.task):
            if each not in inputs:
                continue
            layer, rows, (source, place) = arrival.layers[each], line.rows[each], line.inputs[each]
            lack = self.joint.readings.missed(traced, layer, inputs[each], rows, source)
            if lack is None:
                continue
            if arrival.normed:
                lack /= deviations(traced, layer)[rows].unsqueeze(1)
            total[:, place] += self.joint.scale(each) * lack
        return total

    def _join_depthwise(self, arrival: Arrival, owners: tuple[str, ...], rows: dict[str, IntArray]) -> None:
        joint, traced, layers, task = self.joint, arrival.traced, arrival.layers, arrival.task
        a, b = (matrix(traced, layers[each])[rows[each]] for each in (owners[0], task))
        if arrival.normed:
            deviation = deviations(traced, layers[owners[0]])[rows[owners[0]]]
            self._rescale(traced, layers[task], rows[task], deviation)
            b = matrix(traced, layers[task])[rows[task]]
        one, two = sum(joint.scale(owner) for owner in owners), joint.scale(task)
        if not joint.solves:
            joined = a + (b - a) * (two / (one + two))
        else:
            hessians: dict[str, torch.Tensor] = {}
            for each in (*owners, task):
                moments = arrival.inputs[each]
                assert isinstance(moments, ChannelMoments)
                hessians[each] = moments.hessian(joint.scale(each), joint.options.damping)[rows[each]]
            whole = sum(hessians.values(), torch.zeros(()))
            factor = factorised(whole, what=f"layer {layers[task].name!r}")
            joined = a + factor.solve(hessians[task] @ (b - a).unsqueeze(2)).squeeze(2)
        for each in (*owners, task):
            write(traced, layers[each], rows[each], np.arange(layers[each].positions), joined)

    def _rescale(self, traced: Traced, layer: TaskLayer, rows: IntArray, deviation: torch.Tensor) -> None:
        """Let rows before a batch norm have another deviation, which changes nothing behind it."""
        assert layer.norm is not None
        scale = torch.ones(layer.shape[0], dtype=torch.float64)
        scale[rows] = deviation / deviations(traced, layer)[rows]
        if bool((scale == 1.0).all()):
            return
        state = {leaf: double(traced, leaf) for leaf in (layer.weight, layer.norm.mean, layer.norm.var)}
        put(traced, layer.weight, state[layer.weight] * scale.reshape(-1, *[1] * (len(layer.shape) - 1)))
        if layer.bias is not None:
            put(traced, layer.bias, double(traced, layer.bias) * scale)
        put(traced, layer.norm.mean, state[layer.norm.mean] * scale)
        var = (state[layer.norm.var] + layer.norm.eps) * scale.square() - layer.norm.eps
        put(traced, layer.norm.var, torch.where(scale == 1.0, state[layer.norm.var], var.clamp(min=0.0)))
        self.joint.readings.rescale(layer, scale)

    def correct(self, traced: Traced, layer: TaskLayer, inputs: Read) -> None:
        """Move a batch norm's statistics as far as the layer's outputs moved.

        What hardly varies on the calibration data says little of how much it varies: a hundredth of the variance that
        is known counts with it before and after.
        """
        before = self.joint.readings.spread(layer)
        if layer.norm is None or before is None or self.joint.options.paper:
            return
        weight = matrix(traced, layer) if isinstance(inputs, ChannelMoments) else augmented(traced, layer)
        if isinstance(inputs, ChannelMoments):
            after = inputs.spread(weight)
        else:
            parts = zip(inputs, torch.chunk(weight, layer.parts), strict=True)
            found = [each.spread(rows) for each, rows in parts]
            after = Spread(torch.cat([each.mean for each in found]), torch.cat([each.var for each in found]))
        mean, var = double(traced, layer.norm.mean), double(traced, layer.norm.var)
        put(traced, layer.norm.mean, mean + (after.mean - before.mean))
        known = 0.01 * var + layer.norm.eps
        put(traced, layer.norm.var, var * (after.var + known) / (before.var + known))


def _by_holders(keys: Sequence[int], held: Mapping[str, set[int]]) -> dict[tuple[str, ...], list[int]]:
    """Rows divided by the tasks that have their key, too; those that no task has are left out."""
    found: dict[tuple[str, ...], list[int]] = {}
    for row, key in enumerate(keys):
        owners = tuple(task for task, own in held.items() if key in own)
        if owners:
            found.setdefault(owners, []).append(row)
    return found
