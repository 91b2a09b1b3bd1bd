"""Residual networks, concatenations, plain stacks, gates, grouped convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from net_parts import Example, Net, between, conv, head, image, net, unit
from torch import Tensor, nn

# --- residual networks ---------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions; between stages the shortcut is zero-padded ("pad") or projected ("projection")."""

    def __init__(self, inner: int, outer: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.pad = outer // 4 if (inner != outer and shortcut == "pad") else 0
        self.downsample: nn.Module | None = None
        if inner != outer and shortcut == "projection":
            self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016), section 4.2: `blocks` blocks in each of three stages (3: ResNet-20)."""

    def __init__(self, blocks: int, widths: Sequence[int] = (16, 32, 64), shortcut: str = "pad") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inner = widths[0]
        for stage, width in enumerate(widths, start=1):
            layers = []
            for index in range(blocks):
                layers.append(BasicBlock(inner, width, 2 if stage > 1 and index == 0 else 1, shortcut))
                inner = width
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(inner, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.shape[3]).view(x.shape[0], -1))


@net
def cifar_resnet_pad() -> Example:
    return CifarResNet(2, (4, 8, 16), "pad"), (image(),)


@net
def cifar_resnet_projection() -> Example:
    return CifarResNet(2, (4, 8, 16), "projection"), (image(),)


@net
def bottleneck() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.expand(m.middle(m.reduce(x)))
        x = F.relu(y + m.shortcut(x))
        return m.head(F.relu(m.again(x) + x))

    return Net(
        run, stem=unit(3, 6), reduce=unit(6, 4, 1), middle=unit(4, 5), expand=conv(5, 12, 1), shortcut=conv(6, 12, 1),
        again=nn.Sequential(unit(12, 4, 1), unit(4, 4), conv(4, 12, 1)), head=head(12),
    ), (image(),)  # fmt: skip


@net
def resnext_block() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(F.relu(m.expand(m.grouped(m.reduce(x))) + x))

    return Net(
        run, stem=unit(3, 12), reduce=unit(12, 8, 1), grouped=unit(8, 8, groups=2), expand=conv(8, 12, 1), head=head(12)
    ), (image(),)


@net
def preactivation() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for step in range(2):
            x = x + m.convs[step](F.relu(m.norms[step](x)))
        return m.head(F.relu(m.last(x)))

    return Net(
        run, stem=conv(3, 8), norms=nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)]),
        convs=nn.ModuleList([nn.Sequential(unit(8, 6), conv(6, 8)), conv(8, 8)]), last=nn.BatchNorm2d(8), head=head(8),
    ), (image(),)  # fmt: skip


# --- concatenation -------------------------------------------------------------------------------------------------


@net
def cifar_densenet() -> Example:
    """DenseNet-40's shape (Huang et al. 2017) with two blocks of three layers of growth 4."""

    def layer(inner: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(inner), nn.ReLU(), conv(inner, 4, bias=False))

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in (m.block1, m.block2):
            for dense in block:
                x = torch.cat([x, dense(x)], 1)
            if block is m.block1:
                x = F.avg_pool2d(m.transition(x), 2)
        return m.head(F.relu(m.norm(x)))

    return Net(
        run, stem=conv(3, 8, bias=False), block1=nn.ModuleList([layer(8), layer(12), layer(16)]),
        transition=nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), conv(20, 20, 1, bias=False)),
        block2=nn.ModuleList([layer(20), layer(24), layer(28)]), norm=nn.BatchNorm2d(32), head=head(32),
    ), (image(),)  # fmt: skip


@net
def inception() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = torch.cat([m.one(x), m.three(x), m.five(x), m.pool(F.max_pool2d(x, 3, 1, 1))], dim=1)
        return m.head(m.last(y))

    return Net(
        run, stem=unit(3, 8), one=unit(8, 4, 1), three=nn.Sequential(unit(8, 5, 1), unit(5, 6)),
        five=nn.Sequential(unit(8, 4, 1), unit(4, 4, 5)), pool=unit(8, 4, 1), last=unit(18, 8), head=head(8),
    ), (image(),)  # fmt: skip


@net
def unet() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        top = m.down1(x)
        bottom = m.down2(F.max_pool2d(top, 2))
        up = F.interpolate(m.middle(bottom), scale_factor=2, mode="nearest")
        up = m.up1(torch.cat([top, up], 1))
        wide = F.interpolate(up, size=(16, 16), mode="bilinear", align_corners=False)
        return m.out(wide)

    return Net(run, down1=unit(3, 6), down2=unit(6, 8), middle=unit(8, 8), up1=unit(14, 6), out=conv(6, 2, 1)), (
        image(),
    )


