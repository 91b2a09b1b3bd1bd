"""Batches of a user's data, and a model that is run on them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphzip.errors import ExampleInputError, GraphZipError, InputShapeError
from graphzip.graph.inputs import InputSpec, check_input
from graphzip.graph.torch_private import pytree
from graphzip.guard import user_data

__all__ = ["batch_arguments", "check_batches", "each_batch", "run_batch"]

logger = logging.getLogger(__name__)


def each_batch(calibration: Iterable[Any]) -> Iterator[Any]:
    """The batches of calibration data. Raises `ExampleInputError` where there are none, or none are left."""
    empty = True
    for batch in user_data(calibration):
        empty = False
        yield batch
    if empty:
        raise ExampleInputError(
            "calibration yields no batch; pass at least one, in a list or a DataLoader, which can be gone through again"
        )


def check_batches(inputs: Sequence[InputSpec], batches: Sequence[tuple[Any, ...]]) -> None:
    """Raises `ExampleInputError` unless a graph with these inputs takes each of the batches."""
    for number, leaves in enumerate(batches):
        if len(leaves) != len(inputs):
            raise ExampleInputError(
                f"calibration: the traced model takes {len(inputs)} inputs, a batch brings {len(leaves)}; give batches "
                "of the structure of example_inputs"
            )
        for leaf, spec in zip(leaves, inputs, strict=True):
            if spec.dtype is None:
                continue
            try:
                check_input(leaf, spec.name, spec.shape, spec.dtype)
            except InputShapeError as error:
                raise ExampleInputError(f"calibration: batch {number}: {error}") from None
            if 0 in leaf.shape and not any(size == 0 for size in spec.shape):
                raise ExampleInputError(
                    f"calibration: batch {number}: input {spec.name!r} has the shape {tuple(leaf.shape)}, which holds "
                    "nothing; leave the batch out"
                )


def run_batch(model: nn.Module, args: tuple[Any, ...], what: str = "calibration") -> Any:
    """The output for one batch of the data that `what` names.

    Raises `ExampleInputError` for a batch that the model does not accept.
    """
    try:
        return model(*args)
    except GraphZipError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(arg.shape)) if isinstance(arg, torch.Tensor) else repr(arg) for arg in args)
        raise ExampleInputError(
            f"{what}: {type(model).__name__} fails on a batch ({shapes}): {error}; make it yield batches that "
            "model(*batch) accepts"
        ) from error


def batch_arguments(batch: Any, inputs: int) -> tuple[Any, ...]:
    """The positional inputs of one calibration batch; what a loader yields beyond them (labels) is left out."""
    if isinstance(batch, Mapping):
        raise ExampleInputError("calibration yields a mapping; make it yield a tensor or a tuple of positional inputs")
    args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if len(args) > inputs:
        logger.info("calibration batches have %d entries, the model takes %d: the rest is left out", len(args), inputs)
    first = next((leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)), None)
    if first is not None and first.dim() and first.shape[0] == 0:
        raise ExampleInputError(f"calibration: a batch of {tuple(first.shape)} has no sample; leave it out")
    return args[:inputs]
