"""Who is paired with whom: the channels that a layer makes, by how much error sharing them costs (MTZ, Eq. 12)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from graphzip.labels import IntArray
from graphzip.ops.spec import FloatArray
from graphzip.plan.problems import plan_error
from graphzip_passes.zip.joint import Arrival, Joint, Line
from graphzip_passes.zip.solve import Pairs, pair

__all__ = ["Pairing"]


class Pairing:
    """Pairs the channels of newcomers, layer by layer. `amounts` says how much of each layer is shared, or how near.

    `shared` has the channels that are, by layer and by task and group.
    """

    def __init__(self, joint: Joint, amounts: Mapping[str, float | int], layers: Sequence[str]) -> None:
        self.joint, self.amounts, self.layers = joint, amounts, layers
        self.shared: dict[str, dict[str, int]] = {}

    def decide(self, arrival: Arrival) -> None:
        """Pair the channels that a layer makes, where no layer before it has made them."""
        joint, task = self.joint, arrival.task
        joint.channels.match_tables(arrival.layers[arrival.prior[0]], task)
        made = joint.channels.made(arrival.layers[arrival.prior[0]])
        waiting = [group for group in made if (task, group) not in joint.channels.ids]
        if not waiting or arrival.own.depthwise:
            return
        cost = self._cost(arrival, waiting)
        if cost is None:
            return
        pick, count = self._pick(self.amounts[arrival.name]), self._count(arrival.name)
        for unit in joint.channels.units(waiting):
            part = {group: cost[group] for group in unit}
            moved = joint.channels.settle(arrival.traced, unit, list(arrival.prior), task, part, pick, count)
            for group, (shared, order) in moved.items():
                self._follow(task, group, order)
                title = joint.matching.groups[group].name.partition(".")[2]
                if title.partition("#")[0] != arrival.own.name:
                    joint.readings.forget(task)  # channels that were computed before
                self.shared.setdefault(arrival.name, {})[f"{task}.{title}"] = shared

    def _count(self, name: str) -> Callable[[int], int]:
        """How many channels are paired at most, of those that can be."""
        amount, options = self.amounts[name], self.joint.options

        def count(most: int) -> int:
            if options.threshold is not None:
                return most
            if isinstance(amount, float):
                return int(most * amount)
            if amount > most:
                text = f"{amount} channels of {name!r}, but only {most} can be shared"
                raise plan_error([f"{self.joint.where}.share: {text}"])
            return amount

        return count

    def _pick(self, amount: float | int) -> Callable[[FloatArray, int], Pairs]:
        options = self.joint.options

        def pick(cost: FloatArray, count: int) -> Pairs:
            if options.metric == "random":
                cost = self.joint.random.random(cost.shape)
            elif options.threshold is not None:
                cost = np.minimum(cost, amount)  # what is not shared does not matter
            one, two = pair(cost, count, options.pairing)
            if options.threshold is not None:
                near = cost[one, two] < amount
                one, two = one[near], two[near]
            return one, two

        return pick

    def _follow(self, task: str, group: int, order: IntArray) -> None:
        """Let what is known of a task's layers follow its channels."""
        joint = self.joint
        shared = (joint.matching.layers[name].get(task) for name in self.layers)
        known = {layer.weight: layer for layer in (*joint.matching.every, *shared) if layer and layer.task == task}
        for layer in known.values():
            slots = joint.channels.slots(layer, 0)
            at = np.flatnonzero(slots[:, 0] == group)
            place = {(int(channel), int(rank)): row for row, (_, channel, rank) in zip(at, slots[at], strict=True)}
            source = np.arange(len(slots))
            for row in at.tolist():
                source[row] = place[int(order[slots[row, 1]]), int(slots[row, 2])]
            joint.readings.follow(layer, source)

    def _cost(self, arrival: Arrival, waiting: Sequence[int]) -> dict[int, FloatArray] | None:
        """Differences between the joint channels and the newcomer's, by group; nothing where no input is shared."""
        joint, cost = self.joint, {}
        for group in waiting:
            numbers = joint.channels.joint(group, list(arrival.prior))
            partner = joint.matching.partners(group)[arrival.task]
            found = np.zeros((numbers.size, joint.matching.groups[partner].size))
            if joint.options.metric != "random" and not self._add_costs(arrival, group, numbers, found):
                return None
            cost[group] = found
        return cost

    def _add_costs(self, arrival: Arrival, group: int, numbers: IntArray, cost: FloatArray) -> bool:
        """Add the costs of a group to `cost`, (joint channels, the newcomer's); whether inputs are shared at all."""
        joint, task, height = self.joint, arrival.task, arrival.own.height
        theirs = joint.channels.slots(arrival.own, 0)
        columns = np.flatnonzero(theirs[:, 0] == joint.matching.partners(group)[task])
        holders: dict[tuple[str, ...], list[int]] = {}
        for number in numbers.tolist():
            having = tuple(owner for owner in arrival.prior if number in joint.channels.ids.get((owner, group), ()))
            holders.setdefault(having, []).append(number)
        for owners, held in holders.items():
            rows, place = self._rows_of_numbers(arrival, owners, group, held, numbers)
            for part in range(arrival.own.parts):
                inside = rows[owners[0]] // arrival.layers[owners[0]].height == part
                own = {owner: at[inside] for owner, at in rows.items()}
                own[task] = columns[columns // height == part]
                line = joint.line(arrival, owners, own, part)
                if line is not None:
                    self._add_cost(arrival, line, cost, place[inside])
                elif arrival.own.parts == 1:
                    return False
        return True

    def _add_cost(self, arrival: Arrival, line: Line, cost: FloatArray, place: IntArray) -> None:
        """Add the differences between rows to those of their channels: `place` is the row of `cost` each belongs to."""
        joint = self.joint
        if joint.options.metric == "correlation":
            found = self._unlike(arrival, line)
        else:
            a, b = joint.sides(arrival, line)
            found = joint.solver(arrival, line).difference(a, b)
        first = line.owners[0]
        ranks = joint.channels.slots(arrival.layers[first], 0)[line.rows[first], 2]
        theirs = joint.channels.slots(arrival.own, 0)[line.rows[arrival.task]]
        for rank in np.unique(ranks):
            ours, others = ranks == rank, theirs[:, 2] == rank
            cost[np.ix_(place[ours], theirs[others, 1])] += found[np.ix_(ours, others)]

    def _unlike(self, arrival: Arrival, line: Line) -> FloatArray:
        """How little the outputs of rows of the joint network and of the newcomer correlate: 0 where they do fully."""
        own, rows = arrival.own, line.rows[arrival.task]
        found = [
            self.joint.readings.correlations((arrival.layers[owner], line.rows[owner]), (own, rows))
            for owner in line.owners
        ]
        return np.asarray(1.0 - sum(found) / len(found), dtype=np.float64)

    def _rows_of_numbers(
        self, arrival: Arrival, owners: Sequence[str], group: int, numbers: Sequence[int], joint: IntArray
    ) -> tuple[dict[str, IntArray], IntArray]:
        """For each owner the rows of the joint channels `numbers`, in one order, and their places in `joint`."""
        channels, matching = self.joint.channels, self.joint.matching
        rows: dict[str, IntArray] = {}
        place = np.arange(0)
        for owner in owners:
            slots = channels.slots(arrival.layers[owner], 0)
            own = group if owner == self.joint.tasks[0] else matching.partners(group)[owner]
            at = np.flatnonzero(slots[:, 0] == own)
            ids = channels.ids[owner, group][slots[at, 1]]
            at = at[np.isin(ids, numbers)]
            ids = channels.ids[owner, group][slots[at, 1]]
            at = at[np.lexsort((slots[at, 2], ids))]
            rows[owner] = at
            order = np.argsort(joint)
            place = order[np.searchsorted(joint[order], channels.ids[owner, group][slots[at, 1]])]
        return rows, place
