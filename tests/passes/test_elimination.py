"""Greedy elimination: what it says of a channel is what least squares give, whatever went before."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor

from graphzip_passes.cluster_merge import greedy
from graphzip_passes.cluster_merge.greedy import Reader, rounds

pytestmark = pytest.mark.usefixtures("seeded")

CHANNELS, POSITIONS, OUTS = 7, 3, 5
DAMPING = 1e-2


def problem(rows: int = 60) -> tuple[Tensor, Tensor, np.ndarray]:
    """Weights, the covariance of what they read, and the columns of every channel; channel 2 is not read."""
    mixed = torch.randn(rows, CHANNELS * POSITIONS, dtype=torch.float64) @ torch.randn(21, 21, dtype=torch.float64)
    columns = np.arange(CHANNELS * POSITIONS).reshape(CHANNELS, POSITIONS)
    columns[2] = -1
    return torch.randn(OUTS, CHANNELS * POSITIONS, dtype=torch.float64), mixed.T.cov(correction=0), columns


def lost(weight: Tensor, covariance: Tensor, gone: list[int]) -> float:
    """What is lost where these columns are zero and the others are fitted anew."""
    damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    kept = [column for column in range(len(covariance)) if column not in gone]
    fitted = torch.zeros_like(weight)
    fitted[:, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T).T
    return float(((weight - fitted) @ damped * (weight - fitted)).sum())


@pytest.mark.parametrize("ragged", [False, True])
def test_costs_are_those_of_least_squares(ragged: bool) -> None:
    """Also where some channels are read at fewer columns than others, as by a grouped layer that reads them twice."""
    weight, covariance, columns = problem()
    if ragged:
        columns[5, 2] = columns[1, 1] = columns[1, 2] = -1
    reader, gone, before = Reader(weight, covariance, columns), [], 0.0
    read = [[column for column in row if column >= 0] for row in columns]
    left = [0, 1, 3, 4, 5, 6]
    for step in ([4], [0, 6], [1]):
        costs = reader.costs(torch.tensor(left))
        alone = [lost(weight, covariance, [*gone, *read[channel]]) - before for channel in left]
        torch.testing.assert_close(costs, torch.tensor(alone, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        reader.remove(torch.tensor(step))
        gone += [column for channel in step for column in read[channel]]
        left = [channel for channel in left if channel not in step]
        before = lost(weight, covariance, gone)


def test_a_channel_that_is_not_read_costs_nothing() -> None:
    weight, covariance, columns = problem()
    reader = Reader(weight, covariance, columns)
    assert reader.costs(torch.tensor([2])).tolist() == [0.0]
    before = reader.costs(torch.tensor([0, 1]))
    reader.remove(torch.tensor([2]))
    assert torch.equal(reader.costs(torch.tensor([0, 1])), before)


@pytest.mark.parametrize("scale", [0.0, -1e-17, 1e-30])
def test_a_layer_that_reads_constants(scale: float) -> None:
    """Its covariance is nothing but rounding, which need not be positive."""
    weight, _, columns = problem()
    noise = scale * torch.randn(21, 21, dtype=torch.float64)
    reader = Reader(weight, noise + noise.T, columns)
    reader.remove(torch.tensor([3, 5]))
    costs = reader.costs(torch.tensor([0, 1, 4, 6]))
    assert bool(costs.isfinite().all())
    assert bool((costs >= 0).all())


def wide_problem(channels: int = 40, *, readers: int = 2) -> list[tuple[Tensor, Tensor, np.ndarray]]:
    """Weights, covariances and columns of layers that read so many channels, at one place or at two."""
    found = []
    for width in range(1, 1 + readers):
        size = channels * width
        mixed = torch.randn(4 * size, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
        weight = torch.randn(OUTS, size, dtype=torch.float64)
        found.append((weight, mixed.T.cov(correction=0), np.arange(size).reshape(channels, width)))
    return found


def greedy_order(problems: list[tuple[Tensor, Tensor, np.ndarray]], blocks: list[range], count: int) -> list[int]:
    """One after the other, all costs computed anew by least squares, blocks by turns."""
    gone: list[int] = []
    while len(gone) < count:
        left = [[channel for channel in block if channel not in gone] for block in blocks]
        most = max(map(len, left))
        costs = {
            channel: sum(lost(w, c, columns[[*gone, channel]].ravel().tolist()) for w, c, columns in problems)
            for channel in chain(*(block for block in left if len(block) == most))
        }
        gone.append(min(costs, key=lambda channel: costs[channel]))
    return gone


@pytest.mark.parametrize("count", [1, 4])
def test_rounds_are_greedy(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are all channels here; the rest of the columns is written anew on the way."""
    monkeypatch.setattr(greedy, "_CANDIDATES", 40)
    problems = wide_problem()
    blocks = [range(start, start + 40 // count) for start in range(0, 40, 40 // count)]
    found = rounds(blocks, [Reader(*each) for each in problems], np.arange(40), stops=(35, 4))
    order = list(chain(*found))
    assert order[:32] == greedy_order(problems, blocks, 32)
    assert sorted(order) == list(range(40))


def test_few_candidates_lead_to_about_the_same() -> None:
    problems = wide_problem()
    order = list(chain(*rounds([range(40)], [Reader(*each) for each in problems], np.arange(40))))
    exact = greedy_order(problems, [range(40)], 20)
    losses = [
        sum(lost(w, c, columns[gone].ravel().tolist()) for w, c, columns in problems) for gone in (order[:20], exact)
    ]
    assert losses[0] <= 1.05 * losses[1]


def test_rounds_end_where_they_are_told_and_weights_are_as_least_squares_say() -> None:
    (problem_,) = wide_problem(readers=1)
    reader, gone, stops = Reader(*problem_), list[int](), {33, 9}
    weight, covariance, _ = problem_
    damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    for found in rounds([range(40)], [reader], np.arange(40), stops=tuple(stops)):
        gone += found
        left = [channel for channel in range(40) if channel not in gone]
        if len(left) in stops:
            stops.discard(len(left))
            wanted = torch.zeros_like(weight)
            wanted[:, left] = torch.linalg.solve(damped[left][:, left], damped[left] @ weight.T).T
            torch.testing.assert_close(weight + reader.change(), wanted, rtol=1e-8, atol=1e-8)
    assert not stops
    assert len(gone) == 40


def test_large_layers_are_computed_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, covariance, columns = problem()
    found = []
    for large in (1024, 0):
        monkeypatch.setattr(greedy, "_LARGE", large)
        reader = Reader(weight, covariance, columns)
        reader.remove(torch.tensor([4, 0]))
        found.append(reader.costs(torch.tensor([1, 3, 5, 6])))
    assert reader.inverse.dtype == torch.float32
    torch.testing.assert_close(*found, rtol=1e-4, atol=0.0)


def test_identical_channels_go_first_all_but_one() -> None:
    problems = wide_problem(12, readers=1)
    same = np.array([0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 8, 2])
    order = list(chain(*rounds([range(12)], [Reader(*each) for each in problems], same)))
    assert len({same[channel] for channel in order[3:]}) == 9
