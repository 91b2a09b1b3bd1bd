"""Write files whole or not at all, whenever the process is killed.

Everything is written into a hidden directory beside the target, forced to the disk, and moved into place at the end.
One file replaces another in a single step. Of several, those that the main file points to have names that no earlier
write used (`companion`), and the main file is moved last: until then the old one stands with its own companions, which
go when the new one is there.

What a killed process left behind is removed by the next write to the same place: a live writer holds a lock on its
hidden directory, a dead one does not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import reprlib
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphzip.errors import GraphZipError, MissingDependencyError
from graphzip.file_locks import held, hold, locked

__all__ = [
    "as_path",
    "check_picture",
    "check_target",
    "companion",
    "is_file",
    "scratch",
    "settle",
    "staged",
    "sync",
    "unwritable",
    "write_bytes",
    "write_text",
]

_LOCK, _NEW = "lock", "new"
_PICTURES = (".svg", ".png", ".pdf")


def check_target(path: str | os.PathLike[str], error: type[GraphZipError]) -> Path:
    """Where to write for `path`, once it is clear that a file can be created there: what it is a link to, if it is one.

    Call it before the long work starts. Raises `error` where the directory does not exist or is not writable, or
    where `path` is a directory itself.
    """
    target = as_path(path, error)
    try:
        return _creatable(Path(os.path.realpath(target)) if target.is_symlink() else target, error)
    except OSError as reason:
        raise unwritable(target, reason, error) from reason


def check_picture(path: str | os.PathLike[str], error: type[GraphZipError]) -> Path:
    """Where to write a picture for `path`. Raises `error` for another kind of file, and as `check_target` does.

    Raises `MissingDependencyError` without matplotlib.
    """
    target = check_target(path, error)
    if target.suffix not in _PICTURES:
        raise error(f"{target} is no picture; name a file that ends in {', '.join(_PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("drawing needs matplotlib: pip install 'graphzip[plot]'", name="matplotlib")
    return target


def as_path(path: Any, error: type[GraphZipError]) -> Path:
    """`path` as a `Path`. Raises `error` where it is no path at all."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise error(f"{reprlib.repr(path)} is not a path; give the name of a file as text or as a pathlib.Path")
    if "\0" in os.fspath(path):
        raise error(f"{reprlib.repr(path)} is not a path: it has a null character in it")
    return Path(path)


def is_file(path: Path) -> bool:
    """Whether a file, no directory and no device, is there; one that cannot be looked at is not."""
    try:
        return path.is_file()
    except OSError:
        return False


def _creatable(target: Path, error: type[GraphZipError]) -> Path:
    folder = target.parent
    if target.is_dir():
        raise error(f"{target} is a directory; give the name of a file in it")
    if target.exists() and not target.is_file():
        raise error(f"cannot write {target}: it is a device or a pipe, which nothing may replace; name a file")
    if not folder.exists():
        raise error(f"cannot write {target}: the directory {folder} does not exist; create it first")
    if not folder.is_dir():
        raise error(f"cannot write {target}: {folder} is not a directory; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise error(f"cannot write {target}: the directory {folder} is not writable; choose another place")
    return target


def companion(name: str) -> str:
    """A name for the file of weights that belongs to a file `name`, which no other write uses."""
    return f"{name}.{uuid.uuid4().hex[:8]}.data"


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], error: type[GraphZipError]) -> Iterator[Path]:
    """Yield a path to write to; files beside it move to the target's directory when the block ends without an error.

    The yielded path has the target's file name and lies in an empty directory of its own. What the block writes into
    that directory besides (names from `companion`) is put in place before the file itself, and companions of earlier
    writes of the same file are removed after it. The mode of a file that is replaced is kept. An `OSError` in the block
    becomes `error`.
    """
    target = check_target(path, error)
    try:
        with scratch(target) as fresh:
            yield fresh / target.name
            settle(fresh)
            with locked(target.parent):
                _move_together(fresh, target)
    except OSError as reason:
        raise unwritable(target, reason, error) from reason


def write_text(path: str | os.PathLike[str], text: str, error: type[GraphZipError]) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"), error)


def write_bytes(path: str | os.PathLike[str], data: bytes, error: type[GraphZipError]) -> None:
    """Write `data`, whole or not at all."""
    with staged(path, error) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """An empty directory for what is going to be at `target`; it is gone afterwards, and leftovers are, too."""
    with locked(target.parent):
        _sweep(target)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        lock = hold(folder / _LOCK)
    try:
        fresh = folder / _NEW
        fresh.mkdir()
        yield fresh
    finally:
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what writers that were killed left beside the target."""
    for folder in target.parent.glob(f".{_escaped(target.name)}.*"):
        if not held(folder / _LOCK):
            shutil.rmtree(folder, ignore_errors=True)


def _escaped(name: str) -> str:
    """The name as a pattern that stands for itself."""
    return re.sub(r"([\[*?])", r"[\1]", name)


def settle(folder: Path) -> None:
    """Let the files have the mode that new files have here, and reach the disk."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.iterdir():
        file.chmod(mode)
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def sync(folder: Path) -> None:
    """Let renames in a directory reach the disk, where directories can be opened."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _move_together(fresh: Path, target: Path) -> None:
    """Put the companions in place, then the file itself, and remove the companions of the one it replaces."""
    added: list[Path] = []
    names = {file.name for file in fresh.iterdir()} - {target.name}
    try:
        for name in sorted(names):
            place = target.with_name(name)
            if not place.exists():
                added.append(place)
            os.replace(fresh / name, place)
        sync(target.parent)
        with contextlib.suppress(FileNotFoundError):
            (fresh / target.name).chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(fresh / target.name, target)
        sync(target.parent)
    except BaseException:
        for place in added:
            place.unlink(missing_ok=True)
        raise
    stale = re.compile(re.escape(target.name) + r"\.[0-9a-f]{8}\.data")
    for file in target.parent.iterdir():
        if stale.fullmatch(file.name) and file.name not in names:
            file.unlink(missing_ok=True)


def unwritable(target: Path, reason: OSError, error: type[GraphZipError]) -> GraphZipError:
    return error(f"cannot write {target}: {reason.strerror or reason}; free some space or choose another place")
