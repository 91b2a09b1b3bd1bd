"""What must hold between the sizes of the inputs for a traced graph to be the model.

A model may choose its path by a size (`if x.shape[0] % 2 == 0`). `torch.export` takes the path of the example and
records the condition. A condition is kept as text, `"x.shape[0] % 2 == 0"`, and checked whenever the module runs.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

from graphzip.errors import InputShapeError, TraceError

__all__ = ["Term", "check_sizes", "conditions_of", "parse", "sizes_of"]

Term = int | float | tuple[Any, ...]
"""A parsed condition: a number, `("size", input, dimension)`, or an operation followed by its terms."""

_SMALLEST_TRACED = 2
_LARGEST_POWER = 64
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mult": operator.mul,
    "Div": operator.truediv,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "Pow": operator.pow,
    "USub": operator.neg,
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Not": operator.not_,
    "And": lambda *terms: all(terms),
    "Or": lambda *terms: any(terms),
    "max": max,
    "min": min,
}


def conditions_of(graph: fx.Graph) -> tuple[str, ...]:
    """Conditions on the sizes of the placeholders of an exported graph. Raises `TraceError` for one it cannot state."""
    places = _Places()
    environment = None
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if not isinstance(value, torch.Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
                environment = size.node.shape_env
                places.add(environment.replace(size.node.expr), f"{node.target}.shape[{dim}]")
    if environment is None:
        return ()
    texts = [*places.conditions(), *_ranges(environment, places), *_guards(environment, places)]
    for text in texts:
        parse(text)
    return tuple(dict.fromkeys(texts))


class _Places:
    """Where the symbols of sizes can be read off the inputs."""

    def __init__(self) -> None:
        self.names: dict[sympy.Symbol, str] = {}
        self.extra: list[str] = []
        self.later: list[tuple[sympy.Expr, str]] = []

    def add(self, size: sympy.Expr, place: str) -> None:
        offset, rest = size.as_coeff_Add()
        factor, symbol = rest.as_coeff_Mul()
        if not isinstance(symbol, sympy.Symbol) or symbol in self.names:
            self.later.append((size, place))
        elif size == symbol:
            self.names[symbol] = place
        else:
            self.names[symbol] = f"(({place} - {offset}) // {factor})"
            self.extra.append(f"({place} - {offset}) % {factor} == 0")

    def conditions(self) -> list[str]:
        """Sizes that are made of others."""
        return [*self.extra, *(f"{place} == {self.show(size)}" for size, place in self.later)]

    def show(self, expression: Any) -> str:
        unknown = expression.free_symbols - self.names.keys()
        if unknown:
            raise TraceError(
                f"the model depends on a size that no input shows ({expression}); use another dynamic_shapes"
            )
        return str(_Printer(self.names).doprint(expression))


class _Printer(PythonPrinter):
    """Python text, with the places of symbols for their names."""

    def __init__(self, names: dict[sympy.Symbol, str]) -> None:
        super().__init__()
        self.names = names

    def _print_Symbol(self, symbol: sympy.Symbol) -> str:  # noqa: N802 (the name is sympy's)
        return self.names[symbol]


def _ranges(environment: ShapeEnv, places: _Places) -> list[str]:
    texts = []
    for symbol, place in places.names.items():
        known = environment.var_to_range[symbol]
        if known.lower > _SMALLEST_TRACED:
            texts.append(f"{place} >= {int(known.lower)}")
        if known.upper.is_Integer:
            texts.append(f"{place} <= {int(known.upper)}")
    return texts


def _guards(environment: ShapeEnv, places: _Places) -> list[str]:
    """Branches taken. Those on numbers that only tensor values decide are not about the inputs' sizes."""
    found = []
    for guard in environment.guards:
        expression = environment.replace(guard.expr)
        if expression != sympy.true and expression.free_symbols <= places.names.keys():
            found.append(places.show(expression))
    return found


def parse(text: str) -> Term:
    """The condition as nested tuples. Raises `TraceError` for anything but arithmetic and comparisons of sizes."""
    try:
        return _term(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, ValueError, RecursionError, MemoryError) as error:
        raise TraceError(
            f"the model takes a path that depends on a size ({text}) and graphzip cannot check that; fix this size"
        ) from error


def _term(node: ast.expr) -> Term:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
        return "size", ast.unparse(node.value.value), ast.literal_eval(node.slice)
    if isinstance(node, ast.BinOp):
        return _operation(node.op, node.left, node.right)
    if isinstance(node, ast.UnaryOp):
        return _operation(node.op, node.operand)
    if isinstance(node, ast.BoolOp):
        return _operation(node.op, *node.values)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _operation(node.ops[0], node.left, *node.comparators)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"max", "min"}:
        return node.func.id, *(_term(argument) for argument in node.args)
    raise ValueError(f"{ast.unparse(node)} is not a condition on sizes")


def _operation(kind: ast.AST, *terms: ast.expr) -> Term:
    name = type(kind).__name__
    if name not in _OPERATIONS:
        raise ValueError(f"{name} is not known")
    found = name, *(_term(term) for term in terms)
    if name == "Pow" and not (isinstance(found[2], int) and abs(found[2]) <= _LARGEST_POWER):
        raise ValueError("sizes are raised to small powers only")
    return found


def sizes_of(term: Term) -> Iterator[tuple[str, int]]:
    """The sizes that a parsed condition reads: names of inputs, and their dimensions."""
    if isinstance(term, tuple) and term[0] == "size":
        yield term[1], term[2]
    elif isinstance(term, tuple):
        for part in term[1:]:
            yield from sizes_of(part)


def _value(term: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(term, tuple):
        return term
    if term[0] == "size":
        return tensors[term[1]].shape[term[2]]
    return _OPERATIONS[term[0]](*[_value(part, tensors) for part in term[1:]])


def check_sizes(
    texts: tuple[str, ...], terms: tuple[Term, ...], names: tuple[str, ...], *tensors: torch.Tensor
) -> None:
    """Raises `InputShapeError` where a condition does not hold for the inputs, given with their names."""
    known = dict(zip(names, tensors, strict=True))
    for text, term in zip(texts, terms, strict=True):
        if not _value(term, known):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in known.items())
            raise InputShapeError(
                f"the model was compiled on a path that needs {text}, and the inputs are {shapes}; "
                "compile it with example_inputs of these sizes"
            )
