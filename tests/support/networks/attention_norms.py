"""Norms on a stream, gates, tied embeddings, weights that are computed, traps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attention_parts import (
    INNER,
    STREAM,
    TOKENS,
    joined,
    mlp,
    net,
    projections,
    sequence,
    split,
)
from nets import Example, Net, conv, image, unit
from torch import Tensor, nn
from torch.nn.utils import parametrizations

# --- norms on a stream ----------------------------------------------------------------------------------------------


class WeightNorm(nn.Module):
    """A channel norm for images in its own words: `(x - mean) / sqrt(var + eps)` over dimension 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class LlamaNorm(nn.Module):
    """RMS norm in its own words."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _stream(norm: Callable[[int], nn.Module], *, last: bool) -> Example:
    """Two residual blocks and a norm before each of them; channels last or in dimension 1."""

    def swap(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) if last else x

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for norm, up, down in ((m.norm1, m.up1, m.down1), (m.norm2, m.up2, m.down2)):
            y = norm(swap(x))
            y = y.permute(0, 3, 1, 2) if last else y
            x = x + down(F.gelu(up(y)))
        y = m.norm3(swap(x))
        return m.last(F.relu(y).mean((1, 2) if last else (2, 3)))

    return Net(
        run, stem=conv(3, 8), norm1=norm(8), up1=conv(8, 6), down1=conv(6, 8), norm2=norm(8), up2=conv(8, 12, 1),
        down2=conv(12, 8, 1), norm3=norm(8), last=nn.Linear(8, 3),
    ), (image(3, 4, 4),)  # fmt: skip


class Normalize(nn.Module):
    """L2 normalisation over one dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=self.dim)


class Moments(nn.Module):
    """`var_mean`, `std` and `var` over channels, with and without correction."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, 1, keepdim=True, correction=0)
        y = (x - mean) * torch.rsqrt(variance + 1e-5)
        return y / (1 + x.std(1, keepdim=True)) + 0.1 * x.var(1, unbiased=False).unsqueeze(1)


for _name, _make, _last in (
    ("stream_layer_norm", nn.LayerNorm, True),
    ("stream_rms_norm", nn.RMSNorm, True),
    ("stream_own_rms_norm", LlamaNorm, True),
    ("stream_own_layer_norm", WeightNorm, False),
    ("stream_group_norm", lambda c: nn.GroupNorm(2, c), False),
    ("stream_group_norm_one", lambda c: nn.GroupNorm(1, c), False),
    ("stream_instance_norm", lambda c: nn.InstanceNorm2d(c, affine=True), False),
    ("stream_normalize", lambda c: Normalize(1), False),
    ("stream_normalize_last", lambda c: Normalize(-1), True),
    ("stream_moments", lambda c: Moments(), False),
):

    def _factory(make: Any = _make, last: bool = _last) -> Example:
        return _stream(make, last=last)

    _factory.__name__ = _name
    net(_factory)


# --- gates, tied embeddings, weights that are computed ---------------------------------------------------------------


def _gated(activation: Callable[[Tensor], Tensor], *, whole: bool) -> Example:
    """`activation(a) * b` for the halves of one projection, or for two projections."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        y = m.norm(x)
        a, b = m.both(y).chunk(2, -1) if whole else (m.gate(y), m.up(y))
        return m.last((x + m.down(activation(a) * b)).mean(1))

    gates = {"both": nn.Linear(8, 24)} if whole else {"gate": nn.Linear(8, 12), "up": nn.Linear(8, 12)}
    return Net(run, embed=nn.Linear(7, 8), norm=nn.RMSNorm(8), **gates, down=nn.Linear(12, 8), last=nn.Linear(8, 3)), (
        sequence(),
    )


@net
def geglu() -> Example:
    return _gated(F.gelu, whole=True)


@net
def swiglu() -> Example:
    return _gated(F.silu, whole=False)


@net
def swiglu_packed() -> Example:
    return _gated(F.silu, whole=True)


@net
def glu() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        return m.last((x + m.down(F.glu(m.both(x), -1))).mean(1))

    parts = {"embed": nn.Linear(7, 8), "both": nn.Linear(8, 24), "down": nn.Linear(12, 8), "last": nn.Linear(8, 3)}
    return Net(run, **parts), (sequence(),)


