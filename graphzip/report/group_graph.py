"""Which layers a channel group couples, as a picture has it: layers are rows, a group is a line along those it touches.

Lines that do not overlap stand in one lane, so a deep chain needs few of them, and none crosses another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from graphzip.report.tables import ListedGroup

__all__ = ["DrawnGroups", "GroupGraph", "GroupLine"]


class DrawnGroup(ListedGroup, Protocol):
    """What is drawn of a channel group."""

    @property
    def whole_blocks(self) -> bool: ...


class DrawnGroups(Protocol):
    """All groups of a model."""

    @property
    def order(self) -> Sequence[str]: ...
    def __iter__(self) -> Iterator[DrawnGroup]: ...


@dataclass(frozen=True)
class GroupLine:
    """A group as a line in a `lane`: its `name` and `size`, the rows of `makers`, layers that make its channels, and of
    `readers`, that sum over them. `reason` says why it cannot shrink; it is empty where it can.
    """

    name: str
    size: int
    makers: tuple[int, ...]
    readers: tuple[int, ...]
    reason: str = ""
    lane: int = 0

    @property
    def top(self) -> int:
        """The first row that it touches."""
        return min(self.makers + self.readers)

    @property
    def bottom(self) -> int:
        """The last row that it touches."""
        return max(self.makers + self.readers)


@dataclass(frozen=True)
class GroupGraph:
    """The `layers` of a model in the order in which they run, a row each, and a line for every group of channels."""

    layers: tuple[str, ...]
    lines: tuple[GroupLine, ...]

    @classmethod
    def of(cls, groups: DrawnGroups) -> GroupGraph:
        """That of `groups`; those of whole blocks, which hold the same slices once more, are left out."""
        found = []
        for group in groups:
            if not group.whole_blocks:
                makers = group.touched("producer") or group.touched("pointwise")
                found.append((group, _layers(makers), _layers(group.touched("consumer"))))
        shown = {layer for _, makers, readers in found for layer in (*makers, *readers)}
        layers = [layer for layer in _layers(groups.order) if layer in shown]
        row = {layer: number for number, layer in enumerate(layers)}
        lines = [
            GroupLine(
                group.name,
                group.size,
                tuple(row[layer] for layer in makers),
                tuple(row[layer] for layer in readers),
                "" if group.mergeable else str(group.reason),
            )
            for group, makers, readers in found
        ]
        return cls(tuple(layers), tuple(_in_lanes(lines)))

    @property
    def lanes(self) -> int:
        """How many lanes there are."""
        return max((line.lane for line in self.lines), default=-1) + 1


def _layers(params: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(param.rpartition(".")[0] or param for param in params))


def _in_lanes(lines: Sequence[GroupLine]) -> list[GroupLine]:
    """Each in the first lane in which it touches no other."""
    free_from: list[int] = []
    placed = list(lines)
    for number, line in sorted(enumerate(lines), key=lambda item: (item[1].top, -item[1].bottom)):
        lane = next((lane for lane, row in enumerate(free_from) if row < line.top), len(free_from))
        free_from[lane:] = [line.bottom, *free_from[lane + 1 :]]
        placed[number] = replace(line, lane=lane)
    return placed
