"""Other kinds of attention: windows, channels, linear, convolutional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attention_parts import (
    HEADS,
    INNER,
    STREAM,
    TOKENS,
    WIDTH,
    block,
    explicit,
    heads,
    joined,
    mlp,
    net,
    packed,
    projections,
    sequence,
    split,
)
from nets import Example, Net, conv, image, unit
from torch import Tensor, nn

# --- other kinds of attention ---------------------------------------------------------------------------------------


def _windows(x: Tensor, size: int) -> Tensor:
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, channels)


def _unwindows(x: Tensor, size: int, height: int, width: int) -> Tensor:
    x = x.view(-1, height // size, width // size, size, size, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


def _windowed(shift: int, layout: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]], **parts: Any) -> Example:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).permute(0, 2, 3, 1)
        y = torch.roll(m.norm1(x), (-shift, -shift), (1, 2))
        q, k, v = layout(m, _windows(y, 2))
        bias = m.table[m.index].view(4, 4, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        y = _unwindows(m.out(joined(explicit(q, k, v, bias))), 2, 4, 4)
        x = x + torch.roll(y, (shift, shift), (1, 2))
        x = x + m.mlp(m.norm2(x))
        y = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return m.last(m.merge(m.norm3(y)).flatten(1, 2).mean(1))

    return Net(
        run, patch=nn.Conv2d(3, STREAM, 2, 2), norm1=nn.LayerNorm(STREAM), table=nn.Parameter(torch.randn(9, HEADS)),
        index=torch.randint(0, 9, (16,)), out=nn.Linear(INNER, STREAM), norm2=nn.LayerNorm(STREAM), mlp=mlp(),
        norm3=nn.LayerNorm(4 * STREAM), merge=nn.Linear(4 * STREAM, 8, bias=False), last=nn.Linear(8, 3), **parts,
    ), (image(),)  # fmt: skip


@net
def windows() -> Example:
    """Swin: shifted windows with a bias table, then patch merging."""
    return _windowed(1, split, **projections())


@net
def windows_packed() -> Example:
    def layout(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return qkv[0] / 2, qkv[1], qkv[2]

    return _windowed(0, layout, qkv=packed())


@net
def windows_masked() -> Example:
    """A mask per window, added in five dimensions."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).permute(0, 2, 3, 1)
        q, k, v = split(m, _windows(x, 2))
        scores = q @ k.transpose(-2, -1)
        scores = scores.view(-1, 4, HEADS, 4, 4) + m.mask.unsqueeze(1).unsqueeze(0)
        y = joined(torch.softmax(scores.view(-1, HEADS, 4, 4), -1) @ v)
        return m.last((x + _unwindows(m.out(y), 2, 4, 4)).flatten(1, 2).mean(1))

    return Net(
        run, patch=nn.Conv2d(3, STREAM, 2, 2), **projections(), out=nn.Linear(INNER, STREAM),
        mask=torch.randn(4, 4, 4), last=nn.Linear(STREAM, 3),
    ), (image(),)  # fmt: skip


@net
def channel_attention() -> Example:
    """XCiT: channels attend to channels inside each head; q and k are normalised over the tokens."""

    def attend(m: Any, x: Tensor) -> Tensor:
        qkv = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, HEADS, WIDTH).permute(2, 0, 3, 4, 1)
        q, k, v = F.normalize(qkv[0], dim=-1), F.normalize(qkv[1], dim=-1), qkv[2]
        mixed = torch.softmax(q @ k.transpose(-2, -1) * m.temperature, -1) @ v
        return mixed.permute(0, 3, 1, 2).flatten(2)

    return block(attend, qkv=packed(), temperature=nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5))


@net
def channel_attention_groups() -> Example:
    """DaViT: the same without normalisation, on separate projections."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        scores = torch.softmax((q / TOKENS**0.5).transpose(-1, -2) @ k, -1)
        return joined((scores @ v.transpose(-1, -2)).transpose(-1, -2))

    return block(attend, **projections())


@net
def linear_attention() -> Example:
    """No softmax: `q (k^T v)`."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return joined(q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2).unsqueeze(-1)))

    return block(attend, **projections())


@net
def softmax_over_width() -> Example:
    """Efficient attention: softmax of q over the channels of a head."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        return joined(torch.softmax(q, -1) @ (torch.softmax(k, -2).transpose(-2, -1) @ v))

    return block(attend, **projections())


@net
def squared_scores() -> Example:
    """Cosine attention over the tokens, without heads."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k = F.normalize(m.q(x), dim=-1), F.normalize(m.k(x), dim=-1)
        return torch.relu(q @ k.transpose(1, 2)).square() @ m.v(x)

    return block(attend, **projections())


