"""What one pass did to a model: the values that reports, pictures and JSON are made of, whatever the pass."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Final

from graphzip.errors import GraphZipError
from graphzip.graph.traced import Traced
from graphzip.report.tables import Column, table

__all__ = ["CHANNELS_DIFFER", "CHANNELS_LOST", "Bars", "Outcome", "Table"]

CHANNELS_DIFFER: Final = "channels that were not identical became one"
CHANNELS_LOST: Final = "channels were dropped, or norms that were left plain count merged channels once"
"""What is lost where channels go that count; reports of models that were saved without a reason mean this one."""

_SENTENCE: Final = re.compile(r"[a-z]{2,} [a-z]{2,} ")


@dataclass(frozen=True)
class Table:
    """A table of a report: each of `rows` has a cell for each of `columns`, of which all but the first and those with
    sentences stand flush right.

    `title` is a line above the table and `note` a paragraph below it. Cells that are no text are written as text.
    Raises `GraphZipError` where a row has another number of cells.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...] = ()
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", _cells(self.columns))
        object.__setattr__(self, "rows", tuple(_cells(row) for row in self.rows))
        for row in self.rows:
            if len(row) != len(self.columns):
                raise GraphZipError(f"a table of the columns {self.columns} has the row {row}; give a cell for each")

    @property
    def flush_left(self) -> frozenset[int]:
        """The columns of names and of sentences."""
        cells = zip(*self.rows, strict=True)
        return frozenset({0, *(number for number, each in enumerate(cells) if any(map(_SENTENCE.search, each)))})

    def __str__(self) -> str:
        columns = [Column(title, right=number not in self.flush_left) for number, title in enumerate(self.columns)]
        parts = [self.title, table(columns, self.rows)]
        return "\n".join(part for part in parts if part) + (f"\n\n{self.note}" if self.note else "")


def _cells(row: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(cell) for cell in row)


@dataclass(frozen=True)
class Bars:
    """Bars of a picture, each divided into `parts`: for each part how high it is in every bar; `label` says of what,
    `title` stands above.

    Raises `GraphZipError` where one part has more bars than another, or a height is no int.
    """

    title: str
    label: str
    parts: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if not all(isinstance(height, Integral) for heights in self.parts.values() for height in heights):
            raise GraphZipError(f"the bars of {self.title!r} have heights that are no ints; give numbers of things")
        if len({len(heights) for heights in self.parts.values()}) > 1:
            raise GraphZipError(
                f"the bars of {self.title!r} have parts of different lengths; give a height for each bar"
            )


@dataclass(frozen=True)
class Outcome:
    """A model as a pass left it, and what is to be said of it.

    - `traced`: the model. Where a pass changes nothing it is the one that the pass was given.
    - `changed`: whether the pass found something to do; by default whether a width changed.
    - `lossless`: whether nothing is lost on a model that meets the condition of the pass, such as identical channels in
      a cluster. A pass that drops what a model computes with says `False`, and in `loss` what it was.
    - `proven`: whether `lossless` follows from what was done, so that the model need not be run to see it.
    - `widths`: channels before and after, by the name of each group that changes.
    - `tables`: what `str(report)` shows beside the widths. `bars`: what `graphzip.draw_sharing` draws.
    - `details`: what was decided, JSON-ready: `report.passes` has it under the kind of the pass.
    """

    traced: Traced
    changed: bool | None = None
    lossless: bool = True
    loss: str = ""
    proven: bool = False
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    bars: tuple[Bars, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.changed is None:
            object.__setattr__(self, "changed", bool(self.widths))
