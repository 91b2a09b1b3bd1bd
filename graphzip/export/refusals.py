"""An ONNX file refuses the sizes that the module refuses.

ONNX has no assertion. A condition that does not hold becomes an index that is out of range, of an operator whose name
says what is missing: onnxruntime raises, and names it. Where the condition holds, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import sympy  # type: ignore[import-untyped]

from graphzip.errors import TraceError
from graphzip.export.capture import Captured
from graphzip.export.optional_packages import require
from graphzip.graph.guards import Term, parse, shown

__all__ = ["refuse"]

_COMPARISONS = {"Eq": "Equal", "Lt": "Less", "LtE": "LessOrEqual", "Gt": "Greater", "GtE": "GreaterOrEqual"}
_ARITHMETIC = {"Add": "Add", "Sub": "Sub", "Mult": "Mul", "And": "And", "Or": "Or", "max": "Max", "min": "Min"}


def refuse(model: Any, captured: Captured) -> list[str]:
    """Let `model` refuse inputs that do not fit; the conditions that it cannot check, in words."""
    places = _places(captured)
    writer, left = _Writer(model), list[str]()
    for text, expression in captured.conditions:
        if expression == sympy.true or any(symbol not in places for symbol in expression.free_symbols):
            left.append(text)  # that two sizes are the same is part of the graph, where they have one name
            continue
        try:
            writer.condition(text, parse(shown(expression, places)))
        except (KeyError, TraceError):
            left.append(text)
    return left if writer.finish() else [text for text, _ in captured.conditions]


def _places(captured: Captured) -> dict[Any, str]:
    """Where each free size of the program shows."""
    found: dict[Any, str] = {}
    for number, sizes in enumerate(captured.sizes.leaves):
        for dim, size in enumerate(sizes):
            if not isinstance(size, int) and size.is_Symbol:
                found.setdefault(size, f"input_{number}.shape[{dim}]")
    return found


class _Writer:
    """Appends to the front of a graph what it takes to check conditions on the sizes of its inputs."""

    def __init__(self, model: Any) -> None:
        self.ir = require("onnx_ir")
        self.graph = model.graph
        self.inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
        self.nodes: list[Any] = []
        self.shapes: dict[int, Any] = {}
        self.zeros: list[Any] = []
        self.used: list[int] = []

    def condition(self, text: str, term: Term) -> None:
        """A zero that can be computed only where the condition holds. Raises `KeyError` for what ONNX cannot say."""
        made, used = len(self.nodes), len(self.used)
        try:
            holds = self._value(term)
        except KeyError:
            del self.nodes[made:], self.used[used:]
            self.shapes = {key: value for key, value in self.shapes.items() if value.producer() in self.nodes}
            raise
        number = self._node("Cast", holds, to=self.ir.DataType.INT64.value)
        index = self._node("Sub", self._constant(1), number)
        self.zeros.append(self._node("Gather", self._constant([0]), index, name=f"refused unless {text}"))

    def finish(self) -> bool:
        """Let what reads one of the inputs that were asked for wait for the zeros; whether anything reads one."""
        own = set(self.nodes)
        taken = [number for number in self.used if {user for user, _ in self.inputs[number].uses()} - own]
        if not self.zeros or not taken:
            return not self.zeros
        value = self.inputs[taken[0]]
        readers = list(value.uses())
        size = self._shape(taken[0])
        for zero in self.zeros:
            size = self._node("Add", size, zero)
        checked = self._node("Reshape", value, size, allowzero=1)
        checked.name, checked.shape, checked.type = f"{value.name}_checked", value.shape, value.type
        for user, place in readers:
            if user not in own:
                user.replace_input_with(place, checked)
        first = next(iter(self.graph), None)
        if first is None:
            self.graph.extend(self.nodes)
        else:
            self.graph.insert_before(first, self.nodes)
        return True

    def _value(self, term: Term) -> Any:
        if isinstance(term, bool | int):
            return self._constant(int(term))
        if not isinstance(term, tuple) or term[0] == "input":
            raise KeyError(term)
        if term[0] == "size":
            number = int(term[1].removeprefix("input_"))
            self.used.append(number)
            return self._node("Gather", self._shape(number), self._constant(term[2]))
        return self._operation(term[0], [self._value(part) for part in term[1:]], term[1:])

    def _operation(self, name: str, values: Sequence[Any], terms: Sequence[Term]) -> Any:
        if name == "NotEq":
            return self._node("Not", self._node("Equal", *values))
        if name in ("Not", "USub"):
            return self._node("Not" if name == "Not" else "Neg", *values)
        if name in ("FloorDiv", "Mod"):
            return self._divided(name, *values)
        if name == "Pow":
            return self._power(values[0], terms[1])
        if name in _COMPARISONS:
            return self._node(_COMPARISONS[name], *values)
        made = values[0]
        for value in values[1:]:
            made = self._node(_ARITHMETIC[name], made, value)
        return made

    def _divided(self, name: str, value: Any, by: Any) -> Any:
        """As in Python; a division by an empty size, which ends the process, is one by one."""
        by = self._node("Max", by, self._constant(1))
        rest = self._node("Mod", value, by)
        return rest if name == "Mod" else self._node("Div", self._node("Sub", value, rest), by)

    def _power(self, value: Any, exponent: Term) -> Any:
        if not isinstance(exponent, int) or exponent < 1:
            raise KeyError(exponent)
        made = value
        for _ in range(exponent - 1):
            made = self._node("Mul", made, value)
        return made

    def _shape(self, number: int) -> Any:
        if number not in self.shapes:
            self.shapes[number] = self._node("Shape", self.inputs[number])
        return self.shapes[number]

    def _constant(self, numbers: Any) -> Any:
        tensor = self.ir.tensor(np.array(numbers, dtype=np.int64))
        return self._node("Constant", value=tensor)

    def _node(self, kind: str, *inputs: Any, name: str | None = None, **attributes: Any) -> Any:
        number = len(self.nodes)
        made = self.ir.node(kind, inputs, attributes or None, name=name or f"size_check_{number}")
        made.outputs[0].name = f"size_check_{number}_result"
        self.nodes.append(made)
        return made.outputs[0]