def _language(tied: bool) -> Example:
    """A decoder: embedding, attention, head (the embedding's weight when `tied`)."""

    def run(m: Any, tokens: Tensor) -> Tensor:
        x = m.embed(tokens) + m.positions[:TOKENS]
        x = x + m.out(joined(F.scaled_dot_product_attention(*split(m, m.norm1(x)), is_causal=True)))
        x = m.norm3(x + m.mlp(m.norm2(x)))
        return F.linear(x, m.embed.weight) if tied else m.head(x)

    model = Net(
        run, embed=nn.Embedding(11, STREAM), positions=nn.Parameter(torch.randn(9, STREAM)), **projections(),
        norm1=nn.RMSNorm(STREAM), out=nn.Linear(INNER, STREAM), norm2=nn.LayerNorm(STREAM), mlp=mlp(),
        norm3=nn.LayerNorm(STREAM),
    )  # fmt: skip
    if not tied:
        model.head = nn.Linear(STREAM, 11, bias=False)
        model.head.weight = model.embed.weight
    return model, (torch.randint(0, 11, (2, TOKENS)),)


@net
def tied_embedding_functional() -> Example:
    return _language(tied=True)


@net
def tied_embedding_module() -> Example:
    return _language(tied=False)


class StandardConv(nn.Conv2d):
    """A convolution with a standardised weight (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ScaledStandardConv(nn.Conv2d):
    """The form of NFNets: a gain per filter, statistics by `var_mean`."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(outer, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        scale = torch.rsqrt(torch.clamp(variance * self.weight[0].numel(), min=1e-4)) * self.gain
        return F.conv2d(x, (self.weight - mean) * scale, self.bias, 1, 1)


def _computed(make: Callable[[int, int], nn.Module]) -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x))
        x = x + m.down(F.relu(m.up(x)))
        return m.last(x.mean((2, 3)))

    return Net(run, first=make(3, 8), up=make(8, 12), down=make(12, 8), last=nn.Linear(8, 3)), (image(3, 4, 4),)


@net
def weight_standardisation() -> Example:
    return _computed(lambda inner, outer: StandardConv(inner, outer, 3, padding=1))


@net
def weight_standardisation_by_batch_norm() -> Example:
    """timm's: batch norm of the weight as if it were an image."""

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            flat = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-6)
            return F.conv2d(x, flat.reshape_as(self.weight), self.bias, 1, 1)

    return _computed(lambda inner, outer: Conv(inner, outer, 3, padding=1))


@net
def scaled_weight_standardisation() -> Example:
    return _computed(ScaledStandardConv)


@net
def weight_norm() -> Example:
    return _computed(lambda inner, outer: parametrizations.weight_norm(conv(inner, outer)))


@net
def weight_norm_of_everything() -> Example:
    return _computed(lambda inner, outer: parametrizations.weight_norm(conv(inner, outer), dim=None))


@net
def weight_norm_of_inputs() -> Example:
    return _computed(lambda inner, outer: parametrizations.weight_norm(conv(inner, outer), dim=1))


@net
def spectral_norm() -> Example:
    return _computed(lambda inner, outer: parametrizations.spectral_norm(conv(inner, outer)))


@net
def orthogonal_weight() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(F.relu(m.middle(F.relu(m.first(x)))).mean(1))

    middle = parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley")
    return Net(run, first=nn.Linear(7, 8), middle=middle, last=nn.Linear(8, 3)), (sequence(),)


