"""Packed and split projections, grouped and shared heads, positions and masks."""

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
from nets import Example, Net, image
from torch import Tensor, nn

# --- packed and split projections ----------------------------------------------------------------------------------


@net
def sdpa() -> Example:
    return block(lambda m, x: joined(F.scaled_dot_product_attention(*split(m, x))), **projections())


@net
def explicit_attention() -> Example:
    return block(lambda m, x: joined(explicit(*split(m, x))), **projections())


@net
def values_of_another_width() -> Example:
    return block(lambda m, x: joined(explicit(*split(m, x))), HEADS * 4, **projections(values=HEADS * 4))


@net
def packed_3_h_d() -> Example:
    """timm's vision transformer."""

    def attend(m: Any, x: Tensor) -> Tensor:
        qkv = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], INNER)

    return block(attend, qkv=packed())


@net
def packed_3_h_d_indexed() -> Example:
    """Swin's: `qkv[0], qkv[1], qkv[2]`, the scale on q."""

    def attend(m: Any, x: Tensor) -> Tensor:
        qkv = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * WIDTH**-0.5, qkv[1], qkv[2]
        scores = torch.softmax(q.matmul(k.transpose(-2, -1)), -1)
        return scores.matmul(v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)

    return block(attend, qkv=packed())


@net
def packed_h_3_d() -> Example:
    """GPT-NeoX's: q, k and v stand side by side in every head."""

    def attend(m: Any, x: Tensor) -> Tensor:
        qkv = m.qkv(x).view(x.shape[0], x.shape[1], HEADS, 3 * WIDTH)
        q, k, v = (part.transpose(1, 2) for part in qkv.split(WIDTH, -1))
        return joined(F.scaled_dot_product_attention(q, k, v))

    return block(attend, qkv=packed())


@net
def packed_h_3_d_selected() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        qkv = m.qkv(x).view(x.shape[0], x.shape[1], HEADS, 3, WIDTH)
        q, k, v = (qkv[..., part, :].transpose(1, 2) for part in range(3))
        return joined(F.scaled_dot_product_attention(q, k, v))

    return block(attend, qkv=packed())


@net
def packed_h_d_3() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        qkv = m.qkv(x).view(x.shape[0], x.shape[1], HEADS, WIDTH, 3)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(-1))
        return joined(F.scaled_dot_product_attention(q, k, v))

    return block(attend, qkv=packed())


@net
def packed_chunk() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in m.qkv(x).chunk(3, -1))
        return joined(F.scaled_dot_product_attention(q, k, v))

    return block(attend, qkv=packed())


@net
def heads_innermost() -> Example:
    """NesT's: after attention the heads stand inside the widths, so that all of them keep the same places."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(x.shape[0], x.shape[1], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1).reshape(*x.shape[:2], -1)

    return block(attend, qkv=packed())


@net
def packed_d_h() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(x.shape[0], x.shape[1], 3, WIDTH, HEADS).permute(2, 0, 4, 1, 3)
        return joined(F.scaled_dot_product_attention(q, k, v))

    return block(attend, qkv=packed())


@net
def packed_split_unequal() -> Example:
    """q and k narrower than v."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in m.qkv(x).split([8, 8, INNER], -1))
        return joined(explicit(q, k, v))

    return block(attend, qkv=packed(16 + INNER))


@net
def packed_key_value() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        k, v = m.kv(x).reshape(x.shape[0], x.shape[1], 2, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return joined(explicit(heads(m.q(x)), k, v))

    return block(attend, q=nn.Linear(STREAM, INNER), kv=nn.Linear(STREAM, 2 * INNER))


@net
def folded_into_the_batch() -> Example:
    """`bmm` on `(B H, L, D)`."""

    def attend(m: Any, x: Tensor) -> Tensor:
        batch, length = x.shape[0], x.shape[1]
        q, k, v = (part.reshape(batch * HEADS, length, WIDTH) for part in split(m, x))
        scores = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / WIDTH**0.5, -1)
        return joined(torch.bmm(scores, v).view(batch, HEADS, length, WIDTH))

    return block(attend, **projections())


