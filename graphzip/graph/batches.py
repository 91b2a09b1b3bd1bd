"""Batches of a user's data, and a model that is run on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphzip.boundary import user_data
from graphzip.errors import ExampleInputError, GraphZipError, InputShapeError
from graphzip.graph.inputs import InputSpec, check_input

__all__ = ["check_batches", "each_batch", "leading", "run_batch", "samples_in"]


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


def samples_in(batch: Sequence[Any]) -> int:
    """How many samples a batch has, by the first of its tensors with a dimension."""
    return next((len(leaf) for leaf in batch if isinstance(leaf, torch.Tensor) and leaf.dim()), 1)


def leading(batches: Iterable[tuple[Any, ...]], samples: int) -> list[tuple[Any, ...]]:
    """The first batches, as many as have so many samples together, or all of them."""
    found: list[tuple[Any, ...]] = []
    count = 0
    for batch in batches:
        if count >= samples:
            break
        found.append(batch)
        count += samples_in(batch)
    return found


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


def run_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, what: str = "calibration"
) -> Any:
    """The output for one batch of the data that `what` names.

    Raises `ExampleInputError` for a batch that the model does not accept.
    """
    try:
        return model(*args, **(kwargs or {}))
    except (GraphZipError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        values = (*args, *(kwargs or {}).values())
        shapes = ", ".join(str(tuple(arg.shape)) if isinstance(arg, torch.Tensor) else repr(arg) for arg in values)
        raise ExampleInputError(
            f"{what}: {type(model).__name__} fails on a batch ({shapes}): {error}; make it yield batches that "
            "model(*batch) accepts"
        ) from error