@net
def low_rank_addition() -> Example:
    """A weight plus a product of two small ones."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(F.relu(F.linear(m.first(x), m.weight + m.b @ m.a)).mean(1))

    shapes = {"weight": (6, 8), "a": (4, 8), "b": (6, 4)}
    parts = {name: nn.Parameter(torch.randn(shape) / 2) for name, shape in shapes.items()}
    return Net(run, first=nn.Linear(7, 8), last=nn.Linear(6, 3), **parts), (sequence(),)


@net
def mixer() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = x + m.mix(m.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + m.mlp(m.norm2(x))
        return m.last(m.norm3(x).mean(1))

    return Net(
        run, patch=nn.Conv2d(3, STREAM, 4, 4), mix=mlp(4, 6), mlp=mlp(), norm1=nn.LayerNorm(STREAM),
        norm2=nn.LayerNorm(STREAM), norm3=nn.LayerNorm(STREAM), last=nn.Linear(STREAM, 3),
    ), (image(),)  # fmt: skip


@net
def spatial_gating() -> Example:
    """gMLP: one half of the channels gates the other, mixed over tokens."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        a, b = F.gelu(m.up(x)).chunk(2, -1)
        b = m.mix(m.norm(b).transpose(1, 2)).transpose(1, 2)
        return m.last((x + m.down(a * b)).mean(1))

    return Net(
        run, embed=nn.Linear(7, 8), up=nn.Linear(8, 12), norm=nn.LayerNorm(6), mix=nn.Linear(TOKENS, TOKENS),
        down=nn.Linear(6, 8), last=nn.Linear(8, 3),
    ), (sequence(),)  # fmt: skip


# --- traps ----------------------------------------------------------------------------------------------------------


