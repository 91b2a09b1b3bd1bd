"""Types of option values, with what is said of a value that does not fit. Numbers of numpy are numbers, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Annotated, Any, TypeGuard

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from graphzip.limits import LONGEST_NAME, MOST_NAMES, SIZES
from graphzip.plan.problems import TAG, Sentence, says, show

__all__ = [
    "Amounts",
    "Balance",
    "Blocks",
    "Clusters",
    "Count",
    "Flag",
    "Globs",
    "HeightAndWidth",
    "Match",
    "Number",
    "Part",
    "Path",
    "Positive",
    "Shapes",
    "SharedAmounts",
    "SliceShape",
    "Tasks",
    "Thresholds",
    "is_int",
    "is_list",
    "listed",
]


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an int, of Python or numpy, and no flag."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a sequence and no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def listed(value: Any) -> list[Any] | None:
    """What can be gone through, as a list; no text and no mapping."""
    try:
        return None if isinstance(value, (str, bytes, Mapping)) else list(value)
    except TypeError:
        return None


def _plain(value: Any) -> Any:
    """A number as one of Python's; anything else, a number that no float holds among them, as it is."""
    if is_int(value):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except (OverflowError, ValueError, TypeError):
            return value
    return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if is_list(value) else value


def _at_most(what: str, kind: type[tuple[Any, ...]] | type[Mapping[Any, Any]]) -> BeforeValidator:
    """Counted before any of them is looked at, for each would give an error of its own."""

    def check(value: Any) -> Any:
        if isinstance(value, kind) and len(value) > MOST_NAMES:
            raise Sentence(f"{len(value):,} {what}, of which at most {MOST_NAMES:,} are read; use wildcards")
        return value

    return BeforeValidator(check)


_PLAIN = BeforeValidator(_plain)
_LIST = BeforeValidator(_as_tuple)
_NAMES = _at_most("names", Mapping)

# ------------------------------------------------------------------------------------------------- numbers

Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, lt=SIZES), _PLAIN]
Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), _PLAIN]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), _PLAIN]
Balance = Annotated[float, Field(strict=True, gt=0, lt=1), _PLAIN]

Part = Annotated[float, Field(strict=True, ge=0, lt=1), _PLAIN]

_Share = Annotated[float, Field(strict=True, gt=0, le=1), _PLAIN]
_SharedShare = Annotated[float, Field(strict=True, ge=0, le=1)]
_SharedCount = Annotated[int, Field(strict=True, ge=0, lt=SIZES)]

# ------------------------------------------------------------------------------------------------- names

Name = Annotated[str, Field(strict=True, max_length=LONGEST_NAME)]
Glob = Annotated[Name, says("is not a glob; a glob is text")]
Path = Annotated[
    str,
    Field(strict=True, min_length=1),
    says("is not the path of a file that graphzip.save_generator wrote"),
]


def _no_text(value: Any) -> Any:
    if isinstance(value, str):
        raise Sentence(f"{show(value)} is one glob; write a list: [{show(value)}]")
    return value


Globs = Annotated[
    tuple[Glob, ...],
    Field(strict=True),
    _at_most("globs", tuple),
    BeforeValidator(_no_text),
    _LIST,
    says("is not a list of globs on names"),
]


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("a name stands twice")
    return names


Tasks = Annotated[
    tuple[Annotated[str, Field(strict=True)], ...],
    Field(strict=True, fail_fast=True),
    AfterValidator(_once),
    _LIST,
    says("is not a list of the tasks, each once"),
]

# ------------------------------------------------------------------------------------------------- by name, or for all

_ALL, _BY_NAME = f"{TAG}all", f"{TAG}by name"
_ONE_OR_BY_NAME = Discriminator(lambda value: _BY_NAME if isinstance(value, Mapping) else _ALL)

