"""Moves over channels, normalisation, statistics over channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from net_parts import Example, Net, between, conv, head, image, net, unit
from torch import Tensor, nn

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