@net
def folded_sequence_first() -> Example:
    """fairseq's `(L, B, H D) -> (L, B H, D)`."""

    def attend(m: Any, x: Tensor) -> Tensor:
        batch, length = x.shape[0], x.shape[1]
        y = x.transpose(0, 1)
        q, k, v = (f(y).contiguous().view(length, batch * HEADS, WIDTH).transpose(0, 1) for f in (m.q, m.k, m.v))
        mixed = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 3, -1), v)
        return mixed.transpose(0, 1).reshape(length, batch, INNER).transpose(0, 1)

    return block(attend, **projections())


@net
def einsum_attention() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, WIDTH)) for f in (m.q, m.k, m.v))
        scores = torch.softmax(torch.einsum("blhd,bshd->bhls", q, k) / 2, -1)
        return torch.einsum("bhls,bshd->blhd", scores, v).flatten(2)

    return block(attend, **projections())


@net
def einsum_projections() -> Example:
    """Projections with a dimension for the heads, as in JAX."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("blc,chd->bhld", x, f) for f in (m.wq, m.wk, m.wv))
        return torch.einsum("bhld,hdc->blc", F.scaled_dot_product_attention(q, k, v), m.wo)

    parts = {name: nn.Parameter(torch.randn(STREAM, HEADS, WIDTH) / 3) for name in ("wq", "wk", "wv")}
    return block(attend, STREAM, wo=nn.Parameter(torch.randn(HEADS, WIDTH, STREAM) / 5), **parts)


@net
def multihead_attention() -> Example:
    part = nn.MultiheadAttention(INNER, HEADS, batch_first=True)
    into = nn.Linear(STREAM, INNER)
    return block(lambda m, x: m.attention(*(3 * [m.into(x)]), need_weights=False)[0], attention=part, into=into)


@net
def multihead_attention_with_weights() -> Example:
    part = nn.MultiheadAttention(INNER, HEADS, kdim=STREAM, vdim=STREAM)

    def attend(m: Any, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        mixed, weights = m.attention(m.into(y), y, y)
        return mixed.transpose(0, 1) * weights.sum(-1, keepdim=True)

    return block(attend, attention=part, into=nn.Linear(STREAM, INNER))


@net
def multihead_attention_bias_kv() -> Example:
    part = nn.MultiheadAttention(INNER, HEADS, batch_first=True, add_bias_kv=True)
    into = nn.Linear(STREAM, INNER)
    return block(lambda m, x: m.attention(*(3 * [m.into(x)]), need_weights=False)[0], attention=part, into=into)


@net
def cross_attention() -> Example:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = m.embed(x), m.context(y)
        q, k, v = heads(m.q(x)), heads(m.k(y)), heads(m.v(y))
        x = x + m.out(joined(F.scaled_dot_product_attention(q, k, v)))
        return m.last(x.mean(1))

    return Net(
        run, embed=nn.Linear(7, STREAM), context=nn.Linear(9, STREAM), **projections(), out=nn.Linear(INNER, STREAM),
        last=nn.Linear(STREAM, 3),
    ), (sequence(), sequence(6, 9))  # fmt: skip


# --- grouped and shared heads ---------------------------------------------------------------------------------------


def _grouped(spread: Callable[[Tensor], Tensor], kept: int = 2) -> Example:
    """Fewer heads of keys and values than of queries."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(m.q(x), 4), heads(m.k(x), kept), heads(m.v(x), kept)
        return joined(F.scaled_dot_product_attention(q, spread(k), spread(v)))

    return block(attend, **projections(keys=kept * WIDTH, values=kept * WIDTH))


@net
def grouped_query_expand() -> Example:
    """Llama's `repeat_kv`."""

    def spread(x: Tensor) -> Tensor:
        batch, count, length, width = x.shape
        return x[:, :, None].expand(batch, count, 2, length, width).reshape(batch, count * 2, length, width)

    return _grouped(spread)


@net
def grouped_query_interleave() -> Example:
    return _grouped(lambda x: x.repeat_interleave(2, dim=1))


@net
def grouped_query_sdpa() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(m.q(x)), heads(m.k(x), 2), heads(m.v(x), 2)
        return joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))

    return block(attend, **projections(keys=2 * WIDTH, values=2 * WIDTH))


