"""Take packed projections apart.

`qkv.view(.., 3, H, D)` followed by one `select` per part lays three different groups of channels out in one array, so
that they could only shrink together. Each part is cut out of the packed dimension first; every part then has a view of
its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphzip.graph.builder import Builder
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.meta import place_meta
from graphzip.graph.operators import COPIES
from graphzip.graph.sizes import number, open_dims, stand_ins

__all__ = ["unpack"]

aten = torch.ops.aten

_VIEWS = {aten.view.default, aten.reshape.default, aten.unflatten.int, aten._unsafe_view.default}


def unpack(module: fx.GraphModule) -> None:
    """Rewrite every `select` (or part of an `unbind`) of a dimension that a view has split off."""
    for node in list(module.graph.nodes):
        if node.target is aten.unbind.int:
            _selects_for(node)
    for node in list(module.graph.nodes):
        if node.target is aten.select.int and isinstance(node.args[2], int):
            _take_apart(node)


def _selects_for(unbind: fx.Node) -> None:
    source, dim = unbind.args[0], unbind.args[1] if len(unbind.args) > 1 else 0
    for part in list(unbind.users):
        select = Builder.before(part).known(part.meta["val"], aten.select.int, source, dim, part.args[1])
        part.replace_all_uses_with(select)
        unbind.graph.erase_node(part)
    unbind.graph.erase_node(unbind)


def _take_apart(select: fx.Node) -> None:
    source, dim, index = select.args
    assert isinstance(source, fx.Node)
    assert isinstance(dim, int)
    assert isinstance(index, int)
    chain, places = _trace_back(source, dim % len(source.meta["val"].shape))
    if not chain:
        return
    view, place = chain[0], places[0]
    packed = view.args[0]
    assert isinstance(packed, fx.Node)
    split = _split_of(packed.meta["val"], view.meta["val"], place)
    if split is None:
        return
    at, run = split
    after = concrete_shape(view.meta["val"])
    part = index % after[place]
    numbers = torch.arange(math.prod(after[d] for d in run)).reshape([after[d] for d in run])
    chosen = numbers.select(run.index(place), part).flatten()
    build = Builder.before(select)
    current = _cut(build, packed, at, chosen)
    for node, at in zip(chain, places, strict=True):
        current = _again(build, node, current, at if node.target in _VIEWS else None)
    select.args = (current, dim, 0)


def _trace_back(node: fx.Node, dim: int) -> tuple[list[fx.Node], list[int]]:
    """The nodes from the view that splits to `node`, and for each which of its dimensions became `dim`; or nothing."""
    chain, places = [node], [dim]
    while True:
        first = chain[0]
        source = first.args[0] if first.args else None
        moved = _before(first, places[0])
        if moved is None and first.target in _VIEWS:
            return chain, places
        if moved is None or not isinstance(source, fx.Node):
            return [], []
        chain.insert(0, source)
        places.insert(0, moved)


def _before(node: fx.Node, dim: int) -> int | None:
    """The dimension of the operand that became dimension `dim`."""
    if node.target in COPIES:
        return dim
    if node.target in _VIEWS:
        return _left_alone(node, dim)
    rank = len(node.meta["val"].shape)
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return int(order[dim]) % rank
    if node.target is aten.transpose.int:
        first, second = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        return {first: second, second: first}.get(dim, dim)
    if node.target is aten.unsqueeze.default:
        added = int(node.args[1]) % rank  # type: ignore[arg-type]
        return None if dim == added else dim - (dim > added)
    if node.target is aten.squeeze.dim:
        before = len(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
        gone = int(node.args[1]) % before  # type: ignore[arg-type]
        return dim + (dim >= gone) if rank < before else dim
    return None


def _left_alone(view: fx.Node, dim: int) -> int | None:
    """The dimension of the operand that a view has at `dim` as it was, while it lays out others anew."""
    source, value = view.args[0].meta["val"], view.meta["val"]  # type: ignore[union-attr]
    before, after = stand_ins(source.shape, value.shape)
    if after[dim] == 1 or dim in open_dims(value):
        return None
    same = (at for at, size in enumerate(before) if size == after[dim])
    return next((at for at in same if math.prod(before[:at]) == math.prod(after[:dim])), None)


def _split_of(packed: torch.Tensor, view: torch.Tensor, place: int) -> tuple[int, list[int]] | None:
    """The dimension of the operand that the view splits into several, `place` among them, and those dimensions.

    Nothing where the inputs decide a size of theirs: the parts would be of other sizes for other inputs.
    """
    before, after = stand_ins(packed.shape, view.shape)
    held = open_dims(packed), open_dims(view)
    for at in range(len(before)):
        start = next((k for k in range(len(after)) if math.prod(after[:k]) == math.prod(before[:at])), None)
        if start is None:
            continue
        stop = next((k for k in range(start + 1, len(after) + 1) if math.prod(after[start:k]) == before[at]), None)
        if stop is not None and stop - start > 1 and start <= place < stop:
            run = list(range(start, stop))
            return None if at in held[0] or held[1].intersection(run) else (at, run)
    return None


def _cut(build: Builder, packed: fx.Node, at: int, chosen: torch.Tensor) -> fx.Node:
    value, start, end = packed.meta["val"], int(chosen[0]), int(chosen[-1]) + 1
    if end - start == chosen.numel():
        return build.known(value.narrow(at, start, end - start), aten.slice.Tensor, packed, at, start, end)
    fetch = build.index(f"{build.place.name}_part", chosen, value.device)
    return build.known(value.narrow(at, 0, chosen.numel()), aten.index_select.default, packed, at, fetch)


def _again(build: Builder, node: fx.Node, source: fx.Node, place: int | None) -> fx.Node:
    """The same operator on the part; the view gets a size of one at `place`."""
    args, target = [source, *node.args[1:]], node.target
    if place is not None:
        args[1:] = _with_one(node, place)
        target = target if target is aten.unflatten.int else aten.reshape.default
    made = build(target, *args, **node.kwargs)
    made.meta.update(place_meta(node))
    return made


def _with_one(view: fx.Node, place: int) -> list[Any]:
    """The arguments of a view with a size of one at `place`: fixed sizes as numbers, others as they were given."""
    shape = view.meta["val"].shape
    if view.target is aten.unflatten.int:
        dim, sizes = view.args[1:3]
        first = int(dim) % (len(shape) - len(sizes) + 1)  # type: ignore[arg-type]
        own = range(first, first + len(sizes))  # type: ignore[arg-type]
        return [first, [1 if at == place else number(shape[at]) for at in own]]
    given: Any = view.args[1]
    held = open_dims(view.meta["val"])
    return [[1 if at == place else given[at] if at in held else number(size) for at, size in enumerate(shape)]]
