"""What the small attention networks of the tests are put together from, and the registry of their factories.

As in `nets`, a factory takes nothing and returns `(module, example inputs)`. Unless it says otherwise a network has
`HEADS` heads of `WIDTH` channels on a residual stream of `STREAM` channels, so that heads, widths and the stream can
be told apart by their sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from net_parts import register
from nets import Example, Net
from torch import Tensor, nn

ATTENTION_NETS: dict[str, Callable[[], Example]] = {}
HEADS, WIDTH, STREAM, TOKENS = 4, 6, 10, 5
INNER = HEADS * WIDTH


net = register(ATTENTION_NETS)


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
