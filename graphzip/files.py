"""Write files whole or not at all.

Everything is written into a hidden directory beside the target and moved into place at the end, so a reader never
sees half a file, a failure leaves what was there before, and nothing is left over.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from graphzip.errors import GraphZipError

_UMASK = os.umask(0)
os.umask(_UMASK)

__all__ = ["check_target", "staged", "write_bytes", "write_text"]


def check_target(path: str | os.PathLike[str], error: type[GraphZipError]) -> Path:
    """`path` as a `Path`, once it is clear that a file can be created there.

    Call it before the long work starts. Raises `error` where the directory does not exist or is not writable, or
    where `path` is a directory itself.
    """
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise error(f"{target} is a directory; give the name of a file in it")
    if not folder.exists():
        raise error(f"cannot write {target}: the directory {folder} does not exist; create it first")
    if not folder.is_dir():
        raise error(f"cannot write {target}: {folder} is not a directory; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise error(f"cannot write {target}: the directory {folder} is not writable; choose another place")
    return target


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], error: type[GraphZipError]) -> Iterator[Path]:
    """Yield a path to write to; files beside it move to the target's directory when the block ends without an error.

    The yielded path has the target's file name and lies in an empty directory of its own. What the block writes into
    that directory (the file, and companions such as `<name>.data`) replaces files of the same names together: where
    one of them cannot be moved, the ones already moved are put back. An `OSError` in the block becomes `error`.
    """
    target = check_target(path, error)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as reason:
        raise _unwritable(target, reason, error) from reason
    try:
        fresh = folder / "new"
        fresh.mkdir()
        yield fresh / target.name
        _move_together(sorted(fresh.iterdir()), target.parent, folder)
    except OSError as reason:
        raise _unwritable(target, reason, error) from reason
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str, error: type[GraphZipError]) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"), error)


def write_bytes(path: str | os.PathLike[str], data: bytes, error: type[GraphZipError]) -> None:
    """Write `data`, whole or not at all."""
    with staged(path, error) as temporary:
        temporary.write_bytes(data)


def _move_together(files: list[Path], folder: Path, scratch: Path) -> None:
    replaced: list[tuple[Path, Path | None]] = []
    try:
        for file in files:
            target = folder / file.name
            file.chmod(0o666 & ~_UMASK)
            backup = _set_aside(target, scratch) if len(files) > 1 else None
            replaced.append((target, backup))
            os.replace(file, target)
    except BaseException:
        for target, backup in reversed(replaced):
            if backup is not None:
                os.replace(backup, target)
            elif len(files) > 1:
                target.unlink(missing_ok=True)
        raise


def _set_aside(target: Path, scratch: Path) -> Path | None:
    """Move an existing file out of the way, where it can be fetched back from."""
    if not target.exists():
        return None
    backup = scratch / f"old-{target.name}"
    os.replace(target, backup)
    return backup


def _unwritable(target: Path, reason: OSError, error: type[GraphZipError]) -> GraphZipError:
    return error(f"cannot write {target}: {reason.strerror or reason}; free some space or choose another place")
