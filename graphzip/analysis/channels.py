"""From labels to channel groups.

Two channels belong to one group if exchanging them everywhere at once commutes with every operator. A channel's
*signature* is a hash over every (node output, axis) in which it occurs, with the rank of each occurrence where it
occurs several times, and over how every data movement permutes those ranks. Channels with equal signatures may be
exchanged, occurrence by occurrence in order of rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphzip.analysis.equal_counts import Rectangles, find_blocks
from graphzip.analysis.propagate import Propagation, propagate
from graphzip.labels import Hashes, IntArray, LabelSpace, Reason, Solution, components, mix, ranks, support

__all__ = ["CONSUMER", "POINTWISE", "PRODUCER", "Analysis", "Level", "analyse"]

_PARAM, _MOVE, _WORD = 1 << 20, 1 << 21, 1 << 64


@dataclass
class Level:
    """Channels (classes of labels) at one size: single channels, or whole blocks of them such as heads.

    `signature` says which channels may be exchanged, `block` which of them must keep equal counts, `conflicts` why
    some cannot be merged.
    """

    solution: Solution
    signature: Hashes
    block: IntArray
    conflicts: dict[int, Reason]

    @property
    def classes(self) -> IntArray:
        return self.solution.classes

    def reason(self, channels: IntArray) -> Reason | None:
        """Why one of these channels must stay, or nothing."""
        for found in (self.solution.pins, self.conflicts):
            for channel in channels.tolist():
                if channel in found:
                    return found[channel]
        return None


@dataclass
class Analysis:
    """What is known about the labels of a graph; `coarse` is absent where no channels form blocks."""

    propagation: Propagation
    roles: NDArray[np.int8]
    fine: Level
    coarse: Level | None

    def of_copy(self, graph: fx.Graph) -> Analysis:
        """The same of a copy of the graph."""
        return replace(self, propagation=self.propagation.of_copy(graph))


PRODUCER, CONSUMER, POINTWISE = 1, 2, 4


def analyse(graph: fx.Graph) -> Analysis:
    """Find the channels of a graph and what couples them."""
    space = LabelSpace()
    propagation = propagate(graph, space)
    solution = space.solve()
    rectangles = Rectangles(propagation, solution)
    while interleaved := rectangles.interleaved():
        for rows in interleaved:
            space.line_up(rows)
        solution = space.solve()
        rectangles = Rectangles(propagation, solution)
    fine = _level(propagation, solution, rectangles)
    if not fine.solution.containers:
        return Analysis(propagation, _roles(propagation, fine), fine, None)
    whole = space.solve(coarse=True)
    coarse = _level(propagation, whole, Rectangles(propagation, whole))
    return Analysis(propagation, _roles(propagation, fine, coarse), fine, coarse)


def _level(propagation: Propagation, solution: Solution, rectangles: Rectangles) -> Level:
    signature = _signatures(propagation, solution)
    block, conflicts = find_blocks(solution, rectangles, signature)
    return Level(solution, signature, block, conflicts)


def _roles(propagation: Propagation, *levels: Level) -> NDArray[np.int8]:
    """What every label of a parameter does at the places where it is used, found back through all that joins them.

    Slices are added up only where that is right at every place at once: what is summed over with them must be summable
    too, or never merged, and none of it may be used in another way. Else merged channels keep one slice.
    """
    unit = _used_alike(propagation, levels[0].classes.size)
    found = np.zeros(int(unit.max(initial=-1)) + 1, dtype=np.int8)
    for bit, used in (
        (PRODUCER, propagation.produced),
        (CONSUMER, propagation.consumed),
        (POINTWISE, propagation.pointwise),
    ):
        for labels in used:
            found[unit[labels.ravel()]] |= bit
    sums = [unit[labels.ravel()] for labels in propagation.consumed]
    mixed = (found != CONSUMER) | _not_summable(propagation, unit, levels)
    while refused := [units for units in sums if mixed[units].any() and (found[units] & CONSUMER).any()]:
        for units in refused:
            found[units] = (found[units] & ~CONSUMER) | POINTWISE
            mixed[units] = True
    roles: NDArray[np.int8] = found[unit]
    return roles


def _used_alike(propagation: Propagation, count: int) -> IntArray:
    """A number per label: the same one where the joining of parameters makes labels of one axis of them."""
    if not propagation.joined:
        return np.arange(count)
    pairs = [np.broadcast_arrays(*pair) for pair in propagation.joined]
    return components(count, [(left.ravel(), right.ravel()) for left, right in pairs])


def _not_summable(propagation: Propagation, unit: IntArray, levels: Sequence[Level]) -> NDArray[np.bool_]:
    """Which units have a label that may be merged, although its slices cannot be added up."""
    fixed = np.ones(unit.size, dtype=bool)
    for level in levels:
        pinned = np.zeros(level.solution.count, dtype=bool)
        pinned[list(level.solution.pins)] = True
        fixed &= pinned[level.classes]
    for labels in propagation.summable:
        fixed[labels.ravel()] = True
    found = np.zeros(int(unit.max(initial=-1)) + 1, dtype=bool)
    found[unit[~fixed]] = True
    return found


def _signatures(propagation: Propagation, solution: Solution) -> Hashes:
    signature = np.zeros(solution.count, dtype=np.uint64)
    axes = list(_places(propagation).values())
    axes += [(owned.labels, _PARAM + number) for number, owned in enumerate(propagation.params)]
    if axes:
        channels = [solution.classes[axis].ravel() for axis, _ in axes]
        places = np.repeat(np.array([place for _, place in axes], dtype=np.uint64), [axis.size for axis, _ in axes])
        occurrences = [np.zeros(each.size, np.int64) if (found := ranks(each)) is None else found for each in channels]
        np.add.at(signature, np.concatenate(channels), mix(places, np.concatenate(occurrences)))
    _add_moves(propagation, solution, signature)
    return signature


def _places(propagation: Propagation) -> dict[int, tuple[IntArray, int]]:
    """Every axis, by its `id`, and a hash of where it occurs: at which nodes, along which of their dimensions."""
    keys: dict[int, list[tuple[int, ...]]] = {}
    found: dict[int, list[IntArray]] = {}
    for position, axes in enumerate(propagation.axes.values()):
        for output, held in enumerate(axes if isinstance(axes, list) else [axes]):
            for axis in held:
                key = position, output, *support(axis)
                keys.setdefault(len(key), []).append(key)
                found.setdefault(len(key), []).append(axis)
    where: dict[int, tuple[IntArray, int]] = {}
    for length, listed in keys.items():
        hashes = mix(*np.array(listed, dtype=np.int64).T).tolist()
        for axis, place in zip(found[length], hashes, strict=True):
            where[id(axis)] = axis, (where.get(id(axis), (axis, 0))[1] + place) % _WORD
    return where


def _add_moves(propagation: Propagation, solution: Solution, signature: Hashes) -> None:
    """How each movement carries the occurrences of a channel over; trivial where all occur once."""
    for position, move in propagation.moves:
        found = [ranks(solution.classes[source]) for source in move.sources]
        result = ranks(solution.classes[move.result])
        if result is None and all(rank is None for rank in found):
            continue
        flat = [
            np.zeros(source.size, np.int64) if rank is None else rank.ravel()
            for source, rank in zip(move.sources, found, strict=True)
        ]
        operand = np.repeat(np.arange(len(flat)), [source.size for source in move.sources])
        held = move.origin >= 0
        origin = np.where(held, move.origin, 0)
        came = np.where(held, np.concatenate(flat)[origin], -1)
        hashes = mix(_MOVE + position, operand[origin], came, 0 if result is None else result)
        np.add.at(signature, solution.classes[move.result].ravel(), np.broadcast_to(hashes, move.result.shape).ravel())
