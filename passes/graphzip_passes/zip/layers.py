"""Which layers and channel groups of several models correspond.

Layers are matched by name, by an explicit mapping, or in order of execution; the channel groups at matched dimensions
of their weights are matched with them. A group of the first task and its counterparts are one *joint* group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from graphzip.analysis.channels import Analysis, analyse
from graphzip.analysis.groups import ChannelGroups, channel_groups_of
from graphzip.analysis.layers import Layer, calls_of_layers, norm_behind
from graphzip.graph.operators import arguments_of
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.plan.problems import plan_error
from graphzip.report.tables import closest

__all__ = ["Matching", "TaskLayer", "TaskNorm", "match"]


@dataclass(frozen=True)
class TaskNorm:
    """Names of the state of a batch norm that alone reads a layer."""

    mean: str
    var: str
    eps: float


@dataclass(frozen=True)
class TaskLayer:
    """A linear layer or a convolution of one task, with its parameters' names in the joint model.

    `name` is its name in its own model; `nodes` are the names of its calls. `depthwise` convolutions have a kernel for
    each channel alone. Other grouped ones have as many `parts` as groups, each of `height` rows with inputs of its own.
    """

    task: str
    name: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    nodes: tuple[str, ...]
    groups: int
    norm: TaskNorm | None

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.shape[1] == 1

    @property
    def parts(self) -> int:
        return 1 if self.depthwise else self.groups

    @property
    def height(self) -> int:
        return self.shape[0] // self.parts

    @property
    def positions(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.shape[2:])

    @property
    def features(self) -> int:
        """Numbers that one row reads."""
        return math.prod(self.shape[1:])

    @property
    def kind(self) -> tuple[object, ...]:
        """What is equal of layers that can share: the kernel, and how channels are divided into groups."""
        divided = ("depthwise", self.shape[0] // self.groups) if self.depthwise else self.groups
        return len(self.shape), self.shape[2:], divided

    def __str__(self) -> str:
        if len(self.shape) == 2:
            return f"{self.name!r} of task {self.task!r} (linear)"
        size = " x ".join(map(str, self.shape[2:]))
        groups = "" if self.groups == 1 else f" in {self.groups} groups"
        return f"{self.name!r} of task {self.task!r} (a convolution with a kernel of {size}{groups})"


@dataclass
class Matching:
    """`layers[name]` gives the layer of each task that corresponds to layer `name` of the first one.

    `slots[param, dim]` says for every slice of a parameter which group, channel and rank it is, `(slices, 3)`, -1 where
    it has none. `joint[group]` is the group of the first task that a group corresponds to; `tables` are those that
    embeddings give. `every` has all layers of all tasks whose parameters nothing else has, and `places` where their
    calls stand in the graph. `alone` says of the layers that have no counterpart why, by task and name: `a.up`.
    """

    groups: ChannelGroups
    layers: dict[str, dict[str, TaskLayer]]
    slots: dict[tuple[str, int], IntArray]
    joint: dict[int, int]
    outputs: frozenset[int]
    heads: dict[int, tuple[int, ...]] = field(default_factory=dict)
    every: tuple[TaskLayer, ...] = ()
    places: dict[str, int] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)
    tables: frozenset[int] = frozenset()

    def partners(self, group: int) -> dict[str, int]:
        """The groups that correspond to a group of the first task, by task."""
        return {
            self.groups[other].name.partition(".")[0]: other for other, first in self.joint.items() if first == group
        }

    def free(self, group: int) -> bool:
        """Whether the channels of a group may be put in another order."""
        return self.groups[group].mergeable or self.groups[group].size == 1


def match(traced: Traced, order: tuple[str, ...], given: Mapping[str, Mapping[str, str]], *, where: str) -> Matching:
    """Match the models of a joint graph with the first of `order`.

    `given` names for a task the layers of the first one and its own ones. Raises `PlanError` where layers or their
    channel groups do not correspond.
    """
    analysis = analyse(traced.graph)
    groups = channel_groups_of(traced, analysis)
    slots = _slots(groups)
    layers, alone = _layers(traced)
    first, *others = order
    matched: dict[str, dict[str, TaskLayer]] = {name: {first: layer} for name, layer in layers[first].items()}
    for task in others:
        pairs = _pairs(layers[first], layers[task], given.get(task), task, f"{where}.match")
        for name, own in pairs.items():
            matched[name][task] = layers[task][own]
        unlike = "match does not name it" if task in given else f"it is of another kind than that of task {first!r}"
        alone |= {f"{task}.{name}": unlike for name in layers[task] if name not in pairs.values()}
    for name, found in matched.items():
        if len(found) == 1:
            alone[f"{first}.{name}"] = "no other model has a layer of its kind in its place, or match does not name it"
    matched = {name: found for name, found in matched.items() if len(found) > 1}
    joint = _joint(matched, slots, groups, where)
    outputs = _outputs(traced, analysis, groups)
    tied = {*traced.aliases, *traced.aliases.values()}
    every = [layer for own in layers.values() for layer in own.values() if tied.isdisjoint({layer.weight, layer.bias})]
    places = {node.name: place for place, node in enumerate(traced.graph.nodes)}
    heads, tables = _heads(groups), _tables(traced, slots)
    return Matching(groups, matched, slots, joint, outputs, heads, tuple(every), places, alone, tables)


def _slots(groups: ChannelGroups) -> dict[tuple[str, int], IntArray]:
    sizes: dict[tuple[str, int], int] = {}
    for group in groups:
        for param in group.params:
            key = (param.param, param.dim)
            sizes[key] = max(sizes.get(key, 0), int(param.indices.max()) + 1)
    slots = {key: np.full((size, 3), -1, dtype=np.int64) for key, size in sizes.items()}
    for number, group in enumerate(groups):
        for param in group.params if not group.whole_blocks else ():
            channel, rank = np.nonzero(param.indices >= 0)
            slots[param.param, param.dim][param.indices[channel, rank]] = np.stack(
                [np.full(channel.size, number), channel, rank], axis=1
            )
    return slots


def _layers(traced: Traced) -> tuple[dict[str, dict[str, TaskLayer]], dict[str, str]]:
    """The layers of every task by name, and why others cannot share anything, by task and name."""
    found: dict[str, dict[str, TaskLayer]] = {task.name: {} for task in traced.tasks}
    alone: dict[str, str] = {}
    calls: dict[str, list[Layer]] = {}
    for call in calls_of_layers(traced):
        calls.setdefault(call.name, []).append(call)
    for weight, own in calls.items():
        first, task = own[0], weight.partition(".")[0]
        name = weight.removeprefix(f"{task}.").removesuffix(".weight")
        obstacle = _obstacle(own, task)
        if obstacle is not None:
            alone[f"{task}.{name}"] = obstacle
            continue
        bias = None if first.bias is None else str(first.bias.target)
        nodes = tuple(call.node.name for call in own)
        norm = _norm(first.node) if len(own) == 1 else None
        found[task][name] = TaskLayer(task, name, weight, bias, first.shape, nodes, first.groups, norm)
    return found, alone


def _obstacle(calls: Sequence[Layer], task: str) -> str | None:
    """Why the layer with these calls can share nothing; nothing where it can."""
    first = calls[0]
    if first.transposed:
        return "it is a transposed convolution"
    if any(user.target is not first.node.target for user in first.weight.users):
        return "another operator reads its weight, too"
    if any((call.bias, call.groups) != (first.bias, first.groups) for call in calls):
        return "it is called with one bias here and another one there"
    if any(str(call.node.meta.get("owner", "")).partition(".")[0] != task for call in calls):
        return "several models have its weight already"
    if first.bias is not None and first.bias.op != "get_attr":
        return "its bias is computed"
    return None


def _norm(node: fx.Node) -> TaskNorm | None:
    norm = norm_behind(node)
    if norm is None:
        return None
    args = arguments_of(norm)
    return TaskNorm(str(args["running_mean"].target), str(args["running_var"].target), float(args["eps"]))


def _pairs(
    first: Mapping[str, TaskLayer],
    other: Mapping[str, TaskLayer],
    given: Mapping[str, str] | None,
    task: str,
    where: str,
) -> dict[str, str]:
    """The layer of a task for each layer of the first one that has a counterpart."""
    if given is not None:
        problems = [
            f"{where}[{task!r}]: no layer {name!r}; {closest(name, first)}" for name in given if name not in first
        ]
        problems += [
            f"{where}[{task!r}][{name!r}]: no layer {own!r}; {closest(own, other)}"
            for name, own in given.items()
            if own not in other
        ]
        problems += [
            f"{where}[{task!r}]: {own!r} is given for two layers"
            for own in set(given.values())
            if list(given.values()).count(own) > 1
        ]
        problems += [
            f"{where}[{task!r}][{name!r}]: {other[own]} cannot share weights with {first[name]}; match "
            "layers with equal kernels and groups, or leave the two out"
            for name, own in given.items()
            if name in first and own in other and first[name].kind != other[own].kind
        ]
        if problems:
            raise plan_error(problems)
        return dict(given)
    if list(first) == list(other):
        return {name: name for name in first if first[name].kind == other[name].kind}
    ones, twos = list(first.values()), list(other.values())
    if len(ones) != len(twos) or any(one.kind != two.kind for one, two in zip(ones, twos, strict=True)):
        raise plan_error(
            [
                f"{where}: the layers of task {task!r} ({len(twos)}) cannot be matched with those of the first task "
                f"({len(ones)}) by name or in order; write match={{{task!r}: {{'layer of the first task': 'its own'}}}}"
            ]
        )
    return {one.name: two.name for one, two in zip(ones, twos, strict=True)}


def _joint(
    layers: Mapping[str, Mapping[str, TaskLayer]],
    slots: Mapping[tuple[str, int], IntArray],
    groups: ChannelGroups,
    where: str,
) -> dict[int, int]:
    joint: dict[int, int] = {}
    problems: list[str] = []
    for name, found in layers.items():
        first, *others = found.values()
        for dim in (0, 1):
            own = _groups_at(slots, first.weight, dim)
            joint.update({group: group for group in own})
            for layer in others:
                theirs = _groups_at(slots, layer.weight, dim)
                if len(own) != len(theirs):
                    problems.append(
                        f"{where}: the {'outputs' if dim == 0 else 'inputs'} of {name!r} are coupled in another way in "
                        f"task {layer.task!r} ({len(theirs)} channel groups, {len(own)} in the first task); exclude it"
                    )
                    continue
                for one, two in zip(own, theirs, strict=True):
                    if joint.setdefault(two, one) != one:
                        problems.append(
                            f"{where}: group {groups[two].name!r} corresponds to {groups[one].name!r} at {name!r}, but "
                            f"to {groups[joint[two]].name!r} before; match other layers or exclude it"
                        )
    if problems:
        raise plan_error(list(dict.fromkeys(problems)))
    return joint


def _groups_at(slots: Mapping[tuple[str, int], IntArray], param: str, dim: int) -> list[int]:
    """The groups of a dimension, in order of their first slice."""
    found = slots.get((param, dim))
    return [] if found is None else [number for number in dict.fromkeys(found[:, 0].tolist()) if number >= 0]


def _tables(traced: Traced, slots: Mapping[tuple[str, int], IntArray]) -> frozenset[int]:
    """Groups whose channels are the columns of tables that are looked up."""
    calls = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    names = {
        str(arguments_of(call)["weight"].target) for call in calls if arguments_of(call)["weight"].op == "get_attr"
    }
    return frozenset(group for name in names for group in _groups_at(slots, name, 1))


def _outputs(traced: Traced, analysis: Analysis, groups: ChannelGroups) -> frozenset[int]:
    """Groups whose channels are outputs of a model."""
    channels: set[int] = set()
    for node in traced.graph.nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                for axis in analysis.propagation.axes.get(source, ()):
                    channels.update(analysis.fine.classes[np.asarray(axis).ravel()].tolist())
    return frozenset(
        number
        for number, group in enumerate(groups)
        if not group.whole_blocks and channels & set(group.channels.tolist())
    )


def _heads(groups: ChannelGroups) -> dict[int, tuple[int, ...]]:
    """For each group of whole blocks that may change places, the groups of channels inside the blocks."""
    names = {group.name: number for number, group in enumerate(groups)}
    return {
        number: tuple(names[name] for name in group.overlaps)
        for number, group in enumerate(groups)
        if group.whole_blocks and group.mergeable and len(group.blocks) == 1
    }
