"""The edge of the public interface: what leaves it is a `GraphZipError`, or was raised by the user's own code.

The user's own code is what graphzip calls back: data that is gone through (`user_data`), scores, training loops,
clusterings and models. An error is taken for the user's where a frame of that code stands between the edge and the
place where it was raised. Anything else that is no `GraphZipError` is a fault of graphzip and is said to be one, with
its cause.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, ParamSpec, TypeVar

from graphzip.errors import GraphZipError
from graphzip.global_lock import ALONE

__all__ = ["call_user", "is_users", "public", "tell_user", "user_data", "users_own"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_MARK: Final = "_raised_by_the_user"

_LIBRARIES: Final = frozenset(
    {
        *("functorch", "google", "joblib", "matplotlib", "ml_dtypes", "mpmath", "networkx", "numpy", "onnx", "onnx_ir"),
        *("onnxruntime", "onnxscript", "pydantic", "pydantic_core", "rich", "safetensors", "scipy", "sklearn", "sympy"),
        *("jinja2", "threadpoolctl", "torch", "torchgen", "typer", "typing_extensions", "yaml"),
    }
)
"""What graphzip is built on: an error in there is not the user's, unless his code called it."""


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of everything public: lets nothing out but errors of graphzip and of the user.

    Public functions of several threads wait for each other.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def each(*args: P.args, **kwargs: P.kwargs) -> Any:
            values: Any = iter(function(*args, **kwargs))
            with contextlib.closing(values):
                while True:
                    with _edge(function):
                        try:
                            value = next(values)
                        except StopIteration:
                            return
                    yield value

        return each

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        with _edge(function):
            return function(*args, **kwargs)

    return guarded


@contextlib.contextmanager
def _edge(function: Callable[..., Any]) -> Iterator[None]:
    try:
        with ALONE:
            yield
    except (GraphZipError, Warning):
        raise
    except Exception as error:
        if users_own(error) or _is_wrong_call(error):
            raise
        raise _fault(function.__qualname__, error) from error


def users_own(error: BaseException) -> bool:
    """Whether the user's code raised it, seen from here."""
    if getattr(error, _MARK, False):
        return True
    return any(is_users(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))


def is_users(module: Any) -> bool:
    """Whether the code of a module of that name is the user's; generated code has no module."""
    package = str(module or "").partition(".")[0]
    known = package in {"graphzip", "graphzip_passes", ""} or package in _LIBRARIES
    return not known and (package == "__main__" or package not in sys.stdlib_module_names)


def _is_wrong_call(error: Exception) -> bool:
    """Whether a function was called with arguments that it does not have, as Python says it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, TypeError) and all(frame.f_globals.get("__name__") == __name__ for frame in frames)


def _fault(name: str, error: Exception) -> GraphZipError:
    kind, text = type(error).__name__, str(error).strip().partition("\n")[0]
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError) or "allocate memory" in text:
        return GraphZipError(f"{name} ran out of memory ({text or kind}); give smaller batches, or fewer")
    if isinstance(error, OSError):
        return GraphZipError(f"{name} failed, for the system refuses something: {error}")
    told = f"{kind}: {text or 'no message'}"
    return GraphZipError(f"{name} failed inside graphzip with {told}. Please report it, with the model and the plan")


def call_user(function: Callable[..., T], *args: Any) -> T:
    """Call a function of the user: what it raises is the user's, also where it is called with what it does not take."""
    with ALONE.released(), _marking():
        return function(*args)


def tell_user(function: Callable[..., object], *args: Any) -> None:
    """Call a function of the user that is only told something, and is quick; other threads go on waiting."""
    with _marking():
        function(*args)


def user_data(data: Iterable[T]) -> Iterator[T]:
    """Go through data of the user: what that raises is the user's, wherever in his libraries it comes from."""
    with _marking():
        values = iter(data)
    while True:
        with _marking():
            try:
                value = next(values)
            except StopIteration:
                return
        yield value


@contextlib.contextmanager
def _marking() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        with contextlib.suppress(AttributeError):
            setattr(error, _MARK, True)
        raise
