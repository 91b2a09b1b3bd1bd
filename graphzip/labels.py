"""The algebra of channel labels: plain arrays, no graphs.

Every index of every parameter dimension has an integer *label*. A tensor carries *axes*: integer arrays that broadcast
to its shape and say which label each position holds. Operators say which labels are the same (`unify`), which must
stay as they are (`pin`) and which lie inside another (`contain`). `LabelSpace.solve` turns that into channels:
connected components of the equalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = [
    "Hashes",
    "IntArray",
    "LabelSpace",
    "Solution",
    "collapse",
    "components",
    "lies_outside",
    "mix",
    "ranks",
    "support",
]

IntArray = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def support(axis: IntArray) -> tuple[int, ...]:
    """The dimensions along which an axis has more than one position."""
    return tuple(dim for dim, size in enumerate(axis.shape) if size > 1)


def collapse(axis: IntArray) -> IntArray:
    """Shrink to size one every dimension along which the labels do not vary."""
    for dim, size in enumerate(axis.shape):
        if size > 1:
            first = np.take(axis, [0], axis=dim)
            if np.array_equal(np.broadcast_to(first, axis.shape), axis):
                axis = first
    return axis


def lies_outside(axis: NDArray[Any], dim: int, width: int) -> bool | None:
    """How `width` labels and something that has none share a dimension: which of them varies more slowly.

    True where all the labels are repeated one behind the other, False where each label has a run of its own, `None`
    where it is neither or cannot be told, because there is only one of the other.
    """
    count = axis.shape[dim] // width
    if count < 2 or count * width != axis.shape[dim]:
        return None
    moved = np.moveaxis(axis, dim, -1)
    lines = moved.reshape(*moved.shape[:-1], count, width)
    if (lines == lines[..., :1, :]).all():
        return True
    runs = moved.reshape(*moved.shape[:-1], width, count)
    return False if (runs == runs[..., :1]).all() else None


def ranks(classes: IntArray) -> IntArray | None:
    """For each position its rank among the positions of the same class; `None` where every class occurs once."""
    flat = classes.ravel()
    if (flat[1:] > flat[:-1]).all():
        return None
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    if starts.size == flat.size:
        return None
    counts = np.diff(np.r_[starts, flat.size])
    rank = np.empty_like(flat)
    rank[order] = np.arange(flat.size) - np.repeat(starts, counts)
    return rank.reshape(classes.shape)


def mix(*parts: int | IntArray | Hashes) -> Hashes:
    """Hash integers (broadcast against each other) to 64 bits with the finaliser of splitmix64."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (
                state * np.uint64(0x9E3779B97F4A7C15)
                + np.asarray(part).astype(np.uint64)
                + np.uint64(0x632BE59BD9B4E019)
            )
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


@dataclass
class Solution:
    """`classes[label]` is the channel of a label; `pins[channel]` says why a channel must stay.

    `containers` are channels that hold others, the channels they hold, and the label of each container.
    """

    classes: IntArray
    pins: dict[int, str]
    containers: list[tuple[IntArray, IntArray, IntArray]]

    @property
    def count(self) -> int:
        return int(self.classes.max(initial=-1)) + 1


@dataclass
class LabelSpace:
    """Labels made so far and everything that is known about them."""

    size: int = 0
    _equal: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _shared: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _pins: list[tuple[IntArray, str]] = field(default_factory=list)
    _contain: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _lined_up: list[tuple[IntArray, IntArray]] = field(default_factory=list)

    def fresh(self, count: int) -> IntArray:
        labels = np.arange(self.size, self.size + count, dtype=np.int64)
        self.size += count
        return labels

    def unify(self, left: IntArray, right: IntArray) -> None:
        """Labels at the same position (after broadcasting) are the same."""
        if left is not right:
            left, right = np.broadcast_arrays(left, right)
            self._equal.append((left.ravel(), right.ravel()))

    def share(self, one: IntArray, every: IntArray) -> None:
        """Each label of `one` is the same as those of every block at its place in `every`.

        Whole blocks may come and go without it, so it does not couple them where they are the channels.
        """
        one, every = np.broadcast_arrays(one, every)
        self._shared.append((one.ravel(), every.ravel()))

    def line_up(self, rows: IntArray) -> None:
        """The labels at one place of every row are the same, unless whole rows are the channels."""
        first, others = np.broadcast_arrays(rows[:1], rows[1:])
        self._lined_up.append((first.ravel(), others.ravel()))

    def pin(self, labels: IntArray, reason: str) -> None:
        self._pins.append((labels.ravel(), reason))

    def contain(self, outer: IntArray, inner: IntArray) -> None:
        """Each label of `outer` holds the labels of `inner` at the same positions: a block of them."""
        outer, inner = np.broadcast_arrays(outer, inner)
        self._contain.append((outer.ravel(), inner.ravel()))

    def solve(self, *, coarse: bool = False) -> Solution:
        """Close the equalities. A container whose whole content is one channel joins that channel.

        With `coarse`, every container and all that it holds are one channel: whole heads, whole groups.
        """
        edges = list(self._equal) + (self._contain if coarse else self._shared + self._lined_up)
        while True:
            classes = components(self.size, edges)
            joined = [_single(classes, outer, inner) for outer, inner in self._contain]
            new = [pair for pair in joined if not np.array_equal(classes[pair[0]], classes[pair[1]])]
            if not new:
                break
            edges.extend(new)
        pins: dict[int, str] = {}
        for labels, reason in self._pins:
            for channel in np.unique(classes[labels]).tolist():
                pins.setdefault(channel, reason)
        for one, _ in self._shared if coarse else ():
            for channel in np.unique(classes[one]).tolist():
                pins.setdefault(channel, "it is part of every block alike")
        containers = []
        for outer, inner in self._contain:
            open_ = classes[outer] != classes[inner]
            if open_.any():
                containers.append((classes[outer[open_]], classes[inner[open_]], outer[open_]))
        return Solution(classes, pins, containers)


def components(count: int, edges: Sequence[tuple[IntArray, IntArray]]) -> IntArray:
    """The number of the connected component of each of `count` labels; edges are pairs of labels, end by end."""
    left = np.concatenate([edge[0] for edge in edges]) if edges else np.empty(0, np.int64)
    right = np.concatenate([edge[1] for edge in edges]) if edges else np.empty(0, np.int64)
    graph = coo_array((np.ones(left.size, dtype=bool), (left, right)), shape=(count, count))
    _, found = connected_components(graph, directed=False)
    numbers: IntArray = found.astype(np.int64)
    return numbers


def _single(classes: IntArray, outer: IntArray, inner: IntArray) -> tuple[IntArray, IntArray]:
    """One (container, content) pair for each container all of whose contents are in one class."""
    order = np.argsort(outer, kind="stable")
    outer, inner = outer[order], inner[order]
    content = classes[inner]
    starts = np.flatnonzero(np.r_[True, outer[1:] != outer[:-1]])
    low = np.minimum.reduceat(content, starts)
    high = np.maximum.reduceat(content, starts)
    single = low == high
    return outer[starts][single], inner[starts][single]
