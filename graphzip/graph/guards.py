"""What must hold between the sizes of the inputs for a traced graph to be the model.

A model may choose its path by a size (`if x.shape[0] % 2 == 0`). `torch.export` takes the path of the example and
records the condition. A condition is kept as text, `"x.shape[0] % 2 == 0"`, and checked whenever the module runs.
"""

from __future__ import annotations

import ast
import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from graphzip.errors import InputShapeError, TraceError
from graphzip.graph.branches import Branch
from graphzip.graph.proxies import as_call, is_proxy
from graphzip.graph.sizes import value_at
from graphzip.graph.torch_private import PythonPrinter, ShapeEnv

__all__ = [
    "Open",
    "Sizes",
    "Term",
    "asked_of_sizes",
    "check_sizes",
    "holds",
    "parse",
    "shown",
    "sizes_of",
    "tie_sizes",
    "value_of",
]

Term = int | float | tuple[Any, ...]
"""A parsed condition: a number, `("size", input, dimension)`, `("input", name)`, or an operation and its terms."""

_SMALLEST_TRACED = 2
_LARGEST_POWER = 64
_APART = (sympy.Ne, sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan, sympy.GreaterThan)
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
    "Not": lambda term: torch.sym_not(term) if isinstance(term, torch.SymBool) else not term,
    "And": lambda *terms: functools.reduce(operator.and_, terms),
    "Or": lambda *terms: functools.reduce(operator.or_, terms),
    "max": lambda *terms: functools.reduce(torch.sym_max, terms),
    "min": lambda *terms: functools.reduce(torch.sym_min, terms),
}
_ASKED: ContextVar[list[tuple[str, Any]] | None] = ContextVar("asked of sizes", default=None)


@dataclass(frozen=True)
class Open:
    """A comparison that no guard holds, because it was decided for sizes of two and more, and what it says of one.

    `places` are the sizes, input by input, that would have to be one for the model to take the other path.
    """

    text: str
    places: tuple[str, ...]
    source: str


