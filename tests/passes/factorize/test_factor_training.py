"""Networks stored as factors learn: on the digits of scikit-learn, and from the ResNet-20 of the data folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")

EXAMPLE = (torch.zeros(2, 1, 8, 8),)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train with, and others to test with."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return images[train], labels[train], images[test], labels[test]


def net() -> nn.Sequential:
    def block(ins: int, outs: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU())

    return nn.Sequential(
        block(1, 16), block(16, 16), block(16, 32, 2), block(32, 32), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 10)
    )


def learn(model: nn.Module, epochs: int, rate: float = 0.1) -> None:
    images, labels, _, _ = digits()
    random = torch.Generator().manual_seed(1)
    steps = epochs * (len(labels) // 50)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=random).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    _, _, images, labels = digits()
    return float((model.eval()(images).argmax(1) == labels).float().mean())


VARIANTS: dict[str, gz.AtomFactorize | gz.SliceGenerate] = {
    "net": gz.AtomFactorize(init="random"),
    "block": gz.AtomFactorize(share="block", init="random"),
    "unshared": gz.AtomFactorize(share=None, atoms=4, init="random"),
    "g-net": gz.AtomFactorize(group_size=16, init="random"),
    "g-block": gz.AtomFactorize(share="block", group_size=16, init="random"),
    "g-layer": gz.AtomFactorize(share="layer", group_size=16, init="random"),
    "csg": gz.SliceGenerate(code=32, init="random"),
    "bcsg": gz.SliceGenerate(code=64, binary=True, init="random"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_learns_from_scratch(name: str) -> None:
    prepared = gz.prepare(net(), gz.Plan([VARIANTS[name]]), EXAMPLE)
    learn(prepared, 12)
    found = accuracy(prepared)
    assert found > 0.95
    assert accuracy(prepared.convert().module) == found


def test_the_fitted_start_beats_the_random_one() -> None:
    model = net()
    learn(model, 6)
    assert accuracy(model) > 0.95
    reached = {}
    for init in ("fit", "random"):
        options = gz.AtomFactorize(force=True, share="block", atoms=8, init=init, atom_drop=0.0)
        prepared = gz.prepare(model, gz.Plan([options]), EXAMPLE)
        learn(prepared, 1, rate=0.02)
        reached[init] = accuracy(prepared)
    assert reached["fit"] > reached["random"] + 0.1


# ---------------------------------------------------------------------------------------------------- the data folder


def folder() -> Path:
    return Path(os.environ.get("GRAPHZIP_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))


@pytest.mark.data
@pytest.mark.parametrize(
    "options",
    [
        gz.AtomFactorize(share=None, atoms=9, force=True),
        gz.AtomFactorize(share="block", atoms=54, force=True),
        gz.SliceGenerate(code=128, force=True),
        gz.SliceGenerate(code=512, force=True),
    ],
    ids=str,
)
def test_full_sizes_are_exact_on_the_trained_resnet20(options: Any) -> None:
    from cifar_nets import CIFAR, resnet20
    from planting import relative
    from safetensors.torch import load_file

    if not (folder() / "resnet20_cifar10.safetensors").exists():
        pytest.skip(f"no resnet20_cifar10.safetensors in {folder()}")
    model = resnet20().eval()
    model.load_state_dict(load_file(folder() / "resnet20_cifar10.safetensors"))
    compiled = gz.compile(model.double(), gz.Plan([options]), (CIFAR[0].double(),))
    (found,) = compiled.report.passes[0].values()
    assert max(found["relative_error"].values()) < 1e-6
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert relative(model(x), compiled.module(x)) < 1e-6
