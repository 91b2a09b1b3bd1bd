"""The process of the command line: stdout is for data alone, errors are one line, and Ctrl-C ends it quietly."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from enum import IntEnum
from types import FrameType
from typing import Final, TextIO, TypeAlias

import typer
from rich.console import Console
from rich.logging import RichHandler

from graphzip.boundary import users_own
from graphzip.commands.ranks import joined, leads, ranks
from graphzip.errors import ExampleInputError, GraphZipError, PlanError, ProcessesError, VerificationError
from graphzip.progress import Bar, step, watched

__all__ = ["ExitCode", "Tell", "UsageError", "at_work", "in_flags", "own_process", "say", "show"]

_PLAIN: Final = str.maketrans({"─": "-", "━": "=", "╌": ".", "±": "~", "…": "."})
_ARGUMENTS: Final = (
    "macs|params|bytes|latency|calibration|cache|seed|scope|mode|opset|tune|target|evaluate|error|device"
)


_IN_PYTHON: Final = (
    "save it as one file (compiled.save, or a target that ends in '.graphzip'), or find widths that a config can say "
    "with plan_for(..., uniform=True)"
)
_IN_FLAGS: Final = (
    "save it as one file (--save slim.graphzip, or a target that ends in '.graphzip'), or find widths that a config "
    "can say with --macs and --uniform"
)


class ExitCode(IntEnum):
    """What a command's exit status says."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    VERIFICATION = 3
    UNCHANGED = 4
    INTERRUPTED = 130


Tell: TypeAlias = Callable[[str], None]
"""Says what a command does next."""


class UsageError(GraphZipError):
    """A command line that asks for what does not exist, or cannot be."""


_USAGE_ERRORS: Final = (PlanError, ExampleInputError, UsageError)


# ------------------------------------------------------------------------------------------------- the process

_interrupts: Final[list[int]] = []


@contextlib.contextmanager
def own_process() -> Iterator[None]:
    """Make this process one command's: what is not its result goes to stderr, whoever writes it, until the end."""
    _open_descriptors()
    reserved = _reserve_stdout()
    watched = _watch_interrupts()
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not (_interrupts and stop.code):
            raise
        say("interrupted")
        sys.exit(ExitCode.INTERRUPTED)
    except OSError as error:  # of help and usage texts: all others are caught where they come from
        _unwritable(error)
        sys.exit(ExitCode.FAILURE)
    finally:
        if watched:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if reserved:
            sys.stdout = sys.stderr


def _open_descriptors() -> None:
    """Let no file be opened under the number of a standard stream that was closed: others write there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


def _reserve_stdout() -> bool:
    """Give `sys.stdout` a descriptor of its own, and that of stdout, which libraries write to, to stderr."""
    stream = sys.stdout
    try:
        if stream is None or stream.fileno() != 1:
            return False
        stream.flush()
        reserved = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError, AttributeError):
        return False
    sys.stdout = open(reserved, "w", encoding=stream.encoding, errors=stream.errors)  # noqa: SIM115
    return True


def _watch_interrupts() -> bool:
    """Remember Ctrl-C, which what is built in C may report as an error of another kind."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False

    def remember(number: int, frame: FrameType | None) -> None:
        _interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, remember)
    return True


# ------------------------------------------------------------------------------------------------- what is said


def say(text: str) -> None:
    """A line on stderr; nothing where that is closed or full."""
    try:
        typer.echo(f"graphzip: {text}", err=True)
    except (OSError, ValueError):
        _mute(sys.stderr)


def show(text: str, written: str = "") -> None:
    """The result of a command on stdout, in plain characters where the others cannot be written.

    Where stdout is full or closed, that is said, with what was `written` all the same, and the command fails; a reader
    that has gone, such as `head`, is not worth a word. Of several processes the first shows it.
    """
    if not leads():
        return
    try:
        stream = sys.stdout
        if stream is None:
            raise OSError(errno.EBADF, "it is closed")
        stream.write(_encodable(text, stream.encoding or "ascii") + "\n")
        stream.flush()
    except (OSError, ValueError) as error:
        _unwritable(error, written)
        raise typer.Exit(ExitCode.FAILURE) from None


def _unwritable(error: OSError | ValueError, written: str = "") -> None:
    _mute(sys.stdout)
    if not isinstance(error, BrokenPipeError):
        reason = getattr(error, "strerror", None) or error
        say(f"error: stdout cannot be written: {reason}" + (f"; {written} is written all the same" if written else ""))


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text


def _mute(stream: TextIO | None) -> None:
    """Let what a stream still holds go nowhere, so that the interpreter does not fail on it at the end."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):
        number = os.open(os.devnull, os.O_WRONLY)
        os.dup2(number, stream.fileno())
        os.close(number)


# ------------------------------------------------------------------------------------------------- while working


@contextlib.contextmanager
def at_work(verbose: int, several: str = "") -> Iterator[Tell]:
    """Gives what says the next step; that, logs and whatever the work prints go to stderr.

    An error becomes one line there and an exit code. `several` names a command that several processes can do together.
    """
    console = Console(stderr=True, quiet=not leads())
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            _logging(console, verbose),
            Bar(console) if leads() else contextlib.nullcontext() as bar,
            watched(bar),
        ):
            if not several and ranks()[1] > 1:
                raise UsageError("this command is for one process, and torchrun has started several; start it without")
            with joined(several):
                yield step
    except (KeyboardInterrupt, SystemExit, Exception) as error:
        reason = KeyboardInterrupt() if _interrupts else error
        if verbose:
            with contextlib.suppress(OSError, ValueError):
                console.print_exception()
        if leads() or isinstance(reason, ProcessesError):
            say(_message(reason))
        _interrupts.clear()
        raise typer.Exit(_exit_code(reason)) from None


@contextlib.contextmanager
def _logging(console: Console, verbose: int) -> Iterator[None]:
    root = logging.getLogger()
    handler = RichHandler(console=console, show_path=False, markup=False)
    level = root.level
    root.addHandler(handler)
    root.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if verbose else "ignore")
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def _exit_code(error: BaseException) -> ExitCode:
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, VerificationError):
        return ExitCode.VERIFICATION
    return ExitCode.USAGE if isinstance(error, _USAGE_ERRORS) else ExitCode.FAILURE


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, GraphZipError):
        return f"error: {in_flags(error)}"
    told = f"{type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        return f"error: the model's code ends the program ({told}); let it raise an error or return"
    if users_own(error):
        return f"error: the model's code fails with {told}; run again with -v to see where"
    return f"error: unexpected {told}; a fault of graphzip, run again with -v to see where"


def in_flags(error: GraphZipError) -> str:
    """The text of an error, with flags where the library speaks of its arguments."""
    said = str(error).replace(_IN_PYTHON, _IN_FLAGS)
    text = re.sub(r"^dynamic_shapes(?=:)", "--dynamic", re.sub(r"^outputs(?=:)", "--outputs", said))
    text = re.sub(
        rf"^({_ARGUMENTS})(?=[:= ])",
        r"--\1",
        re.sub(r"^round_to(?=:)", "--round-to", re.sub(r"^ir_version(?=:)", "--ir-version", text)),
    )
    return re.sub(rf"\b(?<!-)({_ARGUMENTS})=(?=[,;. ]|$)", r"--\1", text)
