"""Differences and updates of zipping against the paper's formulas, pairings against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from graphzip.numeric.moments import ChannelMoments, CrossMoments, Moments
from graphzip_passes.zip.solve import BLOCK, Solver, pair

RIDGE = 0.01


def rows(count: int, inputs: int, seed: int) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x: torch.Tensor) -> Moments:
    made = Moments(x.shape[1])
    for piece in x.split(7):
        made.add(piece)
    return made


def hessian(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Eq. 7 and 8, damped by the mean of the diagonal."""
    found = scale * x.T @ x / len(x)
    return found + RIDGE * found.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("samples", [(40, 50), (3, 4), (3, 50)])
def test_difference_and_update(samples: tuple[int, int]) -> None:
    """Eq. 10 to 12; with fewer samples than inputs by Woodbury's identity, or one side of each kind."""
    xa, xb = rows(samples[0], 12, 0), rows(samples[1], 12, 1)
    a, b = rows(5, 12, 2), rows(6, 12, 3)
    ha, hb = hessian(xa, 0.3), hessian(xb, 0.7)
    solver = Solver(([moments(xa)], moments(xb)), ([0.3], 0.7), damping=RIDGE)
    middle = torch.linalg.inv(torch.linalg.inv(ha) + torch.linalg.inv(hb))
    apart = a.unsqueeze(1) - b
    expected = 0.5 * torch.einsum("ijp,pq,ijq->ij", apart, middle, apart)
    np.testing.assert_allclose(solver.difference(a, b), expected.numpy(), rtol=1e-8)
    joint = a + (torch.linalg.inv(ha) @ middle @ (b[:5] - a).T).T
    torch.testing.assert_close(solver.update(a, b[:5], torch.zeros_like(a)), joint, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solver.update(a, a, torch.zeros_like(a)), a, rtol=0, atol=0)


def test_what_is_missed_is_made_up_for() -> None:
    """With the cross moments of what is missed, the joint weights are the least squares fit."""
    x, weight = rows(200, 6, 0), rows(3, 6, 1)
    wanted = x @ rows(6, 3, 2)
    missed = (wanted - x @ weight.T).T @ x / len(x)
    solver = Solver(([moments(x)], moments(x)), ([0.5], 0.5), damping=1e-12)
    fitted = torch.linalg.lstsq(x, wanted).solution.T
    torch.testing.assert_close(solver.update(weight, weight, missed), fitted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("samples", [2, 40])
def test_cross_moments(samples: int) -> None:
    """The same whether the samples or their product is kept."""
    y, x = rows(samples, 6, 0), rows(samples, 5, 1)
    made = CrossMoments(6, 5)
    for part in zip(y.split(7), x.split(7), strict=True):
        made.add(*part)
    assert (made.samples is None) == (samples == 40)
    chosen, columns, order = np.array([4, 0]), np.array([1, 3, 2]), np.array([5, 4, 3, 2, 1, 0])
    expected = y.T @ x / samples
    torch.testing.assert_close(made.among(chosen, columns), expected[chosen][:, columns])
    torch.testing.assert_close(made.reordered(order).among(chosen, columns), expected[[1, 5]][:, columns])


def test_more_rows_than_are_worked_on_at_once() -> None:
    x, a, b = rows(9, 4, 0), rows(BLOCK + 3, 4, 1), rows(BLOCK + 5, 4, 2)
    solver = Solver(([moments(x)], moments(x)), ([0.5], 0.5), damping=RIDGE)
    whole = hessian(x, 0.5) / 2.0
    apart = a.unsqueeze(1) - b
    expected = 0.5 * ((apart @ whole) * apart).sum(2)
    np.testing.assert_allclose(solver.difference(a, b), expected.numpy(), rtol=1e-8, atol=1e-12)


def test_euclidean() -> None:
    a, b = rows(4, 5, 0), rows(4, 5, 1)
    solver = Solver(None, ([0.25], 0.75), damping=0.0)
    torch.testing.assert_close(solver.update(a, b, torch.zeros_like(a)), 0.25 * a + 0.75 * b)
    expected = 0.5 * 0.25 * 0.75 * (a.unsqueeze(1) - b).square().sum(2)
    np.testing.assert_allclose(solver.difference(a, b), expected.numpy(), rtol=1e-9)


@pytest.mark.parametrize("samples", [5, 60])
def test_moments(samples: int) -> None:
    x, weight = rows(samples, 12, 0), rows(4, 12, 1)
    made = moments(x)
    torch.testing.assert_close(made.dense(), x.T @ x / samples)
    out = x @ weight.T
    spread = made.spread(weight)
    torch.testing.assert_close((spread.mean, spread.var), (out.mean(0), out.var(0, correction=0)))
    columns, places = np.array([3, 1, 7]), np.array([4, 0, 2])
    wider = torch.zeros(samples, 5, dtype=torch.float64)
    wider[:, places] = x[:, columns]
    torch.testing.assert_close(made.among(columns, places, 5).dense(), wider.T @ wider / samples)


def test_moments_of_channels() -> None:
    x, weight = rows(30, 8, 0).reshape(30, 2, 4), rows(2, 4, 1)
    made = ChannelMoments(2, 4)
    made.add(x[:11])
    made.add(x[11:])
    out = (x * weight).sum(2)
    spread = made.spread(weight)
    torch.testing.assert_close((spread.mean, spread.var), (out.mean(0), out.var(0, correction=0)))
    assert made.hessian(0.5, 0.1).shape == (2, 4, 4)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_optimal_pairs(count: int) -> None:
    cost = np.random.default_rng(0).random((4, 5))
    one, two = pair(cost, count, "optimal")
    sums = [
        sum(cost[row, column] for row, column in zip(chosen, columns, strict=True))
        for chosen in itertools.combinations(range(4), count)
        for columns in itertools.permutations(range(5), count)
    ]
    assert len(set(one.tolist())) == len(set(two.tolist())) == count
    assert cost[one, two].sum() == pytest.approx(min(sums))


def test_greedy_pairs() -> None:
    cost = np.random.default_rng(1).random((6, 5))
    found, left = [], cost.copy()
    for _ in range(4):
        row, column = np.unravel_index(left.argmin(), left.shape)
        found.append((int(row), int(column)))
        left[row], left[:, column] = np.inf, np.inf
    one, two = pair(cost, 4, "greedy")
    assert sorted(found) == list(zip(one.tolist(), two.tolist(), strict=True))


def test_an_ill_conditioned_hessian_is_damped_more(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(50, 4, dtype=torch.float64) * 1e8
    solver = Solver(([moments(x)], moments(x)), ([0.5], 0.5), damping=1e-30)
    with caplog.at_level("WARNING"):
        found = solver.update(rows(2, 4, 0), rows(2, 4, 0), torch.zeros(2, 4, dtype=torch.float64))
    assert bool(found.isfinite().all())
    assert "ill-conditioned Hessian" in caplog.text
