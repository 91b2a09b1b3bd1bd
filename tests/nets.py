"""Small networks that real architectures are made of, one factory each, in the registry `NETS`.

A factory takes nothing and returns `(module, example inputs)`; it draws its weights from seed 0, images are 8 x 8 and
the batch is 2. `REFUSABLE` names the networks whose writes into views may be refused with a typed error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Tensor, ...]]
NETS: dict[str, Callable[[], Example]] = {}
REFUSABLE: set[str] = set()


def net(factory: Callable[[], Example]) -> Callable[[], Example]:
    """Register a factory, seeded, under its own name."""

    def build() -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return factory()

    NETS[factory.__name__] = build
    return build


def image(channels: int = 3, *size: int) -> Tensor:
    """A batch of two random images, 8 x 8 unless sizes are given."""
    return torch.randn(2, channels, *(size or (8, 8)))


class Net(nn.Module):
    """Named parts (modules, parameters, buffers) and a forward function `run(self, *inputs)`."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def conv(inner: int, outer: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the image's size."""
    return nn.Conv2d(inner, outer, kernel, padding=kernel // 2, **options)


def unit(inner: int, outer: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(conv(inner, outer, kernel, bias=False, **options), nn.BatchNorm2d(outer), nn.ReLU())


def head(channels: int, classes: int = 5) -> nn.Sequential:
    """Global average pooling and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def between(middle: Callable[[Tensor], Tensor], *, width: int = 8, after: int | None = None) -> Example:
    """unit(3, width) -> `middle` -> unit(after, 6) -> head: `middle` sees `width` channels and leaves `after`."""

    def run(m: Any, x: Tensor) -> Any:
        return m.head(m.second(middle(m.first(x))))

    return Net(run, first=unit(3, width), second=unit(after or width, 6), head=head(6)), (image(),)


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


# --- moves over channels -------------------------------------------------------------------------------------------


@net
def pixel_shuffle() -> Example:
    return nn.Sequential(unit(3, 8), conv(8, 16), nn.PixelShuffle(2), nn.ReLU(), unit(4, 6), head(6)), (image(3, 4, 4),)


@net
def pixel_shuffle_flatten() -> Example:
    """Every place of the shuffled image is read by weights of its own."""
    return nn.Sequential(unit(3, 8), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(128, 3)), (image(3, 4, 4),)


@net
def pixel_shuffle_to_one_channel() -> Example:
    return nn.Sequential(unit(3, 4), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(64, 3)), (image(3, 4, 4),)


@net
def pixel_unshuffle() -> Example:
    return nn.Sequential(nn.PixelUnshuffle(2), unit(12, 4), nn.PixelUnshuffle(2), unit(16, 6), head(6)), (image(),)


@net
def space_to_depth_views() -> Example:
    def middle(x: Tensor) -> Tensor:
        x = x.view(x.shape[0], 4, 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(-1, 16, 4, 4)

    return between(middle, width=4, after=16)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle by view, transpose, view."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2).contiguous()
    return x.view(batch, channels, height, width)


@net
def channel_shuffle_view() -> Example:
    return between(lambda x: shuffle(x, 2))


@net
def channel_shuffle_functional() -> Example:
    return between(lambda x: F.channel_shuffle(x, 4))


@net
def channel_shuffle_module() -> Example:
    return nn.Sequential(
        unit(3, 8), nn.ChannelShuffle(2), unit(8, 8, groups=2), nn.ChannelShuffle(4), unit(8, 6), head(6)
    ), (image(),)


@net
def shufflenet() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for branch in m.branches:
            left, right = x.chunk(2, dim=1)
            x = shuffle(torch.cat([left, branch(right)], 1), 2)
        return m.head(x)

    def branch() -> nn.Sequential:
        return nn.Sequential(unit(6, 6, 1), conv(6, 6, groups=6), nn.BatchNorm2d(6), unit(6, 6, 1))

    return Net(run, stem=unit(3, 12), branches=nn.ModuleList([branch(), branch()]), head=head(12)), (image(),)


@net
def split_uneven() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b, c = torch.split(m.stem(x), [2, 6, 4], dim=1)
        return m.head(m.last(torch.cat([m.two(a), b, m.four(c)], 1)))

    return Net(run, stem=unit(3, 12), two=unit(2, 4), four=unit(4, 4), last=unit(14, 6), head=head(6)), (image(),)


@net
def split_hierarchical() -> Example:
    """Res2Net: each split is added to the next one before its convolution."""

    def run(m: Any, x: Tensor) -> Tensor:
        parts = m.stem(x).split(4, dim=1)
        outputs = [parts[0], m.one(parts[1])]
        outputs.append(m.two(parts[2] + outputs[-1]))
        return m.head(m.last(torch.cat(outputs, 1)))

    return Net(run, stem=unit(3, 12), one=unit(4, 4), two=unit(4, 4), last=unit(12, 6), head=head(6)), (image(),)


@net
def slices() -> Example:
    return between(lambda x: x[:, 2:7] * 2 + x[:, 3:], width=8, after=5)


@net
def slice_prefix_residual() -> Example:
    def middle(x: Tensor) -> Tensor:
        return torch.cat([F.relu(x[:, :3] - 0.1), x[:, 3:]], 1)

    return between(middle)


@net
def slice_strided() -> Example:
    return between(lambda x: torch.cat([x[:, ::2], F.avg_pool2d(x[:, 1::2], 3, 1, 1)], 1))


@net
def select_channel() -> Example:
    return between(lambda x: x[:, 1:] * x[:, 0].unsqueeze(1), after=7)


@net
def narrow_and_unbind() -> Example:
    def middle(x: Tensor) -> Tensor:
        first, second, third, fourth = x.narrow(1, 2, 4).unbind(1)
        return torch.stack([first + second, third, fourth], dim=1)

    return between(middle, after=3)


@net
def stack_halves() -> Example:
    """Selective-kernel style: two branches stacked on a new axis and mixed by a softmax over it."""

    def run(m: Any, x: Tensor) -> Tensor:
        both = torch.stack([m.left(x), m.right(x)], dim=1)
        squeezed = m.down(both.sum(1).mean((2, 3)))
        weights = torch.softmax(m.up(squeezed).view(-1, 2, 6), dim=1)
        return m.head((both * weights[:, :, :, None, None]).sum(1))

    return Net(
        run, left=unit(3, 6), right=unit(3, 6, 5), down=nn.Linear(6, 4), up=nn.Linear(4, 12), head=head(6)
    ), (image(),)  # fmt: skip


@net
def maxout() -> Example:
    return between(lambda x: x.view(x.shape[0], 2, 6, 8, 8).amax(1), width=12, after=6)


@net
def pad_channels() -> Example:
    return between(lambda x: F.pad(x, (0, 0, 0, 0, 2, 3)), after=13)


@net
def pad_channels_added() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head(F.relu(F.pad(x, (0, 0, 0, 0, 1, 3)) + m.second(x)))

    return Net(run, first=unit(3, 6), second=unit(6, 10), head=head(10)), (image(),)


@net
def pad_channels_by_cat() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        zeros = torch.zeros(x.shape[0], 4, x.shape[2], x.shape[3], dtype=x.dtype)
        return m.head(F.relu(torch.cat([x, zeros], 1) + m.second(x)))

    return Net(run, first=unit(3, 6), second=unit(6, 10), head=head(10)), (image(),)


@net
def pad_channels_by_a_constant() -> Example:
    return between(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=0.5), after=11)


@net
def squeeze_unsqueeze() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)
        x = m.one(x.unsqueeze(-1)).squeeze(2)
        return m.last(F.relu(x)[:, :, None, None].flatten(1))

    return Net(run, stem=unit(3, 8), one=nn.Conv1d(8, 6, 1), last=nn.Linear(6, 4)), (image(),)


@net
def roll_channels() -> Example:
    return between(lambda x: torch.roll(x, 3, dims=1))


@net
def flip_channels() -> Example:
    return between(lambda x: x.flip(1))


@net
def permuted_channels() -> Example:
    return between(lambda x: x[:, [3, 0, 7, 1, 2, 6, 5, 4]])


@net
def gathered_channels() -> Example:
    return between(lambda x: x[:, [3, 0, 0, 5, 2]], after=5)


@net
def added_to_flipped() -> Example:
    return between(lambda x: x + 2 * x.flip(1))


@net
def added_to_rolled() -> Example:
    return between(lambda x: x * 0.5 + torch.roll(x, 4, dims=1))


@net
def repeated_channels() -> Example:
    return between(lambda x: x.repeat(1, 2, 1, 1), after=16)


@net
def repeat_interleaved_channels() -> Example:
    return between(lambda x: x.repeat_interleave(2, dim=1), after=16)


@net
def channels_last_linear() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.down(F.gelu(m.up(x.permute(0, 2, 3, 1))))
        return m.head(x + y.permute(0, 3, 1, 2))

    return Net(run, stem=unit(3, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8), head=head(8)), (image(),)


@net
def tokens() -> Example:
    """Patches as tokens, then a mixing over tokens and one over channels (MLP-Mixer)."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = x + m.mix(x.transpose(1, 2)).transpose(1, 2)
        x = x + m.channel(x)
        return m.last(x.mean(1))

    mix = nn.Sequential(nn.Linear(16, 6), nn.GELU(), nn.Linear(6, 16))
    channel = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8))
    return Net(run, patch=nn.Conv2d(3, 8, 2, 2), mix=mix, channel=channel, last=nn.Linear(8, 4)), (image(),)


