"""What the CIFAR benchmarks share: the networks, the images, the accuracy."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

BATCH = 500
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
REPOSITORY = Path(__file__).resolve().parents[2]


class Block(nn.Module):
    """Two 3 x 3 convolutions; where the width changes, the shortcut is subsampled and padded with zero channels."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        stride = 1 if inner == outer else 2
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.pad = 0 if inner == outer else outer // 4

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """CIFAR ResNet (He et al. 2016, section 4.2): three stages of `blocks` blocks, widths 16, 32, 64 or other ones."""

    def __init__(self, blocks: int, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for stage, (inner, outer) in enumerate(((1, 1), (1, 2), (2, 4)), start=1):
            inner, outer = inner * width, outer * width
            blocks_of = [Block(inner if index == 0 else outer, outer) for index in range(blocks)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks_of))
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def data_folder() -> Path:
    """Where the images and the trained weights lie."""
    return Path(os.environ.get("GRAPHZIP_DATA", REPOSITORY.parent / "shared" / "data"))


def read_images(archive: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced images of `part` ("train" or "test"), uint8 of shape (count, 3, 32, 32), and their labels."""
    with np.load(archive) as data:
        jpeg, offsets, labels = data[f"{part}_jpeg"].tobytes(), data[f"{part}_offsets"], data[f"{part}_labels"]
    chosen = np.linspace(0, len(labels) - 1, min(count, len(labels))).round().astype(int)
    pixels = [
        np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]])).convert("RGB")) for i in chosen.tolist()
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.from_numpy(labels[chosen].astype(np.int64))


def drawn(data: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Some images and their labels in a random order, the same each time: the files are sorted by class."""
    order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(0))[:count]
    return data[0][order], data[1][order]


def normalised(images: Tensor) -> Tensor:
    """What the trained networks expect: RGB in [0, 1], mean and spread of ImageNet."""
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (MEAN, STD))
    return (images / 255 - mean) / std


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image mirrored or not and moved by up to four pixels (He et al. 2016): (n, 3, 32, 32) on its device."""
    count = len(images)
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, count), generator=generator).to(images.device)
    steps = torch.arange(32, device=images.device)
    columns = left[:, None] + steps
    mirrored = (torch.rand(count, generator=generator) < 0.5).to(images.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    rows = (top[:, None] + steps)[:, None, :, None]
    which = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(3, device=images.device)[None, :, None, None]
    return padded[which, channel, rows, columns[:, None, None, :]]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent right."""
    parts = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    right = sum(int((model(normalised(x)).argmax(1) == y).sum()) for x, y in parts)
    return 100 * right / len(labels)
