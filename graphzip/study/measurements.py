"""Measurements that are kept in a file, and what tells those of one study from those of another.

A line of JSON for each: which study, which group, which width, and the loss. Lines are appended whole, so several
processes may write to one file, and a process that is killed leaves at most half a line, which is passed over.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from graphzip.boundary import is_users
from graphzip.errors import PlanError
from graphzip.files import check_target, is_file, write_bytes
from graphzip.graph.batches import Batches
from graphzip.graph.state import named_state
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.process_groups import ALONE, Processes

__all__ = ["Measurements", "beside_others", "identity", "key_of"]

logger = logging.getLogger(__name__)

_START: Final = b'{"graphzip": "measurement"'
_OLD: Final = {"fingerprint", "losses"}  # what a file of one study was made of


_EXPECTED: ContextVar[bool] = ContextVar("_EXPECTED", default=False)


@contextmanager
def beside_others() -> Iterator[None]:
    """For studies that are kept in one file with others, of which nothing has to be said."""
    token = _EXPECTED.set(True)
    try:
        yield
    finally:
        _EXPECTED.reset(token)


class Measurements:
    """What was measured of one study before, in a file that may hold others. Of several processes the first reads and
    writes it. It is said where the file holds others alone, unless that is what is expected (`beside_others`).
    """

    def __init__(self, path: str | os.PathLike[str], key: str, processes: Processes = ALONE) -> None:
        self.path, self.key, self._writes = Path(path), key, processes.rank == 0
        self._losses: dict[tuple[str, int], float] = {}
        self._old = False
        if self._writes and check_target(path, PlanError).exists():
            self._read()
        self._losses = processes.agreed(self._losses)

    def __len__(self) -> int:
        """How many of this study are known."""
        return len(self._losses)

    def get(self, group: str, width: int) -> float | None:
        """The loss, where it is known."""
        return self._losses.get((group, width))

    def put(self, group: str, width: int, loss: float) -> None:
        """Keep a loss. Where it cannot be written that is said, and the study goes on."""
        self._losses[group, width] = loss
        if not self._writes:
            return
        line = json.dumps({"graphzip": "measurement", "study": self.key, "group": group, "width": width, "loss": loss})
        try:
            if self._old:
                write_bytes(self.path, f"{line}\n".encode(), PlanError)
                self._old = False
            else:
                _append(self.path, line)
        except (OSError, PlanError) as error:
            logger.warning("%s cannot be written (%s); measurements are kept in memory alone", self.path, error)

    def _read(self) -> None:
        if not is_file(self.path):
            raise PlanError(f"cache: {self.path} is no ordinary file; name another one")
        try:
            with self.path.open("rb") as file:
                content = file.read()
        except OSError as error:
            raise PlanError(f"cache: {self.path} cannot be read ({error.strerror or error})") from error
        self._old = not _is_ours(content)
        if self._old:
            _check_old(content, self.path)
        damaged, others = 0, self._old
        for line in [] if self._old else content.split(b"\n"):
            entry = _entry(line)
            if entry is None:
                damaged += bool(line.strip())
            elif entry[0] == self.key:
                self._losses[entry[1], entry[2]] = entry[3]
            else:
                others = True
        if damaged:
            logger.warning("%s has %d lines that are damaged or no losses; they are left out", self.path, damaged)
        if others and not self._losses and not _EXPECTED.get():
            logger.warning("%s was measured with another model, data or options; it is measured anew", self.path)


def _is_ours(content: bytes) -> bool:
    """Whether a file begins as one of measurements does, also where its first line was cut off."""
    first, *others = content.split(b"\n")
    rest = next((line for line in others if line), _START)
    begun = bool(first) and _START.startswith(first) and rest.startswith(_START)
    return not content or first.startswith(_START) or begun


def _check_old(content: bytes, path: Path) -> None:
    """Raises `PlanError` unless it is a file of measurements as it was written before: it may be replaced."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or set(data) != _OLD:
        raise PlanError(f"cache: {path} is not a file of measurements; name another one")


