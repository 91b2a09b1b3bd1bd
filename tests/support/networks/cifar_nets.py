"""The architectures of the ACDC and CSG papers for CIFAR images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3(ins: int, outs: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, 3, stride, 1, bias=bias)


class VGG16(nn.Module):
    """VGG16 with batch norm and one linear layer, as used for CIFAR."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for item in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if item == 0:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [conv3(width, item), nn.BatchNorm2d(item), nn.ReLU()]
                width = item
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.features(x).mean((2, 3)))
        return out


class Basic(nn.Module):
    """A residual block; the shortcut is a 1x1 convolution, or (`padded`) strided and padded with zeros."""

    def __init__(self, ins: int, outs: int, stride: int, *, padded: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(ins, outs, stride), nn.BatchNorm2d(outs)
        self.conv2, self.bn2 = conv3(outs, outs), nn.BatchNorm2d(outs)
        self.pad = (outs - ins) // 2
        self.shortcut = nn.Sequential()
        if not padded and (stride > 1 or ins != outs):
            self.shortcut = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))
        self.stride = stride if padded else 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad)))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Residual networks for CIFAR: `ResNet18` with widths 64 to 512, ResNet-20 and ResNet-56 with 16 to 64."""

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...], *, padded: bool, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(3, widths[0]), nn.BatchNorm2d(widths[0])
        width = widths[0]
        for stage, (count, outs) in enumerate(zip(blocks, widths, strict=True), start=1):
            made = []
            for number in range(count):
                made.append(Basic(width, outs, 2 if number == 0 and stage > 1 else 1, padded=padded))
                width = outs
            self.add_module(f"layer{stage}", nn.Sequential(*made))
        self.stages = len(blocks)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def resnet18() -> ResNet:
    return ResNet((2, 2, 2, 2), (64, 128, 256, 512), padded=False)


def resnet20() -> ResNet:
    return ResNet((3, 3, 3), (16, 32, 64), padded=True)


def resnet56() -> ResNet:
    return ResNet((9, 9, 9), (16, 32, 64), padded=True)


class _WideBlock(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(ins), conv3(ins, outs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outs), conv3(outs, outs)
        self.shortcut = None if ins == outs else nn.Conv2d(ins, outs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """WRN-`depth`-`factor`."""

    def __init__(self, depth: int, factor: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = conv3(3, 16)
        width, blocks = 16, []
        for stage, outs in enumerate((16 * factor, 32 * factor, 64 * factor)):
            for number in range((depth - 4) // 6):
                blocks.append(_WideBlock(width, outs, 2 if stage and not number else 1))
                width = outs
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(F.relu(self.bn(self.blocks(self.conv1(x)))).mean((2, 3)))
        return out


CIFAR = (torch.zeros(2, 3, 32, 32),)
