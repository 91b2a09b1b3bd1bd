"""What a tensor has become when one of its views was written: the inverse of every view.

Views whose operator has an inverse of its own (`slice_scatter`, `select_scatter`, a choice for a diagonal, `cat` for
parts of a `split`) get that. Of all others it is found out, from the strides or by running them on numbered positions,
whether they turn dimensions or only reshape. What is left is written by positions, in `numbered_views`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphzip.canonical.memory import Memory, View, plain
from graphzip.canonical.numbered_views import constant, in_order, is_plain
from graphzip.graph.builder import Builder
from graphzip.graph.inputs import concrete_shape, hint

__all__ = ["is_apart", "overlaps", "write_back"]

aten = torch.ops.aten


def write_back(build: Builder, child: fx.Node, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> Any:
    """The node of what the parent of a view has become when the view was given `value`; `None` where it has no inverse.

    `child` is the view as it stood in the graph, and `parent()` the node of what its parent was before.
    """
    rule = _RULES.get(view.maker.target)
    if view.part is not None:
        return _parts(build, view, parent, value)
    if rule is not None:
        return rule(build, view, parent, value)
    return _turned(build, child, view, parent, value)


def _slice(build: Builder, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node:
    return _put(build, aten.slice_scatter.default, view, parent, value)


def _put(build: Builder, target: Any, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node:
    """`slice_scatter`, `select_scatter`; they have no gradient for complex numbers, but have one for their parts."""
    whole, args, options = view.parent.meta["val"], view.args[1:], dict(view.kwargs)
    if not whole.is_complex():
        return build.known(whole, target, parent(), value, *args, **options)
    dim = (args[0] if args else options.pop("dim", 0)) % whole.dim()
    pairs = [build(aten.view_as_real.default, build(aten.resolve_conj.default, each)) for each in (parent(), value)]
    return build(aten.view_as_complex.default, build(target, *pairs, dim, *args[1:], **options))


def _select(build: Builder, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node:
    return _put(build, aten.select_scatter.default, view, parent, value)


def _narrow(build: Builder, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node:
    dim, start, length = (view.argument(place, name) for place, name in enumerate(("dim", "start", "length"), 1))
    shape = view.parent.meta["val"].shape
    if isinstance(start, int) and start < 0:
        start = _sum(build, _size(build, parent(), dim % len(shape)), start)
    args = (parent(), value, dim, start, _sum(build, start, length))
    return build.known(view.parent.meta["val"], aten.slice_scatter.default, *args)


def _diagonal(build: Builder, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node:
    """By a mask of the diagonal, which every runtime knows; where a size is open, by the operator."""
    whole = view.parent.meta["val"]
    given = (view.argument(place, name, place - 2) for place, name in ((2, "dim1"), (3, "dim2")))
    offset, (first, second) = view.argument(1, "offset", 0), (dim % whole.dim() for dim in given)
    height, width = plain(whole.shape[first]), plain(whole.shape[second])
    if not isinstance(height, int) or not isinstance(width, int):
        args = (parent(), value, *view.args[1:])
        return build.known(whole, aten.diagonal_scatter.default, *args, **view.kwargs)
    before, count = max(0, -offset), int(value.meta["val"].shape[-1])
    rows = build(aten.constant_pad_nd.default, value, [before, height - before - count])
    rows = build(aten.unsqueeze.default, rows, -1)
    dims = [*(dim for dim in range(whole.dim()) if dim not in (first, second)), first, second]
    rows = build(aten.permute.default, rows, [dims.index(dim) for dim in range(whole.dim())])
    places = [
        build(aten.reshape.default, build(aten.arange.start, start, start + size, device=whole.device), shape)
        for start, size, shape in (
            (offset, height, [height if dim == first else 1 for dim in range(whole.dim())]),
            (0, width, [width if dim == second else 1 for dim in range(whole.dim())]),
        )
    ]
    return build(aten.where.self, build(aten.eq.Tensor, *places), rows, parent())


def _as_strided(build: Builder, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node | None:
    """Places in the memory are positions of a tensor that lies there from its start on, position after position."""
    whole, shown = view.parent.meta["val"], value.meta["val"]
    sizes, strides, start = (view.argument(place, "") for place in (1, 2, 3))
    numbers = [*sizes, *strides, start or 0]
    if not is_plain(whole) or not all(isinstance(number, int) for number in numbers):
        return None
    last = (start or 0) + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
    places = torch.arange(last + 1).as_strided(sizes, strides, start or 0).flatten()
    index = constant(build, places, shown.device)
    flat = build(aten.reshape.default, parent(), [-1])
    made = build(aten.index_put.default, flat, [index], build(aten.reshape.default, value, [-1]))
    return _reshape(build, view, parent, made)


def _complex(build: Builder, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node:
    """The real or the imaginary part is given."""
    real = view.maker.target is aten.real.default
    other = build(aten.imag.default if real else aten.real.default, parent())
    return build(aten.complex.default, *((value, other) if real else (other, value)))


def _as_complex(build: Builder, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node:
    return build(aten.complex.default, *(build(aten.select.int, value, -1, part) for part in (0, 1)))


def _as_real(build: Builder, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node:
    return build(aten.view_as_real.default, value)


def _conjugate(build: Builder, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node:
    return build(aten.conj_physical.default, value)


def _reshape(build: Builder, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node:
    whole = view.parent.meta["val"]
    return build.known(whole, aten.reshape.default, value, _sizes(build, parent, whole, list(range(whole.dim()))))


_RULES: dict[Any, Callable[[Builder, View, Callable[[], fx.Node], fx.Node], fx.Node | None]] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.narrow.default: _narrow,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.diagonal.default: _diagonal,
    aten.as_strided.default: _as_strided,
    aten.real.default: _complex,
    aten.imag.default: _complex,
    aten.view_as_real.default: _as_complex,
    aten.view_as_complex.default: _as_real,
    aten.conj.default: _conjugate,
    aten._conj.default: _conjugate,
}


def _size(build: Builder, node: fx.Node, dim: int) -> Any:
    """A size as an argument: a number, or a node where it is open."""
    size = node.meta["val"].shape[dim]
    return size if isinstance(plain(size), int) else build.known(size, aten.sym_size.int, node, dim)


def _sum(build: Builder, left: Any, right: Any) -> Any:
    if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
        return left + right
    values = [each.meta["val"] if isinstance(each, fx.Node) else each for each in (left, right)]
    return build.known(values[0] + values[1], operator.add, left, right)


# --- parts of a list -----------------------------------------------------------------------------------------------


def _parts(build: Builder, view: View, parent: Callable[[], fx.Node], value: fx.Node) -> fx.Node | None:
    """Of `split`, `chunk` and the like the parts are joined again, one of them replaced; of `unbind` stacked."""
    dim, joined = _partition(view)
    if dim is None:
        return None
    whole = parent()
    args = [whole if given is view.parent else given for given in view.args]
    made = build.again(view.maker, args, view.kwargs)
    parts = [
        value if place == view.part else build.known(part, operator.getitem, made, place)
        for place, part in enumerate(view.maker.meta["val"])
    ]
    target = aten.cat.default if joined else aten.stack.default
    return build.known(view.parent.meta["val"], target, parts, dim)


def _partition(view: View) -> tuple[int | None, bool]:
    """Along which dimension the results of an operator lie one behind the other, and whether they keep it."""
    whole, parts = view.parent.meta["val"], view.maker.meta["val"]
    shape, strides, start = concrete_shape(whole), [hint(s) for s in whole.stride()], hint(whole.storage_offset())
    joined = parts[0].dim() == whole.dim()
    for dim in range(whole.dim()):
        expected = start
        for part in parts:
            rest = concrete_shape(part)
            rest = rest[:dim] + rest[dim + 1 :] if joined else rest
            if rest != shape[:dim] + shape[dim + 1 :] or hint(part.storage_offset()) != expected:
                break
            expected += strides[dim] * (hint(part.shape[dim]) if joined else 1)
        else:
            if expected == start + strides[dim] * shape[dim]:
                return dim, joined
    return None, joined


def _span(view: View) -> tuple[int, int, float] | None:
    """`(dim, start, end)` where a view shows these positions along one dimension, at all sizes; else nothing."""
    whole = view.parent.meta["val"]
    if view.part is not None:
        dim, joined = _partition(view)
        if dim is None or not isinstance(plain(whole.shape[dim]), int):
            return None
        sizes = [hint(part.shape[dim]) if joined else 1 for part in view.maker.meta["val"]]
        return dim, sum(sizes[: view.part]), sum(sizes[: view.part + 1])
    if view.maker.target not in {aten.slice.Tensor, aten.select.int}:
        return None
    selects = view.maker.target is aten.select.int
    start = view.argument(2, "index" if selects else "start") or 0
    end = start + 1 if selects and isinstance(start, int) else view.argument(3, "end")
    if not isinstance(start, int) or start < 0 or not isinstance(end, int | None) or (end or 0) < 0:
        return None
    return int(view.argument(1, "dim", 0)) % whole.dim(), start, math.inf if end is None else end


def is_apart(memory: Memory, left: fx.Node, right: fx.Node) -> bool:
    """Whether two values surely show different places: they are parts of one tensor that lie beside one another."""
    paths = [
        [view for child, view in memory.path(node) if memory.same[child] is not memory.same[view.parent]][::-1]
        for node in (left, right)
    ]
    for one, other in zip(*paths, strict=False):
        if (one.maker, one.part) == (other.maker, other.part):
            continue
        here, there = _span(one), _span(other)
        if memory.same[one.parent] is not memory.same[other.parent] or here is None or there is None:
            return False
        return here[0] == there[0] and (here[2] <= there[1] or there[2] <= here[1])
    return False


def overlaps(value: torch.Tensor) -> bool:
    """Whether several positions of a tensor may lie at one place of the memory."""
    sizes = [(hint(step), hint(size)) for size, step in zip(value.shape, value.stride(), strict=True)]
    extent = 1
    for step, size in sorted(each for each in sizes if each[1] != 1):
        if step < extent:
            return True
        extent += (size - 1) * step
    return False


# --- turned and reshaped -------------------------------------------------------------------------------------------


def _turned(
    build: Builder, child: fx.Node, view: View, parent: Callable[[], fx.Node], value: fx.Node
) -> fx.Node | None:
    """The inverse of a view that only changes the order of dimensions, or only the shape."""
    whole, shown = view.parent.meta["val"], child.meta["val"]
    if whole.dtype != shown.dtype or whole.is_conj() != shown.is_conj() or whole.is_neg() != shown.is_neg():
        return None
    order = _order(whole, shown)
    if order is not None:
        turned = [whole.shape[dim] for dim in order]
        if len(turned) != shown.dim() or any(plain(a) != plain(b) for a, b in zip(turned, shown.shape, strict=True)):
            value = build.known(whole.permute(order), aten.reshape.default, value, _sizes(build, parent, whole, order))
        if order == sorted(order):
            return value
        back = sorted(range(len(order)), key=order.__getitem__)
        return build.known(whole, aten.permute.default, value, back)
    return _reshape(build, view, parent, value) if in_order(view, child) else None


def _order(whole: torch.Tensor, shown: torch.Tensor) -> list[int] | None:
    """The dimensions of `whole` in the order in which `shown` has them; those of one position anywhere.

    Told by the strides, which are distinct where a view has positions of its own. Nothing where it is no permutation.
    """
    if plain(whole.storage_offset()) != plain(shown.storage_offset()):
        return None
    left = [(plain(size), plain(step)) for size, step in zip(whole.shape, whole.stride(), strict=True)]
    free = [dim for dim, (size, _) in enumerate(left) if size != 1]
    if len({left[dim][1] for dim in free}) < len(free):
        return None
    order: list[int] = []
    for size, step in zip(shown.shape, shown.stride(), strict=True):
        if plain(size) != 1:
            found = [dim for dim in free if left[dim] == (plain(size), plain(step))]
            if not found:
                return None
            free.remove(found[0])
            order.append(found[0])
    if free:
        return None
    for dim in range(len(left)):
        if dim not in order:
            order.insert(_place_of(dim, order), dim)
    return order


def _place_of(dim: int, order: list[int]) -> int:
    """Where a dimension of one position goes: in front of the first one that follows it."""
    return next((place for place, other in enumerate(order) if other > dim), len(order))


def _sizes(build: Builder, parent: Callable[[], fx.Node], whole: torch.Tensor, order: list[int]) -> list[Any]:
    """The sizes of the parent as arguments of a reshape: -1 for the one that is open, nodes where several are."""
    is_open = [dim for dim in order if not isinstance(plain(whole.shape[dim]), int)]
    if len(is_open) < 2:
        return [-1 if dim in is_open else int(whole.shape[dim]) for dim in order]
    return [_size(build, parent(), dim) for dim in order]
