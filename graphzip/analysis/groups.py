"""Channel groups: the unit that a person sees, a plan names and a pass shrinks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np

from graphzip.analysis.channels import CONSUMER, PRODUCER, Analysis
from graphzip.graph.trace import Traced
from graphzip.labels import IntArray, ranks
from graphzip.tables import closest, groups_table

__all__ = ["ChannelGroup", "ChannelGroups", "GroupParam", "ParamSlice", "channel_groups_of"]


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

    `channels` numbers them in the analysis; position `i` of a group is channel `i` of its first producer's slices.
    """

    name: str
    channels: IntArray
    params: tuple[GroupParam, ...]
    mergeable: bool
    reason: str | None
    exact: bool
    blocks: tuple[tuple[int, ...], ...]
    rows_of: dict[str, int] = field(default_factory=dict)

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
            **{f"{role}s": self.touched(role) for role in ("producer", "pointwise", "consumer")},
        }

    def touched(self, role: str) -> list[str]:
        """Names of the parameters that hold slices of this role."""
        return list(dict.fromkeys(param.param for param in self.params if param.role == role))


class ChannelGroups(Sequence[ChannelGroup]):
    """All channel groups of a model, in execution order, also by name: `groups["layer1.0.conv1"]`."""

    def __init__(self, groups: Sequence[ChannelGroup], parameters: int = 0, shrinkable: int = 0) -> None:
        self._groups = tuple(groups)
        self.parameters = parameters
        self.shrinkable_parameters = shrinkable

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
            return ChannelGroups(self._groups[key], self.parameters, self.shrinkable_parameters)
        if isinstance(key, str):
            if key not in self._by_name:
                raise KeyError(f"no channel group {key!r}; {closest(key, self._by_name)}")
            return self._by_name[key]
        return self._groups[key]

    def __contains__(self, item: object) -> bool:
        return item in self._by_name if isinstance(item, str) else item in self._groups

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __str__(self) -> str:
        return groups_table(self)

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
    groups = _Builder(traced, analysis).groups()
    total, shrinkable = _shares(traced, groups)
    return ChannelGroups(groups, total, shrinkable)


