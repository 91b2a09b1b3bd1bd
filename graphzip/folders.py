"""Write directories of several files that belong together whole or not at all, whenever the process is killed.

A new directory is made beside its place and renamed. One that is there and holds nothing else is exchanged for the new
one in a single step, where the system can (`renameat2`). Otherwise the files go into it one after the other, the data
under a name that no earlier write used and what points to it after that: then a kill may leave some files new and
others old, each with its own data.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from graphzip.errors import GraphZipError
from graphzip.file_locks import locked
from graphzip.files import check_target, companion, scratch, settle, sync, unwritable

__all__ = ["staged_folder"]

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_STEM: Final = "weights"
_DATA: Final = re.compile(rf"{_STEM}(\.[0-9a-f]{{8}})?\.data")


@contextlib.contextmanager
def staged_folder(path: Path, names: Collection[str], error: type[GraphZipError]) -> Iterator[tuple[Path, str]]:
    """Yield an empty directory for the files `names`, and the name of the file of data that they point to.

    They are put in place when the block ends without an error. Other files of the directory stay. An `OSError` becomes
    `error`.
    """
    target = Path(os.path.realpath(path))
    exists = target.is_dir()
    check_target(target / companion(_STEM) if exists else target, error)
    for name in names if exists else ():
        check_target(target / name, error)
    try:
        if not exists or _is_replaceable(target, names):
            with scratch(target) as fresh:
                if not exists or _exchanges(fresh):
                    yield fresh, f"{_STEM}.data"
                    _put_whole(fresh, target)
                    return
        with scratch(target / _STEM) as fresh:
            data = companion(_STEM)
            yield fresh, data
            settle(fresh)
            with locked(target):
                _put_each(fresh, target, data)
    except OSError as reason:
        raise unwritable(target, reason, error) from reason


def _is_replaceable(target: Path, names: Collection[str]) -> bool:
    """Whether a directory holds nothing but what an earlier write put there, and lies where another may be made."""
    if os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK):
        return False
    with contextlib.suppress(FileNotFoundError):  # where there is no working directory
        if Path.cwd().is_relative_to(target.resolve()):  # this process would be left in a directory that is gone
            return False
    with os.scandir(target) as entries:
        return all(
            entry.is_file(follow_symlinks=False) and (entry.name in names or _DATA.fullmatch(entry.name))
            for entry in entries
        )


def _put_whole(fresh: Path, target: Path) -> None:
    settle(fresh)
    with locked(target.parent):
        if target.is_dir():
            for file in (target, *target.iterdir()):
                place = fresh / file.relative_to(target)
                if place.exists():
                    place.chmod(stat.S_IMODE(file.stat().st_mode))
            sync(fresh)
            _exchange(fresh, target)
            _keep_strays(fresh, target)
        else:
            sync(fresh)
            fresh.rename(target)
        sync(target.parent)


def _keep_strays(old: Path, new: Path) -> None:
    """What somebody put into the old directory in the meantime goes into the new one."""
    for file in old.iterdir():
        if not (new / file.name).exists() and not _DATA.fullmatch(file.name):
            file.rename(new / file.name)


def _put_each(fresh: Path, target: Path, data: str) -> None:
    """The data first, then what points to it; data of earlier writes goes where nothing else may point to it."""
    names = sorted(file.name for file in fresh.iterdir() if file.name != data)
    (fresh / data).replace(target / data)
    sync(target)
    for name in names:
        place = Path(os.path.realpath(target / name))
        with contextlib.suppress(FileNotFoundError):
            (fresh / name).chmod(stat.S_IMODE(place.stat().st_mode))
        (fresh / name).replace(place)
    sync(target)
    files = [file for file in target.iterdir() if file.is_file()]
    if all(file.name in names for file in files if file.suffix == ".onnx"):
        for file in files:
            if _DATA.fullmatch(file.name) and file.name != data:
                file.unlink(missing_ok=True)


def _exchanges(folder: Path) -> bool:
    """Whether directories can be exchanged where this empty one lies."""
    one, other = (folder.with_name(name) for name in ("one", "other"))
    one.mkdir()
    other.mkdir()
    try:
        _exchange(one, other)
    except OSError:
        return False
    finally:
        one.rmdir()
        other.rmdir()
    return True


def _exchange(one: Path, other: Path) -> None:
    """Let two paths change places in one step. Raises `OSError` where the system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function is None:
        raise OSError("two directories cannot be exchanged on this system")
    if function(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
