"""Which channels go, given a score for each: every group by itself, or groups in competition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from graphzip.analysis.groups import ChannelGroup
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced

__all__ = ["Contest", "FloatArray", "competing", "dropped", "normalised", "structure"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Contest:
    """Groups that compete, with how many channels each would keep alone; a width is a multiple of `round_to`."""

    scores: Mapping[str, FloatArray]
    widths: Mapping[str, int]
    round_to: int = 1


def dropped(group: ChannelGroup, scores: FloatArray, count: int) -> tuple[int, ...]:
    """The channels that go so that `count` are left: in every block the same number, those with the lowest scores."""
    share = count // len(group.blocks)
    gone = [
        np.array(block)[np.argsort(scores[list(block)], kind="stable")[: len(block) - share]] for block in group.blocks
    ]
    return tuple(sorted(np.concatenate(gone).tolist()))


def competing(groups: Mapping[str, ChannelGroup], contest: Contest) -> dict[str, int]:
    """How many channels each group keeps where the lowest mean scores of all of them go first.

    Together they keep as many as they would alone, or up to one step of a group more. A group keeps at least one step.
    """
    left = sum(groups[name].size - width for name, width in contest.widths.items())
    counts = {name: groups[name].size for name in contest.widths}
    steps = [
        (score, name, width)
        for name in contest.widths
        for score, width in _steps(groups[name], contest.scores[name], contest.round_to)
    ]
    for _, name, width in sorted(steps, key=lambda step: (step[0], step[1], -step[2])):
        gone = counts[name] - width
        if 0 < gone <= left:
            counts[name] = width
            left -= gone
    return counts


def structure(group: ChannelGroup, traced: Traced) -> tuple[object, ...]:
    """What groups have in common whose channels stand in parameters of the same kinds (Fang et al., "Isomorphic
    Pruning for Vision Models", ECCV 2024, section 3.2): roles, and names and dimensions inside their modules.
    """
    found = []
    for param in group.params:
        dims = get_tensor(traced.module, traced.local(param.param)).dim()
        found.append((param.role, param.param.rpartition(".")[2], param.dim, dims))
    return tuple(sorted(found))


def _steps(group: ChannelGroup, scores: FloatArray, round_to: int) -> list[tuple[float, int]]:
    """The widths that a group may take, widest first, each with the mean score of the channels that go last for it."""
    blocks = len(group.blocks)
    step = math.lcm(round_to, blocks)
    widths = [group.size, *range((group.size - 1) // step * step, 0, -step)]
    ranked = np.stack([np.sort(scores[list(block)]) for block in group.blocks]).sum(0)
    gone = np.concatenate([[0.0], np.cumsum(ranked)])
    found: list[tuple[float, int]] = []
    for before, width in pairwise(widths):
        part = gone[(group.size - width) // blocks] - gone[(group.size - before) // blocks]
        found.append((max(float(part) / (before - width), found[-1][0] if found else -math.inf), width))
    return found


def normalised(scores: Sequence[float] | FloatArray) -> FloatArray:
    """Divided by their mean, where it is not zero."""
    values = np.asarray(scores, dtype=np.float64)
    mean = float(np.abs(values).mean()) if values.size else 0.0
    return values / mean if mean else values
