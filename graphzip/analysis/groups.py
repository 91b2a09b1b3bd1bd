"""Channel groups: the unit that a person sees, a plan names and a pass shrinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from graphzip.analysis.channels import CONSUMER, PRODUCER, Analysis, Level, analyse
from graphzip.analysis.explain import Explanation, explain
from graphzip.errors import NotFoundError
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray, Reason, ranks
from graphzip.report.tables import closest, groups_table, preformatted

__all__ = ["Analysed", "ChannelGroup", "ChannelGroups", "GroupParam", "ParamSlice", "channel_groups_of"]


@dataclass(frozen=True)
class ParamSlice:
    """One slice `param.select(dim, index)` that belongs to a channel.

    `role` is `"producer"` (makes the channel), `"pointwise"` (acts on it: bias, batch norm, depthwise kernel) or
    `"consumer"` (is summed over it). `rows` limits a consumer slice of a grouped convolution to the rows (first
    dimension, half open) of its group.
    """

    param: str
    dim: int
    index: int
    role: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class GroupParam:
    """All slices of one parameter dimension that belong to a group: `indices[channel, k]`.

    With `groups` > 1 (the input dimension of a grouped convolution of `size` inputs per group) an entry is
    `group * size + index`.
    """

    param: str
    dim: int
    role: str
    indices: IntArray
    groups: int = 1
    size: int = 0


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that occur in exactly the same places, and so may be merged with each other.

    `name` is that of the first producer, and `params` are the places in parameters that the channels stand in.
    `mergeable` tells whether they can shrink, and `why` not. `channels` numbers them in the analysis; position `i` of a
    group is channel `i` of its first producer's slices. Channels that the data pick from, such as experts, may go but
    none stands for another: they are not `exact`, and at least `least` must stay. `blocks` are positions that must keep
    as many channels as each other, and `rows_of` says how many rows the parameters of grouped layers have.
    `whole_blocks` tells channels that are whole heads or whole groups of a convolution; `overlaps` names the groups
    that hold the same slices at the other size: a plan may shrink one of them.
    """

    name: str
    channels: IntArray
    params: tuple[GroupParam, ...]
    mergeable: bool
    why: Reason | None
    exact: bool
    blocks: tuple[tuple[int, ...], ...]
    rows_of: dict[str, int] = field(default_factory=dict)
    whole_blocks: bool = False
    overlaps: tuple[str, ...] = ()
    least: int = 1

    @property
    def reason(self) -> str | None:
        """Why its channels cannot be merged, or nothing."""
        return None if self.why is None else str(self.why)

    @property
    def size(self) -> int:
        """Number of channels."""
        return int(self.channels.size)

    def slices(self, channel: int) -> tuple[ParamSlice, ...]:
        """Every parameter slice of a channel; those of two channels correspond position by position.

        Raises `IndexError` for a channel outside `range(size)`.
        """
        if not 0 <= channel < self.size:
            raise IndexError(f"group {self.name!r} has channels 0 to {self.size - 1}, not {channel}")
        found = []
        for param in self.params:
            for entry in param.indices[channel].tolist():
                rows = None
                if param.groups > 1:
                    group, entry = divmod(entry, param.size)
                    height = self.rows_of[param.param] // param.groups
                    rows = (group * height, (group + 1) * height)
                found.append(ParamSlice(param.param, param.dim, entry, param.role, rows))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: name, size, flags and the parameters of each role."""
        return {
            "name": self.name,
            "size": self.size,
            "mergeable": self.mergeable,
            "exact": self.exact,
            "reason": self.reason,
            "blocks": len(self.blocks),
            "whole_blocks": self.whole_blocks,
            "overlaps": list(self.overlaps),
            **{f"{role}s": self.touched(role) for role in ("producer", "pointwise", "consumer")},
        }

    def touched(self, role: str) -> list[str]:
        """Names of the parameters that hold slices of this role."""
        return list(dict.fromkeys(param.param for param in self.params if param.role == role))


class ChannelGroups(Sequence[ChannelGroup]):
    """All channel groups of a model, in execution order, also by name: `groups["layer1.0.conv1"]`."""

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        parameters: int = 0,
        shrinkable: int = 0,
        explain: Callable[[ChannelGroup], Explanation] | None = None,
        order: Sequence[str] = (),
    ) -> None:
        self._groups = tuple(groups)
        self.parameters = parameters
        self.shrinkable_parameters = shrinkable
        self._explain = explain
        self.order = tuple(order)
        """Parameters and buffers in the order in which the model first reads them."""

    @cached_property
    def _by_name(self) -> dict[str, ChannelGroup]:
        return {group.name: group for group in self._groups}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all groups."""
        return tuple(self._by_name)

    @overload
    def __getitem__(self, key: int | str) -> ChannelGroup: ...
    @overload
    def __getitem__(self, key: slice) -> ChannelGroups: ...
    def __getitem__(self, key: int | str | slice) -> ChannelGroup | ChannelGroups:
        if isinstance(key, slice):
            return ChannelGroups(
                self._groups[key], self.parameters, self.shrinkable_parameters, self._explain, self.order
            )
        if isinstance(key, str):
            if key not in self._by_name:
                raise NotFoundError(f"no channel group {key!r}; {closest(key, self._by_name)}")
            return self._by_name[key]
        try:
            return self._groups[key]
        except (IndexError, TypeError):
            raise NotFoundError(f"no channel group {key!r}; there are {len(self)}, numbered from 0") from None

    def widths(self) -> dict[str, int]:
        """Channels of every group that can shrink, as the `keep` of a `ClusterMerge` that brings a wider model here.

        Names with a `#n` come first, for a pattern without one matches them too. Whole heads and whole groups of
        convolutions are left out: the width inside them stands for both.
        """
        numbered_first = sorted(self, key=lambda group: "#" not in group.name)
        return {group.name: group.size for group in numbered_first if group.mergeable and not group.whole_blocks}

    def __contains__(self, item: object) -> bool:
        return item in self._by_name if isinstance(item, str) else item in self._groups

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return preformatted(str(self))

    def __str__(self) -> str:
        return groups_table(self)

    def explain(self, name: str) -> Explanation:
        """The operators along which the channels of a group run, up to the one that pins them where one does.

        Raises `NotFoundError` for an unknown name, with the closest ones.
        """
        assert self._explain is not None
        return self._explain(self[name])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description of every group and of what can shrink."""
        return {
            "groups": [group.to_dict() for group in self],
            "channels": sum(group.size for group in self),
            "mergeable_channels": sum(group.size for group in self if group.mergeable),
            "parameters": self.parameters,
            "shrinkable_parameters": self.shrinkable_parameters,
        }


def channel_groups_of(traced: Traced, analysis: Analysis) -> ChannelGroups:
    """Form the groups of an analysed graph."""
    first_use = _execution_order(traced)
    drafts = _Builder(traced, analysis, analysis.fine, first_use).drafts()
    if analysis.coarse is not None:
        drafts += _Builder(traced, analysis, analysis.coarse, first_use).drafts()
    drafts.sort(key=lambda draft: draft.place)
    groups = _named(traced, drafts)
    order = [traced.qualified(name) for name in sorted(first_use, key=first_use.__getitem__)]
    return ChannelGroups(groups, *_shares(traced, groups), partial(_explained, traced, analysis), order)


@dataclass(frozen=True)
class Analysed:
    """The analysis of a graph, and its groups."""

    analysis: Analysis
    groups: ChannelGroups

    @classmethod
    def of(cls, traced: Traced) -> Analysed:
        """Analyse a graph."""
        analysis = analyse(traced.graph)
        return cls(analysis, channel_groups_of(traced, analysis))

    def of_copy(self, traced: Traced) -> Analysed:
        """The same of a copy of the graph."""
        analysis = self.analysis.of_copy(traced.graph)
        groups = self.groups
        explain = partial(_explained, traced, analysis)
        return Analysed(
            analysis, ChannelGroups([*groups], groups.parameters, groups.shrinkable_parameters, explain, groups.order)
        )


def _explained(traced: Traced, analysis: Analysis, group: ChannelGroup) -> Explanation:
    roles = {traced.local(param.param): param.role for param in group.params}
    return explain(traced.graph, analysis, group, roles)


@dataclass(frozen=True)
class _Draft:
    """A group that has no name yet, and its place in execution order."""

    place: tuple[int, int, bool]
    param: str
    channels: IntArray
    params: tuple[GroupParam, ...]
    why: Reason | None
    blocks: tuple[tuple[int, ...], ...]
    whole_blocks: bool
    labels: frozenset[int]
    least: int | None


class _Builder:
    def __init__(self, traced: Traced, analysis: Analysis, level: Level, first_use: Mapping[str, int]) -> None:
        self.traced = traced
        self.analysis = analysis
        self.level = level
        self.whole_blocks = level is analysis.coarse
        self.first_use = first_use
        self.slices = _slices(analysis, level)
        self.of_inputs = _read_with_inputs(traced)

    def drafts(self) -> list[_Draft]:
        if not self.slices:
            return []
        channels = np.unique(np.concatenate([s.channels for s in self.slices]))
        if self.whole_blocks:
            channels = channels[np.isin(channels, self._larger())]
        pins = self.level.solution.pins
        pinned = np.fromiter((int(c) in pins for c in channels), dtype=np.int64, count=channels.size)
        keys = np.stack([self.level.signature[channels], pinned.astype(np.uint64)])
        group_of = np.full(self.level.solution.count, -1, dtype=np.int64)
        group_of[channels] = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
        owned: dict[int, list[tuple[_Slices, IntArray]]] = {}
        for found in sorted(self.slices, key=lambda s: (self.first_use[s.param], s.param, s.dim)):
            numbers = group_of[found.channels]
            order = np.argsort(numbers, kind="stable")
            for part in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
                if part.size and numbers[part[0]] >= 0:
                    owned.setdefault(int(numbers[part[0]]), []).append((found, part))
        return [draft for parts in owned.values() if (draft := self._draft(parts)) is not None]

    def _larger(self) -> IntArray:
        """Channels that hold several channels of the fine level."""
        labels = np.concatenate([s.labels for s in self.slices])
        pairs = np.unique(np.stack([self.level.classes[labels], self.analysis.fine.classes[labels]]), axis=1)
        found, counts = np.unique(pairs[0], return_counts=True)
        larger: IntArray = found[counts > 1]
        return larger

    def _draft(self, parts: list[tuple[_Slices, IntArray]]) -> _Draft | None:
        """The group made of these parts of parameters; what only reads the model's inputs is left out."""
        producers = [(s, part) for s, part in parts if s.role == "producer"]
        others = [(s, part) for s, part in parts if s.role == "pointwise"]
        namers = producers or sorted(others, key=lambda each: not self._is_parameter(each[0].param))
        if not namers:
            return None
        slices, part = namers[0]
        channels = slices.channels[part][_first_occurrence(slices.channels[part])]
        reason = self._reason(channels)
        if reason is not None and (self.whole_blocks or not self._makes_channels(parts, channels)):
            return None
        position = np.full(self.level.solution.count, -1, dtype=np.int64)
        position[channels] = np.arange(channels.size)
        return _Draft(
            place=(self.first_use[slices.param], int(slices.positions[part].min()), self.whole_blocks),
            param=slices.param,
            channels=channels,
            params=tuple(_group_param(s, p, position, channels.size, self.traced) for s, p in parts),
            why=reason,
            blocks=self._blocks(channels),
            whole_blocks=self.whole_blocks,
            labels=frozenset(np.concatenate([s.labels[p] for s, p in parts]).tolist()),
            least=self.level.solution.least.get(int(channels[0])),
        )

    def _makes_channels(self, parts: list[tuple[_Slices, IntArray]], channels: IntArray) -> bool:
        """Whether a weight makes them; where a pinned weight is computed, they may still have a bias or a scale.

        A scale of the model's inputs makes none.
        """
        pinned = any(channel in self.level.solution.pins for channel in channels.tolist())
        return any(found.role == "producer" or (pinned and self._is_vector(found.param)) for found, _ in parts)

    def _is_vector(self, param: str) -> bool:
        vector = self._is_parameter(param) and get_tensor(self.traced.module, param).dim() == 1
        return vector and param not in self.of_inputs

    def _is_parameter(self, name: str) -> bool:
        return isinstance(get_tensor(self.traced.module, name), nn.Parameter)

    def _reason(self, channels: IntArray) -> Reason | None:
        reason = self.level.reason(channels)
        if reason is not None:
            return reason
        least = self.level.solution.least.get(int(channels[0]), 1)
        if channels.size <= least and least > 1:
            return Reason(None, f"{least} of its {channels.size} channels are picked by the data")
        if channels.size == 1:
            return Reason(None, "has no other channel to merge with")
        _, counts = np.unique(self.level.block[channels], return_counts=True)
        if counts.max() == 1:
            return Reason(None, "has no other channel of its block to merge with")
        if (counts != counts[0]).any():
            return Reason(None, "its blocks have different numbers of channels")
        return None

    def _blocks(self, channels: IntArray) -> tuple[tuple[int, ...], ...]:
        numbers = self.level.block[channels]
        parts = {int(number): np.flatnonzero(numbers == number).tolist() for number in dict.fromkeys(numbers.tolist())}
        return tuple(tuple(part) for part in parts.values())


