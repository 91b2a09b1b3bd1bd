"""Channels that change their clusters, against the equations carried out one channel after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphzip_passes.cross_domain.shared_moments import Side, SideProducts, SideRows
from graphzip_passes.cross_domain.shared_moves import Regrouping


def one_after_the_other(
    gram: torch.Tensor, left: torch.Tensor, weights: torch.Tensor, number: np.ndarray, mass: torch.Tensor
) -> None:
    """The rule of `shared_fit` on channels 0 to n, `left` and `number` changed in place."""
    clusters, kernel, _ = weights.shape

    def best(channel: int) -> int:
        own = slice(channel * kernel, (channel + 1) * kernel)
        here, block = int(number[channel]), gram[own, own]
        held = [float(mass[number == cluster].sum()) for cluster in range(clusters)]
        ideal = weights[here] + torch.linalg.pinv(block, hermitian=True) @ left[own]
        costs = []
        for cluster in range(clusters):
            step, m = ideal - weights[cluster], float(mass[channel])
            factor = (
                held[here] / max(held[here] - m, 1e-3 * m) if cluster == here else held[cluster] / (held[cluster] + m)
            )
            costs.append(max(float((step * (block @ step)).sum()), 0.0) * factor)
        return int(np.argmin(costs))

    wanting = [channel for channel in range(len(number)) if best(channel) != number[channel]]
    for channel in wanting:
        here = number[channel]
        to = best(channel) if (number == here).sum() > 1 else here
        left -= gram[:, channel * kernel : (channel + 1) * kernel] @ (weights[to] - weights[here])
        number[channel] = to


@pytest.mark.parametrize("kept", ["products", "rows"])
@pytest.mark.parametrize(("channels", "kernel"), [(150, 1), (40, 3)])
def test_moves_in_parts_are_moves_one_after_the_other(channels: int, kernel: int, kept: str, seeded: None) -> None:
    clusters, outs = 9, 5
    x = torch.randn(400, channels * kernel, dtype=torch.float64)
    target = torch.randn(400, outs, dtype=torch.float64)
    weights = torch.randn(clusters, kernel, outs, dtype=torch.float64)
    number = torch.arange(channels).remainder(clusters).numpy()
    read = weights[number].flatten(0, 1)
    gram, left = x.T @ x, x.T @ (target - x @ read)
    mass = gram.diagonal().reshape(channels, kernel).sum(1)

    expected, missing = number.copy(), left.clone()
    one_after_the_other(gram, missing, weights, expected, mass)
    rest = target - x @ read
    side: Side = SideProducts(gram, left) if kept == "products" else SideRows(x, rest)
    assert torch.allclose(side.square(), gram.diagonal())
    moves = Regrouping(weights, number, mass, "layer")
    moves.go_through(side, range(channels))
    left = side.lacking(torch.arange(channels * kernel))

    assert moves.made == int((expected != torch.arange(channels).remainder(clusters).numpy()).sum()) > channels // 2
    assert np.array_equal(number, expected)
    assert torch.allclose(left, missing, rtol=1e-9, atol=1e-6)
    lost = [(target - x @ each).square().sum() for each in (read, weights[number].flatten(0, 1))]
    assert moves.gained == pytest.approx(float(lost[0] - lost[1]), rel=1e-9)
