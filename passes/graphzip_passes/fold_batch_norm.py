"""Fold every batch norm into the convolution or linear layer before it (lossless in eval mode)."""

from __future__ import annotations

from graphzip.graph.traced import Traced
from graphzip.plan.passes import FoldBatchNorm
from graphzip.report.outcome import Outcome
from graphzip.rewrite.fold import fold_batch_norm
from graphzip_passes.base import PassContext, register_pass

__all__ = ["fold"]


@register_pass(FoldBatchNorm, only_reads=True)
def fold(traced: Traced, options: FoldBatchNorm, context: PassContext) -> Outcome:
    """Carry `FoldBatchNorm` out; there is nothing to decide and nothing to train."""
    result, folded = fold_batch_norm(traced)
    return Outcome(result, changed=bool(folded), proven=True, details={"folded": folded})