# --- normalisation, statistics over channels ----------------------------------------------------------------------


@net
def prelu() -> Example:
    return nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 6), nn.PReLU(), head(6)), (image(),)


@net
def group_norm() -> Example:
    return nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 8), nn.GroupNorm(1, 8), head(8)), (image(),)


@net
def group_norm_single() -> Example:
    """One channel for each group: the normalisation does not mix channels."""
    return nn.Sequential(conv(3, 8), nn.GroupNorm(8, 8), nn.ReLU(), unit(8, 6), head(6)), (image(),)


@net
def layer_norm_channels() -> Example:
    """A ConvNeXt block: layer norm over the last axis after a permute."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
        y = m.down(F.gelu(m.up(y))).permute(0, 3, 1, 2)
        return m.head(x + y)

    return Net(
        run, stem=conv(3, 8), depthwise=conv(8, 8, 7, groups=8), norm=nn.LayerNorm(8), up=nn.Linear(8, 12),
        down=nn.Linear(12, 8), head=head(8),
    ), (image(),)  # fmt: skip


@net
def layer_norm_image() -> Example:
    """Layer norm over channels, height and width at once."""
    return nn.Sequential(conv(3, 6), nn.LayerNorm((6, 8, 8)), nn.ReLU(), unit(6, 6), head(6)), (image(),)


@net
def layer_norm_space() -> Example:
    """Layer norm over space only: channels stay apart."""
    return nn.Sequential(conv(3, 6), nn.LayerNorm((8, 8)), nn.ReLU(), unit(6, 6), head(6)), (image(),)


@net
def instance_norm() -> Example:
    return nn.Sequential(
        conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 6), nn.InstanceNorm2d(6), conv(6, 3)
    ), (image(),)


@net
def instance_norm_tracking() -> Example:
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    return nn.Sequential(conv(3, 8), norm, nn.ReLU(), unit(8, 6), head(6)), (image(),)


@net
def local_response_norm() -> Example:
    return nn.Sequential(unit(3, 8), nn.LocalResponseNorm(3), unit(8, 6), head(6)), (image(),)


@net
def softmax_over_channels() -> Example:
    return between(lambda x: x * torch.softmax(x, dim=1))


@net
def mean_over_channels() -> Example:
    """Spatial attention: the mean and the maximum over channels."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return m.head(m.last(x * torch.sigmoid(m.gate(both))))

    return Net(run, stem=unit(3, 8), gate=conv(2, 1), last=unit(8, 6), head=head(6)), (image(),)