class Sizes:
    """The sizes of an exported graph's placeholders, and what must hold between them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.environment: ShapeEnv | None = None
        self.names: dict[sympy.Symbol, str] = {}
        self.fixed: dict[str, tuple[int, Any]] = {}
        self._extra: list[str] = []
        self._later: list[tuple[sympy.Expr, str]] = []
        for node in graph.nodes:
            value = node.meta.get("val") if node.op == "placeholder" else None
            for dim, size in enumerate(value.shape) if isinstance(value, torch.Tensor) else ():
                self._add(size, f"{node.target}.shape[{dim}]")
            self._add(value, str(node.target))

    def _add(self, size: Any, place: str) -> None:
        """A symbol is read off the first place that shows it; what is made of several is checked."""
        if not isinstance(size, torch.SymInt):
            return
        if size.node.maybe_as_int() is not None:
            self.fixed[place] = int(size), size.node._expr
            return
        environment: Any = size.node.shape_env
        self.environment = environment
        expression = environment.replace(size.node.expr)
        offset, rest = expression.as_coeff_Add()
        factor, symbol = rest.as_coeff_Mul()
        if not isinstance(symbol, sympy.Symbol) or symbol in self.names:
            self._later.append((expression, place))
        elif expression == symbol:
            self.names[symbol] = place
        else:
            self.names[symbol] = f"(({place} - {offset}) // {factor})"
            self._extra.append(f"({place} - {offset}) % {factor} == 0")

    def conditions(self) -> tuple[str, ...]:
        """What must hold for the graph to be the model. Raises `TraceError` for what cannot be stated."""
        if self.environment is None:
            return ()
        derived = [f"{place} == {self._show(size)}" for size, place in self._later]
        texts = [*self._extra, *derived, *self._ranges(self.environment), *self._guards(self.environment)]
        for text in texts:
            parse(text)
        return tuple(dict.fromkeys(texts))

    def open(self, branches: Iterable[Branch]) -> list[Open]:
        """Comparisons that would come out otherwise where sizes are one, though the conditions allow that."""
        if self.environment is None:
            return []
        found: dict[str, Open] = {}
        for branch in dict.fromkeys(branches):
            expression = self.environment.replace(branch.condition)
            symbols = sorted(expression.free_symbols & self._may_be_one(), key=str)
            if not symbols or not expression.free_symbols <= self.names.keys():
                continue
            text = self._show(expression)
            if text not in found and not self._holds_at_one(expression, symbols):
                parse(text)
                found[text] = Open(text, tuple(self.names[symbol] for symbol in symbols), branch.source)
        return list(found.values())

    def asked(self, branches: Iterable[Branch]) -> dict[str, str]:
        """What must hold for comparisons to come out as they did, as conditions, each with the line that asks."""
        if self.environment is None:
            return {}
        found: dict[str, str] = {}
        for branch in dict.fromkeys(branches):
            expression = self.environment.replace(branch.condition)
            if expression != sympy.true and expression.free_symbols <= self.names.keys():
                found.setdefault(self._show(expression), branch.source)
        return found

    def inequalities(self) -> set[str]:
        """Those conditions that say which sizes are apart, and not which ones are the same."""
        if self.environment is None:
            return set()
        guards = [self.environment.replace(guard.expr) for guard in self.environment.guards]
        apart = [guard for guard in guards if isinstance(guard, _APART) and guard.free_symbols <= self.names.keys()]
        return {text for text in self._ranges(self.environment) if ">=" in text} | {*map(self._show, apart)}

    def lower_bounds(self, minima: Collection[int]) -> set[str]:
        """Those conditions that say that a size is no smaller than one of these numbers."""
        if self.environment is None:
            return set()
        wanted = tuple(f" >= {least}" for least in minima)
        return {text for text in self._ranges(self.environment) if text.endswith(wanted)}

    def _may_be_one(self) -> set[sympy.Symbol]:
        assert self.environment is not None
        return {symbol for symbol in self.names if self.environment.var_to_range[symbol].lower == _SMALLEST_TRACED}

    def _holds_at_one(self, expression: Any, symbols: Sequence[sympy.Symbol]) -> bool:
        """Whether a condition holds wherever some of these sizes are one, and the others the smallest or as traced."""
        environment = self.environment
        assert environment is not None
        involved = [*symbols, *sorted(expression.free_symbols - set(symbols), key=str)]
        guards = [environment.replace(guard.expr) for guard in environment.guards]
        choices = [
            {
                *((1,) if symbol in symbols else ()),
                int(environment.var_to_range[symbol].lower),
                int(environment.backed_var_to_val[symbol]),
            }
            for symbol in involved
        ]
        for sizes in itertools.product(*choices):
            values = dict(zip(involved, map(sympy.Integer, sizes), strict=True))
            ruled_out = any(value_at(guard, values) in (sympy.false, None) for guard in guards)
            if 1 in sizes and not ruled_out and value_at(expression, values) != sympy.true:
                return False
        return True

    def _ranges(self, environment: ShapeEnv) -> list[str]:
        texts = []
        for symbol, place in self.names.items():
            known = environment.var_to_range[symbol]
            if known.lower > _SMALLEST_TRACED:
                texts.append(f"{place} >= {int(known.lower)}")
            if known.upper.is_Integer:
                texts.append(f"{place} <= {int(known.upper)}")
        return texts

    def _guards(self, environment: ShapeEnv) -> list[str]:
        """Branches taken. Those on numbers that only tensor values decide are not about the inputs' sizes."""
        found = []
        for guard in environment.guards:
            expression = environment.replace(guard.expr)
            if expression != sympy.true and expression.free_symbols <= self.names.keys():
                found.append(self._show(expression))
        return found

    def _show(self, expression: Any) -> str:
        unknown = expression.free_symbols - self.names.keys()
        if unknown:
            raise TraceError(
                f"the model depends on a size that no input shows ({expression}); use another dynamic_shapes"
            )
        return shown(expression, self.names)


