"""A small network with a shortcut, for tests that shrink it."""

from __future__ import annotations

from planting import randomize_
from torch import Tensor, nn


class Residual(nn.Module):
    """`stem` and `out` make one group of eight channels, `inner` one of six."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.norm1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.out = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x)).relu()
        x = x + self.out(self.norm1(self.inner(x)).relu())
        result: Tensor = self.head(x.relu().mean((2, 3)))
        return result


def residual() -> Residual:
    """In float64 and eval mode, its buffers and affine parameters random too."""
    model = Residual().double().eval()
    randomize_(model, 0)
    return model