@net
def unet_transposed() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        top = m.down1(x)
        up = F.relu(m.up(m.down2(F.avg_pool2d(top, 2))))
        return m.out(m.merge(torch.cat([up, top], 1)))

    return Net(
        run, down1=unit(3, 6), down2=unit(6, 8), up=nn.ConvTranspose2d(8, 6, 2, stride=2), merge=unit(12, 8),
        out=conv(8, 2, 1),
    ), (image(),)  # fmt: skip


@net
def cat_with_itself() -> Example:
    return between(lambda x: torch.cat([x, x], 1), after=16)


@net
def cat_with_squares() -> Example:
    return between(lambda x: torch.cat([x, x * x, x.flip(2)], 1), after=24)


@net
def cat_with_constant() -> Example:
    return between(lambda x: torch.cat([x, torch.ones_like(x[:, :2]), torch.zeros_like(x[:, :2])], 1), after=12)


@net
def cat_with_input() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        return m.head(m.second(torch.cat([x, y, x], 1)))

    return Net(run, first=unit(3, 8), second=unit(14, 6), head=head(6)), (image(),)


@net
def coordinate_conv() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        column = torch.linspace(-1, 1, y.shape[3], dtype=y.dtype).expand(y.shape[0], 1, y.shape[2], y.shape[3])
        return m.head(m.second(torch.cat([y, column], 1)))

    return Net(run, first=unit(3, 8), second=unit(9, 6), head=head(6)), (image(),)


# --- plain stacks, flatten, linear ---------------------------------------------------------------------------------


@net
def vgg_flatten() -> Example:
    return nn.Sequential(
        unit(3, 6), unit(6, 6), nn.MaxPool2d(2), unit(6, 8), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5),
    ), (image(),)  # fmt: skip


@net
def view_flatten_spatial_first() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(m.first(x), 4)
        return m.last(x.permute(0, 2, 3, 1).reshape(-1, 4 * 8))

    return Net(run, first=unit(3, 8), last=nn.Linear(32, 5)), (image(),)


@net
def flatten_norm_linear() -> Example:
    return nn.Sequential(
        unit(3, 6), nn.MaxPool2d(4), nn.Flatten(), nn.BatchNorm1d(24), nn.Linear(24, 10), nn.PReLU(10), nn.Linear(10, 4)
    ), (image(),)


@net
def mlp() -> Example:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 12), nn.LeakyReLU(), nn.Linear(12, 5)
    ), (image(3, 4, 4),)


@net
def activations() -> Example:
    kinds = (nn.SiLU, nn.Hardswish, nn.Mish, nn.ELU, nn.Softplus, nn.Hardsigmoid, nn.Tanh, nn.ReLU6, nn.SELU, nn.CELU)
    layers = [m for kind in kinds for m in (conv(4, 4, 1), nn.BatchNorm2d(4), kind())]
    return nn.Sequential(conv(3, 4), *layers, head(4)), (image(),)


@net
def poolings() -> Example:
    return nn.Sequential(
        unit(3, 8), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1), nn.LPPool2d(2, 1), unit(8, 8),
        nn.AdaptiveMaxPool2d(2), nn.ReflectionPad2d(1), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ReplicationPad2d((1, 0, 0, 1)), head(8),
    ), (image(),)  # fmt: skip


@net
def unfinished_tail() -> Example:
    """The output is a feature map: the last convolution is pinned, what comes before is free."""
    return nn.Sequential(unit(3, 8), unit(8, 6), conv(6, 4)), (image(),)


@net
def functional_conv_parameter() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.second(F.relu(F.conv2d(x, m.kernel, m.bias, padding=1) * m.scale.view(1, -1, 1, 1))))

    return Net(
        run, kernel=nn.Parameter(torch.randn(8, 3, 3, 3) / 5), bias=nn.Parameter(torch.randn(8)),
        scale=nn.Parameter(torch.rand(8) + 0.5), second=unit(8, 6), head=head(6),
    ), (image(),)  # fmt: skip


# --- gates ---------------------------------------------------------------------------------------------------------


@net
def squeeze_excite() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))
        return m.head(m.last(x * gate))

    return Net(run, stem=unit(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), last=unit(8, 8), head=head(8)), (image(),)


@net
def squeeze_excite_linear() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = F.hardsigmoid(m.up(F.relu(m.down(x.mean((2, 3))))))
        return m.head(m.last(gate[:, :, None, None].expand_as(x) * x))

    return Net(
        run, stem=unit(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), last=unit(8, 8), head=head(8)
    ), (image(),)  # fmt: skip


