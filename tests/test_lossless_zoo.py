"""Planted duplicates merge losslessly on the architectures of torchvision and on the CIFAR ResNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import CifarResNet
from planting import assert_lossless, mergeable_share
from torch import nn

models: Any = pytest.importorskip("torchvision.models")

QUICK = {"resnet18": 64, "mobilenet_v2": 64, "shufflenet_v2_x1_0": 64, "squeezenet1_1": 64}
SLOW = {
    "resnet50": 64, "wide_resnet50_2": 64, "resnext50_32x4d": 64, "vgg16_bn": 32, "alexnet": 64, "densenet121": 64,
    "googlenet": 64, "inception_v3": 96, "mobilenet_v3_small": 64, "mnasnet1_0": 64, "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
}  # fmt: skip
SIZES = QUICK | SLOW
"""Height and width of the input image: smaller than usual, the channels are the same."""


def build(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options: dict[str, Any] = {"num_classes": 10}
        if name in {"googlenet", "inception_v3"}:
            options["init_weights"] = False
        model: nn.Module = getattr(models, name)(weights=None, **options)
        return model


def check(model: nn.Module, size: int) -> None:
    """Lossless, at least 95 % of the channels that are not the output mergeable, and most of them merged."""
    inputs = (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5)),)
    found = assert_lossless(model, inputs, unused=lambda key: "aux" in key.lower())
    assert mergeable_share(found.groups) >= 0.95, str(found.groups)
    assert found.merged >= 0.4 * sum(group.size for group in found.groups if group.mergeable)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(SIZES)])
def test_torchvision(name: str) -> None:
    check(build(name), SIZES[name])


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("blocks", [3, 9])
def test_cifar_resnets(blocks: int, shortcut: str) -> None:
    check(CifarResNet(blocks, shortcut=shortcut), 32)


SEGMENTATION: dict[str, Callable[[], nn.Module]] = {
    "fcn_resnet50": lambda: models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=4),
    "lraspp": lambda: models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SEGMENTATION))
def test_segmentation(name: str) -> None:
    torch.manual_seed(0)
    check(SEGMENTATION[name](), 64)
