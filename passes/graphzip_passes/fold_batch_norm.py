"""Fold every batch norm into the convolution or linear layer before it (lossless in eval mode)."""

from __future__ import annotations

from typing import Any

from graphzip.graph.trace import Traced
from graphzip.plan import FoldBatchNorm
from graphzip.rewrite.fold import fold_batch_norm
from graphzip_passes.base import FreeTraining

__all__ = ["FoldBatchNormPass"]


class FoldBatchNormPass(FreeTraining):
    """`FoldBatchNorm` bound to a model; it has nothing to train."""

    stages = ("fold_batch_norm",)

    def __init__(self, options: FoldBatchNorm, traced: Traced, *, seed: int, where: str) -> None:
        self.folded: list[str] = []

    def convert(self, traced: Traced) -> Traced:
        result, self.folded = fold_batch_norm(traced)
        return result

    def summary(self) -> dict[str, Any]:
        return {"folded": self.folded}
