"""Is a graph, which was traced at some sizes, the model at others? The model is traced there, and they are compared.

Operator by operator, argument by argument; sizes are compared as the expressions that they are.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn

from graphzip.calls import Call
from graphzip.graph.sizes import value_at
from graphzip.graph.torch_private import pytree
from graphzip.tracing.flatten import Flat, FormOf, flatten
from graphzip.tracing.program import automatic, is_free, run_export, separate

__all__ = ["length_at", "open_dims", "placeholders", "resized", "same_at", "tensors_of"]

logger = logging.getLogger(__name__)

aten = torch.ops.aten


def same_at(skeleton: nn.Module, flat: Flat, sizes: Mapping[Any, int], form_of: FormOf | None) -> bool:
    """Whether the model, traced where these symbols of the graph have these sizes, is the same graph."""
    call = resized(flat, sizes)
    if call is None:
        return False
    dims = [
        [dim for dim in dims if not node.meta["val"].shape[dim].node.expr.free_symbols & sizes.keys()]
        for node, dims in zip(placeholders(flat), open_dims(flat), strict=True)
    ]
    try:
        twin = flatten(run_export(skeleton, call, automatic(tensors_of(call), dims)), skeleton, form_of)
    except Exception as error:
        where = ", ".join(f"{flat.sizes.names.get(symbol)} is {size}" for symbol, size in sizes.items())
        logger.info("%s does not trace where %s: %s", type(skeleton).__name__, where, error)
        return False
    if not set(twin.conditions) <= set(flat.conditions) or not {each.text for each in twin.open} <= {
        each.text for each in flat.open
    }:
        return False
    return _Comparison(flat, twin, {symbol: sympy.Integer(size) for symbol, size in sizes.items()}).same()


def resized(flat: Flat, sizes: Mapping[Any, int]) -> Call | None:
    """The example with these sizes, cut or repeated; nothing where they do not fit together."""
    wanted = iter(node.meta["val"].shape for node in placeholders(flat))
    fails = False

    def fitted(leaf: Any) -> Any:
        nonlocal fails
        if not isinstance(leaf, torch.Tensor):
            return leaf
        for dim, size in enumerate(next(wanted)):
            if is_free(size):
                length = length_at(size, sizes)
                fails |= length is None
                places = torch.arange(length or 0, device=leaf.device) % max(leaf.shape[dim], 1)
                leaf = leaf.index_select(dim, places)
        return leaf

    call: Call = separate(pytree.tree_map(fitted, flat.program.call))
    return None if fails else call


def tensors_of(call: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]


def placeholders(flat: Flat) -> list[fx.Node]:
    nodes = [node for node in flat.module.graph.nodes if node.op == "placeholder"]
    return [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def open_dims(flat: Flat) -> list[list[int]]:
    shapes = [node.meta["val"].shape for node in placeholders(flat)]
    return [[dim for dim, size in enumerate(shape) if is_free(size)] for shape in shapes]


def length_at(size: Any, sizes: Mapping[Any, int]) -> int | None:
    """An open size where symbols have these sizes and others that of the example; nothing where it cannot be."""
    given = {symbol: sympy.Integer(each) for symbol, each in sizes.items()}
    found = value_at(size.node.expr, {**size.node.shape_env.backed_var_to_val, **given})
    return int(found) if found is not None and found >= 0 else None


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