@net
def cumsum_over_channels() -> Example:
    return between(lambda x: torch.cumsum(x, 1))


@net
def sort_over_channels() -> Example:
    return between(lambda x: torch.sort(x, dim=1).values)


@net
def normalized_features() -> Example:
    return between(lambda x: F.normalize(x, dim=1))


@net
def gram_matrix() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        flat = m.stem(x).flatten(2)
        return m.last((flat @ flat.transpose(1, 2)).flatten(1))

    return Net(run, stem=unit(3, 4), last=nn.Linear(16, 3)), (image(),)


@net
def channel_conv() -> Example:
    """Efficient channel attention: a 1-d convolution over the channel axis."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = torch.sigmoid(m.eca(x.mean((2, 3)).unsqueeze(1))).squeeze(1)
        return m.head(x * gate[:, :, None, None])

    return Net(run, stem=unit(3, 8), eca=nn.Conv1d(1, 1, 3, padding=1), head=head(8)), (image(),)


@net
def einsum_mixing() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(torch.einsum("bchw,dc->bdhw", m.stem(x), m.mixing)))

    return Net(run, stem=unit(3, 8), mixing=nn.Parameter(torch.randn(6, 8) / 3), head=head(6)), (image(),)


@net
def unfolded_patches() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        patches = F.unfold(m.stem(x), 2, stride=2)
        return m.last(F.relu(m.embed(patches.transpose(1, 2))).mean(1))

    return Net(run, stem=unit(3, 4), embed=nn.Linear(16, 6), last=nn.Linear(6, 3)), (image(),)


@net
def dynamic_conv() -> Example:
    """Convolution weights that are computed from the input."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        kernel = m.make(x.mean((0, 2, 3))).view(4, 8, 1, 1)
        return m.head(F.conv2d(x, kernel))

    return Net(run, stem=unit(3, 8), make=nn.Linear(8, 32), head=head(4)), (image(),)


