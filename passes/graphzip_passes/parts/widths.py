"""How far each channel group shrinks: what a plan asks for, resolved against a model's groups.

Pure functions on names and numbers. The width of a group of `size` channels in B blocks:

- a share `keep` keeps B * max(1, floor(size / B * keep)) channels, exactly (0.7 of 10 is 7);
- a count keeps that many, and must divide by B, for every block keeps the same number;
- a group that the data pick channels from, such as experts, keeps at least as many as are picked;
- then the width is raised to `min_width` and rounded up to a multiple of lcm(round_to, B), at most to `size`.

Where whole heads or whole groups of a convolution can go as well as the width inside them, the two groups overlap and
one of them may shrink: the width, unless a key names the other one with its `#n` or no width can shrink.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Final, Protocol

from graphzip.plan.problems import plan_error
from graphzip.report.tables import closest

__all__ = ["Clusters", "SizedGroup", "Width", "WidthOptions", "excluded_by", "matches", "resolve"]

_NAMED: Final = 5  # channels or groups that one message names


class SizedGroup(Protocol):
    """What is asked of a channel group."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def mergeable(self) -> bool: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def whole_blocks(self) -> bool: ...
    @property
    def overlaps(self) -> tuple[str, ...]: ...
    @property
    def least(self) -> int: ...


@dataclass(frozen=True)
class WidthOptions:
    """What a plan asks of the groups' widths; the fields are the options of the same names (`graphzip.plan.passes`)."""

    keep: float | Mapping[str, float]
    exclude: Sequence[str] = ()
    round_to: int = 1
    clusters: Mapping[str, Sequence[Sequence[int]]] | None = None
    min_width: int = 1


@dataclass(frozen=True)
class Width:
    """The group keeps `count` channels; a clustering says which ones go together. A multiple of its blocks' number."""

    count: int


@dataclass(frozen=True)
class Clusters:
    """The group keeps one channel of each of these clusters. Every cluster is sorted; ordered by smallest channel."""

    clusters: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """How many channels the group keeps."""
        return len(self.clusters)


def matches(pattern: str, name: str) -> bool:
    """Whether the glob matches a group's name, with or without its `#2`, `#3` ... (`fnmatch.fnmatchcase`)."""
    return fnmatchcase(name, pattern) or fnmatchcase(re.sub(r"#\d+$", "", name), pattern)


def resolve(
    options: WidthOptions, groups: Iterable[SizedGroup], *, where: str = "cluster_merge"
) -> dict[str, Width | Clusters]:
    """What every group that shrinks keeps, by name, in the order of `groups`. Groups that stay whole are not listed.

    `where` is the path of the options in the plan, for messages.

    Raises `PlanError`, with all problems, where a name or glob fits no group, a group that cannot be merged is asked
    for by name, a count is above a group's size or does not divide by its blocks, or clusters are not a partition.
    """
    by_name = {group.name: group for group in groups}
    problems: list[str] = []
    excluded = excluded_by(options.exclude, by_name, f"{where}.exclude", problems)
    by_hand = _by_hand(options.clusters or {}, by_name, excluded, f"{where}.clusters", problems)
    free = [group for name, group in by_name.items() if name not in excluded and name not in by_hand]
    kept = _kept(options, free, by_name, excluded, f"{where}.keep", problems)
    if problems:
        raise plan_error(problems)
    counts: dict[str, Width | Clusters] = {**by_hand, **kept}
    _settle_overlaps(counts, by_hand, options, by_name, where, problems)
    if problems:
        raise plan_error(problems)
    return {name: counts[name] for name, group in by_name.items() if name in counts and counts[name].count < group.size}


