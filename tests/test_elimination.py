"""Greedy elimination: what it says of a channel is what least squares give, whatever went before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from graphzip_passes.elimination import _Reader

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


def test_costs_are_those_of_least_squares() -> None:
    weight, covariance, columns = problem()
    reader, gone, before = _Reader(weight, covariance, columns), [], 0.0
    left = [0, 1, 3, 4, 5, 6]
    for step in ([4], [0, 6], [1]):
        costs = reader.costs(torch.tensor(left))
        alone = [lost(weight, covariance, [*gone, *columns[channel]]) - before for channel in left]
        torch.testing.assert_close(costs, torch.tensor(alone, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        reader.remove(torch.tensor(step))
        gone += [column for channel in step for column in columns[channel]]
        left = [channel for channel in left if channel not in step]
        before = lost(weight, covariance, gone)


def test_a_channel_that_is_not_read_costs_nothing() -> None:
    weight, covariance, columns = problem()
    reader = _Reader(weight, covariance, columns)
    assert reader.costs(torch.tensor([2])).tolist() == [0.0]
    before = reader.costs(torch.tensor([0, 1]))
    reader.remove(torch.tensor([2]))
    assert torch.equal(reader.costs(torch.tensor([0, 1])), before)


@pytest.mark.parametrize("scale", [0.0, -1e-17, 1e-30])
def test_a_layer_that_reads_constants(scale: float) -> None:
    """Its covariance is nothing but rounding, which need not be positive."""
    weight, _, columns = problem()
    noise = scale * torch.randn(21, 21, dtype=torch.float64)
    reader = _Reader(weight, noise + noise.T, columns)
    reader.remove(torch.tensor([3, 5]))
    costs = reader.costs(torch.tensor([0, 1, 4, 6]))
    assert bool(costs.isfinite().all())
    assert bool((costs >= 0).all())
