"""Clusters of one size, up to one channel.

Rows go to the nearest centre that has room, those that are nearest to one first; then centres are the means of their
rows, and so on, as in k-means. Of all rounds the one with the smallest sum of squared distances counts.

Source: Gao, Deng and Huang, "Cross Domain Model Compression by Structurally Weight Sharing" (2019), section 4.5, which
finds that large clusters beside small ones cost accuracy; the method is ours.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graphzip.labels import IntArray

__all__ = ["balanced"]

FloatArray = NDArray[np.floating[Any]]

_ROUNDS: Final = 10


def balanced(rows: FloatArray, labels: IntArray, count: int) -> IntArray:
    """Labels (n,) from 0 to `count - 1` for rows (n, d), n >= count, near to those of `labels`: each as often as
    every other one, or once more.
    """
    best, least = labels, np.inf
    for _ in range(_ROUNDS):
        centres = np.zeros((count, rows.shape[1]))
        np.add.at(centres, labels, rows)
        centres /= np.bincount(labels, minlength=count)[:, None]
        labels = _assigned(rows, centres)
        apart = float(np.square(rows - centres[labels]).sum())
        if apart >= least:
            break
        best, least = labels, apart
    return best


def _assigned(rows: FloatArray, centres: FloatArray) -> IntArray:
    size, more = divmod(len(rows), len(centres))  # so many have one row more
    square = np.square(centres).sum(1)
    nearest = [(square - 2.0 * (centres @ row)).min() + np.square(row).sum() for row in rows]
    labels = np.empty(len(rows), dtype=np.int64)
    taken = np.zeros(len(centres), dtype=np.int64)
    for row in np.argsort(nearest, kind="stable"):
        room = taken < size if more == 0 else taken <= size
        apart = np.where(room, square - 2.0 * (centres @ rows[row]), np.inf)
        labels[row] = int(np.argmin(apart))
        more -= int(taken[labels[row]] == size)
        taken[labels[row]] += 1
    return labels
