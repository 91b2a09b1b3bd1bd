"""Blocks of several layers for random networks; each keeps the shape of an image (batch, channels, height, width)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = ("explicit", "packed", "packed_heads", "chunk", "plain", "grouped", "interleaved", "normed")
"""Ways to lay out and multiply the q, k and v of an attention."""


class Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(channels, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.norm(self.one(x))))


class Scale(nn.Module):
    def __init__(self, channels: int, trained: bool) -> None:
        super().__init__()
        value = torch.rand(channels, 1, 1) + 0.5
        if trained:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Tied(nn.Module):
    """One weight, there and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, channels) / channels**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(F.linear(x.permute(0, 2, 3, 1), self.weight))
        return (y @ self.weight).permute(0, 3, 1, 2)


class Gated(nn.Module):
    """GEGLU, SwiGLU with two projections, GLU."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.gate = nn.Linear(channels, 12 if kind != "swiglu" else 6), nn.Linear(channels, 6)
        self.down = nn.Linear(6, channels)
        if kind != "swiglu":
            del self.gate

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x.permute(0, 2, 3, 1))
        if self.kind == "swiglu":
            y = F.silu(self.gate(x.permute(0, 2, 3, 1))) * y
        elif self.kind == "geglu":
            a, b = y.chunk(2, -1)
            y = F.gelu(a) * b
        else:
            y = F.glu(y, -1)
        return self.down(y).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Attention over the positions of an image; `kind` says how q, k and v are laid out and multiplied."""

    def __init__(self, channels: int, heads: int, width: int, kind: str) -> None:
        super().__init__()
        self.kind, self.heads, self.width = kind, heads, width
        self.shared = heads // 2 if kind in {"grouped", "interleaved"} and heads % 2 == 0 else heads
        if kind in {"packed", "packed_heads", "chunk"}:
            self.qkv = nn.Linear(channels, 3 * heads * width)
        else:
            self.q = nn.Linear(channels, heads * width)
            self.k, self.v = (nn.Linear(channels, self.shared * width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(heads * width, channels)
        if kind != "normed":
            del self.norm

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length = x.shape[:2]
        if self.kind == "packed":
            q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
            return q, k, v
        if self.kind == "packed_heads":
            parts = self.qkv(x).view(batch, length, self.heads, 3 * self.width).transpose(1, 2)
            return parts.chunk(3, -1)
        q, k, v = self.qkv(x).chunk(3, -1) if self.kind == "chunk" else (self.q(x), self.k(x), self.v(x))
        return tuple(part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in (q, k, v))

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(2).transpose(1, 2)
        q, k, v = self.project(x)
        if self.kind == "interleaved" and self.shared < self.heads:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if self.kind == "normed":
            q, k = self.norm(q), F.normalize(k, dim=-1)
        if self.kind in {"chunk", "explicit"}:
            y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kind == "grouped")
        return self.out(y.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(image) + image
