"""Where every surviving channel stands in every tensor.

A merge keeps one channel of each cluster. In every tensor the survivors keep their order, so the new layout of an axis
is the old one without the positions that are gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphzip.analysis.channels import CONSUMER, Analysis
from graphzip.errors import RewriteError
from graphzip.graph.inputs import concrete_shape
from graphzip.labels import IntArray, ranks, support
from graphzip.ops.spec import FloatArray

__all__ = ["Layout", "Merge", "compact", "product_of", "without_repeats"]


Number = TypeVar("Number", np.int64, np.float64)

Merge = tuple[bool, IntArray, Sequence[Sequence[int]]]
"""Whether whole blocks are meant, the channels of a group, and a partition of their positions."""


@dataclass
class Layout:
    """Which channel stands for which: `keeper[channel]` is the channel itself where it stays.

    With `drops`, channels that go leave nothing behind: norms and means count them as zeros, or with `plain_norms` not
    at all. Else the one that stays stands for them.

    `classes[label]` is a channel: of the coarse level where whole blocks of it are merged, else of the fine one.
    """

    analysis: Analysis
    classes: IntArray
    keeper: IntArray
    plain_norms: bool = False
    drops: bool = False
    left_plain: list[str] = field(default_factory=list)
    _compact: dict[int, tuple[IntArray, IntArray]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, analysis: Analysis, merges: Iterable[Merge], *, plain_norms: bool = False, drops: bool = False
    ) -> Layout:
        """The first channel of each part stays. With `plain_norms`, norms count every channel once."""
        fine, coarse = analysis.fine, analysis.coarse
        classes = fine.classes.copy()
        total = fine.solution.count + (coarse.solution.count if coarse is not None else 0)
        keeper = np.arange(total, dtype=np.int64)
        for whole_blocks, channels, parts in merges:
            numbers = channels
            if whole_blocks:
                assert coarse is not None
                held = np.isin(coarse.classes, channels)
                classes[held] = fine.solution.count + coarse.classes[held]
                numbers = channels + fine.solution.count
            for part in parts:
                keeper[numbers[list(part)]] = numbers[part[0]]
        return cls(analysis, classes, keeper, plain_norms, drops)

    @property
    def unchanged(self) -> bool:
        return bool((self.keeper == np.arange(self.keeper.size)).all())

    def mask(self, labels: IntArray) -> NDArray[np.bool_]:
        """Which positions stay."""
        found = self.classes[labels]
        mask: NDArray[np.bool_] = self.keeper[found] == found
        return mask

    def after(self, axis: IntArray) -> IntArray:
        """The labels that are left of an axis."""
        if id(axis) not in self._compact:
            self._compact[id(axis)] = axis, compact(axis, self.mask(axis))
        return self._compact[id(axis)][1]

    def axis_along(self, value: fx.Node, dim: int) -> IntArray | None:
        """The axis of a tensor that extends along `dim`."""
        found: Any = self.analysis.propagation.axes.get(value, ())
        for axis in found if isinstance(found, tuple) else ():
            if dim in support(axis):
                labels: IntArray = axis
                return labels
        return None

    def size(self, value: fx.Node, dim: int) -> int:
        axis = self.axis_along(value, dim)
        return concrete_shape(value.meta["val"])[dim] if axis is None else self.after(axis).shape[dim]

    def shrinks(self, value: fx.Node, dim: int) -> bool:
        axis = self.axis_along(value, dim)
        return axis is not None and self.after(axis).shape[dim] != axis.shape[dim]

    def kept(self, value: fx.Node, dim: int) -> IntArray:
        """Old positions along `dim` that survive; of the first line that has any where the axis has more dimensions."""
        axis = self.axis_along(value, dim)
        if axis is None:
            return np.arange(concrete_shape(value.meta["val"])[dim])
        lines = np.moveaxis(self.mask(axis), dim, -1).reshape(-1, axis.shape[dim])
        return np.flatnonzero(lines[lines.any(axis=1).argmax()])

    def kept_numbers(self, value: fx.Node) -> IntArray | None:
        """The places that stay of the channels whose places are the numbers in a tensor; `None` where all do."""
        labels = self.analysis.propagation.numbered.get(value, {}).get(0)
        if labels is None or self.mask(labels).all():
            return None
        return np.flatnonzero(self.mask(labels))

    def heirs(self, labels: IntArray) -> IntArray:
        """For each position the position of the channel that stays, at the same rank among its occurrences."""
        classes = self.classes[labels]
        rank = ranks(classes)
        rank = np.zeros_like(classes) if rank is None else rank
        span = int(rank.max()) + 1
        own = classes * span + rank
        order = np.argsort(own)
        wanted = self.keeper[classes] * span + rank
        heirs: IntArray = order[np.searchsorted(own[order], wanted)]
        return heirs

    def heirs_along(self, value: fx.Node, dim: int) -> IntArray:
        """For each position along `dim`, where channels lie along no other, the position of the one that stays."""
        axis = self.axis_along(value, dim)
        return np.arange(concrete_shape(value.meta["val"])[dim]) if axis is None else self.heirs(axis.ravel())

    def multiplicity(self, value: fx.Node, dims: Sequence[int], blocks: int = 1) -> FloatArray | None:
        """How many channels each one that stays stands for, counted along `dims` (in `blocks` equal parts of them)."""
        if self.drops:
            return None
        axes = self.axes_along(value, dims)
        return product_of([self._counts(axis, dims, blocks) for axis in axes if not self.mask(axis).all()])

    def axes_along(self, value: fx.Node, dims: Sequence[int]) -> list[IntArray]:
        """The axes of a tensor that extend along one of `dims`."""
        found = [axis for dim in dims if (axis := self.axis_along(value, dim)) is not None]
        return list({id(axis): axis for axis in found}.values())

    def _counts(self, axis: IntArray, dims: Sequence[int], blocks: int) -> FloatArray:
        others = [dim for dim in range(axis.ndim) if dim not in dims]
        lines = np.arange(np.prod([axis.shape[dim] for dim in others], dtype=np.int64))
        lines = np.broadcast_to(
            lines.reshape([axis.shape[dim] if dim in others else 1 for dim in range(axis.ndim)]), axis.shape
        )
        if blocks > 1:
            place = np.arange(axis.size).reshape(axis.shape) // (axis.size // blocks)
            lines = lines * blocks + place
        classes = self.classes[axis]
        stands_for = lines * self.keeper.size + self.keeper[classes]
        itself = lines * self.keeper.size + classes
        counts = _count(stands_for, itself) / _count(itself, itself)
        return without_repeats(compact(counts, self.mask(axis)), others)

    def consumes(self, value: fx.Node, dim: int) -> bool:
        """Whether slices of a weight along `dim` are added up when channels merge."""
        if value not in self.analysis.propagation.raw:
            return False
        for owned in self.analysis.propagation.params:
            if owned.param == value.target and owned.labels.ndim == 2 and owned.dim == dim:
                return True
        axis = self.axis_along(value, dim)
        return axis is not None and bool((self.analysis.roles[axis] & CONSUMER).any())


def product_of(counts: Sequence[FloatArray]) -> FloatArray | None:
    """Counts along several axes of a tensor as one: a single number where all are equal, nothing where they are one."""
    product = np.ones(())
    for each in counts:
        product = product * each
    if np.ptp(product) == 0:
        product = product.ravel()[:1].reshape((1,) * product.ndim)
    return None if (product == 1).all() else product


def without_repeats(found: NDArray[Number], dims: Sequence[int]) -> NDArray[Number]:
    """Shrink to size one those of `dims` along which nothing varies."""
    for dim in dims:
        first = np.take(found, [0], axis=dim)
        if (found == first).all():
            found = first
    return found


def _count(keys: IntArray, wanted: IntArray) -> FloatArray:
    """How often each of `wanted` occurs among `keys`."""
    known, counts = np.unique(keys, return_counts=True)
    place = np.minimum(np.searchsorted(known, wanted.ravel()), known.size - 1)
    found = np.where(known[place] == wanted.ravel(), counts[place], 0)
    return found.reshape(wanted.shape).astype(np.float64)


def compact(axis: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """The positions of an array that survive, as an array again.

    Raises `RewriteError` where they do not form one.
    """
    if mask.all():
        return axis
    dims = support(axis)
    for dim in dims:
        others = tuple(d for d in range(axis.ndim) if d != dim)
        lines = mask.any(axis=others)
        axis, mask = axis.compress(lines, axis=dim), mask.compress(lines, axis=dim)
    if mask.all():
        return axis
    for dim in reversed(dims):
        counts = mask.sum(axis=dim)
        if (counts == counts.flat[0]).all():
            moved, chosen = np.moveaxis(axis, dim, -1), np.moveaxis(mask, dim, -1)
            left = moved[chosen].reshape(*moved.shape[:-1], int(counts.flat[0]))
            return np.moveaxis(left, -1, dim)
    raise RewriteError("the channels that stay do not form a rectangle; keep the same number in every block")
