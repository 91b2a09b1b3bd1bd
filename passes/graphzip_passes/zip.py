"""Zip several trained models into one that shares neurons (MTZ).

Layer by layer in order of execution: with the inputs of a layer shared as far as the layers before it were zipped, its
neurons are paired by how much error sharing them costs, the newcomer's channels are put in the order of their partners
(which changes nothing), and the weights from shared inputs to shared neurons become one (`graphzip_passes.zip_solve`).
Then every model is put together from what it shares and what it has alone (Fig. 1; `graphzip.rewrite.blocks`).

What couples channels is the channel groups' business (`graphzip_passes.zip_channels`): a residual stream is paired
once, by the layer that makes it first, and every other layer that writes to it or reads it follows; heads of attention
are paired as wholes and inside. A batch norm stays with its task: the scale of a layer before it is free, so rows are
joined in units of their deviation, and its statistics move as far as the layer's outputs did on the calibration data.

Source: He, Zhou and Thiele, "Multi-Task Zipping via Layer-wise Neuron Sharing": Algorithm 1, sections 3.2 to 3.7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn

from graphzip.graph.state import attach, named_state
from graphzip.graph.trace import Traced
from graphzip.labels import IntArray
from graphzip.numeric import factorised
from graphzip.ops.spec import FloatArray
from graphzip.plan import Zip, plan_error
from graphzip.rewrite.blocks import finish, put, share
from graphzip.rewrite.refresh import refresh
from graphzip.tables import closest
from graphzip_passes.base import Feeds, FreeTraining
from graphzip_passes.zip_channels import Channels
from graphzip_passes.zip_layers import Layer, match
from graphzip_passes.zip_readings import Read, Readings
from graphzip_passes.zip_solve import ChannelMoments, Moments, Pairs, Solver, Spread, pair
from graphzip_passes.zip_weights import augmented, blocks, deviations, double, matrix, write

__all__ = ["ZipPass"]

Inputs = Mapping[str, Read]
"""What a layer reads, by task; empty without calibration data."""


@dataclass(frozen=True)
class _Line:
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

    def pieces(self) -> Iterator[_Line]:
        """The same, some rows at a time."""
        split = {task: blocks(rows) for task, rows in self.rows.items()}
        for rows in zip(*split.values(), strict=True):
            yield replace(self, rows=dict(zip(split, rows, strict=True)))


class ZipPass(FreeTraining):
    """`Zip` bound to several models: which layers correspond is decided here, who is paired stage by stage."""

    def __init__(self, options: Zip, traced: Traced, *, seed: int, where: str) -> None:
        self.options, self.seed, self.where = options, seed, where
        self.tasks = _order(options, [task.name for task in traced.tasks], where)
        self.matching = match(traced, self.tasks, options.match or {}, where=where)
        self.channels = Channels(self.matching, self.tasks)
        self.amounts = self._amounts()
        self.layers = [name for name in self.matching.layers if self._takes_part(name)]
        self.stages = tuple(f"zip/{name}" for name in self.layers)
        self.widths_shared: dict[str, dict[str, int]] = {}
        self.stored: dict[str, tuple[int, int]] = {}
        self.readings = Readings(self.tasks, places=options.places, seed=seed)
        self.left: dict[str, torch.Tensor] = {}
        self.random = np.random.default_rng(seed)

    # ------------------------------------------------------------------------------------------- what takes part

    def _amounts(self) -> dict[str, float | int]:
        """How much of each layer is shared, or its threshold; layers of which nothing is are left out."""
        layers = list(self.matching.layers)
        key = "share" if self.options.threshold is None else "threshold"
        given = self.options.share if self.options.threshold is None else self.options.threshold
        table = given if isinstance(given, Mapping) else {"*": given}
        problems = [
            f"{self.where}.{what}: {glob!r} matches no layer; {closest(glob, layers)}"
            for globs, what in ((self.options.exclude, "exclude"), (table if isinstance(given, Mapping) else (), key))
            for glob in globs
            if not any(fnmatchcase(name, glob) for name in layers)
        ]
        if problems:
            raise plan_error(problems)
        found = {}
        for name in layers:
            amount = next((value for glob, value in table.items() if fnmatchcase(name, glob)), 0)
            if amount and not any(fnmatchcase(name, glob) for glob in self.options.exclude):
                found[name] = amount
        return found

    def _takes_part(self, name: str) -> bool:
        layer = self.matching.layers[name][self.tasks[0]]
        made = self.channels.made(layer)
        stays = all(self.channels.parts_stay(each) for each in self.matching.layers[name].values())
        return name in self.amounts and stays and bool(made) and self.matching.outputs.isdisjoint(made)

    # ------------------------------------------------------------------------------------------- stages

    def enter(self, stage: str, traced: Traced, feeds: Feeds) -> Traced:
        """Zip one layer."""
        if self.options.metric == "hessian" and not feeds:
            text = "'hessian' needs calibration data; pass calibration={...}, or write metric: euclidean"
            raise plan_error([f"{self.where}.metric: {text}"])
        name = stage.partition("/")[2]
        layers = self.matching.layers[name]
        joined = [task for task in self.tasks if task in layers]
        result = traced.copy()
        state = dict(named_state(traced.module))
        if any(state.get(key) is not tensor for key, tensor in self.left.items()):
            self.readings.forget()  # it was trained since
        taking_part = [layer for each in self.layers for layer in self.matching.layers[each].values()]
        self.readings.note_given(traced, taking_part, feeds)
        inputs = {task: self.readings.inputs(result, layers[task], feeds) for task in joined} if feeds else {}
        for number, task in enumerate(joined[1:], start=1):
            self._decide(result, name, joined[:number], task, inputs)
            self._merge(result, name, joined[:number], task, inputs)
        for task, found in inputs.items():
            self._correct(result, layers[task], found)
            self.readings.done(layers[task])
        keys = self.channels.keys({task: layers[task] for task in joined})
        self.stored[name] = share(result, {task: layers[task].weight for task in joined}, keys)
        if self._joins_bias(layers):
            biases = {task: str(layers[task].bias) for task in joined}
            sizes = share(result, biases, {task: (rows, None) for task, (rows, _) in keys.items()})
            self.stored[name] = self.stored[name][0] + sizes[0], self.stored[name][1] + sizes[1]
        finish(result)
        self.left = dict(named_state(result.module))
        if any(len(layer.nodes) > 1 for layer in layers.values()):
            self.readings.forget()  # a layer that reads what it made itself
        return result

    def convert(self, traced: Traced) -> Traced:
        """Other parameters of shared channels that are equal in several tasks are one from here on."""
        result = traced.copy()
        state = dict(named_state(result.module))
        first, *others = self.tasks
        for name, tensor in state.items():
            task, _, local = name.partition(".")
            other = state.get(f"{first}.{local}")
            if not isinstance(tensor, nn.Parameter) or not isinstance(other, nn.Parameter) or task not in others:
                continue
            if torch.equal(other, tensor) and self.channels.is_shared(name):
                attach(result.module, name, other)
        finish(result)
        refresh(result)
        return result

    def summary(self) -> dict[str, Any]:
        """For every layer what is shared: channels, and its parameters as a share of all (Table 3's count)."""
        layers = {
            name: {
                "channels": self.widths_shared.get(name, {}),
                "parameters": list(sizes),
                "shared": self._share(sizes),
            }
            for name, sizes in self.stored.items()
        }
        total = [sum(sizes[side] for sizes in self.stored.values()) for side in (0, 1)]
        return {"layers": layers, "parameters": total, "shared": self._share(total)}

    def _share(self, sizes: Sequence[int]) -> float:
        """The share of each network's parameters that all have, from their numbers before and after."""
        before, after = sizes
        return (before - after) / (before * (1.0 - 1.0 / len(self.tasks))) if before else 0.0

    # ------------------------------------------------------------------------------------------- pairing

    def _decide(self, traced: Traced, name: str, prior: list[str], task: str, inputs: Inputs) -> None:
        """Pair the channels that a layer makes, where no layer before it has made them."""
        layers = self.matching.layers[name]
        waiting = [group for group in self.channels.made(layers[prior[0]]) if (task, group) not in self.channels.ids]
        if not waiting or layers[task].depthwise:
            return
        cost = self._cost(traced, name, prior, task, inputs, waiting)
        if cost is None:
            return
        amount = self.amounts[name]

        def count(most: int) -> int:
            if self.options.threshold is not None:
                return most
            if isinstance(amount, float):
                return int(most * amount)
            if amount > most:
                raise plan_error([f"{self.where}.share: {amount} channels of {name!r}, but only {most} can be shared"])
            return amount

        for unit in self.channels.units(waiting):
            part = {group: cost[group] for group in unit}
            moved = self.channels.settle(traced, unit, prior, task, part, self._pick(amount), count)
            for group, (shared, order) in moved.items():
                self._follow(task, group, order)
                title = self.matching.groups[group].name.partition(".")[2]
                if title.partition("#")[0] != layers[task].name:
                    self.readings.forget(task)  # channels that were computed before
                self.widths_shared.setdefault(name, {})[f"{task}.{title}"] = shared

    def _pick(self, amount: float | int) -> Any:
        def pick(cost: FloatArray, count: int) -> Pairs:
            if self.options.metric == "random":
                cost = self.random.random(cost.shape)
            elif self.options.threshold is not None:
                cost = np.minimum(cost, amount)  # what is not shared does not matter
            one, two = pair(cost, count, self.options.pairing)
            if self.options.threshold is not None:
                near = cost[one, two] < amount
                one, two = one[near], two[near]
            return one, two

        return pick

    def _follow(self, task: str, group: int, order: IntArray) -> None:
        """Let what is known of a task's layers follow its channels."""
        for name in self.layers:
            layer = self.matching.layers[name].get(task)
            if layer is None:
                continue
            slots = self.channels.slots(layer, 0)
            at = np.flatnonzero(slots[:, 0] == group)
            place = {(int(channel), int(rank)): row for row, (_, channel, rank) in zip(at, slots[at], strict=True)}
            source = np.arange(len(slots))
            for row in at.tolist():
                source[row] = place[int(order[slots[row, 1]]), int(slots[row, 2])]
            self.readings.follow(layer, source)

    def _cost(
        self, traced: Traced, name: str, prior: list[str], task: str, inputs: Inputs, waiting: Sequence[int]
    ) -> dict[int, FloatArray] | None:
        """Differences between the joint channels and the newcomer's, by group; nothing where no input is shared."""
        layers = self.matching.layers[name]
        cost: dict[int, FloatArray] = {}
        for group in waiting:
            partner = self.matching.partners(group)[task]
            joint = self.channels.joint(group, prior)
            theirs = self.channels.slots(layers[task], 0)
            columns = np.flatnonzero(theirs[:, 0] == partner)
            cost[group] = np.zeros((joint.size, self.matching.groups[partner].size))
            holders: dict[tuple[str, ...], list[int]] = {}
            for number in joint.tolist():
                having = tuple(owner for owner in prior if number in self.channels.ids.get((owner, group), ()))
                holders.setdefault(having, []).append(number)
            for owners, numbers in holders.items() if self.options.metric != "random" else ():
                rows, place = self._rows_of_numbers(layers, owners, group, numbers, joint)
                for part in range(layers[task].parts):
                    inside = rows[owners[0]] // layers[owners[0]].height == part
                    own = {owner: at[inside] for owner, at in rows.items()}
                    own[task] = columns[columns // layers[task].height == part]
                    line = self._line(layers, owners, task, own, part)
                    if line is not None:
                        self._add_cost(traced, layers, line, task, inputs, (cost[group], place[inside]))
                    elif layers[task].parts == 1:
                        return None
        return cost

    def _add_cost(
        self,
        traced: Traced,
        layers: Mapping[str, Layer],
        line: _Line,
        task: str,
        inputs: Inputs,
        into: tuple[FloatArray, IntArray],
    ) -> None:
        """Add the differences between rows to those of their channels: to a matrix, whose row each one belongs to."""
        cost, place = into
        a, b = self._sides(traced, layers, line, task)
        found = self._solver(line, task, inputs).difference(a, b)
        first = line.owners[0]
        ranks = self.channels.slots(layers[first], 0)[line.rows[first], 2]
        theirs = self.channels.slots(layers[task], 0)[line.rows[task]]
        for rank in np.unique(ranks):
            ours, others = ranks == rank, theirs[:, 2] == rank
            cost[np.ix_(place[ours], theirs[others, 1])] += found[np.ix_(ours, others)]

    def _rows_of_numbers(
        self, layers: Mapping[str, Layer], owners: Sequence[str], group: int, numbers: Sequence[int], joint: IntArray
    ) -> tuple[dict[str, IntArray], IntArray]:
        """For each owner the rows of the joint channels `numbers`, in one order, and their places in `joint`."""
        rows: dict[str, IntArray] = {}
        place = np.arange(0)
        for owner in owners:
            slots = self.channels.slots(layers[owner], 0)
            own = group if owner == self.tasks[0] else self.matching.partners(group)[owner]
            at = np.flatnonzero(slots[:, 0] == own)
            ids = self.channels.ids[owner, group][slots[at, 1]]
            at = at[np.isin(ids, numbers)]
            ids = self.channels.ids[owner, group][slots[at, 1]]
            at = at[np.lexsort((slots[at, 2], ids))]
            rows[owner] = at
            order = np.argsort(joint)
            place = order[np.searchsorted(joint[order], self.channels.ids[owner, group][slots[at, 1]])]
        return rows, place

    # ------------------------------------------------------------------------------------------- joining weights

    def _line(
        self, layers: Mapping[str, Layer], owners: tuple[str, ...], task: str, rows: dict[str, IntArray], part: int
    ) -> _Line | None:
        """The inputs that a newcomer shares with at least one of `owners`; nothing where there is none, or no row."""
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
            if self._joins_bias(layers):
                feature = np.append(feature[0], layers[each].features), np.append(feature[1], shared.size * positions)
            found[each] = feature
        count = shared.size * positions + int(self._joins_bias(layers))
        return _Line(layers[task].name, part, owners, rows, found, count)

    def _joins_bias(self, layers: Mapping[str, Layer]) -> bool:
        return all(layer.bias is not None and layer.norm is None for layer in layers.values())

    def _sides(
        self, traced: Traced, layers: Mapping[str, Layer], line: _Line, task: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the joint network and of the newcomer over the inputs they share, in units of their deviation."""
        joint = torch.zeros(len(line.rows[line.owners[0]]), line.count, dtype=torch.float64)
        own = torch.zeros(len(line.rows[task]), line.count, dtype=torch.float64)
        for side, tasks in ((joint, line.owners[::-1]), (own, (task,))):
            for each in tasks:
                source, place = line.inputs[each]
                for at in blocks(np.arange(len(side))):
                    rows = line.rows[each][at]
                    side[np.ix_(at, place)] = augmented(traced, layers[each], rows)[:, source]
        if all(layer.norm is not None for layer in layers.values()):
            joint /= deviations(traced, layers[line.owners[0]])[line.rows[line.owners[0]]].unsqueeze(1)
            own /= deviations(traced, layers[task])[line.rows[task]].unsqueeze(1)
        return joint, own

    def _solver(self, line: _Line, task: str, inputs: Inputs) -> Solver:
        scales = [self._scale(owner) for owner in line.owners], self._scale(task)
        if self.options.metric != "hessian":
            return Solver(None, scales, damping=0.0)
        found: dict[str, Moments] = {}
        for each in (*line.owners, task):
            read = inputs[each]
            assert not isinstance(read, ChannelMoments)
            found[each] = read[line.part].among(*line.inputs[each], line.count)
        moments = [found[owner] for owner in line.owners], found[task]
        return Solver(moments, scales, damping=self.options.damping, what=f"layer {line.layer!r}")

    def _scale(self, task: str) -> float:
        """Its weight in Eq. 5."""
        return self.options.alpha if task == self.tasks[0] else 1.0 - self.options.alpha

    def _merge(self, traced: Traced, name: str, prior: list[str], task: str, inputs: Inputs) -> None:
        """Give the shared weights of the joint network and a newcomer one value (Eq. 10 and 11)."""
        layers = self.matching.layers[name]
        keys = {each: rows for each, (rows, _) in self.channels.keys({t: layers[t] for t in (*prior, task)}).items()}
        held = {owner: set(keys[owner].tolist()) for owner in prior}
        holders: dict[tuple[str, ...], list[int]] = {}
        for row, key in enumerate(keys[task].tolist()):
            owners = tuple(owner for owner in prior if key >= 0 and key in held[owner])
            if owners:
                holders.setdefault(owners, []).append(row)
        for owners, found in holders.items():
            rows = {task: np.array(found)}
            for owner in owners:
                order = np.argsort(keys[owner])
                rows[owner] = order[np.searchsorted(keys[owner][order], keys[task][rows[task]])]
            if layers[task].depthwise:
                self._join_depthwise(traced, layers, owners, task, rows, inputs)
                continue
            for part in range(layers[task].parts):
                inside = rows[task] // layers[task].height == part
                line = self._line(layers, owners, task, {each: at[inside] for each, at in rows.items()}, part)
                if line is not None:
                    solver = None if self.options.metric == "random" else self._solver(line, task, inputs)
                    for piece in line.pieces():
                        self._join(traced, layers, piece, task, solver, inputs)

    def _join(
        self,
        traced: Traced,
        layers: Mapping[str, Layer],
        line: _Line,
        task: str,
        solver: Solver | None,
        inputs: Inputs,
    ) -> None:
        a, b = self._sides(traced, layers, line, task)
        weights = int(line.count - self._joins_bias(layers))
        one, two = (side[:, :weights] != 0.0 for side in (a, b))
        if solver is None:
            chosen = torch.from_numpy(self.random.random(len(a)) < 0.5)
            joint = torch.where(chosen.unsqueeze(1), a, b)
        else:
            joint = solver.update(a, b, self._missed(traced, layers, line, task, inputs))
        fuller = one.sum(1, keepdim=True) >= two.sum(1, keepdim=True)
        joint[:, :weights] *= torch.where(fuller, one, two)  # section 3.6: the mask with more ones
        if all(layer.norm is not None for layer in layers.values()):
            deviation = deviations(traced, layers[line.owners[0]])[line.rows[line.owners[0]]]
            joint = joint * deviation.unsqueeze(1)
            self._rescale(traced, layers[task], line.rows[task], deviation)
        for each in (*line.owners, task):
            source, place = line.inputs[each]
            common = np.isin(place, line.inputs[task][1])
            write(traced, layers[each], line.rows[each], source[common], joint[:, place[common]])

    def _missed(
        self, traced: Traced, layers: Mapping[str, Layer], line: _Line, task: str, inputs: Inputs
    ) -> torch.Tensor:
        """What the outputs of the rows lack since the inputs were zipped, times the inputs: `(rows, inputs)`."""
        total = torch.zeros(len(line.rows[task]), line.count, dtype=torch.float64)
        for each in (*line.owners, task):
            rows, (source, place) = line.rows[each], line.inputs[each]
            lack = self.readings.missed(traced, layers[each], inputs[each], rows, source) if each in inputs else None
            if lack is None:
                continue
            if all(layer.norm is not None for layer in layers.values()):
                lack /= deviations(traced, layers[each])[rows].unsqueeze(1)
            total[:, place] += self._scale(each) * lack
        return total

    def _join_depthwise(
        self,
        traced: Traced,
        layers: Mapping[str, Layer],
        owners: tuple[str, ...],
        task: str,
        rows: dict[str, IntArray],
        inputs: Inputs,
    ) -> None:
        normed = all(layer.norm is not None for layer in layers.values())
        a, b = (matrix(traced, layers[each])[rows[each]] for each in (owners[0], task))
        deviation = torch.ones(len(a), dtype=torch.float64)
        if normed:
            deviation = deviations(traced, layers[owners[0]])[rows[owners[0]]]
            self._rescale(traced, layers[task], rows[task], deviation)
            b = matrix(traced, layers[task])[rows[task]]
        one, two = sum(self._scale(owner) for owner in owners), self._scale(task)
        if self.options.metric != "hessian":
            joint = a + (b - a) * (two / (one + two))
        else:
            hessians: dict[str, torch.Tensor] = {}
            for each in (*owners, task):
                moments = inputs[each]
                assert isinstance(moments, ChannelMoments)
                hessians[each] = moments.hessian(self._scale(each), self.options.damping)[rows[each]]
            whole = sum(hessians.values(), torch.zeros(()))
            factor = factorised(whole, what=f"layer {layers[task].name!r}")
            joint = a + factor.solve(hessians[task] @ (b - a).unsqueeze(2)).squeeze(2)
        for each in (*owners, task):
            write(traced, layers[each], rows[each], np.arange(layers[each].positions), joint)

    def _rescale(self, traced: Traced, layer: Layer, rows: IntArray, deviation: torch.Tensor) -> None:
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
        self.readings.rescale(layer, scale)

    def _correct(self, traced: Traced, layer: Layer, inputs: Read) -> None:
        """Move a batch norm's statistics as far as the layer's outputs moved.

        What hardly varies on the calibration data says little of how much it varies: a hundredth of the variance that
        is known counts with it before and after.
        """
        before = self.readings.spread(layer)
        if layer.norm is None or before is None:
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


def _order(options: Zip, names: list[str], where: str) -> tuple[str, ...]:
    if options.order and sorted(options.order) != sorted(names):
        raise plan_error([f"{where}.order: {list(options.order)} are not the tasks {names}; name each of them once"])
    tasks = tuple(options.order) or tuple(names)
    for task in options.match or {}:
        if task not in tasks[1:]:
            raise plan_error([f"{where}.match: no task {task!r} to match; {closest(task, tasks[1:])}"])
    return tasks
