"""The networks of the ACDC and CSG papers that torchvision does not have, with random weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from paper_nets import conv
from torch import Tensor, nn

__all__ = ["CifarResNet18", "DeepLab", "DenseNetBC", "MobileNet", "WideResNet"]


class _Basic(nn.Module):
    """Two convolutions beside a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inner, outer, 3, stride), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = conv(outer, outer, 3), nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride > 1 or inner != outer:
            self.shortcut = nn.Sequential(conv(inner, outer, 1, stride), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class CifarResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem and no pooling behind it, for images of 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 3), nn.BatchNorm2d(64)
        shapes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
        self.blocks = nn.Sequential(*(_Basic(*shape) for shape in [*shapes, (256, 512, 2), (512, 512, 1)]))
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 10)."""
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class _Wide(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inner), conv(inner, outer, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outer), conv(outer, outer, 3)
        self.shortcut = None if inner == outer else conv(inner, outer, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + (x if self.shortcut is None else self.shortcut(y))


class WideResNet(nn.Module):
    """WRN-`depth`-`factor` (Zagoruyko and Komodakis, 2016)."""

    def __init__(self, depth: int, factor: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = conv(3, 16, 3)
        inner, blocks = 16, []
        for stage, outer in enumerate((16 * factor, 32 * factor, 64 * factor)):
            for number in range((depth - 4) // 6):
                blocks.append(_Wide(inner, outer, 2 if stage and not number else 1))
                inner = outer
        self.blocks, self.bn = nn.Sequential(*blocks), nn.BatchNorm2d(inner)
        self.linear = nn.Linear(inner, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, classes)."""
        return self.linear(F.relu(self.bn(self.blocks(self.conv1(x)))).mean((2, 3)))


class _Bottleneck(nn.Module):
    def __init__(self, inner: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inner), conv(inner, 4 * growth, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(y)))], 1)


class DenseNetBC(nn.Module):
    """DenseNet-BC of 40 layers (Huang et al., 2017): bottlenecks, and transitions that halve the channels."""

    def __init__(self, growth: int) -> None:
        super().__init__()
        width = 2 * growth
        layers: list[nn.Module] = [conv(3, width, 3)]
        for block in range(3):
            for _ in range(6):
                layers.append(_Bottleneck(width, growth))
                width += growth
            if block < 2:
                layers += [nn.BatchNorm2d(width), nn.ReLU(), conv(width, width // 2, 1), nn.AvgPool2d(2)]
                width //= 2
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) to (n, 10)."""
        return self.linear(self.features(x).mean((2, 3)))


class _Inverted(nn.Module):
    """Expansion, depthwise convolution, projection; the shortcut is a convolution where widths differ."""

    def __init__(self, inner: int, outer: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = expansion * inner
        self.conv1, self.bn1 = conv(inner, wide, 1), nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3, self.bn3 = conv(wide, outer, 1), nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride == 1 and inner != outer:
            self.shortcut = nn.Sequential(conv(inner, outer, 1), nn.BatchNorm2d(outer))
        self.added = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if self.added else y


class MobileNet(nn.Module):
    """MobileNetV2 as it is used for CIFAR: strides of 1 in the beginning, convolutions as shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 32, 3), nn.BatchNorm2d(32)
        inner, blocks = 32, []
        for expansion, outer, count, stride in (
            *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)),
            *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
        ):
            for number in range(count):
                blocks.append(_Inverted(inner, outer, expansion, 1 if number else stride))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.conv2, self.bn2 = conv(320, 1280, 1), nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) to (n, 10)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def _unit(inner: int, outer: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    made = nn.Conv2d(inner, outer, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(made, nn.BatchNorm2d(outer), nn.ReLU())


class DeepLab(nn.Module):
    """DeepLab V3 with a decoder, as CSG's count has it: a ResNet, atrous pooling, features of its first stage."""

    def __init__(self, depth: int, classes: int = 21, rates: Sequence[int] = (6, 12, 18)) -> None:
        super().__init__()
        import torchvision.models

        self.backbone = getattr(torchvision.models, f"resnet{depth}")(weights=None)
        del self.backbone.fc
        self.aspp = nn.ModuleList([_unit(2048, 256, 1), *(_unit(2048, 256, 3, rate) for rate in rates)])
        self.pooled, self.joined = _unit(2048, 256, 1), _unit(1280, 256, 1)
        self.low = _unit(256, 48, 1)
        self.decoder = nn.Sequential(_unit(304, 256, 3), _unit(256, 256, 3), nn.Conv2d(256, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, classes, h / 4, w / 4)."""
        net = self.backbone
        low = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        y = net.layer4(net.layer3(net.layer2(low)))
        pooled = self.pooled(y.mean((2, 3), keepdim=True)).expand(-1, -1, *y.shape[2:])
        y = self.joined(torch.cat([*(part(y) for part in self.aspp), pooled], 1))
        y = F.interpolate(y, low.shape[2:], mode="bilinear", align_corners=True)
        return self.decoder(torch.cat([y, self.low(low)], 1))
