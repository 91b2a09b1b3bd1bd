"""Zip on torchvision's networks: permuted copies, the joint file, the widths of the paper's Table 3."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from zip_nets import own_parameters, permuted, randomized

import graphzip as gz

models = pytest.importorskip("torchvision").models
pytestmark = pytest.mark.slow


NAMES = [
    "alexnet",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet1_0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "vgg11_bn",
    "vit",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_permuted_copy(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    net = randomized(small_vit() if name == "vit" else models.get_model(name, weights=None, **options))
    size = {"vit": 32, "alexnet": 96}.get(name, 64)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    nets = {"a": net, "b": permuted(net, (x,))}
    data = {task: [torch.randn(8, *x.shape[1:], dtype=torch.float64)] for task in nets}
    metric = "euclidean" if name.startswith("vgg") else "hessian"
    plan = gz.Plan([gz.Zip(places=8, metric=metric)])
    result = gz.compile(nets, plan, dict.fromkeys(nets, (x,)), calibration=data)
    with torch.no_grad():
        expected = net(x)
        for task in result.tasks:
            torch.testing.assert_close(
                result.task(task)(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())
            )
    assert len(own_parameters(result, "b")) == 1


def test_the_joint_file_of_two_resnets(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    nets: dict[str, nn.Module] = {
        name: models.resnet18(num_classes=count).eval() for name, count in (("a", 1000), ("b", 10))
    }
    data = {task: [torch.randn(8, 3, 64, 64)] for task in nets}
    result = gz.compile(nets, gz.Plan([gz.Zip(places=8)]), dict.fromkeys(nets, (x,)), calibration=data)
    joint = result.export(tmp_path / "joint.onnx").bytes
    one = gz.compile(copy.deepcopy(nets["a"]), gz.Plan([]), (x,)).export(tmp_path / "one.onnx").bytes
    assert joint <= 1.02 * one + 4 * (512 * 10 + 10)
    assert result.export(tmp_path / "tasks", per_task=True).verified


def small_vit() -> nn.Module:
    """`vit_b_16` with fewer and narrower layers; its head is not zero."""
    net: nn.Module = models.VisionTransformer(32, 8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128)
    for name, parameter in net.named_parameters():
        if name.startswith("heads") or name.endswith(("bias", "class_token")):
            nn.init.normal_(parameter, std=0.3)
    return net


WIDTHS = (64, 64, 96, 96, 192, 192, 192, 384, 320, 320, 436, 436, 436, 1792, 4096)
"""Shared channels of each layer in Table 3."""

VGG16 = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 4096, 4096)
POOLED = {1, 3, 6, 9, 12}
"""Layers of VGG-16 with a pooling behind them."""


def shares(divisor: int) -> list[float]:
    """Shared weights and biases in percent, of convolutions and of fully connected layers."""
    inputs = [(3, 3), *((shared // divisor, all_ // divisor) for shared, all_ in zip(WIDTHS, VGG16, strict=True))]
    counted = []
    for number in range(len(VGG16)):
        area = 49 if number == 13 else 1 if number > 13 else 9
        counted.append([(area * inputs[number][side] + 1) * inputs[number + 1][side] for side in (0, 1)])
    parts = counted[:13], counted[13:]
    return [100 * sum(shared for shared, _ in part) / sum(whole for _, whole in part) for part in parts]


def test_the_widths_of_table_3() -> None:
    """56.94 % of the convolutions and 38.17 % of the fully connected layers; zipped at a quarter of the width."""
    assert shares(1) == pytest.approx([56.94, 38.17], abs=0.005)
    torch.manual_seed(0)
    nets = {"a": quarter_vgg(), "b": quarter_vgg()}
    first = [name for name, layer in nets["a"].named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)][:-1]
    share = dict(zip(first, (width // 4 for width in WIDTHS), strict=True))
    plan = gz.Plan([gz.Zip(share=share, metric="random")])
    result = gz.compile(nets, plan, {name: (torch.randn(2, 3, 32, 32),) for name in nets})
    layers = result.report.passes[0]["zip"]["layers"]
    for part, expected in zip(("features", "classifier"), shares(4), strict=True):
        sizes = [entry["parameters"] for name, entry in layers.items() if name.startswith(part)]
        before, after = (sum(size[side] for size in sizes) for side in (0, 1))
        assert 100 * 2 * (before - after) / before == pytest.approx(expected, abs=1e-9)


def quarter_vgg() -> nn.Module:
    layers: list[nn.Module] = []
    width = 3
    for number, channels in enumerate(VGG16[:13]):
        layers += [nn.Conv2d(width, channels // 4, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if number in POOLED else []
        width = channels // 4
    net: nn.Module = models.VGG(nn.Sequential(*layers))
    net.classifier = nn.Sequential(
        nn.Linear(width * 49, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    return net.eval()
