"""Which paths a model takes by the sizes of its inputs, seen while `torch.export` runs it.

`torch.export` takes every dynamic size for two or more. A comparison such as `x.shape[0] > 1` is then decided without a
guard, and where the size is one the graph would be another model's. So every comparison is recorded as it is decided,
with the line of the model that asked, and so is every size that becomes a plain number.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from graphzip.global_lock import ALONE
from graphzip.graph.source import OWN_HOME, TORCH_HOME
from graphzip.graph.torch_private import SymNode

__all__ = ["Branch", "Watch", "watched"]

_BETWEEN = (TORCH_HOME, "<", f"{OWN_HOME}tracing/untraced_calls.py")
"""Files of frames that may stand between the line of a model and what it asks of a size."""
_MODEL_CODE = tuple(f"{TORCH_HOME}{part}" for part in ("nn/", "functional.py", "_tensor.py", "distributions/"))
"""What of torch computes a model's values; the rest computes the sizes of tensors, and operators do that anew."""


@dataclass(frozen=True)
class Branch:
    """A comparison of sizes, how it was decided, and the line of the model that asked."""

    expression: Any
    taken: bool
    source: str

    @property
    def condition(self) -> Any:
        return self.expression if self.taken else sympy.Not(self.expression)


@dataclass
class Watch:
    """What was seen during one export: comparisons, and the line where a size became a number, by its symbol."""

    branches: list[Branch] = field(default_factory=list)
    fixed: dict[Any, str] = field(default_factory=dict)


@contextmanager
def watched() -> Iterator[Watch]:
    """Record what the model that is exported inside asks of sizes."""
    with ALONE:
        yield from _watched()


def _watched() -> Iterator[Watch]:
    watch, me = Watch(), threading.get_ident()
    plain_bool, plain_int = SymNode.bool_, SymNode.guard_int

    def bool_(node: Any) -> bool:
        before = node._expr.free_symbols if threading.get_ident() == me else ()
        taken = plain_bool(node)
        if before and (source := _asked_by(sys._getframe(1))):
            watch.branches.append(Branch(node._expr, taken, source))
            _note_fixed(watch, node, source)
        return taken

    def guard_int(node: Any, file: str, line: int) -> int:
        number = plain_int(node, file, line)
        if threading.get_ident() == me and node._expr.free_symbols:
            _note_fixed(watch, node, _innermost(sys._getframe(1)))
        return number

    _replace(bool_, guard_int)
    try:
        yield watch
    finally:
        _replace(plain_bool, plain_int)


def _replace(bool_: Any, guard_int: Any) -> None:
    SymNode.bool_, SymNode.guard_int = bool_, guard_int  # type: ignore[method-assign]


def _note_fixed(watch: Watch, node: Any, source: str) -> None:
    for symbol in node._expr.free_symbols:
        environment = node.shape_env
        if symbol not in watch.fixed and environment is not None and environment.replace(symbol).is_number:
            watch.fixed[symbol] = source


def _asked_by(frame: FrameType | None) -> str:
    """The line of the model whose `if` it is; empty where torch asks for its own purposes."""
    while frame is not None and frame.f_code.co_filename == torch.__file__:
        frame = frame.f_back
    if frame is None:
        return ""
    file = frame.f_code.co_filename
    if file.startswith(TORCH_HOME) and not file.startswith(_MODEL_CODE):
        return ""
    return _innermost(frame) or _line(frame)


def _innermost(frame: FrameType | None) -> str:
    """The innermost line that is not torch's own; empty where there is none."""
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    own = frame is None or frame.f_code.co_filename.startswith(OWN_HOME)
    return "" if own or frame is None else _line(frame)


def _line(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
