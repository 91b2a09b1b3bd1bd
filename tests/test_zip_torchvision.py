"""Zip on torchvision's networks: permuted copies, the joint file, the widths of the paper's Table 3."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_zip import own_parameters, permuted, randomized
from torch import nn

import graphzip as gz

models = pytest.importorskip("torchvision").models
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenet_v2", "densenet121", "vgg11_bn", "vit", "efficientnet_b0"]
)
def test_a_permuted_copy(name: str) -> None:
    torch.manual_seed(0)
    net = randomized(small_vit() if name == "vit" else models.get_model(name, weights=None))
    x = torch.randn(2, 3, *([32] * 2 if name == "vit" else [64] * 2), dtype=torch.float64)
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


def test_the_widths_of_table_3() -> None:
    """56.94 % of the convolutions' weights and 38.17 % of the fully connected ones."""
    torch.manual_seed(0)
    nets = {name: models.vgg16(weights=None).eval() for name in "ab"}
    first = [name for name, layer in nets["a"].named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)][:-1]
    share = dict(zip(first, WIDTHS, strict=True))
    plan = gz.Plan([gz.Zip(share=share, metric="random")])
    result = gz.compile(nets, plan, {name: (torch.randn(2, 3, 32, 32),) for name in nets})
    found = result.report.passes[0]["zip"]["layers"]
    for part, expected in (("features", 56.94), ("classifier", 38.17)):
        sizes = [entry["weights"] for name, entry in found.items() if name.startswith(part)]
        before, after = (sum(size[side] for size in sizes) for side in (0, 1))
        assert 100 * 2 * (before - after) / before == pytest.approx(expected, abs=0.01)
