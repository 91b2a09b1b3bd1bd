"""Atoms first, or the kernel built: the same function, and the faster one is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factor_cases import IMAGE, KINDS, prepared, small, summary
from planting import relative
from torch import nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize(
    "options", [{}, {"share": None}, {"group_size": 4}, {"group_size": 8}, {"group_size": 4, "share": None}]
)
def test_atoms_first_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = small().double().eval(), torch.randn(3, 4, 9, 9, dtype=torch.float64)
    inputs = (IMAGE[0].double(),)
    built = prepared(model, inputs, atoms=3, **options).convert()
    first = prepared(model, inputs, atoms=3, lower="atoms_first", **options).convert()
    with torch.no_grad():
        assert relative(built.module(x), first.module(x)) < 1e-12
    assert summary(first)["atoms_first"] == ["1.0", "2.0", "3.0"]
    assert summary(built)["atoms_first"] == []
    assert first.report.after.params == built.report.after.params
    first.save(tmp_path / "model.graphzip")
    with torch.no_grad():
        assert torch.equal(gz.load(tmp_path / "model.graphzip").module(x), first.module(x))


@pytest.mark.parametrize(("conv", "shape"), KINDS, ids=lambda value: repr(value)[:40])
def test_atoms_first_of_every_kind(conv: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model = nn.Sequential(conv, nn.ReLU()).eval()
    compiled = prepared(model, (x,), share=None, atoms=32, include=["0"], lower="atoms_first").convert()
    with torch.no_grad():
        assert relative(model(x), compiled.module(x)) < 1e-4


def test_atoms_first_saves_macs_and_stays_slim(tmp_path: Path) -> None:
    compiled = prepared(small(), atoms=3, lower="atoms_first").convert()
    layer = 81 * (8 * 3 * 9 + 8 * 8 * 3)  # 1.0 on 9 x 9
    others = 25 * (8 * 3 * 9 + 16 * 8 * 3) + 25 * (16 * 3 * 9 + 16 * 16 * 3)
    assert compiled.report.after.macs == 81 * 8 * 4 * 9 + layer + others + 400 * 5
    report = compiled.export(tmp_path / "model.onnx")
    assert report.verified
    assert report.bytes < 4 * compiled.report.after.params + 15_000


def test_atoms_drop_in_the_training_of_what_runs_atoms_first() -> None:
    module = prepared(small(), atom_drop=0.5, lower="atoms_first").convert().module
    x = torch.randn(3, 4, 9, 9)
    with torch.no_grad():
        assert torch.equal(module.eval()(x), module(x))
        for inner in module.modules():
            inner.training = isinstance(inner, nn.Dropout1d)
        assert not torch.equal(module(x), module(x))
    module.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_auto_measures_both_and_keeps_the_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    found = summary(prepared(small(), lower="auto", group_size=4, share="block").convert())
    assert list(found["milliseconds"]) == ["1.0", "2.0", "3.0"]
    for name, (built, first) in found["milliseconds"].items():
        assert built > 0
        assert first > 0
        assert (name in found["atoms_first"]) == (first < built)
    cases = []

    def pretend(case: Any) -> tuple[float, float]:
        cases.append(case)
        return (1.0, 2.0) if case.kernel[0] == 8 else (2.0, 1.0)

    monkeypatch.setattr("graphzip_passes.factorize.atom_factorize.milliseconds", pretend)
    assert summary(prepared(small(), lower="auto").convert())["atoms_first"] == ["2.0", "3.0"]
    assert [case.image for case in cases] == [(2, 8, 9, 9), (2, 8, 9, 9), (2, 16, 5, 5)]
    assert [case.strides for case in cases] == [(1, 1), (2, 2), (1, 1)]
