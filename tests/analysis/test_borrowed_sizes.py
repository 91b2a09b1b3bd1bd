"""Values that take their size from a tensor that shrinks: what is summed over them counts every channel there was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from op_cases import param
from planting import assert_lossless, mergeable_share
from torch import Tensor, nn

Spread = Callable[[Any, Tensor, Tensor], Tensor]
"""From a column `g (B, 1)` and channels `y (B, 16)` to a value as wide as the channels."""


def assigned(m: Any, g: Tensor, y: Tensor) -> Tensor:
    whole = torch.zeros_like(y)
    whole[:] = g
    return whole


SPREADS: dict[str, Spread] = {
    "expand_as": lambda m, g, y: g.expand_as(y),
    "expand_as of more dimensions": lambda m, g, y: g.squeeze(1).mean().expand_as(y),
    "expand_as twice": lambda m, g, y: g.expand_as(g.expand_as(y)),
    "expand_as of a parameter": lambda m, g, y: m.one.expand_as(y),
    "expand_as like a parameter": lambda m, g, y: g * m.one.expand_as(m.first.bias),
    "expand_as of truths": lambda m, g, y: (g > 0).expand_as(y).to(y.dtype) + g,
    "copied": lambda m, g, y: torch.empty_like(y).copy_(g),
    "assigned": assigned,
    "filled": lambda m, g, y: torch.zeros_like(y).fill_(0.5) * g,
    "ones_like": lambda m, g, y: torch.ones_like(y) * g,
    "full_like": lambda m, g, y: torch.full_like(y, 1.5) * g,
    "where": lambda m, g, y: torch.where(y > 0, g, 0.25),
    "where of numbers": lambda m, g, y: torch.where(y > 0, 1.0, 0.5).to(y.dtype) * g,
    "masked_fill": lambda m, g, y: g.masked_fill(y > 0, 0.5),
    "expand": lambda m, g, y: g.expand(y.shape) * y.cos(),
    "broadcast_to": lambda m, g, y: torch.broadcast_to(g, y.shape) * y.cos(),
    "broadcast_tensors": lambda m, g, y: torch.broadcast_tensors(g, y)[0] + 0 * y,
    "repeated": lambda m, g, y: g.repeat(1, y.shape[1]) * y.cos(),
    "tiled": lambda m, g, y: g.tile(y.shape[1]) * y.cos(),
    "reshape_as": lambda m, g, y: g.expand(y.shape).reshape_as(y) * y.cos(),
}

SUMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sum": lambda m, e: e.sum(1, keepdim=True),
    "layer": lambda m, e: m.read(e),
    "softmax": lambda m, e: m.last(e.softmax(1) * e),
    "moments": lambda m, e: sum(torch.var_mean(e, 1, keepdim=True)) + e.norm(dim=1, keepdim=True),
}


def net(spread: Spread, total: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        return m.last(y) + total(m, spread(m, m.column(x), y))

    layers = {"first": nn.Linear(5, 16), "last": nn.Linear(16, 3), "read": nn.Linear(16, 3)}
    return Net(run, column=nn.Linear(5, 1), one=param(1), **layers)


def unused(name: str) -> bool:
    return name.split(".")[0] in ("one", "read", "column")


@pytest.mark.parametrize("name", SPREADS)
@pytest.mark.usefixtures("seeded")
def test_a_borrowed_width_is_counted(name: str) -> None:
    total = SUMS[list(SUMS)[list(SPREADS).index(name) % len(SUMS)]]
    for each in {SUMS["sum"], total}:
        found = assert_lossless(net(SPREADS[name], each), (torch.randn(4, 5),), unused=unused, trains=each is total)
        assert found.merged > 0
        assert mergeable_share(found.groups) == 1.0, str(found.groups)


HEADS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "all heads": lambda m, g, y: g[..., None].expand_as(y),
    "a number per head": lambda m, g, y: m.heads(g)[..., None].expand_as(y),
    "a number per channel of a head": lambda m, g, y: m.heads(g)[:, None].expand_as(y),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.usefixtures("seeded")
def test_heads(name: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.first(x).view(-1, 4, 4)
        return m.last(y.flatten(1)) + HEADS[name](m, m.column(x), y).sum((1, 2)).unsqueeze(1)

    layers = {"first": nn.Linear(5, 16), "heads": nn.Linear(1, 4), "last": nn.Linear(16, 3)}
    model = Net(run, column=nn.Linear(5, 1), **layers)
    for whole in (0.0, 1.0):
        found = assert_lossless(
            model, (torch.randn(4, 5),), unused=lambda key: key.startswith("heads."), trains=False, whole=whole
        )
        assert found.merged > 0


FIXED: dict[str, Spread] = {
    "a fixed value": lambda m, g, y: m.sixteen.expand_as(y) * g,
    "an image of the input": lambda m, g, y: torch.zeros_like(y) + m.sixteen * g,
    "a product": lambda m, g, y: (1 + 0.1 * g).expand_as(y).prod(1, keepdim=True),
    "a running sum": lambda m, g, y: g.expand_as(y).cumsum(1)[:, -1:],
    "numbered": lambda m, g, y: torch.arange(y.shape[1], dtype=y.dtype) * g,
}


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.usefixtures("seeded")
def test_what_depends_on_the_number_of_channels_otherwise(name: str) -> None:
    model = net(FIXED[name], SUMS["sum"])
    model.register_buffer("sixteen", torch.linspace(0, 1, 16))
    assert_lossless(model, (torch.randn(4, 5),), unused=unused, trains=False)


def cosine(m: Any, x: Tensor) -> Tensor:
    y = m.wide(x)
    return F.cosine_similarity(y, m.narrow(x), dim=1)[:, None] + F.cosine_similarity(y[:, None], m.keys, -1)


@pytest.mark.usefixtures("seeded")
def test_cosine_similarity_with_one_column() -> None:
    model = Net(cosine, wide=nn.Linear(5, 16), narrow=nn.Linear(5, 1), keys=param(3, 16))
    found = assert_lossless(model, (torch.randn(4, 5),), trains=True)
    assert found.merged > 0
