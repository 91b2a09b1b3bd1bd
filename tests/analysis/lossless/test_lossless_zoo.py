"""Planted duplicates merge losslessly on the architectures of torchvision and on the CIFAR ResNets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import CifarResNet
from planting import assert_lossless, mergeable_share
from torch import nn

import graphzip as gz

models: Any = pytest.importorskip("torchvision.models")

QUICK = {"resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "squeezenet1_1"}
GIANTS = {"vit_l_16", "vit_l_32", "vit_h_14", "regnet_y_128gf"}
"""More than 300 million parameters: analysed without weights."""

CLASSIFIERS = sorted(set(models.list_models(module=models)) - GIANTS)
SIZES = {
    "inception_v3": 96, "alexnet": 96, "vgg": 32, "vit_": 224, "maxvit_t": 224, "swin_": 96, "swin_v2": 128,
    "efficientnet_b7": 128, "efficientnet_v2_l": 128,
}  # fmt: skip
"""Height and width of the input image by the start of the name, 64 for the others: the channels are the same."""

CLIPS = {
    "r3d_18": (8, 32, 32), "mc3_18": (8, 32, 32), "r2plus1d_18": (8, 32, 32), "s3d": (16, 224, 224),
    "mvit_v1_b": (16, 224, 224), "mvit_v2_s": (16, 224, 224), "swin3d_t": (8, 64, 64),
}  # fmt: skip
"""Frames, height and width."""


def size_of(name: str) -> int:
    return max(((start, size) for start, size in SIZES.items() if name.startswith(start)), default=("", 64))[1]


def build(name: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in {"googlenet", "inception_v3"}:
            options["init_weights"] = False
        model: nn.Module = models.get_model(name, weights=None, **options)
        return model


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))


def check(model: nn.Module, *inputs: torch.Tensor) -> None:
    """Lossless, at least 95 % of the channels that are not the output mergeable, and most of them merged.

    The larger models are not trained for a step.
    """
    small = sum(parameter.numel() for parameter in model.parameters()) < 30e6
    found = assert_lossless(model, inputs, unused=lambda key: "aux" in key.lower(), trains=small)
    assert mergeable_share(found.groups) >= 0.95, str(found.groups)
    planted = sum(found.groups[name].size for name in found.clusters)
    assert planted >= 0.7 * sum(group.size for group in found.groups if group.mergeable)  # see `plant` for the others
    assert found.merged >= 0.4 * planted


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CLASSIFIERS])
def test_classification(name: str) -> None:
    check(build(name, num_classes=10), noise(3, size_of(name), size_of(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(GIANTS))
def test_giants_are_analysed_without_weights(name: str) -> None:
    image = torch.empty(2, 3, 224, 224, device="meta")
    assert mergeable_share(gz.channel_groups(build(name).to("meta").eval(), (image,))) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("blocks", [3, 9])
def test_cifar_resnets(blocks: int, shortcut: str) -> None:
    check(CifarResNet(blocks, shortcut=shortcut), noise(3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", models.list_models(module=models.segmentation))
def test_segmentation(name: str) -> None:
    check(build(name, weights_backbone=None, num_classes=4), noise(3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CLIPS))
def test_video(name: str) -> None:
    check(build(name, num_classes=10), noise(3, *CLIPS[name]))


@pytest.mark.parametrize("relative_positions", [False, True])
def test_multiscale_attention(relative_positions: bool) -> None:
    """Heads folded into the batch for a convolution and unfolded again; the batch in the middle of a product."""
    mvit = pytest.importorskip("torchvision.models.video.mvit")
    sizes: list[dict[str, Any]] = [
        {"num_heads": 1, "input_channels": 8, "kernel_q": [], "stride_q": []},
        {"num_heads": 2, "input_channels": 16, "kernel_q": [3, 3, 3], "stride_q": [1, 2, 2]},
    ]
    blocks = [mvit.MSBlockConfig(**s, output_channels=16, kernel_kv=[3, 3, 3], stride_kv=[1, 2, 2]) for s in sizes]
    options = dict.fromkeys(("residual_pool", "rel_pos_embed", "proj_after_attn"), relative_positions)
    torch.manual_seed(0)
    model = mvit.MViT((32, 32), 4, blocks, residual_with_cls_embed=not relative_positions, num_classes=5, **options)
    found = assert_lossless(model, (noise(3, 4, 32, 32),), trains=False)
    assert found.merged >= 60