class _Builder:
    def __init__(self, traced: Traced, analysis: Analysis) -> None:
        self.traced = traced
        self.analysis = analysis
        self.first_use = _execution_order(traced)
        self.shapes = {
            str(node.target): tuple(node.meta["val"].shape) for node in traced.graph.nodes if node.op == "get_attr"
        }
        self.slices = _slices(analysis)

    def groups(self) -> list[ChannelGroup]:
        pins = self.analysis.solution.pins
        channels = (
            np.unique(np.concatenate([s.channels for s in self.slices])) if self.slices else np.empty(0, np.int64)
        )
        pinned = np.fromiter((int(c) in pins for c in channels), dtype=np.int64, count=channels.size)
        keys = np.stack([self.analysis.signature[channels], pinned.astype(np.uint64)])
        number = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
        group_of = np.full(self.analysis.solution.count, -1, dtype=np.int64)
        group_of[channels] = number
        owned: dict[int, list[tuple[_Slices, IntArray]]] = {}
        for found in sorted(self.slices, key=lambda s: (self.first_use[s.param], s.param, s.dim)):
            numbers = group_of[found.channels]
            order = np.argsort(numbers, kind="stable")
            for part in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
                owned.setdefault(int(numbers[part[0]]), []).append((found, part))
        drafts = [draft for parts in owned.values() if (draft := self._draft(parts)) is not None]
        drafts.sort(key=lambda draft: draft[0])
        return self._named([draft[1] for draft in drafts])

    def _draft(self, parts: list[tuple[_Slices, IntArray]]) -> tuple[tuple[int, int], tuple[Any, ...]] | None:
        """The group made of these parts of parameters, with its place in execution order; inputs are left out."""
        namers = [(s, part) for s, part in parts if s.role == "producer"] or [
            (s, part) for s, part in parts if s.role == "pointwise"
        ]
        lead = namers[0] if namers else None
        if lead is None:
            return None
        slices, part = lead
        channels = slices.channels[part][_first_occurrence(slices.channels[part])]
        reason = self._reason(channels)
        if slices.role != "producer" and reason is not None:
            return None
        position = np.full(self.analysis.solution.count, -1, dtype=np.int64)
        position[channels] = np.arange(channels.size)
        params = tuple(_group_param(s, p, position, channels.size, self.traced) for s, p in parts)
        place = self.first_use[slices.param], int(slices.positions[part].min())
        return place, (slices.param, channels, params, reason)

    def _reason(self, channels: IntArray) -> str | None:
        for found in (self.analysis.solution.pins, self.analysis.conflicts):
            for channel in channels.tolist():
                if channel in found:
                    return found[channel]
        if channels.size == 1:
            return "has no other channel to merge with"
        _, counts = np.unique(self.analysis.block[channels], return_counts=True)
        if counts.max() == 1:
            return "has no other channel of its block to merge with"
        if (counts != counts[0]).any():
            return "its blocks have different numbers of channels"
        return None

    def _named(self, drafts: list[tuple[Any, ...]]) -> list[ChannelGroup]:
        used: dict[str, int] = {}
        groups = []
        for param, channels, params, reason in drafts:
            name = self.traced.qualified(param.removesuffix(".weight"))
            used[name] = used.get(name, 0) + 1
            groups.append(
                ChannelGroup(
                    name=name if used[name] == 1 else f"{name}#{used[name]}",
                    channels=channels,
                    params=params,
                    mergeable=reason is None,
                    reason=reason,
                    exact=reason is None,
                    blocks=self._blocks(channels),
                    rows_of={p.param: self.shapes[_local(self.traced, p.param)][0] for p in params if p.groups > 1},
                )
            )
        return groups

    def _blocks(self, channels: IntArray) -> tuple[tuple[int, ...], ...]:
        numbers = self.analysis.block[channels]
        parts = {int(number): np.flatnonzero(numbers == number).tolist() for number in dict.fromkeys(numbers.tolist())}
        return tuple(tuple(part) for part in parts.values())


@dataclass(frozen=True)
class _Slices:
    """One role of one parameter dimension: position, channel and rank of every slice."""

    param: str
    dim: int
    role: str
    positions: IntArray
    channels: IntArray
    groups: int
    size: int


def _slices(analysis: Analysis) -> list[_Slices]:
    found = []
    for owned in analysis.propagation.params:
        labels = owned.labels.ravel()
        bits = analysis.roles[labels]
        groups = owned.labels.shape[0] if owned.labels.ndim == 2 else 1
        roles = np.select([bits & CONSUMER > 0, bits & PRODUCER > 0], [2, 1], 0)
        for code, role in ((0, "pointwise"), (1, "producer"), (2, "consumer")):
            positions = np.flatnonzero((roles == code) & (bits > 0))
            if positions.size:
                channels = analysis.classes[labels[positions]]
                found.append(_Slices(owned.param, owned.dim, role, positions, channels, groups, labels.size // groups))
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


def _local(traced: Traced, name: str) -> str:
    return name.removeprefix(f"{traced.scope}.") if traced.scope else name


def _shares(traced: Traced, groups: Sequence[ChannelGroup]) -> tuple[int, int]:
    """Parameters of the model, and those with at least one slice in a group that can shrink."""
    sizes = dict(traced.module.named_parameters())
    touched: dict[str, list[tuple[int, IntArray]]] = {}
    for group in groups:
        for param in group.params if group.mergeable else ():
            entries = param.indices.ravel() % param.size if param.groups > 1 else param.indices.ravel()
            touched.setdefault(_local(traced, param.param), []).append((param.dim, entries))
    shrinkable = 0
    for name, places in touched.items():
        if name in sizes:
            free = np.ones(tuple(sizes[name].shape), dtype=bool)
            for dim, entries in places:
                free[(slice(None),) * dim + (np.unique(entries),)] = False
            shrinkable += int((~free).sum())
    return sum(parameter.numel() for parameter in sizes.values()), shrinkable