def between(middle: Callable[[Tensor], Tensor], width: int = 8, after: int | None = None) -> Example:
    """Linear layers before and after `middle`, on tokens: dimension 1 are tokens, the last one channels."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(F.relu(m.second(middle(m.first(x)))).mean(1))

    return Net(run, first=nn.Linear(7, width), second=nn.Linear(after or width, 6), last=nn.Linear(6, 3)), (sequence(),)


def _complex_rotation(x: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * 1j).flatten(-2)


def _write_row(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0.0
    y[..., 2:4] += 1
    return y


def _mean_of_best(x: Tensor) -> Tensor:
    """Tokens are ranked by one score and the best ones are gathered."""
    index = x.sum(-1).topk(3, dim=1).indices
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


TRAPS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "gather_channels": (lambda x: torch.gather(x, -1, x.argsort(-1)), 8),
    "gather_fixed": (lambda x: torch.gather(x, -1, torch.tensor([0, 3]).expand(x.shape[0], TOKENS, 2)), 2),
    "gather_tokens": (_mean_of_best, 8),
    "scatter_channels": (lambda x: torch.zeros_like(x).scatter(-1, x.argsort(-1), x), 8),
    "scatter_add_channels": (lambda x: torch.zeros_like(x).scatter_add(-1, x.abs().long() % 8, x), 8),
    "index_add_channels": (lambda x: x.index_add(-1, torch.tensor([1, 1, 5]), x[..., :3]), 8),
    "index_copy_channels": (lambda x: x.index_copy(-1, torch.tensor([1, 2, 5]), x[..., :3]), 8),
    "topk_channels": (lambda x: x.topk(4, dim=-1).values, 4),
    "topk_mask": (lambda x: x * (x >= x.topk(4, dim=-1).values[..., -1:]), 8),
    "sort_tokens": (lambda x: x.sort(1).values, 8),
    "sort_channels": (lambda x: x.sort(-1).values, 8),
    "cumsum_channels": (lambda x: x.cumsum(-1), 8),
    "cumsum_tokens": (lambda x: x.cumsum(1), 8),
    "cumprod_channels": (lambda x: x.cumprod(-1), 8),
    "logcumsumexp_channels": (lambda x: x.logcumsumexp(-1), 8),
    "prod_channels": (lambda x: x * x.prod(-1, keepdim=True), 8),
    "argmax_channels": (lambda x: x * x.argmax(-1, keepdim=True), 8),
    "amax_channels": (lambda x: x - x.amax(-1, keepdim=True), 8),
    "max_channels": (lambda x: x - x.max(-1, keepdim=True).values, 8),
    "median_channels": (lambda x: x - x.median(-1, keepdim=True).values, 8),
    "quantile_channels": (lambda x: x - x.quantile(0.3, dim=-1, keepdim=True), 8),
    "kthvalue_channels": (lambda x: x - x.kthvalue(2, dim=-1, keepdim=True).values, 8),
    "logsumexp_channels": (lambda x: x - x.logsumexp(-1, keepdim=True), 8),
    "log_softmax_channels": (lambda x: F.log_softmax(x, -1), 8),
    "softmin_channels": (lambda x: F.softmin(x, -1) * x, 8),
    "norm_channels": (lambda x: x / (x.norm(dim=-1, keepdim=True) + 1), 8),
    "norm_one_channels": (lambda x: x / (x.norm(p=1, dim=-1, keepdim=True) + 1), 8),
    "norm_three_channels": (lambda x: x / (torch.linalg.vector_norm(x, 3, -1, keepdim=True) + 1), 8),
    "norm_zero_channels": (lambda x: x * torch.linalg.vector_norm(F.relu(x), 0, -1, keepdim=True), 8),
    "norm_infinity_channels": (lambda x: x / (torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True) + 1), 8),
    "norm_minus_one_channels": (lambda x: x * torch.linalg.vector_norm(x, -1, -1, keepdim=True), 8),
    "norm_of_everything": (lambda x: x / (x.flatten(1).norm(dim=1)[:, None, None] + 1), 8),
    "std_channels": (lambda x: x / (x.std(-1, keepdim=True) + 1), 8),
    "var_tokens": (lambda x: x / (x.var(1, keepdim=True) + 1), 8),
    "mean_of_both": (lambda x: x - x.mean((1, 2), keepdim=True), 8),
    "mean_of_a_part": (lambda x: x - x[..., :4].mean(-1, keepdim=True), 8),
    "nansum_channels": (lambda x: x * x.nansum(-1, keepdim=True), 8),
    "any_channels": (lambda x: x * (x > 0.5).any(-1, keepdim=True), 8),
    "all_channels": (lambda x: x * (x > -0.5).all(-1, keepdim=True), 8),
    "mean_of_truths": (lambda x: x * (x > 0).mean(-1, keepdim=True, dtype=x.dtype), 8),
    "sum_of_integers": (lambda x: x * (4 * x).int().sum(-1, keepdim=True), 8),
    "count_channels": (lambda x: x * (x > 0).sum(-1, keepdim=True), 8),
    "fft_channels": (lambda x: torch.fft.rfft(x, dim=-1).abs(), 5),
    "fft_tokens": (lambda x: torch.fft.fft(x, dim=1).real, 8),
    "fft_both": (lambda x: torch.fft.fft2(x).real, 8),
    "complex_pairs": (_complex_rotation, 8),
    "complex_parts": (lambda x: torch.complex(x[..., :4], x[..., 4:]).abs(), 4),
    "write_rows": (_write_row, 8),
    "cdist": (lambda x: torch.cdist(x, x), TOKENS),
    "outer_product": (lambda x: torch.einsum("blc,bld->blcd", x, x).flatten(2), 64),
    "gram": (lambda x: x @ (x.transpose(1, 2) @ x), 8),
    "three_operands": (lambda x: torch.einsum("blc,bsc,bsd->bld", x, x, x), 8),
    "diagonal": (lambda x: torch.diagonal(x @ x.transpose(1, 2), dim1=1, dim2=2).unsqueeze(-1) * x, 8),
    "cosine_similarity": (lambda x: x * F.cosine_similarity(x, x.flip(1), dim=-1).unsqueeze(-1), 8),
    "pairwise_distance": (lambda x: x * F.pairwise_distance(x, x.flip(1)).unsqueeze(-1), 8),
    "cross_product": (lambda x: torch.cross(x[..., :3], x[..., 3:6], dim=-1), 3),
    "renorm": (lambda x: torch.renorm(x, 2, 1, 1.0), 8),
    "diff_channels": (lambda x: x.diff(dim=-1), 7),
    "unfold_channels": (lambda x: x.unfold(-1, 3, 1).mean(-1), 6),
    "interpolate_channels": (lambda x: F.interpolate(x, size=6, mode="linear"), 6),
    "pool_channels": (lambda x: F.avg_pool1d(x, 2), 4),
    "max_pool_channels": (lambda x: F.max_pool1d(x, 2), 4),
    "adaptive_pool_channels": (lambda x: F.adaptive_avg_pool1d(x, 1) * x, 8),
    "pad_reflect_channels": (lambda x: F.pad(x, (1, 1), mode="reflect"), 10),
    "repeat_channels": (lambda x: x.repeat(1, 1, 2), 16),
    "tile_tokens": (lambda x: x.tile(1, 2, 1), 8),
    "meshed": (lambda x: x * torch.linspace(0, 1, 8), 8),
    "triu": (lambda x: torch.triu(x), 8),
    "tril": (lambda x: x.tril(), 8),
    "bucketize": (lambda x: x * torch.bucketize(x, torch.tensor([-0.5, 0.0, 0.5])), 8),
    "one_hot": (lambda x: F.one_hot(x.argmax(-1), 8).to(x.dtype) * x, 8),
    "where_mask": (lambda x: torch.where(x > x.mean(-1, keepdim=True), x, 0.0), 8),
    "masked_softmax": (lambda x: x.masked_fill(x < 0, -1e9).softmax(-1), 8),
    "swap_tokens_and_channels": (lambda x: x.transpose(1, 2).reshape(-1, TOKENS, 8), 8),
    "unflatten_mean": (lambda x: x.unflatten(-1, (4, 2)).mean(-1), 4),
    "unflatten_mean_outer": (lambda x: x.unflatten(-1, (4, 2)).mean(-2), 2),
    "unflatten_softmax": (lambda x: (x.unflatten(-1, (4, 2)).softmax(-1) * x.unflatten(-1, (4, 2))).flatten(2), 8),
    "unflatten_norm": (lambda x: F.normalize(x.unflatten(-1, (4, 2)), dim=-1).flatten(2), 8),
    "unflatten_variance": (lambda x: x.unflatten(-1, (2, 4)).var(-1), 2),
    "layer_norm_of_a_part": (lambda x: torch.cat([F.layer_norm(x[..., :4], (4,)), x[..., 4:]], -1), 8),
    "layer_norm_of_a_cat": (lambda x: F.layer_norm(torch.cat([x, x.relu(), x[..., :3]], -1), (19,)), 19),
    "softmax_of_a_cat": (lambda x: torch.softmax(torch.cat([x, x[..., 2:5]], -1), -1), 11),
    "sum_of_a_cat": (lambda x: x * torch.cat([x, x[..., 2:5]], -1).sum(-1, keepdim=True), 8),
    "mean_with_padding": (lambda x: x * F.pad(x, (2, 3)).mean(-1, keepdim=True), 8),
    "softmax_with_padding": (lambda x: torch.softmax(F.pad(x, (2, 3)), -1)[..., 2:10], 8),
    "layer_norm_with_padding": (lambda x: F.layer_norm(F.pad(x, (2, 3)), (13,)), 13),
    "norm_then_slice": (lambda x: F.layer_norm(x, (8,))[..., 3:], 5),
    "gram_of_parts": (lambda x: x[..., :4] @ (x[..., 4:].transpose(1, 2) @ x), 8),
    "products_of_halves": (lambda x: (x[..., :4] * x[..., 4:]).sum(-1, keepdim=True) * x, 8),
    "dot_with_shifted": (lambda x: (x * x.roll(1, -1)).sum(-1, keepdim=True) * x, 8),
}  # fmt: skip
"""What `between` runs in the middle, and how many channels it leaves."""


for _name, (_middle, _after) in TRAPS.items():

    def _trap(middle: Any = _middle, after: int = _after) -> Example:
        return between(middle, after=after)

    _trap.__name__ = f"trap_{_name}"
    net(_trap)


@net
def lstm() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(m.cell(m.embed(x))[0][:, -1])

    cell = nn.LSTM(8, 6, batch_first=True)
    return Net(run, embed=nn.Linear(7, 8), cell=cell, last=nn.Linear(6, 3)), (sequence(),)


@net
def gru() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(m.cell(m.embed(x))[0][:, -1])

    cell = nn.GRU(8, 6, batch_first=True)
    return Net(run, embed=nn.Linear(7, 8), cell=cell, last=nn.Linear(6, 3)), (sequence(),)


@net
def fold_of_unfold() -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        columns = F.unfold(x, 2, stride=2)
        x = x + F.fold(torch.tanh(columns), (4, 4), 2, stride=2)
        return m.last(x.mean((2, 3)))

    return Net(run, stem=unit(3, 8), last=nn.Linear(8, 3)), (image(3, 4, 4),)
