"""Calibration data: batches that the passes and the report feed to a model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphzip.errors import ExampleInputError, GraphZipError
from graphzip.graph.copies import eval_copy

__all__ = ["batch_arguments", "check_calibration", "drift", "placed", "run_batch"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def drift(before: nn.Module, after: nn.Module, calibration: Iterable[Any] | None, inputs: int) -> float | None:
    """Largest difference of outputs relative to the largest output, both in eval mode.

    `None` without calibration data, NaN where an output is not finite.
    """
    if calibration is None:
        return None
    old, new = eval_copy(before), eval_copy(after)
    worst = scale = 0.0
    for batch in calibration:
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


def run_batch(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """The output for one calibration batch. Raises `ExampleInputError` for a batch that the model does not accept."""
    try:
        return model(*args)
    except GraphZipError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(arg.shape)) if isinstance(arg, torch.Tensor) else repr(arg) for arg in args)
        raise ExampleInputError(
            f"calibration: {type(model).__name__} fails on a batch ({shapes}): {error}; make it yield batches that "
            "model(*batch) accepts"
        ) from error


def check_calibration(calibration: Iterable[Any] | None, model: nn.Module, inputs: int) -> None:
    """Raises `ExampleInputError` unless `calibration` can be gone through again and `model` takes its first batch."""
    if calibration is None:
        return
    if isinstance(calibration, torch.Tensor | Mapping | str):
        raise ExampleInputError(
            f"calibration is a {type(calibration).__name__}; pass a list of batches or a DataLoader"
        )
    batches = iter(calibration)
    if batches is calibration:
        raise ExampleInputError(
            f"calibration is a {type(calibration).__name__}, which can be gone through only once; pass a list of "
            "batches or a DataLoader"
        )
    first = next(batches, None)
    if first is None:
        raise ExampleInputError("calibration yields no batch; pass at least one")
    with torch.no_grad():
        run_batch(eval_copy(model), batch_arguments(first, inputs))


def batch_arguments(batch: Any, inputs: int) -> tuple[Any, ...]:
    """The positional inputs of one calibration batch; what a loader yields beyond them (labels) is left out."""
    if isinstance(batch, Mapping):
        raise ExampleInputError("calibration yields a mapping; make it yield a tensor or a tuple of positional inputs")
    args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if len(args) > inputs:
        logger.info("calibration batches have %d entries, the model takes %d: the rest is left out", len(args), inputs)
    return args[:inputs]


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
