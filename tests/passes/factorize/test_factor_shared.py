"""Kernels that several layers have in common: they are stored as factors once, in one network and in zipped ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planting import relative
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")

ATOMS = gz.AtomFactorize(share=None, atoms=9, force=True)
SLICES = gz.SliceGenerate(slice=(8, 8, 3, 3), code=16, force=True)
GROUPED = gz.AtomFactorize(share="layer", atoms=4, group_size=4, force=True)
FIRST = gz.AtomFactorize(share=None, atoms=9, lower="atoms_first", force=True)


class Tied(nn.Module):
    """Two layers with one kernel, and with biases and strides of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, 2, 1)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(self.stem(x)).relu())
        return out


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("options", [ATOMS, SLICES, FIRST], ids=["atoms", "slices", "atoms first"])
def test_tied_layers_share_their_factors(options: Any, tmp_path: Path) -> None:
    model, x = Tied().eval(), torch.randn(2, 4, 9, 9)
    compiled = gz.compile(model, gz.Plan([options]), (x,))
    with torch.no_grad():
        assert relative(model(x), compiled.module(x)) < 1e-5
    stored = 9 * 9 + 9 * 64 if isinstance(options, gz.AtomFactorize) else 16 * (1 + 8 * 8 * 9)
    kernel_and_biases = [p.numel() for name, p in compiled.module.named_parameters() if "stem" not in name]
    assert sum(kernel_and_biases) == stored + 2 * 8
    assert compiled.export(tmp_path / "tied.onnx").verified


@pytest.mark.parametrize("options", [ATOMS, SLICES], ids=["atoms", "slices"])
def test_tied_layers_stay_tied_while_they_train(options: Any) -> None:
    prepared = gz.prepare(Tied(), gz.Plan([options]), (torch.zeros(2, 4, 9, 9),))
    leaf = "atoms" if isinstance(options, gz.AtomFactorize) else "codes"
    assert getattr(prepared.model.one, leaf) is getattr(prepared.model.two, leaf)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    prepared.train()
    prepared(torch.randn(2, 4, 9, 9)).square().mean().backward()
    optimizer.step()
    x = torch.randn(2, 4, 9, 9)
    trained = prepared.eval()(x).detach()
    assert relative(trained, prepared.convert().module.eval()(x)) < 1e-5


def test_shared_biases_stay_shared_where_filters_are_grouped() -> None:
    model = Tied()
    model.two.bias = model.one.bias
    module = gz.prepare(model, gz.Plan([GROUPED]), (torch.zeros(2, 4, 9, 9),)).model
    assert module.one.bias is module.two.bias
    assert torch.equal(module.one.bias, model.one.bias.reshape(4, 2).t().reshape(-1))


@pytest.mark.parametrize("options", [ATOMS, SLICES], ids=["atoms", "slices"])
def test_merge_zip_and_factorize_in_one_plan(options: Any, tmp_path: Path) -> None:
    models, x = {"a": network(0), "b": network(1)}, torch.randn(4, 3, 8, 8)
    data = {name: [torch.randn(8, 3, 8, 8) for _ in range(2)] for name in models}
    examples = dict.fromkeys(models, (x,))
    both = [gz.ClusterMerge(keep=0.5), gz.Zip()]
    zipped = gz.compile(models, gz.Plan(both), examples, calibration=data)
    compiled = gz.compile(models, gz.Plan([*both, options]), examples, calibration=data)
    a, b = compiled.task("a"), compiled.task("b")
    with torch.no_grad():
        for name in models:
            assert relative(zipped.task(name)(x), compiled.task(name)(x)) < 1e-4
    factors = [name for name, _ in a.named_parameters() if name.rpartition(".")[2] in {"atoms", "codes"}]
    assert len(factors) == 2
    assert all(dict(a.named_parameters())[name] is dict(b.named_parameters())[name] for name in factors)
    assert compiled.export(tmp_path / "joint.onnx").verified
    compiled.export(tmp_path / "apart", per_task=True)
    assert (tmp_path / "apart" / "weights.data").exists()
    compiled.save(tmp_path / "zipped.graphzip")
    again = gz.load(tmp_path / "zipped.graphzip")
    with torch.no_grad():
        assert torch.equal(again.task("b")(x), compiled.task("b")(x))
