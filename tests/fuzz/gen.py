"""Grow a random program line by line. Every line runs as it is written, so that shapes and values are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuzz.program import Input, Line, Program, namespace

__all__ = ["RULES", "Gen", "Skip", "Value", "rule"]

LARGEST, SMALLEST, MOST = 1e3, 1e-4, 20_000

RULES: dict[str, tuple[Callable[[Gen], None], float]] = {}
"""Name -> what writes the lines, and its weight."""


class Skip(Exception):
    """A rule that does not fit here."""


def rule(weight: float = 1.0) -> Callable[[Callable[[Gen], None]], Callable[[Gen], None]]:
    """Register a rule under the name of its function."""

    def register(write: Callable[[Gen], None]) -> Callable[[Gen], None]:
        RULES[write.__name__] = write, weight
        return write

    return register


@dataclass(frozen=True)
class Value:
    """A tensor of the program: its name, and a letter per dimension: B batch, C channels, L H W D positions, N heads,
    K any other.
    """

    name: str
    layout: str
    tensor: Tensor

    def __str__(self) -> str:
        return self.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def rank(self) -> int:
        return self.tensor.dim()

    def dim(self, letter: str) -> int:
        return self.layout.index(letter)

    def size(self, letter: str) -> int:
        return int(self.tensor.shape[self.dim(letter)])

    @property
    def c(self) -> int:
        return self.size("C")


class Gen:
    """State of a program that is being written."""

    BATCH = 4

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.model = nn.Module()
        self.scope: dict[str, Any] = {**namespace(), "self": self.model}
        self.state: list[tuple[str, str]] = []
        self.lines: list[Line] = []
        self.inputs: list[Input] = []
        self.values: list[Value] = []
        self.read: set[str] = set()
        self.rule = ""
        self.random = False
        self.count = 0

    # --- choices -----------------------------------------------------------------------------------------------

    def one(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def width(self) -> int:
        return self.one(4, 4, 6, 8, 8, 12, 16)

    def divisor(self, *numbers: int) -> int:
        """A common divisor, rarely 1."""
        found = [d for d in range(2, min(numbers) + 1) if all(n % d == 0 for n in numbers)]
        return self.one(*found) if found and self.chance(0.85) else 1

    def neg(self, dim: int, rank: int) -> int:
        """The dimension, or the same counted from the end."""
        return dim - rank if self.chance(0.4) else dim

    # --- values ------------------------------------------------------------------------------------------------

    def take(
        self, *layouts: str, where: Callable[[Value], bool] = lambda value: True, ints: bool = False, other: Any = None
    ) -> Value:
        """A value of one of these layouts, mostly a late one. Without layouts any will do."""
        found = [
            value
            for value in self.values
            if (not layouts or value.layout in layouts)
            and value.tensor.is_floating_point() != ints
            and value is not other
            and where(value)
        ]
        if not found:
            raise Skip
        unread = [value for value in found if value.name not in self.read]
        if unread and self.chance(0.6):
            return unread[-1]
        return found[-1] if self.chance(0.5) else self.rng.choice(found)

    def like(self, value: Value, *, itself: float = 0.3) -> Value:
        """Another value of the same shape."""
        found = [
            each
            for each in self.values
            if each.shape == value.shape
            and each.layout == value.layout
            and each.name != value.name
            and each.tensor.is_floating_point()
        ]
        return self.rng.choice(found) if found and not self.chance(itself) else value

    def name(self, letter: str = "y") -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def batch(self) -> str:
        """The size of the batch as text."""
        first = next(each.name for each in self.inputs if each.batch)
        return self.one(f"{first}.shape[0]", f"{first}.size(0)", f"len({first})")

    def sizes(self, value: Value, layout: str | None = None) -> list[str]:
        """The sizes of a value as text, some as numbers and some read off it; the batch always so."""
        return [
            str(size) if letter != "B" and self.chance(0.6) else f"{value}.shape[{dim}]"
            for dim, (letter, size) in enumerate(zip(value.layout, value.shape, strict=True))
        ]

    # --- state -------------------------------------------------------------------------------------------------

    def layer(self, text: str, letter: str = "a", *, shared: bool = True) -> str:
        """`self.a1`, made by the constructor in the text; sometimes an earlier one of the same text."""
        if shared and self.chance(0.15):
            same = [name for name, made in self.state if made.partition(" = ")[2] == text]
            if same:
                return f"self.{self.rng.choice(same)}"
        name = self.name(letter)
        self._make(name, f"self.{name} = {text}")
        return f"self.{name}"

    def param(self, *sizes: int, positive: bool = False, scale: float = 0.5) -> str:
        """A parameter of these sizes."""
        shape = ", ".join(map(str, sizes))
        made = f"torch.rand({shape}) + 0.5" if positive else f"torch.randn({shape}) * {scale}"
        return self.layer(f"nn.Parameter({made})", "p", shared=False)

    def buffer(self, text: str) -> str:
        name = self.name("t")
        self._make(name, f'self.register_buffer("{name}", {text})')
        return f"self.{name}"

    def table(self, *sizes: int) -> str:
        """A parameter, or a buffer."""
        if self.chance(0.6):
            return self.param(*sizes)
        return self.buffer(f"torch.randn({', '.join(map(str, sizes))})")

    def _make(self, name: str, text: str) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.state))
            exec(text, self.scope)
        made = self.scope["self"]._modules.get(name)
        if made is not None:
            made.double().eval()
        for store in (self.model._parameters, self.model._buffers):
            held: Any = store.get(name)
            if held is not None and held.is_floating_point():
                held.data = held.data.double()
        self.state.append((name, text))

    # --- lines -------------------------------------------------------------------------------------------------

    def put(self, text: str, reads: Sequence[Any], *layouts: str, names: Sequence[str] = ()) -> Value:
        """`text` computes an expression (or several, as a tuple); the first of the values it makes."""
        made = list(names) or [self.name() for _ in layouts]
        target = ", ".join(made)
        return self.put_block(f"{target} = {text}", reads, dict(zip(made, layouts, strict=True)))

    def put_block(self, text: str, reads: Sequence[Any], made: dict[str, str]) -> Value:
        """Statements that bind the names in `made` (with their layouts)."""
        return self._add(text, reads, made)[0]

    def put_all(self, text: str, reads: Sequence[Any], *layouts: str) -> list[Value]:
        made = [self.name() for _ in layouts]
        comma = "," if len(made) == 1 else ""
        return self._add(f"{', '.join(made)}{comma} = {text}", reads, dict(zip(made, layouts, strict=True)))

    def _add(self, text: str, reads: Sequence[Any], made: dict[str, str]) -> list[Value]:
        try:
            with torch.enable_grad():  # some writes into views are refused only then
                exec(text, self.scope)
        except Exception as error:
            raise Skip(f"{self.rule}: {text}: {error}") from error
        found = []
        for name, layout in made.items():
            value = self.scope[name]
            if not isinstance(value, Tensor) or value.dim() != len(layout) or not 0 < value.numel() <= MOST:
                raise Skip(f"{self.rule}: {text}: {name} is no {layout}: {getattr(value, 'shape', value)}")
            if value.is_floating_point():
                largest = float(value.detach().abs().max())
                if not SMALLEST < largest < LARGEST:
                    raise Skip(f"{self.rule}: {text}: {largest}")
            found.append(Value(name, layout, value))
        names = tuple(dict.fromkeys(str(each) for each in reads))
        self.lines.append(Line(text, names, tuple(made), self.rule))
        self.read |= set(names)
        self.values = [value for value in self.values if value.name not in made] + found
        return found

    def input(self, sizes: tuple[int, ...], layout: str, **options: Any) -> Value:
        name = ("x", "z", "w")[len(self.inputs)]
        given = Input(name, sizes, **options)
        self.inputs.append(given)
        tensor = given.make(self.BATCH, torch.Generator().manual_seed(self.seed))
        self.scope[name] = tensor
        value = Value(name, layout, tensor)
        self.values.append(value)
        return value

    def apply(self, name: str) -> bool:
        """Let a rule write its lines; nothing stays where it does not fit."""
        kept = (list(self.lines), list(self.values), set(self.read), len(self.state), self.random)
        self.rule = name
        try:
            RULES[name][0](self)
            return True
        except Skip:
            self.lines, self.values, self.read, states, self.random = kept
            for made, _ in self.state[states:]:
                delattr(self.model, made)
            del self.state[states:]
            for value in self.values:  # what was written to in place
                self.scope[value.name] = value.tensor
            return False

    def program(self, outputs: str) -> Program:
        return Program(tuple(self.state), tuple(self.lines), tuple(self.inputs), outputs, self.random).used()
