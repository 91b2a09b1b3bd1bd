"""Sums over calibration data, in whatever order and process they are taken."""

from __future__ import annotations

import pytest
import torch

from graphzip.numeric.moments import SteadySum, mean_products
from graphzip.process_groups import ALONE


def divided(parts: list[torch.Tensor], bound: float, processes: int) -> torch.Tensor:
    """The sum where process r has the parts r, r + processes, ... and a ring adds what they have."""
    own = []
    for rank in range(processes):
        sums = SteadySum(bound, *parts[0].shape)
        for part in parts[rank::processes]:
            sums.add(part)
        own.append(sums)
    first = own[0]
    for other in own[1:]:
        first._parts += other._parts
    return first.total(ALONE)


@pytest.mark.parametrize("size", [1e-200, 1e-3, 1.0, 7e5, 1e200])
def test_a_steady_sum_has_the_same_bits_in_every_order(size: float) -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [size * torch.randn(40, 40, dtype=torch.float64, generator=draw) for _ in range(60)]
    bound = float(torch.stack(parts).abs().sum(0).max())
    found = [divided(parts, bound, processes) for processes in (1, 2, 4, 7)]
    found += [divided([parts[place] for place in torch.randperm(60, generator=draw)], bound, 1) for _ in range(3)]
    assert all(torch.equal(each, found[0]) for each in found)
    plain = [torch.stack(order).sum(0) for order in (parts, parts[::-1])]
    assert not torch.equal(*plain), "a plain sum has other bits"
    torch.testing.assert_close(found[0], plain[0], rtol=0.0, atol=1e-14 * bound)


def test_a_steady_sum_of_nothing_is_zero() -> None:
    found = SteadySum(0.0, 3)
    found.add(torch.zeros(3))
    assert not found.total(ALONE).any()


def test_mean_products_are_those_of_all_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, 5, dtype=torch.float64, generator=draw) for count in (7, 0, 3)]
    whole = torch.cat(rows)
    torch.testing.assert_close(mean_products(rows, 5, ALONE), whole.T @ whole / 10, rtol=1e-14, atol=1e-15)
    assert not mean_products([rows[1]], 5, ALONE).any()