def _named(traced: Traced, drafts: Sequence[_Draft]) -> list[ChannelGroup]:
    """Give every draft the name of its first producer, numbered where one producer feeds several groups."""
    used: dict[str, int] = {}
    names = []
    for draft in drafts:
        name = traced.qualified(draft.param.removesuffix(".weight"))
        used[name] = used.get(name, 0) + 1
        names.append(name if used[name] == 1 else f"{name}#{used[name]}")
    rows = {
        traced.qualified(str(node.target)): int(node.meta["val"].shape[0])
        for node in traced.graph.nodes
        if node.op == "get_attr" and node.meta["val"].dim()
    }
    large = [(name, draft) for name, draft in zip(names, drafts, strict=True) if draft.whole_blocks]
    small = [(name, draft) for name, draft in zip(names, drafts, strict=True) if not draft.whole_blocks]
    groups = []
    for name, draft in zip(names, drafts, strict=True):
        others = small if draft.whole_blocks else large
        groups.append(
            ChannelGroup(
                name=name,
                channels=draft.channels,
                params=draft.params,
                mergeable=draft.why is None,
                why=draft.why,
                exact=draft.why is None and draft.least is None,
                blocks=draft.blocks,
                rows_of={p.param: rows[p.param] for p in draft.params if p.groups > 1},
                whole_blocks=draft.whole_blocks,
                overlaps=tuple(other for other, found in others if draft.labels & found.labels),
                least=draft.least or 1,
            )
        )
    return groups


