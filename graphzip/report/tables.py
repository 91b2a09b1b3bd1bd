"""Names, numbers and tables as plain text: pure functions, no colour, no terminal, the same text everywhere."""

from __future__ import annotations

import difflib
import html
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "Before",
    "Column",
    "ListedGroup",
    "ListedGroups",
    "change",
    "closest",
    "comparison_table",
    "file_size",
    "groups_table",
    "module_names",
    "percent",
    "preformatted",
    "quantity",
    "table",
    "tasks_table",
    "widths_table",
]

WIDTH = 120
_LISTED = 2
_NAMES = 10
_PARAMETER_NAMES = {"weight", "bias"}


@dataclass(frozen=True)
class Column:
    """A column's heading; numbers are set flush right."""

    title: str
    right: bool = False


class ListedGroup(Protocol):
    """What a table shows of a channel group."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def mergeable(self) -> bool: ...
    @property
    def exact(self) -> bool: ...
    @property
    def reason(self) -> str | None: ...
    def touched(self, role: str) -> Sequence[str]: ...


class ListedGroups(Protocol):
    """What a table shows of all channel groups of a model."""

    @property
    def parameters(self) -> int: ...
    @property
    def shrinkable_parameters(self) -> int: ...
    def __iter__(self) -> Iterator[ListedGroup]: ...


@dataclass(frozen=True)
class Before:
    """One quantity before and after, already formatted, and by how much it changed."""

    what: str
    before: str
    after: str
    change: str


def closest(name: str, known: Collection[str]) -> str:
    """The end of a message on an unknown name: the known names nearest to it, or some of them where none is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    if not known:
        return "there are none to choose from"
    listed = [repr(each) for each in list(known)[:_NAMES]]
    rest = [f"{len(known) - _NAMES} more"] if len(known) > _NAMES else []
    return f"there are: {', '.join(listed + rest)}"


def quantity(count: float) -> str:
    """Four digits and a unit: `417`, `25.56 M`, `4.089 G`."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= factor * 0.99995:
            return f"{count / factor:.{_decimals(count / factor)}f}{unit}"
    return f"{count:g}"


def _decimals(value: float) -> int:
    return 3 if abs(value) < 9.9995 else 2 if abs(value) < 99.995 else 1


def file_size(size: int) -> str:
    """Bytes with a decimal unit: `812 B`, `44.67 MB`."""
    return f"{quantity(size)}B" if size >= 1000 else f"{size} B"


def percent(part: float, whole: float) -> str:
    """`part` of `whole`: `37.5 %`; `0.0 %` where there is nothing."""
    return f"{100 * part / whole if whole else 0.0:.1f} %"


def change(before: float, after: float) -> str:
    """By how much `after` differs from `before`: `-55.4 %`."""
    return f"{100 * (after - before) / before if before else 0.0:+.1f} %"


def module_names(params: Iterable[str]) -> tuple[str, ...]:
    """The modules that own these parameters, each once: `conv1` for `conv1.weight`; others keep their name."""
    owners = []
    for param in params:
        owner, _, last = param.rpartition(".")
        owners.append(owner if owner and last in _PARAMETER_NAMES else param)
    return tuple(dict.fromkeys(owners))


def preformatted(text: str) -> str:
    """A text as HTML that keeps its lines: what a notebook shows of a table."""
    return f'<pre style="line-height: 1.2">{html.escape(text)}</pre>'


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, width: int = WIDTH) -> str:
    """Rows under headings, at most `width` characters wide; long cells are folded, nothing is cut off."""
    built = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        built.add_column(Text(column.title), justify="right" if column.right else "left", overflow="fold")
    for row in rows:
        built.add_row(*(Text(cell) for cell in row))
    sink = io.StringIO()
    console = Console(
        file=sink, width=width, color_system=None, force_terminal=False, force_jupyter=False, legacy_windows=False
    )
    console.print(built)
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines() if line.strip())


def groups_table(groups: ListedGroups, *, width: int = WIDTH) -> str:
    """Channel groups (who produces and who consumes them, whether and how exactly they merge) and what can shrink."""
    columns = [Column("group"), Column("channels", right=True), Column("producers"), Column("consumers")]
    rows = [_group_cells(group) for group in groups]
    return f"{table([*columns, Column('mergeable')], rows, width=width)}\n\n{_summary(groups)}"


def _group_cells(group: ListedGroup) -> list[str]:
    named = [_listed(group.touched(role)) for role in ("producer", "consumer")]
    verdict = f"yes, {'exact' if group.exact else 'not exact'}" if group.mergeable else f"no: {group.reason}"
    return [group.name, str(group.size), *named, verdict]


def _listed(params: Sequence[str]) -> str:
    names = module_names(params)
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", +{rest}" if rest > 0 else "")


def _summary(groups: ListedGroups) -> str:
    sizes = [group.size for group in groups]
    free = [group.size for group in groups if group.mergeable]
    return (
        f"{len(free)} of {len(sizes)} {'group' if len(sizes) == 1 else 'groups'} can shrink: "
        f"{percent(sum(free), sum(sizes))} of the channels, "
        f"{percent(groups.shrinkable_parameters, groups.parameters)} of the parameters"
    )


def comparison_table(rows: Sequence[Before], *, width: int = WIDTH) -> str:
    """One row per quantity: before, after, change."""
    columns = [Column(""), Column("before", right=True), Column("after", right=True), Column("change", right=True)]
    return table(columns, [(row.what, row.before, row.after, row.change) for row in rows], width=width)


def tasks_table(params: Sequence[tuple[str, int, int]], together: int, *, width: int = WIDTH) -> str:
    """Parameters of each of several models, before and after, and of all together after."""
    columns = [Column("task"), Column("parameters before", right=True), Column("after", right=True)]
    rows = [(name, quantity(before), quantity(after)) for name, before, after in params]
    total = ("together", quantity(sum(before for _, before, _ in params)), quantity(together))
    return table(columns, [*rows, total], width=width)


def widths_table(widths: Sequence[tuple[str, int, int]], *, width: int = WIDTH) -> str:
    """Group name, channels before and after, for the groups that changed."""
    columns = [Column("group"), Column("channels before", right=True), Column("after", right=True)]
    return table(columns, [(name, str(before), str(after)) for name, before, after in widths], width=width)
