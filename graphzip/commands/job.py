"""`graphzip run job.yaml`: compile and report in one folder; a run that was stopped goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import json
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Annotated, Any, Final, NoReturn

import typer

from graphzip.commands.config import long_name, read_options
from graphzip.commands.options import command
from graphzip.commands.terminal import UsageError, at_work, show
from graphzip.file_locks import holder, take
from graphzip.files import check_target, write_text
from graphzip.report.tables import closest
from graphzip.version import __version__

__all__ = ["register"]

_DECIDED: Final = {"save", "cache", "config", "json", "plot", "help", "verbose"}
"""Options of the commands that a job decides."""

_STATE, _LOCK, _LOG = "job.json", "job.lock", "log.txt"

_BLOCK: Final = 1 << 20


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A command, and the files of the job's folder that there are when it is done.

    `whole`: they are there then alone, also where the job was killed before that was noted.
    """

    name: str
    arguments: list[str]
    makes: tuple[str, ...]
    whole: bool = False


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "run", "graphzip run job.yaml")(run)


def run(
    context: typer.Context,
    job: Annotated[Path, typer.Argument(metavar="JOB", help="YAML file: model or folder, output, and options")],
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="logs on stderr, and where an error came from; -vv: more")
    ] = 0,
) -> None:
    """Find a plan, carry it out, export and report, as a file says, into one folder.

    The same command goes on after a kill: what is done is not done again. Paths are relative to the file.
    """
    code = 0
    with at_work(verbose) as tell:
        assert context.parent is not None
        known: Any = context.parent.command
        options = dict(read_options(job, UsageError))
        home, folder = job.resolve().parent, _folder(options, job)
        said = ["-" + "v" * verbose] if verbose else []
        if "folder" in options:
            stages = _folder_stages(options, known.commands["compile-folder"], job, folder, said)
        else:
            stages = _stages(options, known.commands["compile"], job, folder, said)
        key = _key(options, home)
        with _state(folder, key, job) as (done, log):
            for stage in stages:
                if (stage.name in done or stage.whole) and all((folder / name).exists() for name in stage.makes):
                    tell(f"{stage.name}: done before")
                    continue
                tell(stage.name)
                code = _carry_out(stage, home, log)
                if code:
                    break
                done.append(stage.name)
                _note(folder, key, done)
        made = [name for stage in stages for name in stage.makes]
    if code:
        raise typer.Exit(code)
    show("\n".join(str(folder / name) for name in (*made, _LOG)))


def _folder(options: Mapping[Any, Any], job: Path) -> Path:
    source = ("model", "what a model is for graphzip compile, or 'folder' and one of transformers")
    if "folder" in options:
        source = ("folder", "a folder of transformers")
    for name, what in (source, ("output", "the folder for what it makes")):
        if not isinstance(options.get(name), str):
            raise UsageError(f"{job}: {name!r} is missing; write {what}")
    folder: Path = job.resolve().parent / options["output"]
    if folder.exists() and not (folder / _STATE).is_file() and not _is_unused(folder):
        raise UsageError(f"{job}: output: {folder} exists and no job made it; give the name of a new folder")
    check_target(folder / _STATE if folder.exists() else folder, UsageError)
    return folder


def _is_unused(folder: Path) -> bool:
    """Whether a folder has nothing in it, or what a job that was killed at its first step leaves."""
    names = {each.name for each in folder.iterdir()} if folder.is_dir() else {""}
    begun = {each for each in names if each in (_LOCK, _LOG) or each.startswith(f".{_STATE}.")}
    return not names or (names == begun and _LOCK in names)


def _stages(options: Mapping[Any, Any], command: Any, job: Path, folder: Path, said: list[str]) -> list[_Stage]:
    """The commands, with the options of the job; `said` says how much they tell."""
    params = _params(options, command, job)
    given = {key: value for key, value in options.items() if key not in ("model", "output")}
    budget = next((each for each in ("macs", "params", "bytes", "latency") if each in given), None)
    if budget is not None:
        other = next((each for each in ("plan", "keep") if each in given), None)
        if other is not None:
            raise UsageError(f"{job}: {budget!r} and {other!r} are both given; leave one of them out")
        given["cache"] = folder / "measurements.jsonl"
    slim, page = str(folder / "slim.graphzip"), str(folder / "report.html")
    files = ["-o", str(folder / "slim.onnx"), "--save", slim]
    return [
        _Stage(
            "compile",
            ["compile", options["model"], *_flags(given, params), *files, *said],
            ("slim.onnx", "slim.graphzip"),
        ),
        _Stage("report", ["report", slim, "-o", page, *said], ("report.html",)),
    ]


