"""Which values of a graph share memory, and how each of them is a view of another.

Nothing is concluded from the names of operators. `torch.export` ran every operator on fake tensors, and the ones that
it left in the graph share a storage exactly where the tensors of the model do: also where `reshape`, `.to()`, `einsum`
or a dropout that does not act gives a view or its operand itself, and where they made a copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphzip.graph.inputs import hint
from graphzip.graph.meta import meta_of
from graphzip.graph.modes import DROPOUTS

__all__ = ["Memory", "View", "is_dense", "layout", "plain", "writes", "written"]

aten = torch.ops.aten

_COPIES = {aten.lift_fresh_copy.default}
"""Fake tensors leave out the copy that this makes of a constant."""

_NO_GRADIENT = {aten.detach.default}

_NEVER_SAME = {*DROPOUTS, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
"""Operators that may give their operand itself and something else in training mode, or for a batch of one."""


@dataclass(frozen=True)
class View:
    """How a value was made of another one whose memory it shares.

    `maker` is the operator, with its arguments as they were traced; `part` says which of its results the value is,
    where they are a list.
    """

    parent: fx.Node
    maker: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: int | None = None

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument of the operator, by its place and its name."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    @property
    def stops_gradient(self) -> bool:
        """Whether no gradient reaches the parent through the view."""
        under_no_grad = bool(meta_of(self.maker).get("no_grad")) and not writes(self.maker)
        return under_no_grad or self.maker.target in _NO_GRADIENT


def writes(node: fx.Node) -> bool:
    """Whether an operator changes an operand."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def written(node: fx.Node) -> list[Any]:
    """The operands that an operator changes, in the order of its arguments."""
    found: list[Any] = []
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            found += given if isinstance(given, list | tuple) else [given]
    return found


def plain(size: Any) -> Any:
    """A size that can be compared without asking for its value: a number, or an expression where it is open."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression


def is_dense(value: torch.Tensor) -> bool:
    """Whether the positions of a tensor fill a piece of the memory, in whatever order."""
    extent = 1
    for step, size in sorted((hint(step), hint(size)) for size, step in zip(value.shape, value.stride(), strict=True)):
        if size != 1 and step != extent:
            return False
        extent *= size
    return True


def layout(value: torch.Tensor) -> tuple[Any, ...]:
    """What tells two views of one memory apart."""
    numbers = (*value.shape, *value.stride(), value.storage_offset())
    return value.dtype, value.is_conj(), value.is_neg(), value.dim(), *map(plain, numbers)


class Memory:
    """The values of `graph` by the memory that they lie in, which is told by a number.

    `view` has no entry for the value that the memory was made for. `same` is one and the same node for all values that
    are one tensor under several names, as the result of `y.add_(1)` is `y`. What `detach` gives is another one, because
    no gradient passes it, and what a dropout gives, which is a copy in training mode. `members` of a memory are its
    values, and lists of them.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.view: dict[fx.Node, View] = {}
        self.same: dict[fx.Node, fx.Node] = {}
        self.members: defaultdict[int, list[fx.Node]] = defaultdict(list)
        self._numbers: dict[fx.Node, tuple[int, ...]] = {}
        self._made: dict[int, int] = {}
        for node in graph.nodes:
            self._enter(node)

    def numbers(self, node: fx.Node) -> tuple[int, ...]:
        """The memory of a value, or of all values in a list."""
        return self._numbers.get(node, ())

    def path(self, node: fx.Node) -> Iterator[tuple[fx.Node, View]]:
        """The value and how it was made of its parent, the parent and how it was made of its own, and so on."""
        while node in self.view:
            yield node, self.view[node]
            node = self.view[node].parent

    def root(self, node: fx.Node) -> fx.Node:
        """The value that the memory was made for."""
        for _, view in self.path(node):
            node = view.parent
        return node

    def _enter(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        self.same[node] = node
        if isinstance(value, torch.Tensor):
            view = self._viewed(node, _storage(value))
            if view is not None and writes(view.maker) and not _alike(value, view.parent.meta["val"]):
                view = None  # `out=` has given it other memory
            if view is None:
                self._numbers[node] = (self._number(node, _storage(value)),)
            else:
                self.view[node] = view
                self._numbers[node] = self._numbers[view.parent]
                is_same = layout(value) == layout(view.parent.meta["val"])
                if is_same and not view.stops_gradient and view.maker.target not in _NEVER_SAME:
                    self.same[node] = self.same[view.parent]
        elif isinstance(value, list | tuple) and node.op == "call_function":
            storages = {_storage(part) for part in value if isinstance(part, torch.Tensor)}
            shared = [found for found in _operands(node) if _storage(found.meta["val"]) in storages]
            self._numbers[node] = tuple(dict.fromkeys(self._numbers[found][0] for found in shared))
        for number in self.numbers(node):
            self.members[number].append(node)

    def _viewed(self, node: fx.Node, storage: int) -> View | None:
        if node.op != "call_function" or node.target in _COPIES:
            return None
        source: Any = node.args[0] if node.args else None
        maker, part = node, None
        if isinstance(source, fx.Node) and isinstance(source.meta.get("val"), list | tuple):
            maker, part = source, int(node.args[1])  # type: ignore[arg-type]
        shared = [found for found in _operands(maker) if _storage(found.meta["val"]) == storage]
        if not shared:
            return None
        several = part is not None and len(_operands(maker)) == len(maker.meta["val"])
        parent = _operands(maker)[part] if several else shared[0]  # type: ignore[index]
        return View(parent, maker, maker.args, dict(maker.kwargs), part)

    def _number(self, node: fx.Node, storage: int) -> int:
        if storage not in self._made or node.target in _COPIES:
            self._made[storage] = len(self.members) + 1
        return self._made[storage]


def _alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    return [plain(size) for size in left.shape] == [plain(size) for size in right.shape]


def _storage(value: torch.Tensor) -> int:
    found: int = value.untyped_storage()._cdata
    return found


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator is given, in order; of one that writes, those that it writes to."""
    given = written(node) if writes(node) else node.all_input_nodes
    return [found for found in given if isinstance(found, fx.Node) and isinstance(found.meta.get("val"), torch.Tensor)]