@net
def expanded_gate() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = m.gate(x.amax((2, 3))).view(x.shape[0], 8, 1, 1).expand(-1, 8, 8, 8)
        return m.head(m.last(torch.where(gate > 0, x, x * gate)))

    return Net(run, stem=unit(3, 8), gate=nn.Linear(8, 8), last=unit(8, 8), head=head(8)), (image(),)


@net
def spatial_gate() -> Example:
    """One gate value for each place: broadcast over all channels."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(m.last(x * torch.sigmoid(m.gate(x))))

    return Net(run, stem=unit(3, 8), gate=conv(8, 1), last=unit(8, 8), head=head(8)), (image(),)


@net
def glu_chunk() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.stem(x).chunk(2, dim=1)
        return m.head(m.last(a * torch.sigmoid(b)))

    return Net(run, stem=conv(3, 16), last=unit(8, 6), head=head(6)), (image(),)


@net
def glu_functional() -> Example:
    return nn.Sequential(conv(3, 16), nn.GLU(1), unit(8, 6), head(6)), (image(),)


@net
def swiglu_mlp() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        gate, value = m.up(x.flatten(1)).split(8, dim=-1)
        return m.last(F.silu(gate) * value)

    return Net(run, up=nn.Linear(12, 16), last=nn.Linear(8, 5)), (image(3, 2, 2),)


@net
def layer_scale() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.gamma * m.body(x))

    return Net(
        run, stem=unit(3, 8), gamma=nn.Parameter(torch.rand(8, 1, 1)), body=nn.Sequential(unit(8, 6), conv(6, 8)),
        head=head(8),
    ), (image(),)  # fmt: skip


# --- grouped, depthwise, transposed convolutions ------------------------------------------------------------------


@net
def grouped_conv() -> Example:
    return nn.Sequential(unit(3, 8), unit(8, 12, groups=2), unit(12, 8, groups=4), unit(8, 6), head(6)), (image(),)


@net
def depthwise_separable() -> Example:
    return nn.Sequential(unit(3, 8), unit(8, 8, groups=8), unit(8, 12, 1), unit(12, 12, groups=12), head(12)), (
        image(),
    )


@net
def depthwise_multiplier() -> Example:
    return nn.Sequential(unit(3, 6), unit(6, 12, groups=6), unit(12, 8, 1), head(8)), (image(),)


@net
def inverted_residual() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.body(x))

    body = nn.Sequential(unit(6, 12, 1), unit(12, 12, groups=12), conv(12, 6, 1, bias=False), nn.BatchNorm2d(6))
    return Net(run, stem=unit(3, 6), body=body, head=head(6)), (image(),)


@net
def transposed_conv() -> Example:
    return nn.Sequential(
        unit(3, 8), nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 8, 2, bias=False), conv(8, 3),
    ), (image(3, 4, 4),)  # fmt: skip


@net
def transposed_grouped() -> Example:
    return nn.Sequential(
        unit(3, 8),
        nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        conv(12, 6),
        head(6),
    ), (image(3, 4, 4),)


@net
def transposed_depthwise() -> Example:
    return nn.Sequential(
        unit(3, 8), nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=8), nn.ReLU(), conv(8, 6), head(6)
    ), (image(3, 4, 4),)


@net
def transposed_depthwise_multiplier() -> Example:
    return nn.Sequential(
        unit(3, 6), nn.ConvTranspose2d(6, 12, 3, padding=1, groups=6), nn.ReLU(), conv(12, 6), head(6)
    ), (image(),)


@net
def grouped_after_cat() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.grouped(torch.cat([m.left(x), m.right(x)], 1)))

    return Net(run, left=unit(3, 6), right=unit(3, 2), grouped=unit(8, 8, groups=2), head=head(8)), (image(),)


@net
def conv1d() -> Example:
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 8, 3, groups=8),
        nn.ConvTranspose1d(8, 6, 2, stride=2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3),
    ), (image(4, 12),)  # fmt: skip


@net
def conv3d() -> Example:
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1, bias=False), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(6, 8, (1, 3, 3)), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 3),
    ), (image(2, 4, 8, 8),)  # fmt: skip


@net
def factorized_video() -> Example:
    """Frames folded into the batch for 2-d convolutions."""

    def run(m: Any, x: Tensor) -> Tensor:
        frames = m.frame(x.transpose(1, 2).reshape(-1, 3, 8, 8))
        clip = frames.view(-1, 4, 8, 8, 8).transpose(1, 2)
        return m.last(F.relu(m.time(clip)).mean((2, 3, 4)))

    return Net(run, frame=unit(3, 8), time=nn.Conv3d(8, 6, (3, 1, 1)), last=nn.Linear(6, 3)), (image(3, 4, 8, 8),)
