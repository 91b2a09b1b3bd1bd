"""The networks of C-SGD's tables that torchvision does not have, with random weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CifarResNet", "CifarVgg", "DenseNet40", "ResNet50"]


def conv(inner: int, outer: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps height and width at stride 1."""
    return nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False)


class CifarVgg(nn.Module):
    """The 13 convolutions of VGG-16, each with a batch norm, and one linear layer; images of 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inner = 3
        for widths in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
            for outer in widths:
                layers += [conv(inner, outer, 3), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
                inner = outer
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) to (n, 10)."""
        return self.linear(self.features(x).flatten(1))


class _Basic(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inner, outer, 3, 1 if inner == outer else 2), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = conv(outer, outer, 3), nn.BatchNorm2d(outer)
        self.pad = 0 if inner == outer else outer // 4

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """He et al. (2016), section 4.2; shortcuts padded with zeros.

    9 blocks a stage are ResNet-56, 18 are ResNet-110, and 27 what C-SGD's figures call ResNet-164.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16, 3), nn.BatchNorm2d(16)
        for stage, (inner, outer) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            layers = [_Basic(outer if index else inner, outer) for index in range(blocks)]
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) to (n, 10)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class _DenseLayer(nn.Module):
    def __init__(self, inner: int, growth: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(inner), conv(inner, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class _Transition(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(width), conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet40(nn.Module):
    """Huang et al. (2017): three blocks of 12 layers of growth 12, transitions that keep the width."""

    def __init__(self, growth: int = 12) -> None:
        super().__init__()
        self.conv1 = conv(3, 16, 3)
        width = 16
        for block in (1, 2, 3):
            layers = [_DenseLayer(width + index * growth, growth) for index in range(12)]
            self.add_module(f"block{block}", nn.Sequential(*layers))
            width += 12 * growth
            if block < 3:
                self.add_module(f"transition{block}", _Transition(width))
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) to (n, 10)."""
        x = self.transition1(self.block1(self.conv1(x)))
        x = self.block3(self.transition2(self.block2(x)))
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))


class _Bottleneck(nn.Module):
    def __init__(self, inner: int, width: int, stride: int, *, projects: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inner, width, 1, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = (
            nn.Sequential(conv(inner, 4 * width, 1, stride), nn.BatchNorm2d(4 * width)) if projects else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu((x if self.downsample is None else self.downsample(x)) + self.bn3(self.conv3(y)))


class ResNet50(nn.Module):
    """ResNet-50 as first published: a stage is entered with stride 2 in the 1 x 1 convolution, not in the 3 x 3."""

    def __init__(self, blocks: Sequence[int] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        inner = 64
        for stage, count in enumerate(blocks, start=1):
            layers, width = [], 32 * 2**stage
            for index in range(count):
                stride = 2 if stage > 1 and index == 0 else 1
                layers.append(_Bottleneck(inner, width, stride, projects=index == 0))
                inner = 4 * width
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(inner, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 224, 224) to (n, 1000)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))
