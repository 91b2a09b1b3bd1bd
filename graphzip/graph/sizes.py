"""Sizes that the inputs decide, and how to compare them without looking at the example.

The example's batch may have as many rows as a layer has channels. What a rewrite concludes from such a coincidence is
wrong for every other batch, so sizes are compared as the expressions that they are: at numbers that coincide with
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain, count
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from graphzip.graph.inputs import hint

__all__ = ["content", "is_open", "number", "open_dims", "same_size", "small_sizes", "stand_ins", "value_at"]

_PRIMES = (1000003, 1000033, 1000037, 1000039, 1000081, 1000099, 1000117, 1000121, 1000133, 1000151)
_SMALL = ((2, 3, 5, 7), (3, 2, 7, 5), (7, 5, 3, 2))
_DOUBLED = 8  # times that they are, where sizes would be below one
_DIVISIONS = {"FloorDiv", "CleanDiv"}


def is_open(size: Any) -> bool:
    """Whether the inputs, or their values, decide a size."""
    return isinstance(size, torch.SymInt) and _varies(size.node.expr)


@lru_cache(4096)
def _varies(expression: sympy.Expr) -> bool:
    """Whether an expression has several values: `n // (n // 2)` has one for every `n` that a view by two takes."""
    if expression.is_number or expression.is_Symbol:
        return not expression.is_number
    if not expression.atoms(sympy.Function):
        return True
    found = _small([[expression]])
    return len({shape for shapes in found for shape in shapes}) > 1


def number(size: Any) -> int:
    """A size that the inputs do not decide."""
    assert not is_open(size)
    return hint(size)


def open_dims(value: Any) -> frozenset[int]:
    """The dimensions of a tensor whose sizes the inputs decide."""
    return frozenset(dim for dim, size in enumerate(value.shape) if is_open(size))


def content(size: Any) -> int:
    """The largest known factor of a size: 16 of `16 * batch`."""
    factor, _ = _expression(size).primitive()
    return int(factor) if factor.is_Integer else 1


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are equal for all inputs."""
    if not is_open(one) and not is_open(other):
        return number(one) == number(other)
    (left,), (right,) = stand_ins((one,), (other,))
    return left == right


def stand_ins(*shapes: Sequence[Any]) -> list[tuple[int, ...]]:
    """The shapes with large primes in place of the inputs' sizes, so that numbers are equal only where sizes are.

    All shapes have as many elements, or as many as follows from one another: where one only divides, what it is
    divided by is a factor of the stand-in.
    """
    if not any(is_open(size) for shape in shapes for size in shape):
        return [tuple(map(number, shape)) for shape in shapes]
    expressions = [[_expression(size) for size in shape] for shape in shapes]
    found = _at(expressions, _PRIMES, 1)
    if len({math.prod(shape) for shape in found}) > 1:
        found = _at(expressions, _PRIMES, _divisors(expressions))
    return found


def small_sizes(shapes: Sequence[Sequence[Any]]) -> list[list[tuple[int, ...]]]:
    """The shapes for several choices of the inputs' sizes, small ones; once where the inputs decide none."""
    if not any(is_open(size) for shape in shapes for size in shape):
        return [[tuple(map(number, shape)) for shape in shapes]]
    return _small([[_expression(size) for size in shape] for shape in shapes])


def _small(expressions: list[list[sympy.Expr]]) -> list[list[tuple[int, ...]]]:
    """The values of expressions for several choices of their symbols, so large that no size is below one."""
    factor = _divisors(expressions)
    return [_positive(expressions, sizes, factor) for sizes in _SMALL]


def _positive(expressions: list[list[sympy.Expr]], sizes: Sequence[int], factor: int) -> list[tuple[int, ...]]:
    for doubled in range(_DOUBLED):
        found = _at(expressions, sizes, factor << doubled)
        if all(size > 0 for shape in found for size in shape):
            break
    return found


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if is_open(size) else sympy.Integer(number(size))


def _at(expressions: list[list[sympy.Expr]], sizes: Sequence[int], factor: int) -> list[tuple[int, ...]]:
    """The expressions where the symbols are multiples of these sizes; what has no value there is a size of its own."""
    symbols = sorted({symbol for shape in expressions for each in shape for symbol in each.free_symbols}, key=str)
    spare = chain(sizes, count(2 * sizes[-1] + 1, 2))
    values = {symbol: sympy.Integer(next(spare) * factor) for symbol in symbols}
    unknown: dict[sympy.Expr, int] = {}

    def value(expression: sympy.Expr) -> int:
        result = value_at(expression, values)
        if result is not None and result.is_Integer:
            return int(result)
        if expression not in unknown:
            unknown[expression] = next(spare)
        return unknown[expression]

    return [tuple(map(value, shape)) for shape in expressions]


def value_at(expression: Any, values: Mapping[Any, Any]) -> Any:
    """An expression where symbols have these values; `None` where it has none there.

    So it is with a rest by how often a size goes into a number that is smaller.
    """
    try:
        return sympy.sympify(expression.xreplace(values))
    except ZeroDivisionError:
        return None


def _divisors(expressions: list[list[sympy.Expr]]) -> int:
    """What sizes are divided by."""
    found = [
        int(part.args[1])
        for shape in expressions
        for each in shape
        for part in sympy.preorder_traversal(each)
        if type(part).__name__ in _DIVISIONS and part.args[1].is_Integer
    ]
    return math.lcm(1, *found)