def _entry(line: bytes) -> tuple[str, str, int, float] | None:
    """Study, group, width and loss, where a line is whole and says something that can be."""
    try:
        data = json.loads(line)
        study, group, width, loss = (data[name] for name in ("study", "group", "width", "loss"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = isinstance(study, str) and isinstance(group, str)
    numbers = type(width) is int and width > 0 and type(loss) in (int, float) and 0.0 <= loss < math.inf
    return (study, group, width, float(loss)) if texts and numbers else None


def _append(path: Path, line: str) -> None:
    """Add a line in one go, behind the end of one that was cut off."""
    number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.lseek(number, 0, os.SEEK_END)
        cut_off = size > 0 and os.lseek(number, size - 1, os.SEEK_SET) >= 0 and os.read(number, 1) != b"\n"
        os.write(number, f"{chr(10) * cut_off}{line}\n".encode())
    finally:
        os.close(number)


# ------------------------------------------------------------------------------------------------- keys


def key_of(traced: Traced, batches: Batches, *decided: Any) -> str:
    """Changes with the graph, the weights, the data and whatever else decides what a measurement gives; not with how
    many processes have the data.
    """
    digest = hashlib.sha256()
    for spec in traced.inputs:
        _add(digest, repr(spec))
    for node in traced.graph.nodes:
        _add(digest, f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}")
    for name, value in named_state(traced.module):
        _add(digest, name)
        _add_tensor(digest, value)
    for told, _ in batches.sizes([_told(batch) for batch in batches.here]):
        _add(digest, told)
    _add(digest, json.dumps(decided))
    return digest.hexdigest()


def _told(batch: Any) -> str:
    """Tells a batch from another."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            _add_tensor(digest, leaf)
        else:
            _add(digest, repr(leaf))
    return digest.hexdigest()


def _add(digest: Any, text: str) -> None:
    data = text.encode(errors="backslashreplace")
    digest.update(len(data).to_bytes(8, "little") + data)


def _add_tensor(digest: Any, value: torch.Tensor) -> None:
    """The numbers of a tensor, with their kind and shape."""
    _add(digest, f"{value.dtype} {tuple(value.shape)}")
    digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


class _Unknown(Exception):
    """Something that cannot be told from another thing of its kind."""


def identity(function: Callable[..., Any]) -> str:
    """A text that is another one for a function that computes something else: of its code and of all that it holds.

    Raises `ValueError`, which names the kind of thing, where it holds what cannot be told apart.
    """
    digest = hashlib.sha256()
    try:
        _describe(function, digest, {})
    except _Unknown as error:
        raise ValueError(str(error)) from None
    return digest.hexdigest()


def _describe(value: Any, digest: Any, seen: dict[int, Any]) -> None:
    """Add what makes a value what it is; what has been added already, and is held in `seen`, is passed over."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        _add(digest, f"{type(value).__name__} {value!r}")
        return
    if id(value) in seen:
        return
    seen[id(value)] = value
    _add(digest, f"{type(value).__module__}.{type(value).__qualname__}")
    if isinstance(value, torch.Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        _add(digest, f"{value.dtype} {value.shape}")
        digest.update(value.tobytes())
    elif isinstance(value, types.ModuleType | types.BuiltinFunctionType | types.WrapperDescriptorType):
        _add(digest, repr(getattr(value, "__qualname__", value.__name__)))
    elif isinstance(value, type | types.FunctionType) and not is_users(value.__module__):
        _add(digest, f"{value.__module__}.{value.__qualname__}")
    else:
        for part in _parts(value):
            _describe(part, digest, seen)


def _parts(value: Any) -> list[Any]:
    """What a value is made of."""
    if isinstance(value, tuple | list):
        return list(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_consts, value.co_names, value.co_varnames]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        named = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
        return [value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells, named]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, nn.Module):
        return [type(value), repr(value), dict(named_state(value))]
    if isinstance(value, type):
        held = {name: each for name, each in vars(value).items() if isinstance(each, types.FunctionType)}
        return [value.__qualname__, *(base for base in value.__bases__), held]
    if is_users(type(value).__module__) and hasattr(value, "__dict__"):
        return [type(value), vars(value)]
    raise _Unknown(f"a {type(value).__name__}")


def _names(code: types.CodeType) -> set[str]:
    """All names that code reads, functions inside it included."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*(_names(each) for each in inner))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