def _settle_overlaps(
    counts: dict[str, Width | Clusters],
    by_hand: Collection[str],
    options: WidthOptions,
    by_name: Mapping[str, SizedGroup],
    where: str,
    problems: list[str],
) -> None:
    """Of overlapping groups let one shrink: the one that is named, else the width inside the blocks."""
    keys = set(options.keep) if isinstance(options.keep, Mapping) else set()
    named = {name for name in counts if name in by_hand or name in keys}
    for name, group in by_name.items():
        if not group.whole_blocks or name not in counts:
            continue
        asked = name in named or any("#" in key and fnmatchcase(name, key) for key in keys)
        rivals = [other for other in group.overlaps if other in counts]
        clash = [other for other in rivals if other in named]
        if asked and clash:
            problems.append(f"{where}: groups {name!r} and {clash[0]!r} overlap; a plan may shrink one of them")
        elif asked:
            for other in rivals:
                del counts[other]
        elif rivals or keys:
            del counts[name]


def excluded_by(
    globs: Sequence[str], by_name: Mapping[str, SizedGroup], where: str, problems: list[str]
) -> frozenset[str]:
    """The groups that some glob matches; a glob that matches none is told to `problems`."""
    found: set[str] = set()
    for position, glob in enumerate(globs):
        matched = {name for name in by_name if matches(glob, name)}
        if not matched:
            problems.append(f"{where}[{position}]: {glob!r} matches no channel group; {closest(glob, by_name)}")
        found |= matched
    return frozenset(found)


# ---------------------------------------------------------------------------------------------------- clusters by hand


def _by_hand(
    clusters: Mapping[str, Sequence[Sequence[int]]],
    by_name: Mapping[str, SizedGroup],
    excluded: Collection[str],
    where: str,
    problems: list[str],
) -> dict[str, Clusters]:
    resolved: dict[str, Clusters] = {}
    for name, given in clusters.items():
        group = by_name.get(name)
        if group is None:
            problem = f"no channel group has this name; {closest(name, by_name)}"
        elif name in excluded:
            problem = "the group is excluded too; take it out of one of the two"
        else:
            problem = _partition_problem(group, given) or ""
            resolved[name] = Clusters(tuple(sorted(tuple(sorted(each)) for each in given)))
        if problem:
            problems.append(f"{where}[{name!r}]: {problem}")
    return resolved


def _partition_problem(group: SizedGroup, clusters: Sequence[Sequence[int]]) -> str | None:
    channels = [channel for each in clusters for channel in each]
    outside = sorted(channel for channel in set(channels) if not 0 <= channel < group.size)
    if outside:
        return f"{_channels(outside)} outside the group, whose {group.size} channels are 0 to {group.size - 1}"
    if len(set(channels)) < len(channels):
        repeated = sorted(channel for channel, count in Counter(channels).items() if count > 1)
        return f"{_channels(repeated)} in more than one place; name every channel once"
    missing = sorted(set(range(group.size)) - set(channels))
    if missing:
        return f"{_channels(missing)} in no cluster; name every one of the {group.size} channels once"
    if not group.mergeable and len(clusters) < group.size:
        return f"the group cannot be merged: {group.reason}"
    if len(clusters) < group.least:
        return f"{len(clusters)} clusters are too few, {_picked(group)}"
    return _blocks_problem(group, clusters)


def _blocks_problem(group: SizedGroup, clusters: Sequence[Sequence[int]]) -> str | None:
    if len(group.blocks) < 2:
        return None
    block_of = {channel: number for number, block in enumerate(group.blocks) for channel in block}
    counts = [0] * len(group.blocks)
    for each in clusters:
        blocks = sorted({block_of[channel] for channel in each})
        if len(blocks) > 1:
            return f"the cluster {sorted(each)} spans blocks {blocks[0]} and {blocks[1]}; keep it inside one block"
        counts[blocks[0]] += 1
    for block, count in enumerate(counts):
        if count != counts[0]:
            return f"block {block} has {count} clusters and block 0 has {counts[0]}; give every block the same number"
    return None


