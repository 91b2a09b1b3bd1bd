"""Checks of option values that say what is wrong and what to write; `plan` puts the path of the key before them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence, Sized
from numbers import Integral, Real
from typing import Any, TypeGuard

__all__ = [
    "MOST",
    "Problems",
    "Wrong",
    "check_amount",
    "check_balance",
    "check_clusters",
    "check_damping",
    "check_globs",
    "check_keep",
    "check_match",
    "check_multiple",
    "check_name",
    "check_names",
    "check_norms",
    "check_partition",
    "check_shapes",
    "check_share",
    "check_strength",
    "check_threshold",
    "check_weight",
    "count_of",
    "height_and_width",
    "is_flag",
    "is_int",
    "is_list",
    "key_text",
    "listed",
    "named",
    "one_of",
    "path_or_none",
    "share_of_atoms",
    "show",
    "slice_shape",
]


MOST = 1 << 31
"""No size and no count is as large."""

_MOST_NAMES = 10_000  # in one option; each is compared with every group or layer
_LONGEST = 1_000  # characters of a name


def count_of(what: str, *, optional: bool = False) -> Callable[[Any], int | None]:
    """An int of at least 1; `None` too where `optional`."""

    def check(value: Any) -> int | None:
        if value is None and optional:
            return None
        if not is_int(value) or not 1 <= value < MOST:
            limit = f" and below {MOST}" if is_int(value) and value >= MOST else ""
            raise ValueError(f"{show(value)} is not a number of {what}; write an int of at least 1{limit}")
        return int(value)

    return check


def one_of(*choices: str | None) -> Callable[[Any], str | None]:
    """One of a few words."""
    listed = ", ".join("null (None)" if choice is None else repr(choice) for choice in choices)

    def check(value: Any) -> str | None:
        if value not in choices:
            raise ValueError(f"{show(value)} is not one of {listed}")
        return value  # type: ignore[no-any-return]

    return check


def is_flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{show(value)} is neither true nor false")
    return value


def path_or_none(value: Any) -> str | None:
    """The path of a file."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{show(value)} is not the path of a file that graphzip.save_generator wrote")
    return value


def share_of_atoms(value: Any) -> float:
    """A drop rate."""
    share = _real(value)
    if share is None or not 0.0 <= share < 1.0:
        raise ValueError(f"{show(value)} is not a share of the atoms; write a number from 0 to below 1")
    return share


def slice_shape(value: Any) -> tuple[int, ...]:
    """Sizes along the out channels, the in channels and the dimensions of the kernel."""
    sizes = list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else []
    whole = all(is_int(size) and 1 <= size < MOST for size in sizes)
    if len(sizes) not in (3, 4, 5) or not whole:
        raise ValueError(
            f"{show(value)} is not the shape of a slice; write its out channels, in channels and kernel size, such as "
            "[16, 16, 3, 3]"
        )
    return tuple(int(size) for size in sizes)


def height_and_width(value: Any) -> tuple[int, int]:
    """Two sizes."""
    sizes = list(value) if is_list(value) else []
    if len(sizes) != 2 or not all(is_int(size) and 1 <= size < MOST for size in sizes):
        raise ValueError(f"{show(value)} is not a height and a width; write two ints of at least 1, such as [4, 4]")
    return int(sizes[0]), int(sizes[1])


class Wrong(ValueError):
    """What is wrong with the value of one option."""


