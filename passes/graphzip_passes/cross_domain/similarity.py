"""The similarity graph of channels, and what is asked of its embedding. No matrix of channels by channels is made.

Channel i has features `x_i`, a row of numbers; the graph joins channels i and j with the weight (Eq. 5)

    S_ij = <x_i, x_j> / (||x_i|| ||x_j||),

which is a Gram matrix: `S = F F^T` where the rows of the *factor* `F` (n, m) are the features at length one. All that
is needed of `S` is then a product with `F`. The degrees are `d = F (F^T 1)`, and for an embedding `z` (n, k)

    sum_ij S_ij ||z_i - z_j||^2 = 2 (sum_i d_i ||z_i||^2 - ||F^T z||^2).

Where features have both signs, so that some similarities are below zero and a degree could vanish, `(1 + S_ij) / 2`
takes the place of `S_ij`: it orders the pairs alike, and is the Gram matrix of the same rows with a constant added.

Source: Gao, Deng and Huang, "Cross Domain Model Compression by Structurally Weight Sharing" (2019), sections 3.1, 3.3
and 4.5.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["THRESHOLD", "degrees", "factor_of", "growl", "growl_weights", "simple_loss", "spectral_loss"]

THRESHOLD: Final = 0.3
"""Above this similarity the simple constraint draws channels together (section 4.5)."""


def factor_of(features: Tensor) -> Tensor:
    """`F` with `S = F F^T` for features (n, m): shape (n, m + 1). A channel that is zero everywhere is like none."""
    length = features.norm(dim=1, keepdim=True)
    live = length > torch.finfo(features.dtype).tiny
    unit = torch.where(live, features, 0.0) / torch.where(live, length, 1.0)
    mixed = bool((features < 0).any())
    constant = torch.ones_like(length) if mixed else torch.zeros_like(length)
    factor = torch.cat([unit, constant], dim=1)
    return factor / 2**0.5 if mixed else factor


def degrees(rows: Tensor, factor: Tensor) -> Tensor:
    """`d_i = sum_j S_ij` of the channels i whose rows of the factor are given; 1 for a channel that is like none."""
    found = rows @ factor.sum(0)
    return torch.where(found > 0.0, found, 1.0)


def spectral_loss(factor: Tensor, embedding: Tensor, *, normalized: bool) -> Tensor:
    """`1/n^2 sum_ij S_ij ||y_i - y_j||^2` with `y_i = z_i / d_i` where `normalized` (Eq. 10), else `y = z` (Eq. 7)."""
    weight = degrees(factor, factor)
    spread = embedding / weight[:, None] if normalized else embedding
    total = (weight * spread.square().sum(1)).sum() - (factor.t() @ spread).square().sum()
    return 2.0 * total / len(factor) ** 2


def simple_loss(factor: Tensor, *, threshold: float = THRESHOLD) -> Tensor:
    """The simple constraint, over pairs of different channels and divided by n^2 (Eq. 13).

    Channels whose similarity is above the threshold are drawn together, the others apart: a term `1 - S_ij` above it
    and `S_ij` below. (Eq. 13 is printed the other way round; this is what its text says.) This one needs `S` itself:
    give it a sample of the channels.
    """
    similarity = factor @ factor.t()
    terms = torch.where(similarity > threshold, 1.0 - similarity, similarity)
    return (terms.sum() - terms.diagonal().sum()) / len(factor) ** 2


def growl(channels: Tensor) -> Tensor:
    """Group ordered weighted lasso of one layer's weights (Eq. 2), `channels` being (n, weights of a channel).

    `sum_i w_i ||t_[i]||_2`, the norms in falling order and the weights `w_i = (n - i + 1) / n` falling evenly to 1/n.
    """
    norms = (channels.square().sum(1) + torch.finfo(channels.dtype).tiny).sqrt().sort(descending=True).values
    return (growl_weights(len(norms), norms) * norms).sum()


def growl_weights(count: int, like: Tensor) -> Tensor:
    """`w_i` (count,), falling evenly to `1 / count`."""
    return torch.arange(count, 0, -1, device=like.device, dtype=like.dtype) / count