Amount = Annotated[
    Count | _Share,
    _PLAIN,
    says(
        "is not an amount; write a float above 0 and at most 1 (a share of the channels) or an int of at least 1 (a "
        "number of channels)",
        whole="is out of range; an int is the number of channels to keep, at least 1",
        real="is out of range; a float is the share of the channels to keep, above 0 and at most 1 (write an int to "
        "keep a number of channels)",
    ),
]
SharedAmount = Annotated[
    _SharedCount | _SharedShare,
    _PLAIN,
    says(
        "is not an amount to share; write a float from 0 to 1 (a share of the channels) or an int of at least 0 (a "
        "number of channels)"
    ),
]
Blocks = Annotated[
    _SharedCount | _SharedShare,
    _PLAIN,
    says(
        "is not a number of blocks; write a float from 0 to 1 (a share of the blocks) or an int of at least 0 (a "
        "number of blocks)"
    ),
]
Threshold = Annotated[Positive, says("is not a threshold; write a number above 0")]

Amounts = Annotated[
    Annotated[Amount, Tag(_ALL)] | Annotated[dict[Name, Amount], _NAMES, Tag(_BY_NAME)], _ONE_OR_BY_NAME
]
SharedAmounts = Annotated[
    Annotated[SharedAmount, Tag(_ALL)] | Annotated[dict[Name, SharedAmount], _NAMES, Tag(_BY_NAME)], _ONE_OR_BY_NAME
]
Thresholds = Annotated[
    Annotated[Threshold, Tag(_ALL)] | Annotated[dict[Name, Threshold], _NAMES, Tag(_BY_NAME)], _ONE_OR_BY_NAME
]

# ------------------------------------------------------------------------------------------------- clusters by hand


def _partition(clusters: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """No channel twice. Whether one is missing is for those to say who know the group's size."""
    if not clusters:
        raise Sentence("no clusters; leave the group out to keep it whole")
    if not all(clusters):
        raise Sentence("a cluster is empty; every cluster keeps one channel, so remove it")
    twice = [channel for channel, count in Counter(each for one in clusters for each in one).items() if count > 1]
    if twice:
        raise Sentence(f"channel {twice[0]} is named twice; every channel belongs to exactly one cluster")
    return clusters


Channel = Annotated[int, Field(strict=True, ge=0, lt=SIZES), _PLAIN, says("is not a channel; channels are ints from 0")]
Partition = Annotated[
    tuple[Annotated[tuple[Channel, ...], Field(strict=True, fail_fast=True), _LIST], ...],
    Field(strict=True, fail_fast=True),
    AfterValidator(_partition),
    _LIST,
    says("is not a list of lists of channels, such as [[0, 3], [1], [2]]"),
]
Clusters = Annotated[dict[Name, Partition], _NAMES, says("is not a mapping from group names to lists of clusters")]

Match = Annotated[
    dict[
        Name,
        Annotated[
            dict[Annotated[str, Field(strict=True)], Annotated[str, Field(strict=True)]],
            says("is not a mapping from the first task's layers to its own, such as {'fc1': 'a'}"),
        ],
    ],
    _NAMES,
    says("is not a mapping from tasks to mappings of layers"),
]

# ------------------------------------------------------------------------------------------------- shapes


def _kernel(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if len(sizes) not in (3, 4, 5):
        raise ValueError("a kernel has one, two or three dimensions")
    return sizes


SliceShape = Annotated[
    tuple[Count, ...],
    Field(strict=True, fail_fast=True),
    AfterValidator(_kernel),
    _LIST,
    says("is not the shape of a slice; write its out channels, in channels and kernel size, such as [16, 16, 3, 3]"),
]
HeightAndWidth = Annotated[
    tuple[Count, Count],
    Field(strict=True),
    _LIST,
    says("is not a height and a width; write two ints of at least 1, such as [4, 4]"),
]


def _some(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    if not sizes:
        raise ValueError("there is nothing in it")
    return sizes


def _shapes(value: Any) -> Any:
    shapes = listed(value)
    return tuple(shapes) if shapes is not None and all(map(is_list, shapes)) else None


Shape = Annotated[tuple[Count, ...], Field(strict=True), AfterValidator(_some), _LIST]
Shapes = Annotated[tuple[Shape, ...], Field(strict=True), AfterValidator(_some), BeforeValidator(_shapes)]
