"""Calibration data: batches that the passes and the report feed to a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from graphzip.arguments import re_iterable
from graphzip.graph.batches import batch_arguments, each_batch, run_batch
from graphzip.graph.copies import eval_copy
from graphzip.graph.torch_private import pytree

__all__ = ["check_calibration", "drift", "placed"]


@torch.no_grad()
def drift(before: nn.Module, after: nn.Module, calibration: Iterable[Any] | None, inputs: int) -> float | None:
    """Largest difference of outputs relative to the largest output, both in eval mode.

    `None` without calibration data, NaN where an output is not finite.
    """
    if calibration is None:
        return None
    old, new = eval_copy(before), eval_copy(after)
    worst = scale = 0.0
    for batch in each_batch(calibration):
        args = batch_arguments(batch, inputs)
        expected = run_batch(old, args)
        for left, right in zip(_leaves(expected), _leaves(run_batch(new, placed(args, old, new))), strict=True):
            if left.numel():
                apart, size = float((left - right.to(left.device)).abs().max()), float(left.abs().max())
                if not math.isfinite(apart):
                    return math.nan
                worst, scale = max(worst, apart), max(scale, size)
    return worst / scale if scale else worst


def _leaves(output: Any) -> list[torch.Tensor]:
    return [leaf.double() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def check_calibration(calibration: Iterable[Any] | None, model: nn.Module, inputs: int) -> None:
    """Raises `ExampleInputError` unless `calibration` can be gone through again and `model` takes its first batch."""
    if calibration is None:
        return
    for first in each_batch(re_iterable(calibration, "calibration")):
        with torch.no_grad():
            run_batch(eval_copy(model), batch_arguments(first, inputs))
        return


def placed(values: tuple[Any, ...], before: nn.Module, after: nn.Module) -> tuple[Any, ...]:
    """Inputs of `before` on the device and in the floating dtype of `after`, where the two differ."""
    old, new = (
        next(((p.dtype, p.device) for p in model.parameters() if p.is_floating_point()), None)
        for model in (before, after)
    )
    if old is None or new is None or old == new:
        return values

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(new[1], new[0] if value.dtype == old[0] else value.dtype)

    placed: tuple[Any, ...] = pytree.tree_map(move, values)
    return placed
