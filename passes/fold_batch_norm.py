"""Fold every batch norm into the convolution or linear layer before it (lossless in eval mode)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphzip.graph.trace import Traced
from graphzip.plan import FoldBatchNorm
from graphzip.rewrite.fold import fold_batch_norm

__all__ = ["FoldBatchNormPass"]


class FoldBatchNormPass:
    """`FoldBatchNorm` bound to a model; it has nothing to train."""

    stages = ("fold_batch_norm",)

    def __init__(self, options: FoldBatchNorm, traced: Traced, *, seed: int, where: str) -> None:
        self.folded: list[str] = []

    def convert(self, traced: Traced) -> Traced:
        result, self.folded = fold_batch_norm(traced)
        return result

    def collapse_(self, model: nn.Module) -> None:
        """The layers are folded by `convert` alone."""

    def pull_(self, model: nn.Module, fraction: float) -> None:
        """There is nothing to move."""

    def deviation(self, model: nn.Module) -> float:
        return 0.0

    def deviations(self, model: nn.Module) -> dict[str, float]:
        return {}

    def bind(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, steps: int | None) -> None:
        """Training is not constrained."""

    def state(self) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def load_state(self, state: torch.Tensor) -> None:
        """The pass decides nothing."""

    def widths(self) -> dict[str, tuple[int, int]]:
        return {}

    def summary(self) -> dict[str, Any]:
        return {"folded": self.folded}