@dataclass(frozen=True)
class _Slices:
    """One role of one parameter dimension: position, channel and rank of every slice."""

    param: str
    dim: int
    role: str
    positions: IntArray
    labels: IntArray
    channels: IntArray
    groups: int
    size: int


def _slices(analysis: Analysis, level: Level) -> list[_Slices]:
    found = []
    for owned in analysis.propagation.params:
        labels = owned.labels.ravel()
        bits = analysis.roles[labels]
        groups = owned.labels.shape[0] if owned.labels.ndim == 2 else 1
        roles = np.select([bits & CONSUMER > 0, bits & PRODUCER > 0], [2, 1], 0)
        for code, role in ((0, "pointwise"), (1, "producer"), (2, "consumer")):
            positions = np.flatnonzero((roles == code) & (bits > 0))
            if positions.size:
                own = labels[positions]
                size = labels.size // groups
                found.append(_Slices(owned.param, owned.dim, role, positions, own, level.classes[own], groups, size))
    return found


def _group_param(slices: _Slices, part: IntArray, position: IntArray, size: int, traced: Traced) -> GroupParam:
    channels, positions = position[slices.channels[part]], slices.positions[part]
    rank = ranks(channels)
    width = 1 if rank is None else int(rank.max()) + 1
    indices = np.full((size, width), -1, dtype=np.int64)
    indices[channels, 0 if rank is None else rank] = positions
    return GroupParam(traced.qualified(slices.param), slices.dim, slices.role, indices, slices.groups, slices.size)


