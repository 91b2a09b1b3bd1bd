"""Attention in which heads share parts of their channels, or lie with the batch in one dimension."""

from __future__ import annotations

from typing import Any

import torch
from attention_heads import angles, rotate_half
from attention_parts import HEADS, INNER, STREAM, WIDTH, block, heads, joined, net, packed
from nets import Example
from torch import Tensor, nn
from torch.nn import functional as F


@net
def packed_folded_into_the_batch() -> Example:
    """SAM's `(3, B, H, L, D) -> (3, B H, L, D)`, where the queries of all heads are scaled by the same numbers."""

    def attend(m: Any, x: Tensor) -> Tensor:
        batch, length = x.shape[0], x.shape[1]
        qkv = m.qkv(x).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, batch * HEADS, length, -1).unbind(0)
        scores = torch.softmax((q * m.scale) @ k.transpose(-2, -1), -1)
        mixed = (scores @ v).reshape(batch, HEADS, length, -1)
        return joined(mixed)

    return block(attend, qkv=packed(), scale=nn.Parameter(torch.randn(WIDTH)))


@net
def latent_keys_and_values() -> Example:
    """DeepSeek's: keys and values come from one narrow latent, and one part of the keys is the same in all heads."""

    def attend(m: Any, x: Tensor) -> Tensor:
        batch, length = x.shape[0], x.shape[1]
        latent, turned = torch.split(m.down(x), [6, 2], -1)
        k, v = torch.split(heads(m.up(m.norm(latent))), [4, WIDTH], -1)
        keys = k.new_empty(batch, HEADS, length, 6)
        keys[..., :4].copy_(k)
        keys[..., 4:].copy_(turned.view(batch, 1, length, 2).expand(-1, HEADS, -1, -1))
        return joined(F.scaled_dot_product_attention(heads(m.q(x)), keys, v))

    return block(
        attend, q=nn.Linear(STREAM, HEADS * 6), down=nn.Linear(STREAM, 8), norm=nn.LayerNorm(6),
        up=nn.Linear(6, HEADS * (4 + WIDTH)),
    )  # fmt: skip


@net
def rotary_of_a_part_packed() -> Example:
    """GPT-NeoX's: a head has its query, key and value in a row, and only the first channels of two of them turn."""
    cos, sin = angles()

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(m.qkv(x)).chunk(3, -1)
        q, k = (torch.cat([p[..., :4] * m.cos + rotate_half(p[..., :4]) * m.sin, p[..., 4:]], -1) for p in (q, k))
        return joined(F.scaled_dot_product_attention(q, k, v))

    return block(attend, INNER, cos=cos[:, :4], sin=sin[:, :4], qkv=packed())
