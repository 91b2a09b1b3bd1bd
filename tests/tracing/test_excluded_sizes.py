"""Sizes that only torch's own reasoning excludes are taken where the graph is the model, and else refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor, nn
from torch.export import Dim

import graphzip as gz
from graphzip.tracing.trace import trace

pytestmark = pytest.mark.usefixtures("seeded")

AUTO = Dim.AUTO


def net(run: Callable[..., Tensor]) -> nn.Module:
    return Net(run, a=nn.Linear(8, 12), b=nn.Linear(12, 4)).double().eval()


def outcomes(model: nn.Module, example: Sequence[int], shapes: Sequence[Sequence[int]], **options: Any) -> list[str]:
    """For every shape: `same`, `refused`, or `fails` where the model itself does."""
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=1.0)]), (torch.randn(*example).double(),), **options)
    found = []
    for shape in shapes:
        x = torch.randn(*shape).double()
        try:
            wanted = model(x)
        except RuntimeError:
            found.append("fails")
            continue
        try:
            torch.testing.assert_close(compiled.module(x), wanted, rtol=1e-10, atol=1e-10)
            found.append("same")
        except gz.InputShapeError:
            found.append("refused")
    return found


RIGHT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "two halves": lambda m, x: torch.mul(*m.b(m.a(x)).view(2, -1, 4).unbind(0)),
    "two halves, taken apart": lambda m, x: m.b(m.a(x)).unflatten(0, (2, -1))[0],
    "pairs": lambda m, x: m.b(m.a(x)).view(-1, 2, 4).sum(1),
    "pairs, turned": lambda m, x: m.b(m.a(x).view(-1, 2, 12).mT.contiguous().mT).flatten(0, 1),
    "fours": lambda m, x: m.b(m.a(x)).view(-1, 2, 2, 4).transpose(1, 2).reshape(-1, 4),
}


@pytest.mark.parametrize("name", RIGHT)
def test_sizes_that_the_model_takes_are_taken(name: str) -> None:
    found = outcomes(net(RIGHT[name]), (8, 8), [(batch, 8) for batch in (1, 2, 3, 4, 6, 8, 12)])
    assert "refused" not in found
    assert found.count("same") >= 3


def test_a_path_of_the_model_stays_excluded() -> None:
    model = net(lambda m, x: m.b(m.a(x) * 2 if x.shape[0] > 2 else m.a(x)))
    assert outcomes(model, (5, 8), [(batch, 8) for batch in (1, 2, 3, 4)]) == ["refused", "refused", "same", "same"]


def test_a_path_without_consequence_excludes_nothing() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        if x.shape[0] < 3:
            x = x.view(x.shape)
        return m.b(m.a(x))  # type: ignore[no-any-return]

    def checked(m: Any, x: Tensor) -> Tensor:
        count = 2 if x.shape[0] != 3 else 1
        return m.b(m.a(x)) * (count if x.shape[0] == 3 else 1)  # type: ignore[no-any-return]

    assert trace(net(checked), (torch.randn(5, 8).double(),)).conditions == ()
    assert set(outcomes(net(run), (5, 8), [(batch, 8) for batch in (1, 2, 3)])) <= {"same", "refused"}


def test_memory_that_is_shared_at_one_size_only() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = y.view(2, -1, 12).transpose(0, 1).reshape(-1, 12)
        z.mul_(2)
        return m.b(y + z)  # type: ignore[no-any-return]

    found = outcomes(net(run), (8, 8), [(batch, 8) for batch in (2, 4, 6)])
    assert found[1:] == ["same", "same"]
    assert found[0] in ("same", "refused")


def test_images_of_other_sizes(tmp_path: Path) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.first(x).relu()
        b, c, h, w = y.shape
        y = y.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)
        return m.last(y)  # type: ignore[no-any-return]

    model = Net(run, first=nn.Conv2d(3, 6, 3, padding=1), last=nn.Conv2d(24, 2, 1)).double().eval()
    dynamic = (({0: AUTO, 2: AUTO, 3: AUTO},),)
    shapes = [(n, 3, h, w) for n in (1, 3) for h in (2, 4, 8) for w in (2, 6)]
    found = outcomes(model, (2, 3, 8, 12), shapes, dynamic_shapes=dynamic)
    assert set(found) == {"same"}