def _first_occurrence(channels: IntArray) -> IntArray:
    return np.sort(np.unique(channels, return_index=True)[1])


def _execution_order(traced: Traced) -> dict[str, int]:
    """For each parameter the position of the first operator that reads it."""
    place = {node: number for number, node in enumerate(traced.graph.nodes)}
    return {
        str(node.target): min((place[user] for user in node.users), default=place[node])
        for node in traced.graph.nodes
        if node.op == "get_attr"
    }


def _read_with_inputs(traced: Traced) -> set[str]:
    """Parameters that operators read together with nothing but the model's inputs, as these are or rearranged."""
    given: set[fx.Node] = set()
    found: dict[str, bool] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            given.add(node)
        elif node.op == "call_function":
            fetched = [source for source in node.all_input_nodes if source.op == "get_attr"]
            alone = len(fetched) < len(node.all_input_nodes) and given.issuperset({*node.all_input_nodes} - {*fetched})
            if alone and not fetched:
                given.add(node)
            for source in fetched:
                found[str(source.target)] = found.get(str(source.target), True) and alone
    return {name for name, alone in found.items() if alone}


def _shares(traced: Traced, groups: Sequence[ChannelGroup]) -> tuple[int, int]:
    """Parameters of the model, and those with at least one slice in a group that can shrink."""
    sizes = dict(traced.module.named_parameters())
    touched: dict[str, dict[int, NDArray[np.bool_]]] = {}
    for group in groups:
        for param in group.params if group.mergeable else ():
            entries = param.indices.ravel() % param.size if param.groups > 1 else param.indices.ravel()
            name = traced.local(param.param)
            if name in sizes:
                free = touched.setdefault(name, {})
                free.setdefault(param.dim, np.ones(sizes[name].shape[param.dim], dtype=bool))[entries] = False
    shrinkable = 0
    for name, free in touched.items():
        left = [int(free[dim].sum()) if dim in free else size for dim, size in enumerate(sizes[name].shape)]
        shrinkable += sizes[name].numel() - math.prod(left)
    return sum(parameter.numel() for parameter in sizes.values()), shrinkable
