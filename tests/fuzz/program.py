"""Random models as text: layers, lines of a forward, inputs. What is printed is what runs."""

from __future__ import annotations

import linecache
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Input", "Line", "Program", "namespace"]


def namespace() -> dict[str, Any]:
    """What the text of a program can name."""
    return {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor}


@dataclass(frozen=True)
class Line:
    """One statement of a forward (its further lines are indented), what it reads and what it makes."""

    text: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    rule: str


@dataclass(frozen=True, repr=False)
class Input:
    """One argument of the forward: `sizes` without the batch; `high` is set for integers and is their bound.

    `dynamic` are the dimensions (with the batch as 0) that are asked to be dynamic.
    """

    name: str
    sizes: tuple[int, ...]
    high: int | None = None
    flags: bool = False
    batch: bool = True
    dynamic: tuple[int, ...] = ()

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in ("high", "flags", "batch", "dynamic")}
        plain = {"high": None, "flags": False, "batch": True, "dynamic": ()}
        more = "".join(f", {name}={value!r}" for name, value in shown.items() if value != plain[name])
        return f"Input({self.name!r}, {self.sizes!r}{more})"

    def make(self, batch: int, generator: torch.Generator, grown: int = 0) -> Tensor:
        """Random values; dimensions that are dynamic are `grown` larger."""
        lead = (batch,) if self.batch else ()
        sizes = [size + (grown if dim in self.dynamic else 0) for dim, size in enumerate((*lead, *self.sizes))]
        if grown and 0 in self.dynamic:
            sizes[0] -= grown
        if self.high is not None:
            return torch.randint(self.high, sizes, generator=generator)
        if self.flags:
            found = torch.rand(sizes, generator=generator) < 0.7
            found[..., 0] = True
            return found
        return torch.randn(sizes, generator=generator, dtype=torch.float64)


_COUNT = [0]


@dataclass(frozen=True)
class Program:
    """A model. `state` are the statements of `__init__`, by the attribute that each makes."""

    state: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]
    inputs: tuple[Input, ...]
    outputs: str
    random: bool = False
    text: str = ""

    @classmethod
    def given(cls, text: str, *inputs: Input, random: bool = False) -> Program:
        """A program whose source is known; it cannot be made smaller."""
        return cls((), (), inputs, "", random, text)

    @property
    def rules(self) -> set[str]:
        return {line.rule for line in self.lines}

    def used(self) -> Program:
        """Without the state that no line reads."""
        text = "\n".join([*(line.text for line in self.lines), self.outputs])
        kept = []
        for name, made in reversed(self.state):
            if f"self.{name}" in text:
                kept.append((name, made))
                text += "\n" + made
        return replace(self, state=tuple(reversed(kept)))

    def source(self) -> str:
        """The class as Python."""
        if self.text:
            return self.text
        text = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        text += ["        " + made for _, made in self.state]
        text += ["", f"    def forward(self, {', '.join(each.name for each in self.inputs)}):"]
        text += ["        " + part for line in self.lines for part in line.text.split("\n")]
        text += [f"        return {self.outputs}"]
        return "\n".join(text) + "\n"

    def build(self, seed: int = 0) -> nn.Module:
        """The model in float64 and eval mode; weights come from the seed."""
        _COUNT[0] += 1
        file, source = f"<program {_COUNT[0]}>", self.source()
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        if len(linecache.cache) > 400:
            for key in [key for key in linecache.cache if key.startswith("<program")][:200]:
                del linecache.cache[key]
        scope = namespace()
        exec(compile(source, file, "exec"), scope)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = scope["Net"]().double().eval()
        return model

    def make_inputs(self, batch: int, seed: int = 0, grown: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1000 * seed + batch)
        return tuple(each.make(batch, generator, grown) for each in self.inputs)

    def dynamic_shapes(self) -> Any:
        """What `torch.export.export` is told, where anything but the batch is dynamic."""
        if not any(each.dynamic for each in self.inputs):
            return None
        auto = torch.export.Dim.AUTO
        return tuple(dict.fromkeys({*each.dynamic, *((0,) if each.batch else ())}, auto) for each in self.inputs)