@net
def standardized_weight() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        weight = m.first.weight
        mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return m.head(m.second(F.relu(F.conv2d(x, (weight - mean) / (std + 1e-5), m.first.bias))))

    return Net(run, first=conv(3, 8), second=unit(8, 6), head=head(6)), (image(),)


# --- reuse, buffers, structure -------------------------------------------------------------------------------------


@net
def shared_conv() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(F.relu(m.shared(F.relu(m.shared(x)))))

    return Net(run, stem=unit(3, 8), shared=conv(8, 8), head=head(8)), (image(),)


@net
def shared_head_over_scales() -> Example:
    """RetinaNet style: one head over feature maps of two sizes."""

    def run(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        fine = m.one(x)
        coarse = m.two(F.max_pool2d(fine, 2))
        fine = m.lateral1(fine) + F.interpolate(m.lateral2(coarse), size=fine.shape[2:])
        return m.out(m.tower(fine)), m.out(m.tower(m.lateral2(coarse)))

    return Net(
        run, one=unit(3, 6), two=unit(6, 8), lateral1=conv(6, 8, 1), lateral2=conv(8, 8, 1), tower=unit(8, 8),
        out=conv(8, 2),
    ), (image(),)  # fmt: skip


@net
def siamese() -> Example:
    def run(m: Any, left: Tensor, right: Tensor) -> Tensor:
        a, b = m.body(left), m.body(right)
        return m.last(torch.cat([(a - b).abs(), a * b], 1))

    body = nn.Sequential(unit(3, 8), unit(8, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net(run, body=body, last=nn.Linear(12, 2)), (image(), image())


@net
def tied_weights() -> Example:
    first, second = conv(8, 8), conv(8, 8)
    second.weight = first.weight
    return nn.Sequential(unit(3, 8), first, nn.BatchNorm2d(8), nn.ReLU(), second, unit(8, 6), head(6)), (image(),)


@net
def tied_autoencoder() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x.flatten(1)))
        hidden = torch.tanh(F.linear(x, m.encode.weight))
        return m.last(F.linear(hidden, m.encode.weight.t()))

    return Net(
        run, first=nn.Linear(12, 8), encode=nn.Linear(8, 6, bias=False), last=nn.Linear(8, 4)
    ), (image(3, 2, 2),)  # fmt: skip


@net
def tied_embedding() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.linear(m.down(F.gelu(m.up(m.table(x)))), m.table.weight)

    model = Net(run, table=nn.Embedding(11, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8))
    return model, (torch.randint(11, (2, 5)),)


@net
def buffers() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = (x - m.mean) / m.std
        return m.head(m.second(m.first(x) * m.scale[None, :, None, None] + m.shift))

    return Net(
        run, mean=torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
        std=torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), first=unit(3, 8), scale=torch.rand(8) + 0.5,
        shift=torch.randn(1, 8, 8, 8), second=unit(8, 6), head=head(6),
    ), (image(),)  # fmt: skip


@net
def buffer_mask_and_index() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head(m.second(x.index_select(1, m.order) * m.mask))

    return Net(
        run, first=unit(3, 8), order=torch.tensor([7, 6, 5, 4, 0, 1, 2, 3]),
        mask=(torch.arange(8) % 3 != 0).view(1, 8, 1, 1), second=unit(8, 6), head=head(6),
    ), (image(),)  # fmt: skip


@net
def inplace() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.norm(m.first(x)).relu_()
        y = m.second(x)
        y.add_(x).mul_(0.5)
        return m.head(F.hardswish(y, inplace=True))

    return Net(run, first=conv(3, 8), norm=nn.BatchNorm2d(8), second=conv(8, 8), head=head(8)), (image(),)


