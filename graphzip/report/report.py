"""What a compilation reports."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from graphzip.analysis.cost import Cost
from graphzip.boundary import public
from graphzip.errors import GraphZipError
from graphzip.files import as_path, write_text
from graphzip.report.card import Card, Scores
from graphzip.report.group_graph import GroupGraph
from graphzip.report.origin import Origin, Study
from graphzip.report.outcome import CHANNELS_LOST, Bars, Table
from graphzip.report.tables import (
    Before,
    Column,
    change,
    comparison_table,
    file_size,
    quantity,
    table,
    tasks_table,
    widths_table,
)

__all__ = ["GroupChange", "Report", "TaskChange", "Tuning"]

_APART = 0.02
"""How far the shares of bytes and of parameters that are left lie apart where both are shown: statistics of batch norms
alone, which are no parameters, make a little difference."""


@dataclass(frozen=True)
class GroupChange:
    """Channels of a group before and after."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class TaskChange:
    """One of several models: its cost alone before and after, and how far its outputs moved (as `Report.drift`)."""

    before: Cost
    after: Cost
    drift: float | None = None


@dataclass(frozen=True)
class Tuning:
    """What fitting the outputs to the original's gained: the loss on `held_out` samples, on which it did not train,
    `before` and `after` it, and the number of the epoch over the other `samples` that was the best one (0: none was
    better than before). The loss is the mean square of what outputs are off, relative to their variance.
    """

    before: float
    after: float
    epoch: int
    samples: int
    held_out: int

    def __str__(self) -> str:
        if not self.epoch:
            return (
                f"tuning gained nothing on {self.held_out} samples that were held out: the weights are those before it"
            )
        return (
            f"tuned for {self.epoch} epochs over {self.samples} samples: on {self.held_out} others the outputs are off "
            f"by {self.after:.3g} of their variance, {self.before:.3g} before"
        )


@dataclass(frozen=True)
class Report:
    """What a plan did to a model.

    `lossless` tells that the result computes what the model that was given does, up to rounding: no pass drops
    anything, and outputs are the same on the calibration data; where there is none on the example inputs, unless it is
    known without running the model, as of merging identical channels. What is lost is in `losses`; a model that was
    trained in between computes something else. `changed` tells whether anything is another than before, and `groups`
    how wide groups were and are. `passes` has for each pass what it decided, under its kind; `tables` and `bars` are
    what passes show of it. `drift` is the largest difference between outputs before and after on the calibration data,
    relative to the largest output; `None` without calibration data. Of several models `tasks` has each; `before` and
    `after` are then of all together, a parameter that several share counted once, and `drift` is the largest. `notes`
    says what the result lacks, such as branches that exist only in training. `tuning` is what `tune=` gained, `None`
    where it was not asked for. `scores` are what `evaluate=` gave before and after, and `card` the figures that
    `Compiled.measure` took. `origin` is the plan, the seed and the versions that reproduce it and the curves of the
    training, `study` how the widths were found where that is known (`WidthStudy.summary`), `verification` what was said
    of the file that was exported, `graph` which layers of the model that was given are coupled by channel groups.
    """

    before: Cost
    after: Cost
    groups: tuple[GroupChange, ...] = ()
    changed: bool = False
    lossless: bool = True
    drift: float | None = None
    notes: tuple[str, ...] = ()
    passes: tuple[dict[str, Any], ...] = field(default=())
    tasks: dict[str, TaskChange] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    bars: tuple[Bars, ...] = ()
    losses: tuple[str, ...] = ()
    tuning: Tuning | None = None
    scores: Scores | None = None
    card: Card | None = None
    origin: Origin | None = None
    study: Study | None = None
    verification: tuple[str, ...] = ()
    graph: GroupGraph | None = None

    @property
    def exact(self) -> bool:
        """Another name of `lossless`."""
        return self.lossless

    def __str__(self) -> str:
        lines = [self.figures()]
        if self.tasks:
            params = [(name, task.before.params, task.after.params) for name, task in self.tasks.items()]
            lines += ["", tasks_table(params, self.after.params)]
        if self.groups:
            lines += ["", widths_table([(group.name, group.before, group.after) for group in self.groups])]
        for each in self.tables:
            lines += ["", str(each)]
        if not self.changed:
            lines += ["", "nothing changed: the plan names no group that can shrink"]
        if not self.lossless:
            lines += ["", f"not lossless: {'; '.join(dict.fromkeys(self.losses)) or CHANNELS_LOST}"]
        if self.tuning is not None:
            lines += ["", str(self.tuning)]
        if self.drift is not None and not any(loss.startswith("outputs moved") for loss in self.losses):
            lines += ["", f"outputs moved by at most {self.drift:.2e} of the largest output on the calibration data"]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(lines)

    def figures(self) -> str:
        """The card, or where nothing was measured what is counted, and scores."""
        if self.card is not None:
            return self.card.text(self.scores)
        rows = [
            Before(what, quantity(old), quantity(new), change(old, new))
            for what, old, new in (
                ("parameters", self.before.params, self.after.params),
                ("MACs per sample", self.before.macs, self.after.macs),
            )
        ]
        if _stored_otherwise(self.before, self.after):
            old, new = self.before.bytes, self.after.bytes
            rows.insert(1, Before("stored", file_size(old), file_size(new), change(old, new)))
        if self.scores is None:
            return comparison_table(rows)
        states = list(self.scores.values)
        counted = [[row.what, row.before, *[row.after] * (len(states) - 1), row.change] for row in rows]
        last = [[each.title, *map(each.text, states), each.gain(states[-1])] for each in self.scores.each()]
        columns = [Column(title, right=number > 0) for number, title in enumerate(["", *states, "change"])]
        return table(columns, [*counted, *last])

    @public
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML page that needs no network, for a screen in light or dark, and for paper.

        Raises `GraphZipError` where the file is no `.html` or cannot be written.
        """
        from graphzip.report.page import page_of

        target = as_path(path, GraphZipError)
        if target.suffix not in (".html", ".htm"):
            raise GraphZipError(f"{target} is no page; name a file that ends in .html (to_dict is for JSON)")
        write_text(target, page_of(self), GraphZipError)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from graphzip.report.page import fragment_of

        return fragment_of(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report that `to_dict` described. Raises `pydantic.ValidationError` for anything else."""
        return _REPORT.validate_python(data)


def _stored_otherwise(before: Cost, after: Cost) -> bool:
    """Whether bytes say something else than parameters do: generators of bits, weights of another type."""
    if not (before.bytes and after.bytes and before.params):
        return False
    return abs(after.bytes / before.bytes - after.params / before.params) > _APART


_REPORT = TypeAdapter(Report)
