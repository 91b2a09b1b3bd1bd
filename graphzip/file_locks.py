"""Locks that end with the process that holds them, on systems that have them (`flock`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: writers are told apart by the names of their directories alone
    fcntl = None  # type: ignore[assignment]

__all__ = ["held", "hold", "locked"]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone among the processes and threads that lock this directory; without a lock where there is none to be had."""
    number = None
    if fcntl is not None:
        with contextlib.suppress(OSError):
            number = os.open(folder, os.O_RDONLY)
            fcntl.flock(number, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if number is not None:
            os.close(number)


def hold(path: Path) -> IO[bytes]:
    """Create a file and keep it locked until it is closed, or until the process ends."""
    file = path.open("wb")
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def held(path: Path) -> bool:
    """Whether somebody holds a file; one that is not there is not held. Taken to be so where it cannot be told."""
    if fcntl is None:
        return True
    try:
        with path.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
