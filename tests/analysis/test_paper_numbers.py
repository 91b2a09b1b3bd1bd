"""The figures of C-SGD's tables 1 and 5, by the analyzer's own count and by arithmetic written here from scratch.

"Manipulating Identical Filter Redundancy for Efficient Pruning on Deep and Complicated CNN". Multiply-accumulates of
convolutions and linear layers, one image, 224 x 224 for ResNet-50 and 32 x 32 for the CIFAR ResNets.
"""

from __future__ import annotations

from math import floor
from typing import Any

import pytest
import torch
from nets import CifarResNet

import graphzip as gz

RESNET50 = {0.7: 36.38, 0.6: 46.52, 0.5: 55.44}
RESNET56_10_20_40 = 60.85


def resnet50_macs(keep: float) -> int:
    """ResNet-50 of torchvision (stride in the 3 x 3) whose two inner widths of every bottleneck are cut to `keep`."""
    total = 112 * 112 * 49 * 3 * 64 + 2048 * 1000
    inner = 64
    for width, blocks, size in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        kept, outer = max(1, floor(width * keep)), 4 * width
        for block in range(blocks):
            entry = 2 * size if block == 0 and width > 64 else size
            total += entry * entry * inner * kept + size * size * (9 * kept * kept + kept * outer)
            total += size * size * inner * outer if block == 0 else 0
            inner = outer
    return total


def cifar_resnet_macs(blocks: int, widths: tuple[int, int, int], shortcut: str) -> int:
    """CIFAR ResNet with `blocks` blocks a stage; only the projection shortcut costs anything."""
    total = 32 * 32 * 27 * widths[0] + 10 * widths[2]
    inner = widths[0]
    for width, size in zip(widths, (32, 16, 8), strict=True):
        for _ in range(blocks):
            total += size * size * 9 * width * (inner + width)
            total += size * size * inner * width if inner != width and shortcut == "projection" else 0
            inner = width
    return total


def percent_less(before: int, after: int) -> float:
    return round(100 * (1 - after / before), 2)


@pytest.mark.parametrize("keep", sorted(RESNET50))
def test_the_arithmetic_gives_the_papers_resnet50(keep: float) -> None:
    assert resnet50_macs(1.0) == 4_089_184_256
    assert percent_less(resnet50_macs(1.0), resnet50_macs(keep)) == RESNET50[keep]


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_the_arithmetic_gives_the_papers_resnet56(shortcut: str) -> None:
    """Both shortcuts give the printed figure: 60.8548 % with zero padding (the usual 125.5 M), 60.8549 % projected."""
    full, slim = (cifar_resnet_macs(9, widths, shortcut) for widths in ((16, 32, 64), (10, 20, 40)))
    assert full == {"pad": 125_485_696, "projection": 125_747_840}[shortcut]
    assert percent_less(full, slim) == RESNET56_10_20_40


@pytest.mark.parametrize(
    "keep", [0.5, pytest.param(0.6, marks=pytest.mark.slow), pytest.param(0.7, marks=pytest.mark.slow)]
)
def test_resnet50_inner_widths(keep: float) -> None:
    models: Any = pytest.importorskip("torchvision.models")
    model = models.resnet50(weights=None).eval()
    inputs = (torch.zeros(2, 3, 224, 224),)
    plan = gz.Plan([gz.ClusterMerge(keep={"layer?.*.conv[12]": keep}, clustering="even")])
    compiled = gz.compile(model, plan, inputs)
    before, after = compiled.report.before, compiled.report.after
    assert (before.macs, after.macs) == (resnet50_macs(1.0), resnet50_macs(keep))
    assert percent_less(before.macs, after.macs) == RESNET50[keep]
    assert before.params == 25_557_032
    assert after.params == sum(parameter.numel() for parameter in compiled.module.parameters())


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_resnet56_10_20_40(shortcut: str) -> None:
    model = CifarResNet(9, shortcut=shortcut).eval()
    inputs = (torch.zeros(2, 3, 32, 32),)
    assert gz.cost(model, inputs).macs == cifar_resnet_macs(9, (16, 32, 64), shortcut)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.625, clustering="even")]), inputs)
    assert compiled.report.after.macs == cifar_resnet_macs(9, (10, 20, 40), shortcut)
    widths = {
        tuple(compiled.module.get_parameter(f"layer{stage}.4.conv{i}.weight").shape[:2])
        for stage in (1, 2, 3)
        for i in (1, 2)
    }
    assert widths == {(10, 10), (20, 20), (40, 40)}


def test_cost_of_the_compiled_module_is_the_reports() -> None:
    model = CifarResNet(1).eval()
    inputs = (torch.zeros(2, 3, 32, 32),)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), inputs)
    assert gz.cost(compiled.module, inputs) == compiled.report.after
