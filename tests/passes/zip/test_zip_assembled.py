"""Networks that share a part of their weights put these together once, and keep them until something changes."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphzip as gz
from graphzip.graph.restore_modules import Assembled

pytestmark = pytest.mark.usefixtures("seeded")


class Counted(TorchDispatchMode):
    """Counts concatenations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 3)
    )


DATA = {
    name: [torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(seed))] for seed, name in enumerate("ab")
}


@pytest.fixture(scope="module")
def zipped() -> gz.Compiled:
    torch.manual_seed(0)
    nets = {name: network().eval() for name in DATA}
    inputs = {name: (each[0][:2],) for name, each in DATA.items()}
    return gz.compile(nets, gz.Plan([gz.Zip(share=0.5)]), inputs, calibration=DATA)


def inputs() -> dict[str, torch.Tensor]:
    return {name: each[0] for name, each in DATA.items()}


def ran(module: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    with torch.no_grad(), Counted() as counted:
        out = module(**inputs())
    return out, counted.count


def test_weights_are_put_together_once(zipped: gz.Compiled) -> None:
    module = copy.deepcopy(zipped.module).eval()
    assert any(isinstance(layer, Assembled) for layer in module.modules())
    first, built = ran(module)
    again, kept = ran(module)
    assert built > 0
    assert kept == 0
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_changed_is_put_together_anew(zipped: gz.Compiled) -> None:
    module = copy.deepcopy(zipped.module).eval()
    before, _ = ran(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    after, built = ran(module)
    assert built > 0
    fresh, _ = ran(copy.deepcopy(module))
    assert all(torch.equal(after[name], fresh[name]) for name in after)
    assert not any(torch.equal(before[name], after[name]) for name in after)


def test_training_reaches_every_tile(zipped: gz.Compiled) -> None:
    module = copy.deepcopy(zipped.module).train()
    sum(out.square().mean() for out in module(**inputs()).values()).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    with torch.no_grad(), Counted() as counted:
        module(**inputs())
    assert counted.count > 0


def test_names_stay_and_copies_files_and_exports_have_none_of_it(zipped: gz.Compiled, tmp_path: Path) -> None:
    module = zipped.module.eval()
    expected, _ = ran(module)
    assert not any("assembled" in name for name in module.state_dict())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    zipped.save(tmp_path / "zipped.graphzip")
    loaded = gz.load(tmp_path / "zipped.graphzip").module.eval()
    for each in (torch.load(buffer, weights_only=False), loaded):
        found, _ = ran(each)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert zipped.export(tmp_path / "zipped.onnx").verified
