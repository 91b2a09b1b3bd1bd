"""What a model asks of its surroundings while `torch.export` runs it once: its mode, gradients, random numbers.

A graph holds one answer to each. Whether a model asks at all is seen here at next to no cost; only where it does, a
second trace tells what another answer would change. What `torch.nn` asks for its own layers is known and not recorded.
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

import torch
from torch import nn

from graphzip.global_lock import ALONE
from graphzip.graph.randomness import generators_kept
from graphzip.graph.source import OWN_HOME, TORCH_HOME

__all__ = ["Asked", "asked"]


@dataclass
class Asked:
    """Lines of the model that read `.training` and `torch.is_grad_enabled()`, and which generators it drew from."""

    mode: list[str] = field(default_factory=list)
    grad: list[str] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)


@contextmanager
def asked(*, grad: bool | None = None) -> Iterator[Asked]:
    """Record what the model that is exported inside asks; to whether gradients are wanted `grad` answers, if given.

    Numbers that it draws from the generators of Python and numpy are not missing from them afterwards.
    """
    with ALONE:
        yield from _asked(grad)


def _asked(grad: bool | None) -> Iterator[Asked]:
    found, me = Asked(), threading.get_ident()
    grad_enabled = torch.is_grad_enabled

    def training(module: nn.Module) -> Any:
        try:
            value = module.__dict__["training"]
        except KeyError:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute 'training'") from None
        if threading.get_ident() == me:
            _note(found.mode, sys._getframe(1))
        return value

    def set_training(module: nn.Module, value: Any) -> None:
        module.__dict__["training"] = value

    def is_grad_enabled() -> bool:
        asks = threading.get_ident() == me and _note(found.grad, sys._getframe(1))
        return grad if asks and grad is not None else grad_enabled()

    with generators_kept(found.drawn):
        nn.Module.training = property(training, set_training)  # type: ignore[assignment]
        torch.is_grad_enabled = is_grad_enabled
        try:
            yield found
        finally:
            del nn.Module.training
            torch.is_grad_enabled = grad_enabled


def _note(lines: list[str], frame: FrameType) -> bool:
    """Add the line that asks, unless it is torch's or graphzip's own; whether it is the model's."""
    file = frame.f_code.co_filename
    if file.startswith((TORCH_HOME, OWN_HOME)):
        return False
    line = f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}"
    if line not in lines:
        lines.append(line)
    return True