def shown(expression: Any, names: Mapping[Any, str]) -> str:
    """An expression as text, with the places of its symbols, which `names` has, in their stead."""
    return str(_Printer(names).doprint(expression))


class _Printer(PythonPrinter):
    """Python text, with the places of symbols for their names."""

    def __init__(self, names: Mapping[Any, str]) -> None:
        super().__init__()
        self.names = names

    def _print_Float(self, number: sympy.Float) -> str:  # noqa: N802 (the name is sympy's)
        return repr(float(number))

    def _print_Symbol(self, symbol: sympy.Symbol) -> str:  # noqa: N802 (the name is sympy's)
        return self.names[symbol]


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
    if isinstance(node, ast.Name):
        return "input", node.id
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


def sizes_of(term: Term) -> Iterator[tuple[str, int | None]]:
    """The sizes that a parsed condition reads: names of inputs, and their dimensions; none for a number itself."""
    if isinstance(term, tuple) and term[0] == "size":
        yield term[1], term[2]
    elif isinstance(term, tuple) and term[0] == "input":
        yield term[1], None
    elif isinstance(term, tuple):
        for part in term[1:]:
            yield from sizes_of(part)


def value_of(term: Any, known: dict[str, Any]) -> Any:
    """A parsed condition for inputs, given by name: a number, or whether it holds."""
    if not isinstance(term, tuple):
        return term
    if term[0] == "size":
        return known[term[1]].shape[term[2]]
    if term[0] == "input":
        return known[term[1]]
    return _OPERATIONS[term[0]](*[value_of(part, known) for part in term[1:]])


def holds(text: str, known: dict[str, Any]) -> bool:
    """Whether a condition holds for inputs, given by name."""
    return bool(_checked(parse(text), known))


def tie_sizes(texts: Iterable[str], known: dict[str, Any]) -> None:
    """Make one size of those that conditions say are equal, of fake inputs given by name."""
    for text in texts:
        term = parse(text)
        if isinstance(term, tuple) and term[0] == "Eq" and all(_is_size(part, known) for part in term[1:]):
            bool(value_of(term, known))


def _is_size(term: Any, known: dict[str, Any]) -> bool:
    """Whether a term is the size of a dimension that an input has."""
    if not isinstance(term, tuple) or term[0] != "size" or not isinstance(known.get(term[1]), torch.Tensor):
        return False
    return isinstance(term[2], int) and 0 <= term[2] < known[term[1]].dim()


def _checked(term: Term, known: dict[str, Any]) -> Any:
    """What cannot be computed, as a rest by zero, is not true: the model fails there, too."""
    try:
        return value_of(term, known)
    except ZeroDivisionError:
        return False


@contextmanager
def asked_of_sizes() -> Iterator[list[tuple[str, Any]]]:
    """The conditions that are checked inside while a module is traced, with what each one says of the trace's sizes."""
    found: list[tuple[str, Any]] = []
    token = _ASKED.set(found)
    try:
        yield found
    finally:
        _ASKED.reset(token)


def check_sizes(texts: tuple[str, ...], terms: tuple[Term, ...], names: tuple[str, ...], *inputs: Any) -> None:
    """Raises `InputShapeError` where a condition does not hold for the inputs, given with their names."""
    if is_proxy(*inputs):
        as_call(check_sizes, texts, terms, names, *inputs)
        return
    known = dict(zip(names, inputs, strict=True))
    asked = _ASKED.get()
    for text, term in zip(texts, terms, strict=True):
        value = _checked(term, known)
        if asked is not None and isinstance(value, torch.SymBool):
            asked.append((text, value.node.expr))
        if not value:
            shapes = ", ".join(
                f"{name} {tuple(given.shape) if isinstance(given, torch.Tensor) else given}"
                for name, given in known.items()
            )
            raise InputShapeError(
                f"the model was compiled on a path that needs {text}, and the inputs are {shapes}; "
                "compile it with example_inputs of these sizes"
            )