class TwoInputs(nn.Module):
    """An image and a condition vector in; a dict that holds a tensor, a tuple and a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.condition = nn.Linear(4, 16)
        self.body = unit(8, 6)
        self.classes = head(6)
        self.mask = conv(6, 2, 1)

    def forward(self, picture: Tensor, condition: Tensor) -> dict[str, Any]:
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, 1)
        features = self.body(self.stem(picture) * (1 + scale) + shift)
        return {
            "classes": self.classes(features),
            "masks": (self.mask(features), self.mask(F.avg_pool2d(features, 2))),
            "more": {"features": features.mean((2, 3))},
        }


@net
def dict_and_two_inputs() -> Example:
    return TwoInputs(), (image(), torch.randn(2, 4))


@net
def output_in_the_middle() -> Example:
    def run(m: Any, x: Tensor) -> list[Tensor]:
        x = m.one(x)
        y = m.two(x)
        return [m.three(y), y[:, :3], x.mean((2, 3))[:, 2:6]]

    return Net(run, one=unit(3, 8), two=unit(8, 6), three=conv(6, 2)), (image(),)


@net
def unused_parts() -> Example:
    """A value that nothing reads, an output that is returned twice, an input that passes through."""

    def run(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = m.one(x)
        _ = m.two(y).sum()
        y = m.head(m.three(y))
        return y, y, x

    return Net(run, one=unit(3, 8), two=conv(8, 4), three=unit(8, 6), head=head(6)), (image(),)


# --- traps: channels that touch the same parameters and are not exchangeable ----------------------------------------


def halves_differ(change: Callable[[Tensor], Tensor]) -> Callable[[], Example]:
    """`change` is done to one half of the channels before a concatenation."""
    return lambda: between(lambda x: torch.cat([x[:, :4], change(x[:, 4:])], 1))


def opposite_order(change: Callable[[Tensor], Tensor], **options: Any) -> Callable[[], Example]:
    """Every channel is used plain and changed; one half in the one order, the other half in the other."""

    def build() -> Example:
        def run(m: Any, x: Tensor) -> Tensor:
            x = m.first(x)
            plain, changed = x.split(4, 1), change(x).split(4, 1)
            return m.head(m.second(torch.cat([plain[0], changed[1], changed[0], plain[1]], 1)))

        return Net(run, first=unit(3, 8), second=unit(16, 8, **options), head=head(8)), (image(),)

    return build


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: torch.roll(x, 2, dims=3),
    "flip": lambda x: x.flip(2),
    "transpose": lambda x: x.transpose(2, 3),
    "scale": lambda x: 3 * x,
    "relu": lambda x: F.relu(x - 0.3),
    "square": lambda x: x * x,
    "pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "shift": lambda x: F.pad(x, (1, -1, 0, 0)),
}
for _name, _change in CHANGES.items():
    for _prefix, _make in (("halves_differ", halves_differ), ("opposite_order", opposite_order)):
        _factory = _make(_change)
        _factory.__name__ = f"{_prefix}_{_name}"
        net(_factory)


@net
def opposite_order_grouped() -> Example:
    return opposite_order(CHANGES["roll"], groups=2)()


@net
def opposite_order_depthwise() -> Example:
    return opposite_order(CHANGES["roll"], groups=8)()


@net
def opposite_order_by_index() -> Example:
    order = [0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7]
    return between(lambda x: torch.cat([x, x.roll(2, 3)], 1)[:, order], after=16)


@net
def opposite_order_by_chunks() -> Example:
    def middle(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([a, torch.roll(a, 1, 2), torch.roll(b, 1, 2), b], 1)

    return between(middle, after=16)


@net
def opposite_order_two_readers() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.first(x).chunk(2, 1)
        return m.head(m.left(torch.cat([a, b.flip(2)], 1)) + m.right(torch.cat([a.flip(2), b], 1)))

    return Net(run, first=unit(3, 8), left=unit(8, 6), right=unit(8, 6), head=head(6)), (image(),)


@net
def interleaved_changes() -> Example:
    """Even channels are rolled, odd ones are not; a view hides the stride."""

    def middle(x: Tensor) -> Tensor:
        pairs = x.view(x.shape[0], 4, 2, 8, 8)
        return torch.stack([pairs[:, :, 0], pairs[:, :, 1].roll(1, 3)], 2).reshape(-1, 8, 8, 8)

    return between(middle)


@net
def cycles_in_opposite_order() -> Example:
    """x + x[perm] with two cycles of three that run in opposite directions."""
    return between(lambda x: x + 2 * x[:, [1, 2, 0, 5, 3, 4]], width=6)


@net
def subtracted_neighbours() -> Example:
    return between(lambda x: x[:, 1:] - x[:, :-1], after=7)


@net
def attention_between_halves() -> Example:
    """Linear attention over space: channels of q and k are contracted away."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(m.stem(x)).flatten(2).split([4, 4, 6], 1)
        return m.last((torch.softmax(q.transpose(1, 2) @ k, -1) @ v.transpose(1, 2)).mean(1))

    return Net(run, stem=unit(3, 8), qkv=conv(8, 14, 1), last=nn.Linear(6, 3)), (image(3, 4, 4),)