def _channels(channels: Sequence[int]) -> str:
    listed = ", ".join(map(str, channels[:_NAMED]))
    more = f" and {len(channels) - _NAMED} more" if len(channels) > _NAMED else ""
    return f"channel {listed} is" if len(channels) == 1 else f"channels {listed}{more} are"


# ---------------------------------------------------------------------------------------------------- widths


def _kept(
    options: WidthOptions,
    free: Sequence[SizedGroup],
    by_name: Mapping[str, SizedGroup],
    excluded: Collection[str],
    where: str,
    problems: list[str],
) -> dict[str, Width]:
    """The widths of the groups that are neither excluded nor clustered by hand."""
    if isinstance(options.keep, Mapping):
        for pattern, amount in options.keep.items():
            problem = _key_problem(pattern, amount, by_name, excluded)
            if problem:
                problems.append(f"{where}[{pattern!r}]: {problem}")
        keep = options.keep
    else:
        keep = {"*": options.keep}
    widths: dict[str, Width] = {}
    for group in free:
        key = next((pattern for pattern in keep if _is_meant(group, pattern, keep is options.keep, by_name)), None)
        if key is None or not group.mergeable:
            continue
        path = f"{where}[{key!r}]" if keep is options.keep else where
        try:
            widths[group.name] = Width(_width(group, keep[key], options))
        except _Misfit as misfit:
            problems.append(f"{path}: {misfit}")
    return widths


def _is_meant(group: SizedGroup, key: str, is_named: bool, by_name: Mapping[str, SizedGroup]) -> bool:
    """Whether a key matches; whole blocks by their own name only, and by none at all if no width inside can shrink."""
    if not group.whole_blocks:
        return matches(key, group.name)
    if is_named:
        return fnmatchcase(group.name, key)
    return not any(by_name[other].mergeable for other in group.overlaps if other in by_name)


def _key_problem(
    pattern: str, amount: float, by_name: Mapping[str, SizedGroup], excluded: Collection[str]
) -> str | None:
    matched = [group for name, group in by_name.items() if matches(pattern, name)]
    if not matched:
        return f"matches no channel group; {closest(pattern, by_name)}"
    asked = [group for group in matched if group.name not in excluded and not _whole(group, amount)]
    if asked and not any(group.mergeable for group in matched):
        others = f" (and {len(asked) - 1} more)" if len(asked) > 1 else ""
        return f"group {asked[0].name!r}{others} cannot be merged: {asked[0].reason}; take the key out"
    return None


def _whole(group: SizedGroup, amount: float) -> bool:
    return amount == (group.size if isinstance(amount, int) else 1.0)


class _Misfit(ValueError):
    """Why an amount does not fit a group."""


def _width(group: SizedGroup, amount: float, options: WidthOptions) -> int:
    blocks = len(group.blocks)
    if isinstance(amount, int):
        width = _count(group, amount)
    else:
        share = Fraction(repr(amount))  # the decimal that was written, not the binary number nearest to it
        width = blocks * max(1, math.floor(group.size // blocks * share))
        width = max(width, group.least)
    multiple = math.lcm(options.round_to, blocks)
    return min(group.size, -(-max(width, options.min_width) // multiple) * multiple)


def _picked(group: SizedGroup) -> str:
    return f"of which the data pick {group.least}; keep at least {group.least}"


def _count(group: SizedGroup, count: int) -> int:
    blocks = len(group.blocks)
    if count > group.size:
        raise _Misfit(f"{count} channels cannot be kept of group {group.name!r}, which has {group.size}")
    if count < group.least:
        raise _Misfit(f"{count} channels cannot be kept of group {group.name!r}, {_picked(group)}")
    if count % blocks:
        below, above = count // blocks * blocks, -(-count // blocks) * blocks
        nearest = " or ".join(str(each) for each in (below, above) if 0 < each <= group.size)
        raise _Misfit(
            f"{count} channels cannot be kept of group {group.name!r}, whose {blocks} blocks keep the same number "
            f"each; keep {nearest}"
        )
    return count
