"""The trained networks that `compare.py` makes slimmer: two from the data folder, two that it trains on CIFAR-10."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar import CifarResNet, augmented, normalised
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import MobileNetV2
from torchvision.models.vgg import VGG, make_layers

__all__ = ["NETS", "Net", "fine_tuned", "weights_of"]

BATCH = 128
INNER = "layer?.*.conv1"

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Net:
    """How a network is made, which of its groups the even methods narrow, and how it is trained where it has to be."""

    make: Callable[[], nn.Module]
    groups: str = "*"
    epochs: int = 0
    rate: float = 0.0


def vgg16_half() -> nn.Module:
    """VGG-16 with batch norm for 32 x 32 pixels, half of every width, one linear layer."""
    widths: list[str | int] = [32, 32, "M", 64, 64, "M", *[128] * 3, "M", *[256] * 3, "M", *[256] * 3, "M"]
    net = VGG(make_layers(widths, batch_norm=True))
    net.avgpool, net.classifier = nn.Identity(), nn.Linear(256, 10)
    return net


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 for 32 x 32 pixels: fewer strides, 13 blocks."""
    blocks = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1]]
    return MobileNetV2(num_classes=10, inverted_residual_setting=blocks, dropout=0.0)


NETS = {
    "resnet20": Net(lambda: CifarResNet(3), INNER),
    "resnet56": Net(lambda: CifarResNet(9), INNER),
    "vgg16-half": Net(vgg16_half, epochs=3, rate=0.1),
    "mobilenet-v2": Net(mobilenet_v2, epochs=3, rate=0.1),
}


def weights_of(name: str, folder: Path, kept: Path, data: Callable[[], Data]) -> nn.Module:
    """The trained network; its weights are in the data folder, or in the file `kept`, once it has been trained."""
    net = NETS[name]
    torch.manual_seed(0)
    model = net.make().eval()
    if not net.epochs:
        model.load_state_dict(load_file(folder / f"{name}_cifar10.safetensors"))
    elif kept.exists():
        model.load_state_dict(load_file(kept))
    else:
        print(f"{name}: {net.epochs} epochs of training", file=sys.stderr)
        fine_tuned(model, data(), net.epochs, rate=net.rate)
        save_file(model.state_dict(), kept)
    return model


def fine_tuned(model: nn.Module, data: Data, epochs: int, *, rate: float = 0.02) -> nn.Module:
    """Trained on labels by SGD, the rate rising to `rate` and falling to zero; the same for all methods."""
    images, labels = data
    steps = epochs * (len(labels) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    model.train()
    for chosen in _batches(len(labels), epochs):
        x = normalised(augmented(images[chosen], torch.Generator().manual_seed(int(chosen[0]))))
        x = x.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        loss = F.cross_entropy(model(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _batches(count: int, epochs: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(count, generator=generator).split(BATCH):
            if len(chosen) == BATCH:
                yield chosen
