"""Recompute the shapes of a graph, and see to it that its sizes still come from its inputs.

A size that depends on the inputs is an expression of their symbols. A rewrite may give a dimension fewer positions;
it may neither turn such an expression into a number, nor change a number that the graph computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, product
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from graphzip.errors import RewriteError
from graphzip.graph.sizes import is_open, value_at
from graphzip.graph.state import get_tensor
from graphzip.graph.torch_private import FakeTensor, FakeTensorMode, enable_python_dispatcher, pytree
from graphzip.graph.traced import Traced
from graphzip.ops import OPS
from graphzip.ops.norm import batch_norm
from graphzip.ops.rules import same
from graphzip.ops.site import describe

__all__ = ["refresh"]

aten = torch.ops.aten

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_NUMBERS = (int, float, *_SYMBOLIC)
_FACTORS = ((3, 5, 7), (5, 7, 3), (2, 3, 2), (3, 2, 2), (2, 2, 2))
_UNKNOWN = 12
_MOVED = 4
_INEQUALITIES = (sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan, sympy.GreaterThan)


def refresh(traced: Traced, *, rewritten: bool = False) -> None:
    """Recompute every node's fake value, and with it its shape.

    With `rewritten` the values that the nodes had are those of the graph before: `RewriteError` where a size no longer
    depends on the inputs as it did.
    """
    mode = next(
        node.meta["val"].fake_mode for node in traced.graph.nodes if isinstance(node.meta.get("val"), FakeTensor)
    )
    before = {node: node.meta.get("val") for node in traced.graph.nodes}
    run = _Run(before, mode.shape_env, _known(traced, mode, rewritten=rewritten))
    values: dict[fx.Node, Any] = {
        node: run.like_known(get_tensor(traced.module, str(node.target)), lambda each: _fake(mode, each))
        for node in traced.graph.find_nodes(op="get_attr")
    }
    settled = _nothing_decided(mode.shape_env) if rewritten else nullcontext()
    with mode, enable_python_dispatcher(), torch.no_grad(), settled:
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                values[node] = node.meta["val"]
            elif node.op == "call_function":
                like = _like(node, before)
                values[node] = run.call(node, values) if like is None else values[like]
                if rewritten:
                    _check_sizes(node, before[node], values[node])
            node.meta["val"] = values.get(node)


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """The fake value of a tensor. Of one that was moved in place the mode remembers what it was before."""
    found: torch.Tensor = mode.from_tensor(tensor, static_shapes=True)
    if (found.dtype, found.device) == (tensor.dtype, tensor.device):
        return found
    alike = tensor.data  # and not a view of it, which would be told by what it views
    again = torch.nn.Parameter(alike, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else alike
    found = mode.from_tensor(again, static_shapes=True)
    return found


def _known(traced: Traced, mode: FakeTensorMode, *, rewritten: bool) -> dict[Any, Any]:
    """What operators gave before on fake values of this mode; what may decide a size tells nothing of what may not."""
    held, known = traced.shapes.get(rewritten, (None, {}))
    if held is not mode:
        known = {}
        traced.shapes[rewritten] = mode, known
    found: dict[Any, Any] = known
    return found


@contextmanager
def _nothing_decided(environment: Any) -> Iterator[None]:
    """A rewritten graph decides no size that the graph before left open.

    Inequalities, by which operators choose a memory layout, may be asked.
    """

    def refuse(question: sympy.Basic, answer: Any) -> None:
        kept_apart = isinstance(question, sympy.Ne) and answer == sympy.true
        differs = isinstance(question, sympy.Eq) and answer == sympy.false
        asked = not (kept_apart or differs or isinstance(question, _INEQUALITIES))
        if asked and not _follows(environment, question, answer):
            raise RewriteError(f"it fits only where {question} is {answer}, which the inputs need not be")

    frozen = environment.frozen
    environment.frozen, environment._check_frozen = True, refuse
    try:
        yield
    finally:
        environment.frozen = frozen
        del environment._check_frozen


def _follows(environment: Any, question: sympy.Basic, answer: Any) -> bool:
    """Whether the answer is the same at other sizes for which the graph was made.

    Where its conditions rule out all multiples of the example's sizes, sizes near them are tried, and their own.
    """
    known = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    conditions = [environment.replace(guard.expr) for guard in environment.guards]
    symbols = sorted(set().union(question.free_symbols, *(each.free_symbols for each in conditions)), key=str)
    traced = [known.get(symbol, sympy.Integer(_UNKNOWN)) for symbol in symbols]

    def answers(choices: Iterable[Sequence[Any]]) -> list[bool]:
        found = []
        for choice in choices:
            sizes = dict(zip(symbols, choice, strict=True))
            if all(value_at(each, sizes) == sympy.true for each in conditions):
                found.append(bool(value_at(question, sizes) == answer))
        return found

    multiples = ([size * factor for size, factor in zip(traced, cycle(factors), strict=False)] for factors in _FACTORS)
    near = product(*((size, size + 1, 2 * size, 3 * size) for size in traced[:_MOVED]))
    found = answers(multiples) or answers((*moved, *traced[_MOVED:]) for moved in near)
    return bool(found) and all(found)


def _like(node: fx.Node, before: dict[fx.Node, Any]) -> fx.Node | None:
    """The operand whose shape an elementwise operator takes over as it is."""
    spec = OPS.get(node.target)
    if spec is None or spec.propagate not in (same, batch_norm) or not isinstance(node.args[0], fx.Node):
        return None
    source, result = before[node.args[0]], before[node]
    known = isinstance(source, torch.Tensor) and isinstance(result, torch.Tensor)
    return node.args[0] if known and _kind(source) == _kind(result) else None


class _Run:
    """Runs operators on fake values; repeated layers, which differ in nothing that it depends on, share theirs."""

    def __init__(self, before: dict[fx.Node, Any], environment: Any, known: dict[Any, Any]) -> None:
        self.before = before
        self.environment = environment
        self.known = known
        self.symbols = _symbols_of(list(before.values()))

    def like_known(self, tensor: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The fake value of a parameter or buffer; those that differ in nothing but their numbers share one."""
        if tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return make(tensor)
        key = (type(tensor), tensor.requires_grad, _kind(tensor))
        if key not in self.known:
            self.known[key] = make(tensor)
        found: torch.Tensor = self.known[key]
        return found

    def call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        target: Any = node.target
        leaves, tree = pytree.tree_flatten((args, kwargs))
        key = (target, tree, *map(_kind, leaves))
        if key in self.known:
            return self.known[key]
        operands = [self.before[source] for source in node.all_input_nodes]
        if _symbols_of(self.before[node]) - _symbols_of(operands):  # layers share fake values, which torch counts once
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        try:
            result = target(*args, **kwargs)
        except Exception as error:
            if target is aten.view.default:  # what is left, such as one head, may lie in the memory in another way
                node.target = aten.reshape.default
                return self.call(node, values)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RewriteError(f"{describe(node)} does not fit the shapes after the merge: {reason}") from error
        fresh = _symbols_of(result) - self.symbols
        if fresh:
            return self._named_as_before(node, result, fresh)
        if _symbols_of(result) <= _symbols_of(leaves):  # what the data decide is the same for the same tensor only
            self.known[key] = result
        return result

    def _named_as_before(self, node: fx.Node, result: Any, fresh: set[sympy.Symbol]) -> Any:
        """A number or a size that only the data decide keeps its name; it is no other operator's."""
        before = self.before[node]
        if isinstance(before, _SYMBOLIC):
            return before
        self.symbols |= fresh
        if before is not None:
            for size, old in zip(_sizes_of(result), _sizes_of(before), strict=False):
                if size in fresh and isinstance(old, sympy.Symbol) and old not in fresh:
                    self.environment._rename_unbacked_to(size, old)
        return result


