"""Where a size is one: is the graph, which was traced with two and more, still the model?

A model may ask for a batch of one (`if x.shape[0] > 1`) and take another path. Then it is traced a second time, with
one, and the graphs are compared operator by operator. Where they differ, inputs of that size are refused.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from graphzip.graph.conditions import Open, holds
from graphzip.graph.flat import Flat, FormOf, flatten
from graphzip.graph.program import TRACED_AS_TWO, Call, run_export, separate, untraceable
from graphzip.graph.sizes import value_at
from graphzip.graph.squeezes import squeezed

__all__ = ["settle"]

logger = logging.getLogger(__name__)

aten = torch.ops.aten


def settle(skeleton: nn.Module, given: Call, flat: Flat, form_of: FormOf | None = None) -> Flat:
    """The graph with the conditions that hold where sizes are one, or one of those sizes, if the example needs it."""
    groups: dict[tuple[str, ...], list[Open]] = {}
    for each in flat.open:
        groups.setdefault(each.places, []).append(each)
    apart = [group for places, group in groups.items() if not _same_at_one(skeleton, flat, places, form_of)]
    kept = [each for group in apart for each in group]
    flat = _with_conditions(flat, kept)
    unfit = _unfit(flat, given)
    if not unfit:
        return flat
    note = f"sizes of one are fixed, as in the example: traced with two, the model would need {unfit}"
    logger.warning("%s: %s", type(skeleton).__name__, note)
    call: Call = (separate(given[0]), separate(given[1]))
    dims = [
        [dim for dim in dims if leaf.shape[dim] > 1]
        for leaf, dims in zip(_tensors(call), _open_dims(flat), strict=True)
    ]
    try:
        program = run_export(skeleton, call, _automatic(_tensors(call), dims))
    except Exception as error:
        raise untraceable(skeleton, error) from error
    return settle(skeleton, given, flatten(replace(program, notes=(note,)), skeleton, form_of), form_of)


def _with_conditions(flat: Flat, kept: list[Open]) -> Flat:
    """Rule out that these sizes are one."""
    if not kept:
        return flat
    texts = {each.text for each in kept}
    for node in list(flat.module.graph.nodes):
        asked = [flat.sizes.open([branch]) for branch in squeezed(node)]
        if asked and all(found and found[0].text in texts for found in asked):
            node.meta["never_one"] = True
    conditions = tuple(dict.fromkeys([*flat.conditions, *(each.text for each in kept)]))
    notes = tuple(note for note in flat.notes if note != TRACED_AS_TWO)
    return replace(flat, conditions=conditions, asked_at={each.text: each.source for each in kept}, notes=notes)


def _tensors(call: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]


def _placeholders(flat: Flat) -> list[fx.Node]:
    nodes = [node for node in flat.module.graph.nodes if node.op == "placeholder"]
    return [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def _is_open(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _open_dims(flat: Flat) -> list[list[int]]:
    shapes = [node.meta["val"].shape for node in _placeholders(flat)]
    return [[dim for dim, size in enumerate(shape) if _is_open(size)] for shape in shapes]


def _automatic(tensors: list[torch.Tensor], dims: list[list[int]]) -> ShapesCollection | dict[str, Any]:
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, open_dims in zip(tensors, dims, strict=True):
        if open_dims:
            shapes[tensor] = dict.fromkeys(open_dims, Dim.AUTO)
    return shapes if any(dims) else {}


def _unfit(flat: Flat, given: Call) -> str:
    """Why the example itself could not be given to the result; empty where it can."""
    for node, tensor in zip(_placeholders(flat), _tensors(given), strict=True):
        for dim, (size, has) in enumerate(zip(node.meta["val"].shape, tensor.shape, strict=True)):
            if not _is_open(size) and int(size) != has:
                return f"{node.target}.shape[{dim}] == {int(size)}"
    names = [str(node.target) for node in flat.module.graph.nodes if node.op == "placeholder"]
    known = dict(zip(names, pytree.tree_leaves(given), strict=True))
    return next((text for text in flat.conditions if not holds(text, known)), "")


def _same_at_one(skeleton: nn.Module, flat: Flat, places: tuple[str, ...], form_of: FormOf | None) -> bool:
    """Whether the model, traced where these sizes are one, is the same graph."""
    ones = {symbol: sympy.Integer(1) for symbol, place in flat.sizes.names.items() if place in places}
    call = _cut(flat, ones)
    if call is None:
        return False
    dims = [
        [dim for dim in dims if tensor.shape[dim] > 1]
        for tensor, dims in zip(_tensors(call), _open_dims(flat), strict=True)
    ]
    try:
        twin = flatten(run_export(skeleton, call, _automatic(_tensors(call), dims)), skeleton, form_of)
    except Exception as error:
        logger.info("%s does not trace where %s is one: %s", type(skeleton).__name__, ", ".join(places), error)
        return False
    if not set(twin.conditions) <= set(flat.conditions) or not {each.text for each in twin.open} <= {
        each.text for each in flat.open
    }:
        return False
    return _Comparison(flat, twin, ones).same()


def _cut(flat: Flat, ones: dict[Any, Any]) -> Call | None:
    """The example with these sizes cut down to one; nothing where it does not follow from the example."""
    wanted = iter(node.meta["val"].shape for node in _placeholders(flat))
    fails = False

    def narrowed(leaf: Any) -> Any:
        nonlocal fails
        if not isinstance(leaf, torch.Tensor):
            return leaf
        for dim, size in enumerate(next(wanted)):
            if _is_open(size):
                found = value_at(size.node.expr, {**size.node.shape_env.backed_var_to_val, **ones})
                length = 0 if found is None else int(found)
                fails |= not 0 < length <= leaf.shape[dim]
                leaf = leaf.narrow(dim, 0, max(1, min(length, leaf.shape[dim])))
        return leaf

    call: Call = separate(pytree.tree_map(narrowed, flat.program.call))
    return None if fails else call


class _Comparison:
    """Two graphs side by side: the left one where some of its sizes are one, the right one traced so."""

    def __init__(self, left: Flat, right: Flat, ones: dict[Any, Any]) -> None:
        self.left, self.right = left, right
        self.pairs: dict[fx.Node, fx.Node] = {}
        places = {symbol: sympy.Symbol(place) for symbol, place in left.sizes.names.items()}
        self.left_names = {**places, **ones}
        self.right_names = {symbol: sympy.Symbol(place) for symbol, place in right.sizes.names.items()}

    def same(self) -> bool:
        left, right = (_computing(flat.module.graph.nodes) for flat in (self.left, self.right))
        return len(left) == len(right) and all(map(self._same_node, left, right))

    def _same_node(self, left: fx.Node, right: fx.Node) -> bool:
        self.pairs[left] = right
        if left.op != right.op:
            return False
        if left.op == "get_attr":
            return self._same_tensor(str(left.target), str(right.target))
        if left.op == "placeholder":
            return True
        if left.target != right.target or left.kwargs.keys() != right.kwargs.keys():
            return False
        if left.target in _BY_SHAPE:  # where a size is left to the operator, the result tells
            return self._same(left.args[0], right.args[0]) and self._same_shape(left, right)
        return self._same(left.args, right.args) and all(
            self._same(value, right.kwargs[name]) for name, value in left.kwargs.items()
        )

    def _same_tensor(self, left: str, right: str) -> bool:
        one, other = (
            dict(flat.module.named_parameters(remove_duplicate=False))
            | dict(flat.module.named_buffers(remove_duplicate=False))
            for flat in (self.left, self.right)
        )
        return one[left] is other[right] or (
            one[left].shape == other[right].shape
            and one[left].dtype == other[right].dtype
            and not one[left].is_meta
            and torch.equal(one[left], other[right])
        )

    def _same_shape(self, left: fx.Node, right: fx.Node) -> bool:
        shapes = [tuple(node.meta["val"].shape) for node in (left, right)]
        return len(shapes[0]) == len(shapes[1]) and all(map(self._same, *shapes))

    def _same(self, left: Any, right: Any) -> bool:
        left, right = _behind(left), _behind(right)
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and left in self.pairs:
            return self.pairs[left] is right
        left, right = _value(left), _value(right)
        if isinstance(left, list | tuple) and isinstance(right, list | tuple):
            return len(left) == len(right) and all(map(self._same, left, right))
        if isinstance(left, _SYMBOLIC) or isinstance(right, _SYMBOLIC):
            one, other = _expression(left, self.left_names), _expression(right, self.right_names)
            return one is not None and other is not None and (one == other or sympy.expand(one - other) == 0)
        return type(left) is type(right) and bool(left == right)


_SYMBOLIC = (torch.SymInt, torch.SymFloat)
_BY_SHAPE = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}


def _computing(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """All but slices of everything, and but the arithmetic of sizes, which is compared where it is used."""
    plain = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
    return [node for node in nodes if not isinstance(node.meta.get("val"), plain) and _behind(node) is node]


def _behind(argument: Any) -> Any:
    """What a slice of everything, which an open size leaves in the graph, is a slice of."""
    while isinstance(argument, fx.Node) and argument.target is aten.slice.Tensor:
        bounds = (*argument.args[2:], *(None, None, 1)[len(argument.args) - 2 :])
        if bounds[0] not in (None, 0) or bounds[1] not in (None, sys.maxsize) or bounds[2] != 1:
            break
        argument = argument.args[0]
    return argument


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def _expression(value: Any, names: dict[Any, Any]) -> Any:
    if isinstance(value, _SYMBOLIC):
        return value.node.expr.xreplace(names)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return sympy.sympify(value)
    return None
