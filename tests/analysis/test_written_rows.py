"""Rows, positions and channels that are written in place by an index or a mask: right at every batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Net
from op_cases import param
from planting import assert_lossless
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("seeded")

ROWS = torch.tensor([0, 2])

Write = Callable[[Any, Tensor, Tensor], Tensor]
"""Layers, and two activations `(batch, 6, 8)`: what is written to, and what is written; what is read afterwards."""


def fresh(y: Tensor) -> Tensor:
    return torch.zeros(y.shape[0], 6, 8, dtype=y.dtype)


def assigned(y: Tensor, place: Any, value: Any) -> Tensor:
    y[place] = value
    return y


def some(y: Tensor) -> Tensor:
    """A mask of rows and positions that channels do not decide one by one."""
    return y.sum(-1) > 0


def order(y: Tensor) -> Tensor:
    """An index of positions that is the same for all channels."""
    return y.sum(-1, keepdim=True).argsort(1).expand(-1, -1, 8)


def tripled(y: Tensor) -> Tensor:
    y[some(y)].mul_(3)  # a copy, which nobody reads
    y[:, 1].index_add_(0, torch.arange(y.shape[0]), y[:, 3])
    return y


ROW_BY_ROW: dict[str, Write] = {
    "a number by a mask": lambda m, y, z: assigned(y, some(z), 0.5),
    "a parameter by a mask": lambda m, y, z: assigned(y, some(z), m.v),
    "rows by a mask": lambda m, y, z: assigned(y, some(z), z[some(z)]),
    "a row by a mask over the batch": lambda m, y, z: assigned(y, z.sum((1, 2)) > 0, z[0]),
    "numbers by their own mask": lambda m, y, z: assigned(y, y > 0, 0.25),
    "rows by a mask into zeros": lambda m, y, z: assigned(fresh(y), some(z), y[some(z)]) + z,
    "rows by a mask into new zeros": lambda m, y, z: assigned(y.new_zeros(y.shape), some(z), y[some(z)]) + z,
    "a position": lambda m, y, z: assigned(y, (slice(None), 2), z[:, 0]),
    "positions by an index": lambda m, y, z: assigned(y, (slice(None), ROWS), y[:, ROWS] + z[:, :2]),
    "index_put_": lambda m, y, z: y.index_put_((torch.arange(y.shape[0])[:, None], ROWS), z[:, :2]),
    "index_put_ of sums": lambda m, y, z: y.index_put_((torch.zeros_like(ROWS),), z[:1].mean(1), accumulate=True),
    "index_copy_": lambda m, y, z: y.index_copy_(1, ROWS, z[:, :2]),
    "index_copy_ into zeros": lambda m, y, z: fresh(y).index_copy_(1, ROWS, z[:, :2]) + y,
    "index_copy_ into zeros like it": lambda m, y, z: torch.zeros_like(y).index_copy_(1, ROWS, z[:, :2]),
    "index_add_": lambda m, y, z: y.index_add_(1, ROWS, z[:, :2], alpha=2),
    "index_add_ into zeros": lambda m, y, z: torch.zeros(6, 8, dtype=y.dtype).index_add_(
        0, torch.arange(y.shape[0]) % 3, z[:, 0]
    ),
    "index_fill_": lambda m, y, z: y.index_fill_(1, ROWS, 0.3),
    "masked_fill_": lambda m, y, z: y.masked_fill_(some(z)[..., None], 0.5),
    "masked_scatter_": lambda m, y, z: y.masked_scatter_(some(z)[..., None].expand(-1, -1, 8), z),
    "scatter_": lambda m, y, z: y.scatter_(1, order(y), z),
    "scatter_ into zeros": lambda m, y, z: fresh(y).scatter_(1, order(z), z) + y,
    "scatter_ a number": lambda m, y, z: y.scatter_(1, order(z)[:, :2], 0.5),
    "scatter_add_ into zeros": lambda m, y, z: fresh(y).scatter_add_(1, order(z) % 3, z) + y,
    "scatter_reduce_ into zeros": lambda m, y, z: (
        y + fresh(y).scatter_reduce_(1, order(z) % 3, z, "mean", include_self=False)
    ),
    "a copy that is lost, and a view": lambda m, y, z: tripled(y) + z,
    "a copy of a parameter by a mask": lambda m, y, z: y * assigned(m.t.clone(), torch.arange(6) % 2 == 0, m.v),
    "a copy of a parameter by an index": lambda m, y, z: y * m.t.clone().index_copy_(0, ROWS, m.t[3:5] * 2),
}

CHANNEL_BY_CHANNEL: dict[str, Write] = {
    "a number by a mask of channels": lambda m, y, z: assigned(y, (slice(None), slice(None), m.v > 0), 0.25),
    "index_fill_": lambda m, y, z: y.index_fill_(2, ROWS, 0.3),
    "index_add_": lambda m, y, z: y.index_add_(2, ROWS, z[..., :2]),
    "index_copy_": lambda m, y, z: y.index_copy_(2, ROWS, z[..., :2]),
    "scatter_": lambda m, y, z: y.scatter_(2, z.argsort(2)[..., :3], z[..., :3]),
    "masked_scatter_": lambda m, y, z: y.masked_scatter_(y > 0, z),
    "put_": lambda m, y, z: y.put_(torch.tensor([1, 9]), y.new_tensor([0.1, 0.2])),
}


def network(write: Write) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.last(write(m, m.first(x), m.second(x)))
        return result

    parts = {"first": nn.Linear(5, 8), "second": nn.Linear(5, 8), "last": nn.Linear(8, 3)}
    return Net(run, **parts, t=param(6, 8), v=param(8))


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_channels_that_are_written_alike_are_merged(name: str) -> None:
    found = assert_lossless(network(ROW_BY_ROW[name]), (torch.randn(4, 6, 5),), trains=False, unused=lambda name: True)
    assert found.clusters


@pytest.mark.parametrize("name", CHANNEL_BY_CHANNEL)
def test_channels_that_are_written_one_by_one_stay(name: str) -> None:
    found = assert_lossless(
        network(CHANNEL_BY_CHANNEL[name]), (torch.randn(4, 6, 5),), trains=False, unused=lambda name: True
    )
    assert not found.groups["first"].mergeable
