"""Tensors that are written part by part tie no channels to what is written over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net
from planting import assert_lossless
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def whole(m: Any, x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], 14)
    out[:, :8] = m.a(x)
    out[:, 8:] = m.b(x)
    return m.c(out.tanh())  # type: ignore[no-any-return]


def over(m: Any, x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], 8)
    out[:, :] = m.a(x).tanh()
    out[:, 2:8] = m.b(x)
    return m.d(out)  # type: ignore[no-any-return]


def beside_zeros(m: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], 14)
    out[:, 3:-3] = m.a(x)
    return m.c(out.tanh())  # type: ignore[no-any-return]


def over_a_layer(m: Any, x: Tensor) -> Tensor:
    out = m.a(x) * 2
    out[:, :6] = m.b(x)
    out[:, 6:] = m.e(x)
    return m.d(out.tanh())  # type: ignore[no-any-return]


def read_between(m: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], 8)
    out[:, :6] = m.b(x)
    sums = out.sum(0)
    out[:, 6:] = m.e(x)
    return m.d(out) + m.d(sums)  # type: ignore[no-any-return]


def latent_heads(m: Any, x: Tensor) -> Tensor:
    """Keys as multi-head latent attention writes them: parts of each head, and one part that all heads share."""
    keys, shared = m.a(x).view(-1, 2, 4), m.b(x)[:, None].expand(-1, 2, -1)
    out = keys.new_empty(*keys.shape[:-1], 10)
    out[..., :4].copy_(keys)
    out[..., 4:].copy_(shared)
    return m.f(out.relu().flatten(1))  # type: ignore[no-any-return]


def net(run: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    sizes = {"a": (5, 8), "b": (5, 6), "c": (14, 3), "d": (8, 3), "e": (5, 2), "f": (20, 3)}
    return Net(run, **{name: nn.Linear(*size) for name, size in sizes.items()}).eval()


@pytest.mark.parametrize("run", [whole, over, beside_zeros, over_a_layer, read_between, latent_heads])
def test_lossless(run: Callable[[Any, Tensor], Tensor]) -> None:
    used = {"whole": "abc", "over": "abd", "beside_zeros": "ac", "over_a_layer": "bed", "read_between": "bed"}
    found = assert_lossless(
        net(run), (torch.randn(4, 5),), unused=lambda key: key[0] not in used.get(run.__name__, "abf")
    )
    assert found.merged >= 3


@pytest.mark.parametrize(("run", "free"), [(whole, {8, 6}), (beside_zeros, {8}), (over_a_layer, {6, 2})])
def test_layers_shrink_alone(run: Callable[[Any, Tensor], Tensor], free: set[int]) -> None:
    groups = gz.channel_groups(net(run), (torch.randn(4, 5),))
    assert {group.size for group in groups if group.mergeable} >= free


def test_what_is_written_over_is_not_needed() -> None:
    compiled = gz.compile(net(over_a_layer), gz.Plan([]), (torch.randn(4, 5),))
    assert not any(name.startswith("a.") for name in compiled.module.state_dict())
    assert not any("scatter" in str(node.target) for node in compiled.module.graph.nodes)


def every_second(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 12)
    out[:, ::2] = m.b(x)
    return out


def rounded(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 8, dtype=torch.bfloat16)
    out[:, :6] = m.b(x)
    out[:, 6:] = m.e(x)
    return out.float()


def places_of_the_batch(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(2 * x.shape[0], 6)
    out[: x.shape[0]] = m.b(x)
    out[x.shape[0] :] = m.b(2 * x)
    return out


@pytest.mark.parametrize("run", [every_second, rounded, places_of_the_batch])
def test_what_else_is_written_by_part(run: Callable[[Any, Tensor], Tensor], tmp_path: Path) -> None:
    model = net(run)
    compiled = gz.compile(model, gz.Plan([]), (torch.randn(4, 5),))
    for batch in (1, 4, 7):
        x = torch.randn(batch, 5)
        torch.testing.assert_close(compiled.module(x), model(x))
    assert compiled.export(tmp_path / "net.onnx").verified
