"""The card: what a model costs and how well it does, before and after, in figures that were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from graphzip.report.tables import Column, change, file_size, quantity, table

__all__ = ["AFTER", "BEFORE", "TUNED", "Card", "Figures", "Latency", "Scores"]

BEFORE: Final = "before"
AFTER: Final = "after"
TUNED: Final = "after tuning"

_WIDTH: Final = 80  # columns of a terminal that nobody made larger


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run in onnxruntime: the `median` of `runs`, and the quartiles `low` and `high` around it.

    `batch` is the number of samples of a run; `None` where the model fixes what the example has.
    """

    batch: int | None
    median: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{_ms(self.median)} ms ({_ms(self.low)}-{_ms(self.high)})"


@dataclass(frozen=True)
class Figures:
    """What one state of a model, its `name`, costs: `params` and `macs` as `Cost` has them, of the scope where there is
    one, and the `latencies` in onnxruntime, one for each batch.

    `bytes` are those of parameters and buffers, `file` those of the ONNX file, `memory` those that a process of its own
    takes to load the file and run it once, at its peak (`None` where the system does not tell). `drift` is how far the
    outputs are from the original's on the calibration data, as in `Report`.
    """

    name: str
    params: int
    macs: int
    bytes: int
    file: int | None = None
    memory: int | None = None
    latencies: tuple[Latency, ...] = ()
    drift: float | None = None


@dataclass(frozen=True)
class Scores:
    """What `evaluate` gave for each state of the model, in order: `values` by `before`, `after`, `after tuning`, ...

    `title` is what the row of a card is called. Shown as a percentage where it is a `share` between 0 and 1, such as an
    accuracy. Where several models have scores of their own, `tasks` has the values of each, and `values` their mean.
    """

    title: str
    values: dict[str, float]
    share: bool = False
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    def each(self) -> list[Scores]:
        """The scores of every task by themselves; of one model, or of all together, these."""
        if not self.tasks:
            return [self]
        return [Scores(f"{self.title}, {task}", values, self.share) for task, values in self.tasks.items()]

    def with_value(self, name: str, value: float | Mapping[str, float]) -> Scores:
        """The same with `value`, the score of the state `name`, or with one of each task, whose mean counts then."""
        if not isinstance(value, Mapping):
            return replace(self, values={**self.values, name: value})
        tasks = {task: {**self.tasks.get(task, {}), name: each} for task, each in value.items()}
        mean = sum(value.values()) / max(len(value), 1)
        return replace(self, values={**self.values, name: mean}, tasks={**self.tasks, **tasks})

    def text(self, name: str) -> str:
        """One score; empty where there is none."""
        if name not in self.values:
            return ""
        return f"{100 * self.values[name]:.2f} %" if self.share else f"{self.values[name]:.5g}"

    def gain(self, last: str) -> str:
        """How much the `last` score is above the first."""
        first = next(iter(self.values.values()))
        if last not in self.values or len(self.values) < 2:
            return ""
        apart = self.values[last] - first
        return f"{100 * apart:+.2f} points" if self.share else f"{apart:+.3g}"


@dataclass(frozen=True)
class Card:
    """The `figures` of the model before and after, and of further states of it; `machine` is where they were measured,
    and `notes` say what could not be.
    """

    figures: tuple[Figures, ...]
    machine: str
    notes: tuple[str, ...] = ()

    def with_states(self, other: Card) -> Card:
        """Both cards in one; states of the other take the place of those of the same name."""
        figures = {each.name: each for each in (*self.figures, *other.figures)}
        return Card(tuple(figures.values()), other.machine, tuple(dict.fromkeys([*self.notes, *other.notes])))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def rows(self, scores: Scores | None = None) -> list[tuple[str, ...]]:
        """A heading, and a row for each figure that is known: what it is, every state, how the last one changed."""
        names = [each.name for each in self.figures]
        by_name = {each.name: each for each in self.figures}
        shown = [by_name.get(name) for name in names]
        found: list[tuple[str, ...]] = [("", *names, "change")]
        for title, value, text in self._quantities():
            values = [None if each is None else value(each) for each in shown]
            if any(each is not None for each in values):
                cells = ["" if each is None else text(each) for each in values]
                known = [each for each in values if each is not None]
                found.append((title, *cells, change(known[0], known[-1]) if len(known) > 1 else ""))
        found += self._latencies(shown)
        if any(each is not None and each.drift is not None for each in shown):
            moved = ["" if each is None or each.drift is None else f"{each.drift:.2e}" for each in shown]
            found.append(("outputs moved", *moved, ""))
        for each in [] if scores is None else scores.each():
            found += self._scores(names, each)
        return found

    def _quantities(self) -> list[tuple[str, Callable[[Figures], int | None], Callable[[int], str]]]:
        return [
            ("parameters", lambda each: each.params, quantity),
            ("MACs per sample", lambda each: each.macs, quantity),
            ("weights", lambda each: each.bytes, file_size),
            ("ONNX file", lambda each: each.file, file_size),
            ("peak memory", lambda each: each.memory, file_size),
        ]

    def _latencies(self, shown: Sequence[Figures | None]) -> list[tuple[str, ...]]:
        batches = dict.fromkeys(latency.batch for each in shown if each is not None for latency in each.latencies)
        found = []
        for batch in batches:
            runs = [_of_batch(each, batch) for each in shown]
            known = [each for each in runs if each is not None]
            title = "latency, the example" if batch is None else f"latency, batch {batch}"
            cells = ["" if each is None else str(each) for each in runs]
            found.append((title, *cells, change(known[0].median, known[-1].median) if len(known) > 1 else ""))
        return found

    def _scores(self, names: Sequence[str], scores: Scores) -> list[tuple[str, ...]]:
        """Those of the states that have figures in one row, each other state in a row below."""
        last = [name for name in names if name in scores.values]
        found = [(scores.title, *map(scores.text, names), scores.gain(last[-1]) if last else "")]
        blank = ("",) * (len(names) - 1)
        for name in scores.values:
            if name not in names:
                found.append((f"  {name}", *blank, scores.text(name), scores.gain(name)))
        return found

    def text(self, scores: Scores | None = None, *, width: int = _WIDTH) -> str:
        """A table of at most `width` columns, with a row for the `scores`, and below it where it was measured."""
        heading, *rows = self.rows(scores)
        columns = [Column(title, right=number > 0) for number, title in enumerate(heading)]
        return "\n".join([table(columns, rows, width=width), "", f"measured on {self.machine}", *self.notes])

    def __str__(self) -> str:
        return self.text()


def _of_batch(figures: Figures | None, batch: int | None) -> Latency | None:
    found = () if figures is None else figures.latencies
    return next((each for each in found if each.batch == batch), None)


def _ms(value: float) -> str:
    """Three digits."""
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"