@net
def height_equals_channels() -> Example:
    """Channels and height have one size; a transpose swaps them before a second convolution."""

    def middle(x: Tensor) -> Tensor:
        return x + x.transpose(1, 2)

    return between(middle)


@net
def channels_in_the_batch() -> Example:
    """One single-channel convolution over every channel: channels are folded into the batch."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        y = m.each(x.reshape(-1, 1, 8, 8)).view(-1, 6, 4, 8, 8)
        return m.head(m.second(y.flatten(1, 2)))

    return Net(run, first=unit(3, 6), each=conv(1, 4), second=unit(24, 6), head=head(6)), (image(),)


@net
def bilinear_pooling() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.left(x).mean((2, 3)), m.right(x).mean((2, 3))
        return m.last((a.unsqueeze(2) * b.unsqueeze(1)).flatten(1))

    return Net(run, left=unit(3, 4), right=unit(3, 5), last=nn.Linear(20, 3)), (image(),)


# --- writes into views ---------------------------------------------------------------------------------------------


def writes(write: Callable[[Tensor], Tensor | None]) -> Callable[[], Example]:
    """A network in which `write` changes its argument in place (and returns nothing) or returns another tensor."""

    def middle(x: Tensor) -> Tensor:
        result = write(x)
        return x if result is None else result

    return lambda: between(middle)


def _write_halves(x: Tensor) -> None:
    x[:, :4].mul_(2)


def _write_strided(x: Tensor) -> None:
    x[:, ::2] = 0


def _write_one(x: Tensor) -> None:
    x[:, 1] += x[:, 3]


def _write_space(x: Tensor) -> None:
    x[:, :, ::2].add_(1)


def _write_relu(x: Tensor) -> None:
    F.relu_(x[:, 4:].sub_(0.2))


def _write_result_kept(x: Tensor) -> Tensor:
    part = x[:, 4:].mul_(2)
    part.neg_()
    x[:, 5:].add_(1)
    return torch.cat([x[:, :4], part], 1)


def _write_result_read_later(x: Tensor) -> Tensor:
    part = x.transpose(2, 3).add_(0.1)
    x.mul_(2)
    return part + x


def _write_after_copies(x: Tensor) -> Tensor:
    """A reshape and a contiguous that had to copy: they keep what was there before."""
    rows, turned = x[..., 1:].reshape(-1, 8, 56), x.transpose(2, 3).contiguous()
    x.mul_(-2)
    return x + turned + F.pad(rows.view(-1, 8, 8, 7), (1, 0))


def _write_after_no_copies(x: Tensor) -> Tensor:
    """A reshape and a contiguous that are views: they see the write."""
    rows, same = x.reshape(-1, 8, 64), x.contiguous()
    x.mul_(-2)
    return rows.view(-1, 8, 8, 8) + same


def _write_overlapping(x: Tensor) -> None:
    x[:, :5].add_(x[:, 3:].roll(1, 3))


def _write_view(x: Tensor) -> None:
    x.view(x.shape[0], 2, 4, 8, 8)[:, 1].neg_()


def _write_fresh(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :3] = x[:, 5:]
    y[:, 3:] = x[:, :5] * 2
    return y


def _write_masked(x: Tensor) -> None:
    x[x < 0.1] = 0.5


def _write_after_reading(x: Tensor) -> Tensor:
    before = x[:, 2:6]
    y = before.flip(2)
    before.zero_()
    return torch.cat([x[:, :4], y], 1)


for _write in (
    _write_halves, _write_strided, _write_one, _write_space, _write_relu, _write_overlapping, _write_view, _write_fresh,
    _write_masked, _write_after_reading, _write_result_kept, _write_result_read_later,
    _write_after_copies, _write_after_no_copies,
):  # fmt: skip
    _factory = writes(_write)
    _factory.__name__ = _write.__name__.removeprefix("_")
    net(_factory)
    REFUSABLE.add(_factory.__name__)
