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

from graphzip.errors import RewriteError

__all__ = [
    "Hashes",
    "IntArray",
    "LabelSpace",
    "Proof",
    "Reason",
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


@dataclass(frozen=True)
class Reason:
    """Why channels must stay: a text for people, and the name of the node in the graph that is to blame, if one is."""

    node: str | None
    text: str

    def __str__(self) -> str:
        return self.text

    def says(self, predicate: str) -> Reason:
        """The whole reason, of which this is the subject."""
        return Reason(self.node, f"{self.text} {predicate}")


@dataclass
class Solution:
    """`classes[label]` is the channel of a label; `pins[channel]` says why a channel must stay.

    Channels of `least` are picked by the data: none stands for another, and so many of them must stay. `containers` are
    channels that hold others, the channels they hold, and the label of each container.
    """

    classes: IntArray
    pins: dict[int, Reason]
    containers: list[tuple[IntArray, IntArray, IntArray]]
    least: dict[int, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return int(self.classes.max(initial=-1)) + 1


@dataclass
class LabelSpace:
    """Labels made so far and everything that is known about them."""

    size: int = 0
    _equal: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _tied: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _pins: list[tuple[IntArray, Reason]] = field(default_factory=list)
    _contain: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _lined_up: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _picked: list[tuple[IntArray, int]] = field(default_factory=list)

    def fresh(self, count: int) -> IntArray:
        labels = np.arange(self.size, self.size + count, dtype=np.int64)
        self.size += count
        return labels

    def unify(self, left: IntArray, right: IntArray) -> None:
        """Labels at the same position (after broadcasting) are the same."""
        if left is not right:
            left, right = np.broadcast_arrays(left, right)
            self._equal.append((left.ravel(), right.ravel()))

    def tie_blocks(self, one: IntArray, every: IntArray) -> None:
        """Each label of `one` is the same as those of every block at its place in `every`.

        Whole blocks may come and go without it, so it does not couple them where they are the channels.
        """
        one, every = np.broadcast_arrays(one, every)
        self._tied.append((one.ravel(), every.ravel()))

    def line_up(self, rows: IntArray) -> None:
        """The labels at one place of every row are the same, unless whole rows are the channels."""
        first, others = np.broadcast_arrays(rows[:1], rows[1:])
        self._lined_up.append((first.ravel(), others.ravel()))

    def pin(self, labels: IntArray, reason: Reason) -> None:
        self._pins.append((labels.ravel(), reason))

    def pick(self, labels: IntArray, count: int) -> None:
        """The data pick `count` of these labels: fewer may be left to pick from, but none stands for another."""
        self._picked.append((labels.ravel(), count))

    def contain(self, outer: IntArray, inner: IntArray) -> None:
        """Each label of `outer` holds the labels of `inner` at the same positions: a block of them."""
        outer, inner = np.broadcast_arrays(outer, inner)
        self._contain.append((outer.ravel(), inner.ravel()))

    def solve(self, *, coarse: bool = False) -> Solution:
        """Close the equalities. A container whose whole content is one channel joins that channel.

        With `coarse`, every container and all that it holds are one channel: whole heads, whole groups.
        """
        edges = list(self._equal) + (self._held_together() if coarse else self._tied + self._lined_up)
        while True:
            classes = components(self.size, edges)
            joined = [_single(classes, outer, inner) for outer, inner in self._contain]
            new = [pair for pair in joined if not np.array_equal(classes[pair[0]], classes[pair[1]])]
            if not new:
                break
            edges.extend(new)
        pins: dict[int, Reason] = {}
        for labels, reason in self._pins:
            for channel in np.unique(classes[labels]).tolist():
                pins.setdefault(channel, reason)
        for one, _ in self._tied if coarse else ():
            for channel in np.unique(classes[one]).tolist():
                pins.setdefault(channel, Reason(None, "it is part of every block alike"))
        containers = []
        for outer, inner in self._contain:
            open_ = classes[outer] != classes[inner]
            if open_.any():
                containers.append((classes[outer[open_]], classes[inner[open_]], outer[open_]))
        least: dict[int, int] = {}
        for labels, count in self._picked:
            least.update({channel: max(count, least.get(channel, 1)) for channel in classes[labels].tolist()})
        return Solution(classes, pins, containers, least)

    def _held_together(self) -> list[tuple[IntArray, IntArray]]:
        """The containers that can all be channels at once; of rows and columns of a rectangle, the more numerous ones.

        All containers of one operator become one channel where others hold some of each: groups of the convolution that
        makes halves of split attention, and the places that both halves have.
        """

        def joined(classes: IntArray, outer: IntArray) -> bool:
            return bool((classes[outer] == classes[outer[0]]).all())

        def is_one(outer: IntArray, pairs: list[tuple[IntArray, IntArray]]) -> bool:
            return joined(components(self.size, self._equal + pairs), outer)

        apart, together = components(self.size, self._equal), components(self.size, self._equal + self._contain)
        held: list[tuple[IntArray, IntArray]] = []
        torn: list[tuple[IntArray, IntArray]] = []
        taken: list[tuple[IntArray, IntArray]] = []
        for pair in self._contain:
            lost = joined(together, pair[0]) and not joined(apart, pair[0]) and not is_one(pair[0], [pair])
            (torn if lost else held).append(pair)
        for pair in sorted(torn, key=lambda pair: -np.unique(pair[0]).size):
            if not any(is_one(outer, [*held, *taken, pair]) for outer, _ in (*taken, pair)):
                taken.append(pair)
        return held + taken


class Proof:
    """Labels of a rewritten graph: wherever the analysis unified labels, the survivors must still meet each other."""

    def __init__(self, solution: Solution, lone: set[int]) -> None:
        self.classes = solution.classes
        self.lone = lone
        self.still = lone | solution.pins.keys()
        self.holders: dict[int, set[int]] = {}
        for outer, inner, _ in solution.containers:
            for channel, holder in zip(inner.tolist(), outer.tolist(), strict=True):
                self.holders.setdefault(channel, {channel}).add(holder)
        self.unknown = 0

    def fresh(self, count: int) -> IntArray:
        self.unknown -= count
        return np.arange(self.unknown, self.unknown + count, dtype=np.int64)

    def unify(self, left: IntArray, right: IntArray) -> None:
        left, right = np.broadcast_arrays(left, right)
        known = (left >= 0) & (right >= 0)
        one, other = self.classes[left[known]], self.classes[right[known]]
        apart = one != other
        for a, b in sorted(set(zip(one[apart].tolist(), other[apart].tolist(), strict=True))):
            held = self.holders.get(a, {a}) & self.holders.get(b, {b})  # a block's last channel stands for the block
            alone = {a, b} <= self.still and {a, b} & self.lone  # of two that lay in one dimension one is left there
            if not held and not alone:
                raise RewriteError("channels that belong together no longer meet; nothing was changed")

    def tie_blocks(self, one: IntArray, every: IntArray) -> None:
        """Channels that every block has alike are the same in every block that stays."""
        self.unify(one, every)

    def pin(self, labels: IntArray, reason: Reason) -> None:
        """What was pinned has not been merged."""

    def pick(self, labels: IntArray, count: int) -> None:
        """What is left of the labels is picked from."""

    def contain(self, outer: IntArray, inner: IntArray) -> None:
        """A container keeps its blocks."""


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
