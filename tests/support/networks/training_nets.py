"""Layers that compute something else in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Adapted", "DropPath"]


class DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1)).bernoulli_(1 - self.rate) / (1 - self.rate)


class Adapted(nn.Linear):
    """A linear layer that adds its low-rank adapter to its weights for eval."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.down = nn.Parameter(torch.randn(2, inner))
        self.up = nn.Parameter(torch.randn(outer, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.T @ self.up.T
