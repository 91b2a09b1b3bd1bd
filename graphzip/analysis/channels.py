"""From labels to channel groups.

Two channels belong to one group if exchanging them everywhere at once commutes with every operator. A channel's
*signature* is a hash over every (node output, axis) in which it occurs, with the rank of each occurrence where it
occurs several times, and over how every data movement permutes those ranks. Channels with equal signatures may be
exchanged, occurrence by occurrence in order of rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphzip.analysis.propagate import Propagation, propagate
from graphzip.labels import Hashes, IntArray, LabelSpace, Solution, mix, ranks, support

__all__ = ["Analysis", "analyse"]

_PARAM, _MOVE, _WORD = 1 << 20, 1 << 21, 1 << 64


@dataclass
class Analysis:
    """Labels, channels (classes of labels) and what is known about each channel."""

    propagation: Propagation
    solution: Solution
    signature: Hashes
    block: IntArray
    conflicts: dict[int, str]
    roles: NDArray[np.int8]

    @property
    def classes(self) -> IntArray:
        return self.solution.classes


PRODUCER, CONSUMER, POINTWISE = 1, 2, 4


def analyse(graph: fx.Graph) -> Analysis:
    """Find the channels of a graph and what couples them."""
    space = LabelSpace()
    propagation = propagate(graph, space)
    roles = _roles(space, propagation)
    solution = space.solve()
    signature = _signatures(propagation, solution)
    block, conflicts = _blocks(propagation, solution, signature)
    return Analysis(propagation, solution, signature, block, conflicts, roles)


def _roles(space: LabelSpace, propagation: Propagation) -> NDArray[np.int8]:
    roles = np.zeros(space.size, dtype=np.int8)
    for bit, found in (
        (PRODUCER, propagation.produced),
        (CONSUMER, propagation.consumed),
        (POINTWISE, propagation.pointwise),
    ):
        for labels in found:
            roles[labels.ravel()] |= bit
    both = np.flatnonzero((roles & CONSUMER > 0) & (roles & (PRODUCER | POINTWISE) > 0))
    if both.size:
        space.pin(both, "a weight dimension is both summed over and used as values")
    return roles


def _signatures(propagation: Propagation, solution: Solution) -> Hashes:
    signature = np.zeros(solution.count, dtype=np.uint64)
    rank_of: dict[int, IntArray | None] = {}

    def rank(axis: IntArray) -> IntArray | None:
        if id(axis) not in rank_of:
            rank_of[id(axis)] = ranks(solution.classes[axis])
        return rank_of[id(axis)]

    def add(axis: IntArray, hashes: Hashes) -> None:
        np.add.at(signature, solution.classes[axis].ravel(), np.broadcast_to(hashes, axis.shape).ravel())

    where: dict[int, tuple[IntArray, int]] = {}
    with np.errstate(over="ignore"):
        for position, axes in enumerate(propagation.axes.values()):
            outputs = axes if isinstance(axes, list) else [axes]
            for output, found in enumerate(outputs):
                for axis in found:
                    place = int(mix(position, output, *support(axis)))
                    where[id(axis)] = (axis, (where.get(id(axis), (axis, 0))[1] + place) % _WORD)
        for axis, place in where.values():
            occurrence = rank(axis)
            add(axis, mix(place, 0 if occurrence is None else occurrence))
        for number, owned in enumerate(propagation.params):
            occurrence = ranks(solution.classes[owned.labels])
            add(owned.labels, mix(_PARAM + number, 0 if occurrence is None else occurrence))
    _add_moves(propagation, solution, signature)
    return signature


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


def _blocks(propagation: Propagation, solution: Solution, signature: Hashes) -> tuple[IntArray, dict[int, str]]:
    """Channels that must keep equal counts per block, as a block number per channel, and channels where none fits."""
    block = np.zeros(solution.count, dtype=np.int64)
    conflicts: dict[int, str] = {}
    for outer, inner in solution.containers:
        for channel in np.unique(outer).tolist():
            conflicts.setdefault(channel, "holds whole blocks of channels")
        block = _refine(block, _sets(inner, outer, solution.count))
    rectangles = _rectangles(propagation, solution)
    for _, lines_of in rectangles:
        options = [_refine(block, _sets(classes.ravel(), lines.ravel(), solution.count)) for classes, lines in lines_of]
        block = min(options, key=lambda option: int(option.max()))
    for name, lines_of in rectangles:
        if not any(_even(classes, lines, signature, block) for classes, lines in lines_of):
            for channel in np.unique(lines_of[0][0]).tolist():
                conflicts.setdefault(channel, f"{name} needs equal parts that different channel groups share unevenly")
    return block, conflicts


Lines = tuple[IntArray, IntArray]


def _rectangles(propagation: Propagation, solution: Solution) -> list[tuple[str, list[Lines]]]:
    """Arrays that stay arrays only if every line keeps the same number of channels, and the ways to choose lines."""
    found: list[tuple[str, list[Lines]]] = []
    seen: set[bytes] = set()
    for name, rows in propagation.blocks:
        classes = solution.classes[rows]
        lines = np.broadcast_to(np.arange(rows.shape[0])[:, None], rows.shape)
        found.append((name, [(classes, np.ascontiguousarray(lines))]))
    for node, axes in propagation.axes.items():
        for output in axes if isinstance(axes, list) else [axes]:
            for axis in output:
                dims = support(axis)
                if len(dims) < 2 or node.op == "get_attr":
                    continue
                classes = solution.classes[axis].squeeze()
                varying = [
                    d
                    for d in range(classes.ndim)
                    if not np.array_equal(classes, np.broadcast_to(classes.take([0], d), classes.shape))
                ]
                if len(varying) < 2:
                    continue
                classes = classes[
                    tuple(slice(None) if d in varying else slice(0, 1) for d in range(classes.ndim))
                ].squeeze()
                key = classes.tobytes() + repr(classes.shape).encode()
                if key not in seen:
                    seen.add(key)
                    found.append((f"node {node.name}", [_lines(classes, dim) for dim in reversed(range(classes.ndim))]))
    return found


def _lines(classes: IntArray, dim: int) -> Lines:
    moved = np.moveaxis(classes, dim, -1)
    numbers = np.arange(moved[..., 0].size).reshape(moved.shape[:-1])
    return moved, np.broadcast_to(numbers[..., None], moved.shape)


def _sets(members: IntArray, keys: IntArray, count: int) -> Hashes:
    """For each channel a hash of the set of keys it occurs with; 0 where it does not occur."""
    pairs = np.unique(np.stack([members.ravel(), keys.ravel()]), axis=1)
    result = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        np.add.at(result, pairs[0], mix(pairs[1], 1))
    return result


def _refine(block: IntArray, keys: Hashes) -> IntArray:
    """Split blocks so that channels with different keys are apart; channels without a key stay where they are."""
    touched = np.flatnonzero(keys)
    if not touched.size:
        return block
    _, parts = np.unique(mix(block[touched], keys[touched].view(np.int64)), return_inverse=True)
    refined: IntArray = block.copy()
    refined[touched] = block.max() + 1 + parts.reshape(-1)
    return refined


def _even(classes: IntArray, lines: IntArray, signature: Hashes, block: IntArray) -> bool:
    """Every line holds the same number of blocks, of the same sizes, of every group."""
    group = np.unique(signature[classes.ravel()], return_inverse=True)[1].reshape(-1)
    line = np.unique(lines.ravel(), return_inverse=True)[1].reshape(-1)
    table = np.zeros((line.max() + 1, group.max() + 1), dtype=np.int64)
    np.add.at(table, (line, group), 1)
    parts = np.zeros_like(table)
    triples = np.unique(np.stack([line, group, block[classes.ravel()]]), axis=1)
    np.add.at(parts, (triples[0], triples[1]), 1)
    return bool((table == table[0]).all() and (parts == parts[0]).all())