@net
def grouped_query_five_dims() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        q = heads(m.q(x)).unflatten(1, (2, 2))
        k, v = heads(m.k(x), 2).unsqueeze(2), heads(m.v(x), 2).unsqueeze(2)
        return joined(explicit(q, k, v).flatten(1, 2))

    return block(attend, **projections(keys=2 * WIDTH, values=2 * WIDTH))


@net
def multi_query_broadcast() -> Example:
    return _grouped(lambda x: x, kept=1)


@net
def multi_query_expand() -> Example:
    return _grouped(lambda x: x.expand(-1, HEADS, -1, -1), kept=1)


@net
def multi_query_repeat() -> Example:
    return _grouped(lambda x: x.repeat(1, HEADS, 1, 1), kept=1)


@net
def talking_heads() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        scores = m.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1) / 3).permute(0, 3, 1, 2)
        scores = m.after(torch.softmax(scores, -1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return joined(scores @ v)

    return block(attend, before=nn.Linear(HEADS, HEADS), after=nn.Linear(HEADS, HEADS), **projections())


@net
def talking_heads_convolution() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        return joined(torch.softmax(m.talk(q @ k.transpose(-2, -1) / 3), -1) @ v)

    return block(attend, talk=nn.Conv2d(HEADS, HEADS, 1), **projections())


@net
def scale_per_head() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        mixed = torch.softmax(q @ k.transpose(-2, -1) * m.temperature, -1) @ v
        return joined(mixed * m.gate)

    scale = nn.Parameter(torch.rand(HEADS, 1, 1)), nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
    return block(attend, temperature=scale[0], gate=scale[1], **projections())


@net
def gate_per_head() -> Example:
    """A gate per head that is computed from the input."""

    def attend(m: Any, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*split(m, x))
        return joined(mixed * torch.sigmoid(m.gate(x)).transpose(1, 2).unsqueeze(-1))

    return block(attend, gate=nn.Linear(STREAM, HEADS), **projections())


@net
def attention_scores_as_output() -> Example:
    """The scores of all heads, averaged, are an output."""

    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = m.embed(x)
        q, k, v = split(m, x)
        scores = torch.softmax(q @ k.transpose(-2, -1) / 3, -1)
        return m.out(joined(scores @ v)), scores.mean(1)

    return Net(run, embed=nn.Linear(7, STREAM), out=nn.Linear(INNER, 3), **projections()), (sequence(),)


# --- positions and masks --------------------------------------------------------------------------------------------


def angles() -> tuple[Tensor, Tensor]:
    frequencies = torch.outer(torch.arange(TOKENS).float(), 1.0 / 10 ** (torch.arange(0, WIDTH, 2) / WIDTH))
    turned = torch.cat([frequencies, frequencies], -1)
    return turned.cos(), turned.sin()


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _rotary(rotate: Callable[[Tensor], Tensor]) -> Example:
    cos, sin = angles()

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        q, k = (part * m.cos + rotate(part) * m.sin for part in (q, k))
        return joined(F.scaled_dot_product_attention(q, k, v))

    return block(attend, cos=cos, sin=sin, **projections())


@net
def rotary_halves() -> Example:
    return _rotary(rotate_half)


@net
def rotary_pairs() -> Example:
    return _rotary(_rotate_pairs)


@net
def rotary_complex() -> Example:
    """Llama's first form: pairs of channels as complex numbers."""

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        turn = torch.polar(torch.ones_like(m.angles), m.angles)
        q, k = (
            torch.view_as_real(torch.view_as_complex(p.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            for p in (q, k)
        )
        return joined(F.scaled_dot_product_attention(q, k, v))

    return block(attend, angles=torch.rand(TOKENS, WIDTH // 2), **projections())


@net
def rotary_of_a_part() -> Example:
    """Only the first channels of a head turn."""
    cos, sin = angles()

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        q, k = (torch.cat([p[..., :4] * m.cos + rotate_half(p[..., :4]) * m.sin, p[..., 4:]], -1) for p in (q, k))
        return joined(F.scaled_dot_product_attention(q, k, v))

    return block(attend, cos=cos[:, :4], sin=sin[:, :4], **projections())


@net
def learned_positions() -> Example:
    """Class and register tokens, learned positions, the class token is read."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.cls.expand(x.shape[0], -1, -1), m.registers.expand(x.shape[0], -1, -1), x], 1) + m.positions
        y = m.norm1(x)
        x = x + m.out(joined(F.scaled_dot_product_attention(*split(m, y))))
        x = x + m.mlp(m.norm2(x))
        return m.last(m.norm3(x)[:, 0])

    return Net(
        run, patch=nn.Conv2d(3, STREAM, 4, 4), cls=nn.Parameter(torch.randn(1, 1, STREAM)),
        registers=nn.Parameter(torch.randn(1, 2, STREAM)), positions=nn.Parameter(torch.randn(1, 7, STREAM)),
        norm1=nn.LayerNorm(STREAM), **projections(), out=nn.Linear(INNER, STREAM), norm2=nn.LayerNorm(STREAM),
        mlp=mlp(), norm3=nn.LayerNorm(STREAM), last=nn.Linear(STREAM, 3),
    ), (image(),)  # fmt: skip


@net
def position_embedding_table() -> Example:
    """Positions from an embedding of `arange`."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x) + m.positions(torch.arange(TOKENS, device=x.device))
        x = x + m.out(joined(F.scaled_dot_product_attention(*split(m, x), is_causal=True)))
        return m.last(m.norm(x)[:, -1])

    return Net(
        run, embed=nn.Linear(7, STREAM), positions=nn.Embedding(9, STREAM), **projections(),
        out=nn.Linear(INNER, STREAM), norm=nn.LayerNorm(STREAM), last=nn.Linear(STREAM, 3),
    ), (sequence(),)  # fmt: skip


def _relative_index(length: int) -> Tensor:
    return torch.arange(length)[:, None] - torch.arange(length)[None] + length - 1


@net
def relative_position_bias() -> Example:
    """A table with a column per head, indexed by a constant."""

    def attend(m: Any, x: Tensor) -> Tensor:
        bias = m.table[m.index.view(-1)].view(TOKENS, TOKENS, -1).permute(2, 0, 1).unsqueeze(0)
        return joined(explicit(*split(m, x), bias))

    table = nn.Parameter(torch.randn(2 * TOKENS - 1, HEADS))
    return block(attend, table=table, index=_relative_index(TOKENS), **projections())


@net
def relative_position_embedding() -> Example:
    """T5's: an embedding with a column per head."""

    def attend(m: Any, x: Tensor) -> Tensor:
        bias = m.table(m.index).permute(2, 0, 1).unsqueeze(0)
        return joined(F.scaled_dot_product_attention(*split(m, x), attn_mask=bias))

    table = nn.Embedding(2 * TOKENS - 1, HEADS)
    return block(attend, table=table, index=_relative_index(TOKENS), **projections())


@net
def slope_per_head() -> Example:
    """ALiBi: a fixed slope per head times the distance."""

    def attend(m: Any, x: Tensor) -> Tensor:
        return joined(explicit(*split(m, x), m.slopes.view(HEADS, 1, 1) * m.distance))

    distance = -_relative_index(TOKENS).float().abs()
    return block(attend, slopes=0.5 ** torch.arange(HEADS).float(), distance=distance, **projections())


@net
def causal_tril() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        scores = (q @ k.transpose(-2, -1) / 3).masked_fill(m.mask[:, :, :TOKENS, :TOKENS] == 0, float("-inf"))
        return joined(torch.softmax(scores, -1) @ v)

    return block(attend, mask=torch.tril(torch.ones(9, 9)).view(1, 1, 9, 9), **projections())


@net
def causal_made_in_forward() -> Example:
    def attend(m: Any, x: Tensor) -> Tensor:
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=x.device).tril()
        scores = split(m, x)
        return joined(explicit(*scores, torch.where(mask, 0.0, float("-inf")).to(x.dtype)))

    return block(attend, **projections())


@net
def mask_as_an_input() -> Example:
    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = m.embed(x)
        mixed = F.scaled_dot_product_attention(*split(m, x), attn_mask=mask[:, None, None, :] > -1)
        return m.out(joined(mixed)).mean(1)

    example = sequence(), torch.rand(2, TOKENS)
    return Net(run, embed=nn.Linear(7, STREAM), out=nn.Linear(INNER, 3), **projections()), example
