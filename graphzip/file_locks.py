"""Locks on files that end with the process that holds them.

Where the file system has locks (`flock`) they say who holds a file. Where it has none, such as on Windows and on some
network drives, the file says it: it names the process, when that began, and the machine. A process of this machine that
is gone, or that began at another time, holds nothing; of another machine nobody can tell, and the file is taken to be
held.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Lock", "held", "hold", "holder", "locked", "take"]

_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


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


class Lock:
    """A file that is held until `close`, or until the process ends."""

    def __init__(self, path: Path, file: IO[bytes] | None) -> None:
        self._path, self._file = path, file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        else:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold(path: Path) -> Lock:
    """Create a file that nobody knows of yet, and hold it."""
    lock = take(path)
    assert lock is not None
    return lock


def take(path: Path) -> Lock | None:
    """Hold a file, which is created where there is none; nothing where somebody holds it, asked and done in one step.

    Raises `OSError` where it cannot be created.
    """
    if fcntl is None:
        return _claimed(path)
    file = path.open("a+b")
    state = _flocked(file)
    if state:
        file.truncate(0)
        file.write(_record())
        file.flush()
        return Lock(path, file)
    file.close()
    return _claimed(path) if state is None else None


def held(path: Path) -> bool:
    """Whether somebody holds a file. Taken to be so where it cannot be told: without locks a file that is not there, or
    is empty, may be about to be held.
    """
    try:
        with path.open("rb") as file:
            state = _flocked(file)
            record = file.read()
            return not state if state is not None else not record or _lives(record)
    except FileNotFoundError:
        return fcntl is None
    except OSError:
        return True


def holder(path: Path) -> str:
    """Who holds a file, as far as that is said in it: "process 17 on node3"."""
    try:
        known = _read(path.read_bytes())
    except OSError:
        known = None
    return "another process" if known is None else f"process {known['pid']} on {known['machine'][0]}"


def _flocked(file: IO[bytes]) -> bool | None:
    """Lock an open file: whether that succeeded, `None` where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _TAKEN else None
    return True


# ------------------------------------------------------------------------------------------------- without locks


def _claimed(path: Path) -> Lock | None:
    """Put this process's name into a file that no living process has its name in.

    What a process left that is gone is replaced by who holds the turn, a file of its own: without it two that saw the
    same could both take it, the second from the first.
    """
    mine = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    mine.write_bytes(_record())
    try:
        found = _content(path)
        if found is None:
            return Lock(path, None) if _linked(mine, path) else None
        turn = None if _lives(found) else _claimed(path.with_name(f"{path.name}.turn"))
        if turn is None:
            return None
        with turn:
            if _content(path) != found:
                return None
            mine.replace(path)
            return Lock(path, None)
    finally:
        mine.unlink(missing_ok=True)


def _content(path: Path) -> bytes | None:
    """What is in a file, if it is there."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _linked(source: Path, path: Path) -> bool:
    """Let a file have a second name that none has: whole, and in one step."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with path.open("xb") as file:
                file.write(source.read_bytes())
        except FileExistsError:
            return False
    return True


def _record() -> bytes:
    """What names this process."""
    pid = os.getpid()
    return json.dumps({"pid": pid, "began": _began(pid), "machine": _machine()}).encode()


def _read(record: bytes) -> dict[str, Any] | None:
    try:
        known = json.loads(record)
        return {"pid": int(known["pid"]), "began": known["began"], "machine": list(known["machine"])}
    except (ValueError, KeyError, TypeError):
        return None


def _lives(record: bytes) -> bool:
    """Whether the process that a record names is there. An empty one names nobody; one of another machine may live."""
    known = _read(record)
    if known is None:
        return bool(record)
    return known["machine"] != _machine() or (known["began"] is not None and _began(known["pid"]) == known["began"])


def _machine() -> list[str]:
    """What tells machines apart, on which a number may be another process: containers, one that was started anew."""
    found = [platform.node()]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError, AttributeError):
        found.append(os.readlink("/proc/self/ns/pid"))
    return found


def _began(pid: int) -> int | None:
    """When a process of this machine began, in units of the system; `None` where there is none."""
    if sys.platform == "win32":
        return _began_on_windows(pid)
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in {"Z", "X"} else int(numbers[18])
    except (OSError, ValueError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return 0  # it is there, and nothing says since when


if sys.platform == "win32":

    def _began_on_windows(pid: int) -> int | None:
        import ctypes
        from ctypes import wintypes

        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.OpenProcess.restype = wintypes.HANDLE
        handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
        if not handle:
            return None
        try:
            code, times = wintypes.DWORD(), [wintypes.FILETIME() for _ in range(4)]
            kernel.GetExitCodeProcess(wintypes.HANDLE(handle), ctypes.byref(code))
            known = kernel.GetProcessTimes(wintypes.HANDLE(handle), *map(ctypes.byref, times))
            if not known or code.value != 259:  # STILL_ACTIVE
                return None
            return int(times[0].dwHighDateTime) << 32 | int(times[0].dwLowDateTime)
        finally:
            kernel.CloseHandle(wintypes.HANDLE(handle))