def _folder_stages(options: Mapping[Any, Any], command: Any, job: Path, folder: Path, said: list[str]) -> list[_Stage]:
    """The command for a folder of transformers, which is read and written a tensor at a time."""
    params = _params(options, command, job)
    given = {key: value for key, value in options.items() if key not in ("folder", "output")}
    flags = [*_flags(given, params), "-o", str(folder / "slim"), *said]
    return [_Stage("compile-folder", ["compile-folder", options["folder"], *flags], ("slim",), whole=True)]


def _params(options: Mapping[Any, Any], command: Any, job: Path) -> dict[str, Any]:
    """The options of a command by name, once those of the job are among them."""
    params = {long_name(each): each for each in command.params}
    free = params.keys() - _DECIDED
    for key in options:
        if key not in free:
            raise UsageError(f"{job}: {key!r} is no option of a job; {closest(str(key), sorted(free))}")
    return params


def _flags(options: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """The options that a command knows, as they are written."""
    found: list[str] = []
    for key, value in options.items():
        if params[key].is_flag:
            found += [params[key].opts[0]] if value else params[key].secondary_opts[:1]
            continue
        for each in value if isinstance(value, list) else [value]:
            found += [f"--{key}", str(each)]
    return found


def _carry_out(stage: _Stage, home: Path, log: IO[str]) -> int:
    """Run a command, what it says goes into the log and to stderr; its exit code."""
    told = shlex.join(["graphzip", *stage.arguments])
    log.write(f"{dt.datetime.now().isoformat(timespec='seconds')} {told}\n")
    log.flush()
    child = subprocess.Popen(
        [sys.executable, "-m", "graphzip", *stage.arguments],
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert child.stdout is not None
    try:
        with _told_to_stop():
            for line in child.stdout:
                log.write(line)
                log.flush()
                print(line, end="", file=sys.stderr, flush=True)
            return child.wait()
    except BaseException as reason:
        child.terminate()
        child.wait()
        if isinstance(reason, _Stopped):
            return 128 + signal.SIGTERM
        raise


class _Stopped(Exception):
    """A scheduler ends the job."""


@contextlib.contextmanager
def _told_to_stop() -> Iterator[None]:
    """Inside, SIGTERM raises `_Stopped`: a process that it ended at once would leave its command at work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped


# ------------------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def _state(folder: Path, key: str, job: Path) -> Iterator[tuple[list[str], IO[str]]]:
    """The stages that were done in a folder for the same job, and the log, while nobody else works there."""
    folder.mkdir(exist_ok=True)
    lock = take(folder / _LOCK)
    if lock is None:
        raise UsageError(
            f"{job}: {folder} is being worked on by {holder(folder / _LOCK)}; wait for it, or stop it; where it is "
            f"gone for good, remove {folder / _LOCK}"
        )
    with lock, (folder / _LOG).open("a", encoding="utf-8") as log:
        done: list[str] = []
        if (folder / _STATE).is_file():
            known = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            if known.get("key") != key:
                raise UsageError(
                    f"{job}: {folder} is of another job: the file, what it names or the version has changed since; "
                    "give another output, or remove that folder"
                )
            done = list(known["done"])
        else:
            _note(folder, key, done)
        yield done, log


def _note(folder: Path, key: str, done: list[str]) -> None:
    write_text(folder / _STATE, json.dumps({"key": key, "done": done}) + "\n", UsageError)


def _key(options: Mapping[Any, Any], home: Path) -> str:
    """What tells a job from another: its options, the version, and what is in the files that it names."""
    found = hashlib.sha256(json.dumps([__version__, options], sort_keys=True, default=str).encode())
    for value in _texts(options):
        for name in (value, value.rpartition(":")[0]):
            if name and (home / name).is_file():
                _add(found.update, home / name)
    if isinstance(options.get("folder"), str):
        _add_folder(found.update, home / options["folder"])
    return found.hexdigest()


def _add(update: Callable[[bytes], None], path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            update(block)


def _add_folder(update: Callable[[bytes], None], folder: Path) -> None:
    """The names of its files, how large they are and when they were written: reading them may take long."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_file():
            known = file.stat()
            update(f"{file.name} {known.st_size} {known.st_mtime_ns}".encode())


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)
