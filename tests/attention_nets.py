"""Small networks around attention and normalisation, one factory each, in the registry `ATTENTION_NETS`.

As in `nets`, a factory takes nothing and returns `(module, example inputs)`. Unless it says otherwise a network has
`HEADS` heads of `WIDTH` channels on a residual stream of `STREAM` channels, so that heads, widths and the stream can
be told apart by their sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from nets import Example, Net, conv, image, unit
from torch import Tensor, nn
from torch.nn.utils import parametrizations

ATTENTION_NETS: dict[str, Callable[[], Example]] = {}
HEADS, WIDTH, STREAM, TOKENS = 4, 6, 10, 5
INNER = HEADS * WIDTH


def net(factory: Callable[[], Example]) -> Callable[[], Example]:
    """Register a factory, seeded, under its own name."""

    def build() -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return factory()

    ATTENTION_NETS[factory.__name__] = build
    return build


def sequence(*size: int) -> Tensor:
    """A batch of two random sequences of vectors."""
    return torch.randn(2, *(size or (TOKENS, 7)))


def mlp(width: int = STREAM, hidden: int = 12) -> nn.Sequential:
    """Two linear layers with a GELU between them."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def block(attend: Callable[[Any, Tensor], Tensor], inner: int = INNER, **parts: Any) -> Example:
    """`x + out(attend(norm(x)))`, then `x + mlp(norm(x))`: a transformer block between an embedding and a head."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.out(attend(m, m.norm1(x)))
        x = x + m.mlp(m.norm2(x))
        return m.last(m.norm3(x).mean(1))

    return Net(
        run, embed=nn.Linear(7, STREAM), norm1=nn.LayerNorm(STREAM), out=nn.Linear(inner, STREAM),
        norm2=nn.LayerNorm(STREAM), mlp=mlp(), norm3=nn.LayerNorm(STREAM), last=nn.Linear(STREAM, 3), **parts,
    ), (sequence(),)  # fmt: skip


def projections(queries: int = INNER, keys: int = INNER, values: int = INNER) -> dict[str, nn.Module]:
    """Separate q, k and v."""
    return {
        "q": nn.Linear(STREAM, queries),
        "k": nn.Linear(STREAM, keys),
        "v": nn.Linear(STREAM, values),
    }


def packed(width: int = 3 * INNER) -> nn.Linear:
    """One projection for q, k and v."""
    return nn.Linear(STREAM, width)


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    """`(B, L, H D) -> (B, H, L, D)`."""
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """`(B, H, L, D) -> (B, L, H D)`."""
    return x.transpose(1, 2).flatten(2)


def explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix product, softmax, matrix product."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return torch.softmax(scores if bias is None else scores + bias, -1) @ v


def split(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of separate projections."""
    return heads(m.q(x)), heads(m.k(x)), heads(m.v(x))


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


def _angles() -> tuple[Tensor, Tensor]:
    frequencies = torch.outer(torch.arange(TOKENS).float(), 1.0 / 10 ** (torch.arange(0, WIDTH, 2) / WIDTH))
    angles = torch.cat([frequencies, frequencies], -1)
    return angles.cos(), angles.sin()


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _rotary(rotate: Callable[[Tensor], Tensor]) -> Example:
    cos, sin = _angles()

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        q, k = (part * m.cos + rotate(part) * m.sin for part in (q, k))
        return joined(F.scaled_dot_product_attention(q, k, v))

    return block(attend, cos=cos, sin=sin, **projections())


@net
def rotary_halves() -> Example:
    return _rotary(_rotate_half)


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
    cos, sin = _angles()

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m, x)
        q, k = (torch.cat([p[..., :4] * m.cos + _rotate_half(p[..., :4]) * m.sin, p[..., 4:]], -1) for p in (q, k))
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
