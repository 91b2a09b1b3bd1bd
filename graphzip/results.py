"""What a compilation reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from graphzip.analysis.cost import Cost
from graphzip.tables import (
    Before,
    change,
    comparison_table,
    errors_table,
    quantity,
    sharing_table,
    tasks_table,
    widths_table,
)

__all__ = ["GroupChange", "Report", "TaskChange"]


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
class Report:
    """What a plan did to a model.

    `exact` tells that merging was lossless where the merged channels were identical; it is false where the plan asked
    for plain norms and some norm now counts merged channels once, or dropped channels. `drift` is the largest
    difference between outputs before and after on the calibration data, relative to the largest output; `None` without
    calibration data. Of several models `tasks` has each; `before` and `after` are then of all together, a parameter
    that several share counted once, and `drift` is the largest. `notes` says what the result lacks, such as branches
    that exist only in training.
    """

    before: Cost
    after: Cost
    groups: tuple[GroupChange, ...] = ()
    changed: bool = False
    exact: bool = True
    drift: float | None = None
    notes: tuple[str, ...] = ()
    passes: tuple[dict[str, Any], ...] = field(default=())
    tasks: dict[str, TaskChange] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            comparison_table(
                [
                    Before(what, quantity(old), quantity(new), change(old, new))
                    for what, old, new in (
                        ("parameters", self.before.params, self.after.params),
                        ("MACs per sample", self.before.macs, self.after.macs),
                    )
                ]
            )
        ]
        if self.tasks:
            params = [(name, task.before.params, task.after.params) for name, task in self.tasks.items()]
            lines += ["", tasks_table(params, self.after.params)]
        if self.groups:
            lines += ["", widths_table([(group.name, group.before, group.after) for group in self.groups])]
        for found in (found for summary in self.passes for found in summary.values()):
            if found.get("relative_error"):
                lines += ["", errors_table(found["relative_error"], found["shared"])]
            if found.get("weights"):
                lines += ["", sharing_table(found["layers"], found["weights"])]
            if found.get("note"):
                lines += ["", found["note"]]
        if not self.changed:
            lines += ["", "nothing changed: the plan names no group that can shrink"]
        if not self.exact:
            lines += ["", "not exact: channels were dropped, or norms that were left plain count merged channels once"]
        if self.drift is not None:
            lines += ["", f"outputs moved by at most {self.drift:.2e} of the largest output on the calibration data"]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report that `to_dict` described. Raises `pydantic.ValidationError` for anything else."""
        return _REPORT.validate_python(data)


_REPORT = TypeAdapter(Report)
