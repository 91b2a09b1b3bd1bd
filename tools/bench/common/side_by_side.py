"""Two kinds of steps measured in turns, so that what else the machine does hits both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

__all__ = ["seconds", "side_by_side"]


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def side_by_side(plain: Callable[[], float], other: Callable[[], float], turns: int) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median ratio of the other to the plain one; both give their seconds."""
    pairs = [(plain(), other()) if turn % 2 else (other(), plain())[::-1] for turn in range(turns)]
    one, two = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    return one, two, statistics.median(after / before for before, after in pairs)