def _sizes_of(value: Any) -> Iterator[sympy.Expr]:
    """Expressions of all symbolic numbers in a value, and of all sizes of its tensors that are symbolic."""
    for leaf in pytree.tree_leaves(value):
        for size in leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,):
            if isinstance(size, _SYMBOLIC):
                yield size.node.expr


def _symbols_of(value: Any) -> set[sympy.Symbol]:
    """What the sizes and symbolic numbers in a value are made of."""
    return set().union(*(size.free_symbols for size in _sizes_of(value)))


def _kind(leaf: Any) -> Any:
    """What the result's shape, dtype and device depend on; the type tells 1 from 1.0 and True, and a number's symbol.

    A symbolic number may not be compared: that would decide it.
    """
    if isinstance(leaf, torch.Tensor):
        return (*map(_kind, leaf.shape), None, *map(_kind, leaf.stride()), leaf.dtype, leaf.device)
    if isinstance(leaf, _SYMBOLIC):
        return type(leaf), leaf.node.expr
    return type(leaf), leaf


def _check_sizes(node: fx.Node, before: Any, after: Any) -> None:
    """Numbers stay what they were, and sizes depend on the symbols on which they depended.

    Raises `RewriteError` where that is not so.
    """
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        pairs = list(zip(before.shape, after.shape, strict=False))
        if len(before.shape) != len(after.shape) or any(_symbols(old) != _symbols(new) for old, new in pairs):
            raise RewriteError(
                f"{describe(node)} would have the shape {tuple(after.shape)}, which does not follow the inputs as "
                f"{tuple(before.shape)} does; nothing was changed"
            )
    elif isinstance(before, _NUMBERS) and _expression(before) != _expression(after):
        raise RewriteError(f"{describe(node)} would be {after} and was {before}; nothing was changed")


def _symbols(size: Any) -> Any:
    return size.node.expr.free_symbols if is_open(size) else frozenset()


def _expression(number: Any) -> Any:
    return number.node.expr if isinstance(number, _SYMBOLIC) else sympy.sympify(number)
