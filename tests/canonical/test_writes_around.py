"""Writes that change nothing, that are given as `out=`, and that go to a diagonal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def moved(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    m.table = m.table.to(y.device)
    return m.b(y + m.table)  # type: ignore[no-any-return]


def moved_and_cast(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    m.table = m.table.to(y.device).to(y.dtype).contiguous()
    return m.b(y * m.table)  # type: ignore[no-any-return]


def out_of_no_grad(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    total = torch.empty_like(y)
    with torch.no_grad():
        torch.add(y, y.relu(), out=total)
    return m.b(y + total)  # type: ignore[no-any-return]


def halves(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    with torch.no_grad():
        first, second = y.chunk(2, -1)
        first.mul_(2)
        second.add_(first)
    return m.b(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("run", [moved, moved_and_cast, out_of_no_grad, halves])
def test_writes_that_a_graph_can_hold(run: Callable[[Any, Tensor], Tensor], tmp_path: Path) -> None:
    model = Net(run, a=nn.Linear(8, 12), b=nn.Linear(12, 3)).eval()
    model.register_buffer("table", torch.randn(12))
    compiled = gz.compile(model, gz.Plan([]), (torch.randn(4, 8),))
    for batch in (1, 4, 5):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(compiled.module(x), model(x))
    assert compiled.export(tmp_path / "net.onnx").verified


def test_a_model_that_gives_out_while_its_parameters_want_gradients(tmp_path: Path) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        total = torch.empty_like(y)
        torch.add(y, y.relu(), out=total)
        return m.b(y + total)  # type: ignore[no-any-return]

    model = Net(run, a=nn.Linear(8, 12), b=nn.Linear(12, 3)).eval()
    compiled = gz.compile(model, gz.Plan([]), (torch.randn(4, 8),))
    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled.module(x), model(x))
    assert compiled.export(tmp_path / "net.onnx").verified


DIAGONALS: dict[str, Callable[[Tensor], Any]] = {
    "of images": lambda y: y.diagonal(0, 2, 3).fill_(2),
    "above": lambda y: y.diagonal(2, 2, 3).mul_(3),
    "below": lambda y: y.diagonal(-1, 2, 3).add_(y[..., 0].mean()),
    "turned": lambda y: y.diagonal(1, 3, 2).relu_(),
    "of negative dimensions": lambda y: y.diagonal(dim1=-2, dim2=-1).zero_(),
}


@pytest.mark.parametrize("name", DIAGONALS)
def test_a_diagonal_is_written_and_exported(name: str, tmp_path: Path) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        DIAGONALS[name](y)
        return m.b(y)  # type: ignore[no-any-return]

    model = Net(run, a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 7)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=1.0)]), (x,))
    torch.testing.assert_close(compiled.module(x), model(x))
    assert gz.channel_groups(model, (x,))["a"].mergeable
    assert compiled.export(tmp_path / "net.onnx").verified


def test_memory_that_nothing_filled_is_made_once() -> None:
    model = Net(out_of_no_grad, a=nn.Linear(8, 12), b=nn.Linear(12, 3)).eval()
    compiled = gz.compile(model, gz.Plan([]), (torch.randn(4, 8),))
    assert sum("empty" in str(node.target) for node in compiled.traced.graph.nodes) <= 1
