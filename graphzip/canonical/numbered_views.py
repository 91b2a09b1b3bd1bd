"""Views run on numbered positions: which places of a tensor does a chain of views show, and in which order?

Where sizes are open, the answer holds for all of them only if the view leaves these dimensions whole. That is checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphzip.canonical.memory import View, plain
from graphzip.graph.builder import Builder
from graphzip.graph.inputs import concrete_shape, hint

__all__ = ["constant", "in_order", "is_plain", "write_positions"]

aten = torch.ops.aten

_LARGEST = 1 << 24


def in_order(view: View, child: fx.Node) -> bool:
    """Whether a view shows all positions of its parent in their order, so that it is a reshape."""
    whole, shown = view.parent.meta["val"], child.meta["val"]
    if math.prod(concrete_shape(whole)) != math.prod(concrete_shape(shown)):
        return False
    if _is_row_major(whole) and _is_row_major(shown):
        return True
    numbers = _numbered(whole)
    return numbers is not None and torch.equal(_run(view, numbers).flatten(), numbers.flatten())


def _is_row_major(value: torch.Tensor) -> bool:
    """Whether the positions of a tensor lie one behind the other."""
    expected: Any = 1
    for size, step in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if plain(size) != 1 and plain(step) != expected:
            return False
        expected = expected * plain(size)
    return True


def is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor lies in memory from its start on, position after position."""
    return plain(value.storage_offset()) == 0 and _is_row_major(value)


def _numbered(value: torch.Tensor) -> torch.Tensor | None:
    """The number of every position, in a tensor with the strides of `value`; nothing where positions coincide."""
    sizes, strides = concrete_shape(value), [hint(step) for step in value.stride()]
    extent = 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
    if max(math.prod(sizes), extent) > _LARGEST or not all(sizes):
        return None
    numbers = torch.arange(math.prod(sizes)).reshape(sizes)
    made = torch.empty_strided(sizes, strides, dtype=torch.int64).copy_(numbers)
    return made if torch.equal(made, numbers) else None


def _run(view: View, numbers: torch.Tensor) -> torch.Tensor:
    def given(node: fx.Node) -> Any:
        value = node.meta["val"]
        if node is view.parent:
            return numbers
        return torch.zeros(concrete_shape(value)) if isinstance(value, torch.Tensor) else hint(value)

    def sized(argument: Any) -> Any:
        return hint(argument) if isinstance(argument, torch.SymInt) else argument

    args, kwargs = fx.node.map_aggregate(fx.node.map_arg((view.args, view.kwargs), given), sized)
    made: Any = view.maker.target(*args, **kwargs)  # type: ignore[operator]
    result: torch.Tensor = made if view.part is None else made[view.part]
    return result


def write_positions(
    build: Builder, steps: Sequence[tuple[fx.Node, View]], before: fx.Node, value: fx.Node
) -> fx.Node | None:
    """What a tensor has become when a view of it was given `value`; nothing where the view is not of the same places
    at all sizes.

    `steps` lead from the view up to the tensor, and `before` is the node of what the tensor was.
    """
    whole, shown = steps[-1][1].parent.meta["val"], steps[0][0].meta["val"]
    numbers = _numbered(whole)
    if numbers is None:
        return None
    for _, view in reversed(steps):
        if view.maker.target is aten.as_strided.default and plain(view.parent.meta["val"].storage_offset()) != 0:
            return None
        numbers = _run(view, numbers)
    opened = [
        [dim for dim, size in enumerate(each.shape) if not isinstance(plain(size), int)] for each in (whole, shown)
    ]
    pairs = _pairs(whole, shown, opened, numbers)
    if pairs is None:
        return None
    inside = _inside(numbers, concrete_shape(whole), pairs)
    if inside is None:
        return None
    return _write(build, before, whole, value, pairs, inside)


_Pairs = list[tuple[int, int]]
"""Open dimensions of a tensor and of its view that are the same."""


def _pairs(whole: torch.Tensor, shown: torch.Tensor, opened: list[list[int]], numbers: torch.Tensor) -> _Pairs | None:
    if len(opened[0]) != len(opened[1]):
        return None
    shape = concrete_shape(whole)
    pairs, left = [], list(opened[1])
    for dim in opened[0]:
        step = math.prod(shape[dim + 1 :])
        found = [
            other
            for other in left
            if plain(shown.shape[other]) == plain(whole.shape[dim]) and bool((numbers.diff(dim=other) == step).all())
        ]
        if not found:
            return None
        left.remove(found[0])
        pairs.append((dim, found[0]))
    return pairs


def _inside(numbers: torch.Tensor, shape: tuple[int, ...], pairs: _Pairs) -> torch.Tensor | None:
    """The positions that the view shows among those of the other dimensions, each of them once."""
    first = numbers
    for _, dim in sorted(pairs, key=lambda pair: -pair[1]):
        first = first.select(dim, 0)
    places = torch.unravel_index(first.flatten(), shape)
    taken = [dim for dim, _ in pairs]
    if any(bool(places[dim].any()) for dim in taken):
        return None
    inside = torch.zeros_like(places[0])
    for dim, place in enumerate(places):
        if dim not in taken:
            inside = inside * shape[dim] + place
    return inside if len(set(inside.tolist())) == inside.numel() else None


def _write(
    build: Builder, before: fx.Node, whole: torch.Tensor, value: fx.Node, pairs: _Pairs, inside: torch.Tensor
) -> fx.Node:
    """Lay the dimensions that are not open one behind the other, write there, and take them apart again."""
    dims, shown = [dim for dim, _ in pairs], [dim for _, dim in pairs]
    order = dims + [dim for dim in range(whole.dim()) if dim not in dims]
    given = shown + [dim for dim in range(value.meta["val"].dim()) if dim not in shown]
    fixed = [int(whole.shape[dim]) for dim in order[len(dims) :]]
    sizes: list[Any] = [-1] * len(dims)
    if len(dims) > 1:
        sizes = [build.known(whole.shape[dim], aten.sym_size.int, before, dim) for dim in dims]
    made = build(aten.reshape.default, _turn(build, value, given), [*sizes, inside.numel()])
    if not torch.equal(inside, torch.arange(math.prod(fixed))):
        flat = build(aten.reshape.default, _turn(build, before, order), [*sizes, math.prod(fixed)])
        made = build(aten.index_put.default, flat, [*[None] * len(dims), constant(build, inside, whole.device)], made)
    back = sorted(range(len(order)), key=order.__getitem__)
    return _turn(build, build(aten.reshape.default, made, [*sizes, *fixed]), back)


def _turn(build: Builder, value: fx.Node, order: list[int]) -> fx.Node:
    return value if order == sorted(order) else build(aten.permute.default, value, order)


def constant(build: Builder, numbers: torch.Tensor, device: torch.device) -> fx.Node:
    """A new constant of the model: positions."""
    module = build.graph.owning_module
    assert module is not None
    taken = sum(name.startswith(f"{build.place.name}_positions") for name, _ in module.named_buffers())
    return build.index(f"{build.place.name}_positions{taken or ''}", numbers, device)
