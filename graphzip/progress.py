"""How far work has come: told by what takes long, shown where somebody asked for it with `progress=`.

What has parts says `for layer in counted(layers, "fitting")`, what is one long step says `step("tracing")`. The library
prints nothing of its own accord: without a watcher, both end in the log.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from graphzip.boundary import tell_user

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Bar", "Progress", "Watcher", "counted", "duration", "step", "told", "unwatched", "watched"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

Watcher: TypeAlias = Callable[[int, int, str], object]
"""Called with how many alike things are done, how many there are, what comes next; of a single step with 0 and 1."""

Progress: TypeAlias = "bool | Watcher | None"
"""What an argument `progress` may be: a watcher, or true for a bar."""

_WIDE: Final = 30  # characters of a bar
_FEW: Final = 5  # things that are not worth a line each
_OFTEN: Final = 0.2  # seconds between two pictures of a bar in a notebook

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def told(done: int, total: int, text: str) -> None:
    """Say how many of `total` alike things are done, and what comes next."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(done, total, text)


def step(text: str) -> None:
    """Say what is done next, where it has no parts that are counted."""
    logger.info("%s", text)
    told(0, 1, text)


def counted(things: Collection[T], text: str, names: Iterable[str] | None = None) -> Iterator[T]:
    """Go through `things` and say so: `text`, with the name of each where they have `names`."""
    if not things:
        return
    logger.info("%s (%d)", text, len(things))
    said = itertools.repeat(text) if names is None else (f"{text}: {name}" for name in names)
    for number, (each, what) in enumerate(zip(things, said, strict=False)):
        told(number, len(things), what)
        yield each
    told(len(things), len(things), text)


def duration(seconds: float) -> str:
    """A time in words."""
    for size, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(seconds, 1.0):.0f} s"


@contextlib.contextmanager
def watched(progress: Progress) -> Iterator[None]:
    """Inside, what is told goes to `progress`, or to a bar where it is true and nobody is told already.

    Raises `GraphZipError` where it cannot be called.
    """
    if progress is None or progress is False or (progress is True and _watcher.get() is not None):
        yield
        return
    with contextlib.ExitStack() as stack:
        watcher: Watcher
        if progress is True:
            watcher = stack.enter_context(Bar())
        else:
            from graphzip.arguments import check_callable  # which loads torch

            check_callable(progress, "progress", "progress(done, all, what), or true for a bar")
            user: Any = progress

            def watcher(done: int, total: int, text: str) -> None:
                tell_user(user, done, total, text)

        token = _watcher.set(watcher)
        stack.callback(_watcher.reset, token)
        yield


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Inside, nothing is told: what runs is a part of something that is counted already."""
    token = _watcher.set(None)
    try:
        yield
    finally:
        _watcher.reset(token)


class Bar:
    """Says on stderr what is being done: a bar with the time that is left on a terminal or in a notebook.

    Elsewhere, of what is counted, a line for every ten per cent.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich import console as consoles
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._console = console or consoles.Console(stderr=True)
        self._notebook: Any = None
        live = self._console.is_terminal and not self._console.is_jupyter
        spinner = [SpinnerColumn()] if live else []
        self._bars = Bars(
            *spinner,
            TextColumn("{task.description}", markup=False),
            BarColumn(_WIDE),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not live,
        )
        self._task = self._bars.add_task("starting", total=None)
        self._done = self._total = self._tenths = 0
        self._drawn = 0.0

    def __enter__(self) -> Bar:
        self._bars.start()
        if self._console.is_jupyter:
            display: Any = importlib.import_module("IPython.display")

            self._notebook = display.display(self._bars, display_id=True)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._bars.stop()
        if self._notebook is not None:
            display: Any = importlib.import_module("IPython.display")

            self._notebook.update(display.HTML(""))

    def __call__(self, done: int, total: int, text: str) -> None:
        """Show how many of `total` alike things are done, and what comes next."""
        if total != self._total or done < self._done:  # something else is counted from here on
            self._bars.reset(self._task, total=total if total > 1 else None, description=text)
            self._tenths = 0
        self._done, self._total = done, total
        self._bars.update(self._task, completed=done, description=text)
        if self._notebook is not None:
            self._draw()
        elif self._bars.disable and total >= _FEW:
            self._line(text)

    def _draw(self) -> None:
        """In a notebook: another picture in the place of the last one."""
        now = time.monotonic()
        if now - self._drawn > _OFTEN:
            self._drawn = now
            self._notebook.update(self._bars)

    def _line(self, text: str) -> None:
        tenths = 10 * self._done // self._total
        if tenths > self._tenths:
            self._tenths = tenths
            left = self._bars.tasks[0].time_remaining
            rest = f", about {left:.0f} s left" if left else ""
            with contextlib.suppress(OSError, ValueError):
                self._console.print(
                    f"graphzip: {10 * tenths} % {text}{rest}", markup=False, highlight=False, soft_wrap=True
                )
