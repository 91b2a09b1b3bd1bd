"""What more than one part of the compiler asks about operators: sets of them, and the arguments of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["CONVOLUTIONS", "COPIES", "TRANSPOSED", "argument_of", "arguments_of", "is_view", "set_argument"]

aten = torch.ops.aten

CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
COPIES = (aten.contiguous.default, aten.clone.default)
"""What returns its input with the same values and shape."""


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults filled in; `None` where one is missing and has none."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {argument.name: argument.default_value for argument in schema.arguments}
    bound.update({argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)})
    bound.update(node.kwargs)
    return bound


def argument_of(node: fx.Node, name: str) -> Any:
    """One of them."""
    return arguments_of(node)[name]


def is_view(node: fx.Node) -> bool:
    """Whether it is a call that may give its input's own memory, seen in another way."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(each.alias_info is not None for each in schema.returns)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give argument `name` of an ATen call another value."""
    schema = node.target._schema  # type: ignore[union-attr]
    place = [argument.name for argument in schema.arguments].index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)
