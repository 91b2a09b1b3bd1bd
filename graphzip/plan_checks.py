"""Checks of option values that say what is wrong and what to write; `plan` puts the path of the key before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

__all__ = ["count_of", "globs", "is_flag", "one_of", "path_or_none", "share_of_atoms", "slice_shape"]


def count_of(what: str, *, optional: bool = False) -> Callable[[Any], int | None]:
    """An int of at least 1; `None` too where `optional`."""

    def check(value: Any) -> int | None:
        if value is None and optional:
            return None
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{value!r} is not a number of {what}; write an int of at least 1")
        return int(value)

    return check


def one_of(*choices: str | None) -> Callable[[Any], str | None]:
    """One of a few words."""
    listed = ", ".join("null (None)" if choice is None else repr(choice) for choice in choices)

    def check(value: Any) -> str | None:
        if value not in choices:
            raise ValueError(f"{value!r} is not one of {listed}")
        return value  # type: ignore[no-any-return]

    return check


def globs(value: Any) -> tuple[str, ...]:
    """A list of globs on layer names."""
    if isinstance(value, str):
        raise ValueError(f"{value!r} is one glob; write a list: [{value!r}]")
    if not isinstance(value, Sequence) or not all(isinstance(glob, str) for glob in value):
        raise ValueError(f"{value!r} is not a list of globs on layer names")
    return tuple(value)


def is_flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def path_or_none(value: Any) -> str | None:
    """The path of a file."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{value!r} is not the path of a file that graphzip.save_generator wrote")
    return value


def share_of_atoms(value: Any) -> float:
    """A drop rate."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0.0 <= float(value) < 1.0:
        raise ValueError(f"{value!r} is not a share of the atoms; write a number from 0 to below 1")
    return float(value)


def slice_shape(value: Any) -> tuple[int, ...]:
    """Sizes along the out channels, the in channels and the dimensions of the kernel."""
    sizes = list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else []
    whole = all(isinstance(size, Integral) and not isinstance(size, bool) and int(size) >= 1 for size in sizes)
    if len(sizes) not in (3, 4, 5) or not whole:
        raise ValueError(
            f"{value!r} is not the shape of a slice; write its out channels, in channels and kernel size, such as "
            "[16, 16, 3, 3]"
        )
    return tuple(int(size) for size in sizes)
