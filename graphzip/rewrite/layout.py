"""Where every surviving channel stands in every tensor.

A merge keeps one channel of each cluster. In every tensor the survivors keep their order, so the new layout of an axis
is the old one without the positions that are gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphzip.analysis.channels import Analysis
from graphzip.errors import RewriteError
from graphzip.graph.inputs import concrete_shape
from graphzip.labels import IntArray, support

__all__ = ["Layout", "compact"]


@dataclass
class Layout:
    """Which channel stands for which: `keeper[channel]` is the channel itself where it stays."""

    analysis: Analysis
    keeper: IntArray
    _compact: dict[int, tuple[IntArray, IntArray]] = field(default_factory=dict)

    @classmethod
    def of(cls, analysis: Analysis, clusters: Iterable[tuple[IntArray, Sequence[Sequence[int]]]]) -> Layout:
        """`clusters` pairs the channels of a group with a partition of their positions; the first of each stays."""
        keeper = np.arange(analysis.solution.count, dtype=np.int64)
        for channels, parts in clusters:
            for part in parts:
                keeper[channels[list(part)]] = channels[part[0]]
        return cls(analysis, keeper)

    @property
    def stays(self) -> NDArray[np.bool_]:
        stays: NDArray[np.bool_] = self.keeper == np.arange(self.keeper.size)
        return stays

    def mask(self, labels: IntArray) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = self.stays[self.analysis.classes[labels]]
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


def compact(axis: IntArray, mask: NDArray[np.bool_]) -> IntArray:
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
