"""Sizes that are asked to be open by name, in place of what `torch.export` takes: `dynamic_shapes="height,width"`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Final

import torch

from graphzip.errors import ExampleInputError
from graphzip.graph.torch_private import pytree

__all__ = ["by_name", "named_dims"]

_PLACES: Final[dict[str, Callable[[int], int | None]]] = {
    "batch": lambda dims: 0 if dims else None,
    "length": lambda dims: 1 if dims == 2 else None,
    "depth": lambda dims: 2 if dims == 5 else None,
    "height": lambda dims: dims - 2 if dims > 3 else None,
    "width": lambda dims: dims - 1 if dims > 3 else None,
}
"""Where an input of so many dimensions has a size; `None` where it has it not."""

_KNOWN: Final = (
    "batch, length (of inputs batch x length), height, width (the last two of four or more dimensions), depth (of "
    "five) or the number of a dimension"
)


def by_name(shapes: Any) -> tuple[str | int, ...] | None:
    """The names and numbers of sizes that are to be open; `None` where `shapes` is something else.

    Raises `ExampleInputError` for a name that no size has.
    """
    if isinstance(shapes, str):
        parts: Sequence[Any] = [part.strip() for part in shapes.split(",")]
    elif isinstance(shapes, list | tuple) and shapes and all(isinstance(each, str | Integral) for each in shapes):
        parts = shapes
    else:
        return None
    named = tuple(int(part) if str(part).isdecimal() else part for part in parts)
    for name in named:
        if not isinstance(name, int) and name not in _PLACES:
            raise ExampleInputError(f"dynamic_shapes: {name!r} is no size; write {_KNOWN}")
    return named


def named_dims(names: Sequence[str | int], call: Any) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The tensors of a call with dimensions, and for each those that are to be open: the named ones and the batch.

    Raises `ExampleInputError` for a size that no input has.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    found = [{0} if tensor.shape[0] == tensors[0].shape[0] else set[int]() for tensor in tensors]
    for name in names:
        places = [_place(name, tensor.dim()) for tensor in tensors]
        if not any(place is not None for place in places):
            shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors)
            raise ExampleInputError(f"dynamic_shapes: no input has {name!r}; they are {shapes or 'no tensors'}")
        for dims, place in zip(found, places, strict=True):
            dims |= {place} - {None}  # type: ignore[arg-type]
    return tensors, [sorted(dims) for dims in found]


def _place(name: str | int, dims: int) -> int | None:
    return _PLACES[name](dims) if isinstance(name, str) else name if name < dims else None