@net
def query_key_norm() -> Example:
    """One norm over the channels of a head, shared by all heads."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        return joined(F.scaled_dot_product_attention(m.qnorm(q), m.knorm(k), v))

    return block(attend, qnorm=nn.LayerNorm(WIDTH), knorm=nn.LayerNorm(WIDTH), **projections())


@net
def query_key_rms_norm() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        return joined(explicit(m.qnorm(q), m.knorm(k), v))

    return block(attend, qnorm=nn.RMSNorm(WIDTH), knorm=nn.RMSNorm(WIDTH), **projections())


@net
def query_key_cosine() -> Example:
    """Swin v2: cosine similarity, a temperature per head."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return joined(torch.softmax(scores * m.scale.clamp(max=4.0).exp(), -1) @ v)

    return block(attend, scale=nn.Parameter(torch.ones(HEADS, 1, 1)), **projections())


@net
def query_key_norm_all_heads() -> Example:
    """A norm over all heads at once, before they are split."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(m.qnorm(m.q(x))), heads(m.knorm(m.k(x))), heads(m.v(x))
        return joined(F.scaled_dot_product_attention(q, k, v))

    return block(attend, qnorm=nn.LayerNorm(INNER), knorm=nn.RMSNorm(INNER), **projections())


@net
def norm_after_attention() -> Example:
    """Heads are normalised one by one as groups (RetNet)."""

    def attend(m: Any, x: Tensor) -> Tensor:
        mixed = joined(F.scaled_dot_product_attention(*split(m, x)))
        return m.norm(mixed.flatten(0, 1)).view(-1, TOKENS, INNER)

    return block(attend, norm=nn.GroupNorm(HEADS, INNER), **projections())


@net
def convolution_on_scores() -> Example:
    """A depthwise convolution over the scores of each head."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        scores = m.each(q @ k.transpose(-2, -1) / 3)
        return joined(torch.softmax(scores, -1) @ v)

    return block(attend, each=nn.Conv2d(HEADS, HEADS, 3, padding=1, groups=HEADS), **projections())


@net
def convolution_on_values() -> Example:
    """A depthwise convolution over the values as an image (LePE)."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        q, k, v = (f(x).flatten(2).unflatten(1, (HEADS, WIDTH)).transpose(-2, -1) for f in (m.q, m.k, m.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-2, -1).reshape(-1, INNER, 4, 4)
        return m.last((m.out(mixed + m.local(m.v(x))) + x).mean((2, 3)))

    kinds = {name: conv(8, INNER, 1) for name in ("q", "k", "v")}
    return Net(
        run, stem=unit(3, 8), **kinds, local=conv(INNER, INNER, 3, groups=INNER), out=conv(INNER, 8, 1),
        last=nn.Linear(8, 3),
    ), (image(3, 4, 4),)  # fmt: skip


@net
def grouped_projections() -> Example:
    """q, k and v from a grouped convolution, one group per head."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(m.stem(x)).flatten(2).unflatten(1, (HEADS, 3, WIDTH)).unbind(2)
        mixed = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT.flatten(1, 2)
        return m.last(mixed.mean(2))

    parts = {"stem": unit(3, 8), "qkv": conv(8, 3 * INNER, 1, groups=HEADS), "last": nn.Linear(INNER, 3)}
    return Net(run, **parts), (image(3, 4, 4),)


@net
def encoder_layer() -> Example:
    layer = nn.TransformerEncoderLayer(INNER, HEADS, 14, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(7, INNER), layer, nn.Linear(INNER, 3)), (sequence(),)


@net
def encoder_layer_norm_first() -> Example:
    layer = nn.TransformerEncoderLayer(INNER, HEADS, 14, dropout=0.0, norm_first=True, activation="gelu")
    return nn.Sequential(nn.Linear(7, INNER), layer, nn.Linear(INNER, 3)), (sequence(),)


@net
def encoder_stack() -> Example:
    layer = nn.TransformerEncoderLayer(12, 3, 14, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(7, 12), encoder, nn.Linear(12, 3)), (sequence(),)


@net
def decoder_layer() -> Example:
    layer = nn.TransformerDecoderLayer(12, 3, 14, dropout=0.0, batch_first=True)

    def run(m: Any, x: Tensor, memory: Tensor) -> Tensor:
        return m.last(m.layer(m.embed(x), m.context(memory)))

    parts = {"embed": nn.Linear(7, 12), "context": nn.Linear(9, 12), "layer": layer, "last": nn.Linear(12, 3)}
    return Net(run, **parts), (sequence(), sequence(6, 9))
