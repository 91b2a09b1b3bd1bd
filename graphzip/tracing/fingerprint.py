"""Is a model still the one that was traced? What its code reads of it is noted, and compared later.

Noted are the classes of its modules, all that they hold (numbers, functions, objects with what these hold), its hooks,
and of every parameter and buffer the name, kind, shape, dtype and device. The numbers of floating-point parameters and
buffers are not: a graph reads those itself. Those of other tensors may have become part of the graph: they are noted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import types
from collections.abc import Iterator, Mapping, Set
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from graphzip.boundary import is_users
from graphzip.graph.copies import recomputed
from graphzip.graph.state import find_aliases, joined, named_state

__all__ = ["Fingerprint", "difference", "fingerprint"]

Fingerprint = dict[str, Any]
"""What was noted, by where it stands: `layer1.0.conv1.stride`."""

_TOLD: Final = frozenset({"_parameters", "_buffers", "_modules", "training"})
_PLAIN: Final = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
_COUNTER: Final = "num_batches_tracked"


class _Same:
    """Equal to itself alone, and held so that nothing else gets its `id`."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Note what makes a model what it is, but for the numbers of its weights."""
    found: Fingerprint = {"": str(find_aliases(model))}
    computed = set(recomputed(model))
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = first.setdefault(id(module), name)
        found[f"{name}.__class__"] = (_Same(type(module)), _Same(type(module).forward), own)
        if own != name:
            continue
        notes = _Notes(found)
        for attribute, value in module.__dict__.items():
            place = joined(name, attribute)
            if attribute not in _TOLD and place not in computed:
                notes.add(place, value)
    for name, tensor in named_state(model):
        kind = (type(tensor).__qualname__, tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)
        counted = name.rpartition(".")[2] == _COUNTER
        read = not counted and not tensor.is_floating_point() and not tensor.is_complex()
        found[name] = (kind, _digest(tensor) if read else None)
    return found


def difference(before: Fingerprint, now: Fingerprint) -> str | None:
    """The first place where two models differ, or nothing."""
    for name, value in now.items():
        if name not in before or before[name] != value:
            return name or "its shared weights"
    return next((name for name in before if name not in now), None)


class _Notes:
    """Notes what an attribute of a module holds, and all that can be reached from it."""

    def __init__(self, found: Fingerprint) -> None:
        self.found = found
        self.seen: dict[int, str] = {}

    def add(self, place: str, value: Any) -> None:
        if value is None or isinstance(value, _PLAIN):
            self.found[place] = (type(value), repr(value))
        elif id(value) in self.seen:
            self.found[place] = self.seen[id(value)]
        else:
            self.seen[id(value)] = place
            self.found[place], inner = _told(value)
            for name, each in inner:
                self.add(f"{place}.{name}", each)


def _told(value: Any) -> tuple[Any, Iterator[tuple[Any, Any]]]:
    """What a value is, and what it is made of."""
    if isinstance(value, torch.Tensor):
        return (type(value).__qualname__, tuple(value.shape), value.dtype, value.device, _digest(value)), iter(())
    if isinstance(value, np.ndarray) and value.dtype != object:
        return (value.shape, str(value.dtype), hashlib.sha256(value.tobytes()).digest()), iter(())
    if isinstance(value, Mapping):
        return (type(value), len(value)), ((repr(key), each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return (type(value), len(value)), iter(enumerate(value))
    if isinstance(value, Set):
        return (type(value), len(value)), iter(enumerate(sorted(value, key=repr)))
    if isinstance(value, types.FunctionType):
        return _Same(value), iter(enumerate([*(value.__defaults__ or ()), *_held(value)]))
    if isinstance(value, types.MethodType):
        return (_Same(value.__func__), _Same(value.__self__)), iter(())
    if isinstance(value, functools.partial):
        return type(value), iter({"func": value.func, "args": value.args, "keywords": value.keywords}.items())
    if _has_fields(value):
        return _Same(value), iter(vars(value).items())
    return _Same(value), iter(())


def _held(function: types.FunctionType) -> Iterator[Any]:
    """The variables around a function that it reads."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # one that has no value yet
            yield cell.cell_contents


def _has_fields(value: Any) -> bool:
    """Whether a value is what its attributes are: a module that is no submodule, a configuration."""
    if isinstance(value, type | types.ModuleType) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, nn.Module | types.SimpleNamespace) or is_users(type(value).__module__)


def _digest(tensor: torch.Tensor) -> bytes | None:
    """Of the numbers of a tensor that has some which can be read."""
    if tensor.is_meta or tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, nn.Parameter):
        return None
    numbers = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers.tobytes()).digest()
