"""Example inputs and the shapes that a traced graph accepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphzip.errors import InputShapeError

__all__ = ["InputSpec", "check_input", "concrete_shape", "hint", "input_specs", "with_batch_of_two"]


@dataclass(frozen=True)
class InputSpec:
    """One tensor input: its name, its shape (`None` where any size is accepted) and its dtype.

    `shape` is `()` and `dtype` is `None` for an argument that is not a tensor.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype | None


def with_batch_of_two(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Repeat a batch of one: `torch.export` would bake it into the graph as a constant."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors or tensors[0].shape[0] != 1:
        return inputs

    def repeat(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == 1:
            return torch.cat([leaf, leaf])
        return leaf

    repeated: tuple[Any, ...] = pytree.tree_map(repeat, inputs)
    return repeated


def concrete_shape(value: Any) -> tuple[int, ...]:
    """The shape of a fake tensor on the example inputs: symbolic sizes are replaced by the sizes traced with."""
    return tuple(hint(size) for size in value.shape)


def hint(size: Any) -> int:
    """The size that a possibly symbolic dimension had while tracing."""
    if isinstance(size, torch.SymInt):
        known: Any = size.node.hint
        return int(known)
    return int(size)


def input_specs(graph: fx.Graph) -> tuple[InputSpec, ...]:
    specs = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shape = tuple(None if isinstance(size, torch.SymInt) else int(size) for size in value.shape)
            specs.append(InputSpec(node.name, shape, value.dtype))
        else:
            specs.append(InputSpec(node.name, (), None))
    return tuple(specs)


def check_input(value: torch.Tensor, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
    """Hand `value` on if it has the shape the graph was made for, or raise `InputShapeError`."""
    fits = value.dim() == len(shape) and all(
        want is None or size == want for size, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise InputShapeError(
            f"input {name!r} has shape {tuple(value.shape)}, but the model was compiled for {wanted}; "
            "compile it with example_inputs of the new shape, or with dynamic_shapes"
        )
    return value
