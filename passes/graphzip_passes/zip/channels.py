"""Which channels of several models are the same one: identities that grow as layers are zipped.

Every decided channel of a task has a number in its joint group; channels of equal number are shared. Undecided channels
and those of outputs are a task's own. What a model reads is matched by position, and so is what its embeddings give:
where one has more inputs, the others have no connection to the rest (MTZ, section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.ops.spec import FloatArray
from graphzip.rewrite.partition import Keys, permute_slices
from graphzip_passes.parts.streamed import Workspace
from graphzip_passes.zip.layers import Matching, TaskLayer
from graphzip_passes.zip.solve import Pairs

__all__ = ["Channels", "Pick"]

_NONE = -1
"""In place of a group: a slice that no channel group holds."""

Pick = Callable[[FloatArray, int], Pairs]
"""Chooses at most so many pairs from a matrix of differences."""


class Channels:
    """The identities of all channels of the models in `tasks`, the first of which gives its own numbers."""

    def __init__(self, matching: Matching, tasks: Sequence[str]) -> None:
        self.matching, self.tasks = matching, tuple(tasks)
        self.workspace: Workspace | None = None
        self.ids: dict[tuple[str, int], IntArray] = {}

    def slots(self, layer: TaskLayer, dim: int) -> IntArray:
        """Group, channel and rank of every slice of a layer's weight, `(slices, 3)`; -1 where no group holds it.

        The inputs are those of all its parts.
        """
        size = layer.shape[dim] * (layer.parts if dim == 1 else 1)
        found = self.matching.slots.get((layer.weight, dim), np.zeros((0, 3), dtype=np.int64))[:size]
        return np.concatenate([found, np.full((size - len(found), 3), _NONE, dtype=np.int64)])

    def made(self, layer: TaskLayer) -> list[int]:
        """The groups of the first task, or their counterparts, that a layer makes channels of."""
        return [group for group in dict.fromkeys(self.slots(layer, 0)[:, 0].tolist()) if group != _NONE]

    def keys(self, layers: Mapping[str, TaskLayer]) -> dict[str, Keys]:
        """For every task one number for each row and column of its layer's weight, equal in two where they share it.

        A grouped convolution shares rows whose inputs are all shared, too.
        """
        rows = {task: self._keys(task, self.slots(layer, 0), inputs=False) for task, layer in layers.items()}
        if all(layer.groups == 1 for layer in layers.values()):
            return {task: (rows[task], self.columns(layer, 0)) for task, layer in layers.items()}
        numbers: dict[tuple[int, bytes], int] = {}
        for task, layer in layers.items():
            read = [b"" if layer.depthwise else self.columns(layer, part).tobytes() for part in range(layer.parts)]
            for row in np.flatnonzero(rows[task] >= 0).tolist():
                same = int(rows[task][row]), read[row // layer.height]
                rows[task][row] = numbers.setdefault(same, len(numbers))
        return {task: (rows[task], np.arange(layer.shape[1])) for task, layer in layers.items()}

    def columns(self, layer: TaskLayer, part: int) -> IntArray:
        """One number for each column of a part of a layer's weight, equal in two tasks where they share it."""
        size = layer.shape[1]
        return self._keys(layer.task, self.slots(layer, 1)[part * size : (part + 1) * size], inputs=True)

    def parts_stay(self, layer: TaskLayer) -> bool:
        """Whether channels that may change places are rows of one part of a layer."""
        slots = self.slots(layer, 0)
        for group in self.made(layer):
            at = slots[:, 0] == group
            part = dict(zip(slots[at, 1].tolist(), (np.flatnonzero(at) // layer.height).tolist(), strict=True))
            blocks = self.matching.groups[group].blocks if self.matching.free(group) else ()
            if any(len({part.get(channel) for channel in block}) > 1 for block in blocks):
                return False
        return True

    def _keys(self, task: str, slots: IntArray, *, inputs: bool) -> IntArray:
        """Slices of one task alone have negative numbers."""
        keys = -1 - np.arange(len(slots), dtype=np.int64) - ((self.tasks.index(task) + 1) << 40)
        for group in np.unique(slots[:, 0]).tolist():
            at = slots[:, 0] == group
            joint = self.matching.joint.get(group, group)
            ids = self.ids.get((task, joint))
            if group == _NONE and inputs:
                keys[at] = np.flatnonzero(at)
            elif group != _NONE and ids is not None:
                keys[at] = ((joint + 1) << 44) + (ids[slots[at, 1]] << 20) + slots[at, 2]
        return keys

    def is_shared(self, param: str) -> bool:
        """Whether every slice of a task's parameter belongs to a channel that all tasks have."""
        found = [slots for (name, _), slots in self.matching.slots.items() if name == param]
        groups = {int(group) for slots in found for group in slots[:, 0]}
        return bool(groups) and all(
            group != _NONE and self._all_have(self.matching.joint.get(group, -1)) for group in groups
        )

    def _all_have(self, joint: int) -> bool:
        if joint in self.matching.outputs or any((task, joint) not in self.ids for task in self.tasks):
            return False
        first = np.sort(self.ids[self.tasks[0], joint])
        return all(np.array_equal(first, np.sort(self.ids[task, joint])) for task in self.tasks[1:])

    def joint(self, group: int, tasks: Sequence[str]) -> IntArray:
        """The numbers of the channels that `tasks` have so far of a joint group, the first task's as they come."""
        first = self.tasks[0]
        self.ids.setdefault((first, group), np.arange(self.matching.groups[group].size))
        known = [self.ids[task, group] for task in tasks if (task, group) in self.ids]
        return np.array(list(dict.fromkeys(np.concatenate(known).tolist())), dtype=np.int64)

    def match_tables(self, layer: TaskLayer, task: str) -> None:
        """Match what an embedding gives to a layer of the first task by position, where nothing has paired it before.

        No layer pairs that, as none pairs what a model reads.
        """
        for group in set(self.slots(layer, 1)[:, 0].tolist()) & self.matching.tables:
            partner = self.matching.partners(group).get(task) if group in self.matching.joint else None
            if partner is not None and (task, group) not in self.ids:
                self.joint(group, self.tasks[:1])
                self.ids[task, group] = np.arange(self.matching.groups[partner].size)

    def units(self, groups: Sequence[int]) -> list[tuple[int, ...]]:
        """Groups whose blocks change places together, those inside heads of attention; every other one is alone."""
        heads = {inner: fine for fine in self.matching.heads.values() for inner in fine if set(fine) <= set(groups)}
        return list(dict.fromkeys(heads.get(group, (group,)) for group in groups))

    def settle(
        self,
        traced: Traced,
        unit: Sequence[int],
        prior: Sequence[str],
        task: str,
        cost: dict[int, FloatArray],
        pick: Pick,
        count: Callable[[int], int],
    ) -> dict[int, tuple[int, IntArray]]:
        """Pair the channels of a unit's groups and put the newcomer's in the order of their partners.

        `cost[group]` is `(joint channels, newcomer's channels)`; `count` says how many of so many are to be shared.
        Returns for each group of the newcomer how many are, and the old position of every channel.
        """
        partners = {group: self.matching.partners(group)[task] for group in unit}
        pairs = self._pairs(unit, prior, partners, cost, pick, count)
        moved: dict[int, tuple[int, IntArray]] = {}
        for group in unit:
            joint, theirs = self.joint(group, prior), self.matching.groups[partners[group]]
            one, two = pairs[group]
            ids = np.full(theirs.size, -1, dtype=np.int64)
            ids[two] = joint[one]
            alone = ids < 0
            ids[alone] = int(joint.max()) + 1 + np.arange(int(alone.sum()))
            order = np.arange(theirs.size)
            if self.matching.free(partners[group]):
                parts = theirs.blocks if len(unit) == 1 else (tuple(range(theirs.size)),)
                for part in parts:
                    at = np.array(part)
                    order[at] = at[np.argsort(ids[at], kind="stable")]
                self._permute(traced, partners[group], order)
            self.ids[task, group] = ids[order]
            moved[partners[group]] = len(one), order
        if len(unit) > 1:
            self._permute_blocks(traced, partners, moved)
        return moved

    def _pairs(
        self,
        unit: Sequence[int],
        prior: Sequence[str],
        partners: dict[int, int],
        cost: dict[int, FloatArray],
        pick: Pick,
        count: Callable[[int], int],
    ) -> dict[int, Pairs]:
        if len(unit) > 1:
            return self._paired_heads(unit, partners, cost, pick, count)
        (group,) = unit
        matrix = cost[group]
        wanted = count(min(matrix.shape))
        theirs = self.matching.groups[partners[group]]
        if not self.matching.free(partners[group]):
            same = np.arange(min(matrix.shape) if wanted == min(matrix.shape) else 0)
            return {group: (same, same)}
        if len(theirs.blocks) == 1:
            return {group: pick(matrix, wanted)}
        ours = self.matching.groups[group].blocks
        if [len(block) for block in ours] != [len(block) for block in theirs.blocks]:
            return {group: (np.arange(0), np.arange(0))}
        joint, found = self.joint(group, prior), []
        owners = [(owner, self.matching.partners(group)[owner]) for owner in prior if (owner, group) in self.ids]
        for number, two in enumerate(map(np.array, theirs.blocks)):
            held = [self.ids[owner, group][list(self.matching.groups[own].blocks[number])] for owner, own in owners]
            one = np.flatnonzero(np.isin(joint, np.concatenate(held)))
            left, right = pick(matrix[np.ix_(one, two)], wanted * len(two) // min(matrix.shape))
            found.append((one[left], two[right]))
        return {group: (np.concatenate([pair[0] for pair in found]), np.concatenate([pair[1] for pair in found]))}

    def _paired_heads(
        self,
        unit: Sequence[int],
        partners: dict[int, int],
        cost: dict[int, FloatArray],
        pick: Pick,
        count: Callable[[int], int],
    ) -> dict[int, Pairs]:
        """Pair heads as wholes, each at the cost of the best pairs inside of all its groups."""
        blocks = {
            group: (self.matching.groups[group].blocks, self.matching.groups[partners[group]].blocks) for group in unit
        }
        heads = {len(side) for both in blocks.values() for side in both}
        widths = {group: {len(block) for side in both for block in side} for group, both in blocks.items()}
        if len(heads) > 1 or any(len(found) > 1 for found in widths.values()):
            return {group: (np.arange(0), np.arange(0)) for group in unit}
        (number,) = heads
        total = np.zeros((number, number))
        inside: dict[tuple[int, int, int], Pairs] = {}
        for group, (ours, theirs) in blocks.items():
            for one in range(number):
                for two in range(number):
                    matrix = cost[group][np.ix_(ours[one], theirs[two])]
                    left, right = inside[group, one, two] = pick(matrix, len(matrix))
                    total[one, two] += float(matrix[left, right].sum())
        chosen = pick(total, count(number))
        found: dict[int, Pairs] = {}
        for group, (ours, theirs) in blocks.items():
            parts = [
                (np.array(ours[one])[inside[group, one, two][0]], np.array(theirs[two])[inside[group, one, two][1]])
                for one, two in zip(*(side.tolist() for side in chosen), strict=True)
            ]
            sides = [[part[side] for part in parts] or [np.arange(0)] for side in (0, 1)]
            found[group] = (np.concatenate(sides[0]), np.concatenate(sides[1]))
        return found

    def _permute(self, traced: Traced, group: int, order: IntArray) -> None:
        """Channel `i` of a group becomes what channel `order[i]` was, everywhere."""
        for param in self.matching.groups[group].params:
            if param.groups == 1:
                self._move(traced, param.param, param.dim, param.indices, order)
            elif param.size > 1:
                self._move_inside(traced, param.param, param.indices, order, param.groups, param.size)

    def _permute_blocks(self, traced: Traced, partners: dict[int, int], moved: dict[int, tuple[int, IntArray]]) -> None:
        """What belongs to heads as wholes, such as a table of biases, follows them."""
        inner = {
            (param.param, param.dim) for group in partners.values() for param in self.matching.groups[group].params
        }
        group = next(iter(partners.values()))
        (whole,) = [number for number, fine in self.matching.heads.items() if group in fine]
        blocks = self.matching.groups[group].blocks
        block_of = {channel: number for number, block in enumerate(blocks) for channel in block}
        order = np.array([block_of[int(moved[group][1][block[0]])] for block in blocks])
        for param in self.matching.groups[whole].params:
            if (param.param, param.dim) not in inner:
                self._move(traced, param.param, param.dim, param.indices, order)

    def _move(self, traced: Traced, param: str, dim: int, indices: IntArray, order: IntArray) -> None:
        source = np.arange(_size(traced, param, dim))
        held = indices >= 0
        source[indices[held]] = indices[order][held]
        permute_slices(traced, param, dim, source)
        self._store(traced)

    def _move_inside(
        self, traced: Traced, param: str, indices: IntArray, order: IntArray, groups: int, size: int
    ) -> None:
        """Columns of a grouped convolution, whose rows of each group have columns of their own."""
        source = np.arange(groups * size)
        held = indices >= 0
        source[indices[held]] = indices[order][held]
        permute_slices(traced, param, 1, source.reshape(groups, size) % size, rows=groups)
        self._store(traced)

    def _store(self, traced: Traced) -> None:
        """What moves may be everything that reads a residual stream: one tensor after the other goes to its file."""
        if self.workspace is not None:
            self.workspace.store(traced)


def _size(traced: Traced, param: str, dim: int) -> int:
    owner, _, leaf = param.rpartition(".")
    return int(getattr(traced.module.get_submodule(owner), leaf).shape[dim])