class Problems(Wrong):
    """What is wrong at several places of one option: pairs of the path below the option and the text."""

    def __init__(self, items: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{path} {text}".strip() for path, text in items))
        self.items = tuple(items)


def show(value: object) -> str:
    """A value in a message: short, whatever it is."""
    try:
        return reprlib.repr(value)
    except Exception:  # an int that is too long to be written, an object of somebody else's
        return f"a {type(value).__name__}"


def key_text(key: object) -> str:
    """A key of a mapping in a message."""
    return key if isinstance(key, str) and len(key) <= _LONGEST else show(key)


def _real(value: object) -> float | None:
    """A number as a float; `None` for anything else, an int that no float holds among them."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError, TypeError):
        return None


def _above_zero(value: object) -> float | None:
    number = _real(value)
    return number if number is not None and 0.0 < number < math.inf else None


def _check_count(names: Sized, what: str) -> None:
    if len(names) > _MOST_NAMES:
        raise Wrong(f"{len(names):,} {what}, of which at most {_MOST_NAMES:,} are read; use wildcards")


def _check_length(name: str) -> None:
    if len(name) > _LONGEST:
        raise Wrong(f"{show(name)} has {len(name):,} characters; no name has more than {_LONGEST:,}")


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def listed(value: Any) -> list[Any] | None:
    """What can be gone through, as a list; no text and no mapping."""
    try:
        return None if isinstance(value, (str, bytes, Mapping)) else list(value)
    except TypeError:
        return None


def named(value: Mapping[Any, Any], check: Callable[[Any], Any]) -> dict[str, Any]:
    """A mapping from names to checked values; the problems of all its entries are raised together."""
    _check_count(value, "names")
    checked: dict[str, Any] = {}
    problems: list[tuple[str, str]] = []
    for name, entry in value.items():
        if not isinstance(name, str):
            problems.append((f"[{show(name)}]", "a name must be text; put it in quotes"))
            continue
        try:
            _check_length(name)
            checked[name] = check(entry)
        except Wrong as error:
            problems.append((f"[{name!r}]" if len(name) <= _LONGEST else "", str(error)))
    if problems:
        raise Problems(problems)
    return checked


def check_amount(value: Any) -> float | int:
    if is_int(value):
        if not 1 <= value < MOST:
            limit = f" and below {MOST}" if value >= MOST else ""
            raise Wrong(f"{show(value)} is out of range; an int is the number of channels to keep, at least 1{limit}")
        return int(value)
    share = _real(value)
    if share is not None:
        if not 0.0 < share <= 1.0:
            raise Wrong(
                f"{share} is out of range; a float is the share of the channels to keep, above 0 and at most 1 "
                "(write an int to keep a number of channels)"
            )
        return share
    raise Wrong(
        f"{show(value)} is not an amount; write a float above 0 and at most 1 (a share of the channels) "
        "or an int of at least 1 (a number of channels)"
    )


def check_keep(value: Any) -> Any:
    return named(value, check_amount) if isinstance(value, Mapping) else check_amount(value)


def check_partition(value: Any) -> tuple[tuple[int, ...], ...]:
    """The clusters of one group. Whether a channel is missing is for those to say who know the group's size."""
    if not is_list(value) or not all(is_list(cluster) for cluster in value):
        raise Wrong(f"{show(value)} is not a list of lists of channels, such as [[0, 3], [1], [2]]")
    if not value:
        raise Wrong("no clusters; leave the group out to keep it whole")
    seen: set[int] = set()
    for cluster in value:
        if not cluster:
            raise Wrong("a cluster is empty; every cluster keeps one channel, so remove it")
        for channel in cluster:
            if not is_int(channel) or not 0 <= channel < MOST:
                raise Wrong(f"{show(channel)} is not a channel; channels are ints from 0")
            if channel in seen:
                raise Wrong(f"channel {channel} is named twice; every channel belongs to exactly one cluster")
            seen.add(int(channel))
    return tuple(tuple(int(channel) for channel in cluster) for cluster in value)


def check_clusters(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise Wrong(f"{show(value)} is not a mapping from group names to lists of clusters")
    return named(value, check_partition)


def check_globs(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        raise Wrong(f"{show(value)} is one glob; write a list: [{show(value)}]")
    if not is_list(value):
        raise Wrong(f"{show(value)} is not a list of globs on names")
    _check_count(value, "globs")
    for glob in value:
        if not isinstance(glob, str):
            raise Wrong(f"{show(glob)} is not a glob; a glob is text")
        _check_length(glob)
    return tuple(value)


def check_name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Wrong(f"{show(value)} is not the name of a clustering, such as 'kmeans'")
    return value


def check_multiple(value: Any) -> int:
    if not is_int(value) or not 1 <= value < MOST:
        raise Wrong(f"{show(value)} is not a number of channels; write an int of at least 1")
    return int(value)


def check_norms(value: Any) -> str:
    if value in ("exact", "plain"):
        return str(value)
    raise Wrong(f"{show(value)} is not a way to treat norms; write 'exact' or 'plain'")


def check_strength(value: Any) -> float | str:
    if value == "auto":
        return "auto"
    number = _above_zero(value)
    if number is not None:
        return number
    raise Wrong(f"{show(value)} is not a strength; write a number above 0, or 'auto'")


def check_weight(value: Any) -> float:
    number = _real(value)
    if number is not None and 0.0 <= number < math.inf:
        return number
    raise Wrong(f"{show(value)} is not a strength; write a number of at least 0")


def check_shared(value: Any) -> float | int:
    if is_int(value) and 0 <= value < MOST:
        return int(value)
    share = None if is_int(value) else _real(value)
    if share is not None and 0.0 <= share <= 1.0:
        return share
    raise Wrong(
        f"{show(value)} is not an amount to share; write a float from 0 to 1 (a share of the channels) or an int of at "
        "least 0 (a number of channels)"
    )


def check_share(value: Any) -> Any:
    return named(value, check_shared) if isinstance(value, Mapping) else check_shared(value)


def check_positive(value: Any) -> float:
    number = _above_zero(value)
    if number is not None:
        return number
    raise Wrong(f"{show(value)} is not a threshold; write a number above 0")


def check_threshold(value: Any) -> Any:
    if value is None:
        return None
    return named(value, check_positive) if isinstance(value, Mapping) else check_positive(value)


def check_balance(value: Any) -> float:
    number = _real(value)
    if number is not None and 0.0 < number < 1.0:
        return number
    raise Wrong(f"{show(value)} does not balance two errors; write a number between 0 and 1")


def check_damping(value: Any) -> float:
    number = _above_zero(value)
    if number is not None:
        return number
    raise Wrong(f"{show(value)} is not a damping; write a number above 0")


def check_names(value: Any) -> tuple[str, ...]:
    if not is_list(value) or not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
        raise Wrong(f"{show(value)} is not a list of the tasks, each once")
    return tuple(value)


def check_match(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise Wrong(f"{show(value)} is not a mapping from tasks to mappings of layers")

    def check(layers: Any) -> dict[str, str]:
        if not isinstance(layers, Mapping) or not all(
            isinstance(each, str) for pair in layers.items() for each in pair
        ):
            raise Wrong(
                f"{show(layers)} is not a mapping from the first task's layers to its own, such as {{'fc1': 'a'}}"
            )
        return dict(layers)

    return named(value, check)


def check_shapes(value: Any, problems: list[str]) -> tuple[tuple[int, ...], ...] | None:
    """The shapes of a plan's inputs; what is wrong with them is added to `problems`."""
    if value is None:
        return None
    shapes = listed(value)
    if not shapes or not all(is_list(shape) and len(shape) for shape in shapes):
        problems.append(f"inputs: {show(value)} is not a list of shapes, such as [[2, 3, 224, 224]]")
        return None
    wrong = [
        f"inputs[{position}][{dim}]: {show(size)} is not a size; write an int of at least 1 and below {MOST}"
        for position, shape in enumerate(shapes)
        for dim, size in enumerate(shape)
        if not is_int(size) or not 1 <= size < MOST
    ]
    problems += wrong
    return None if wrong else tuple(tuple(int(size) for size in shape) for shape in shapes)
