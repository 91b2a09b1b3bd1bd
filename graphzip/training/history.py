"""What training did, step by step: how far clustered filters are apart, and the loss where it was told."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, overload

from graphzip.boundary import public
from graphzip.errors import GraphZipError, MissingDependencyError, NotFoundError
from graphzip.files import staged

__all__ = ["History", "Record"]

EVERY: Final = 10
"""Steps between two records that are made without being asked for."""

MOST: Final = 1000
"""Records at which every second one is dropped and the distance between them doubled."""

_LINES: Final = 12  # groups of which a plot draws curves of their own
_TINY: Final = 1e-300


@dataclass(frozen=True)
class Record:
    """The state after `step` optimizer steps.

    `groups` holds the sum of squared kernel deviations (C-SGD, Eq. 7) by the name of each group that shrinks, and
    `values` what else was told, such as an accuracy. `residual` is the sum of squares of the kernels that go (Eq. 22).
    """

    step: int
    groups: Mapping[str, float]
    loss: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    residual: float = 0.0

    @property
    def deviation(self) -> float:
        """The sum over all groups."""
        return sum(self.groups.values())


class History(Sequence[Record]):
    """The records of one training, oldest first.

    An optimizer of `Prepared.optimizer` adds one at the start and every few steps, `Prepared.convert` the last one;
    `Prepared.record` adds one with a loss. When there are many, those without a loss are thinned out.
    """

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._every = EVERY

    @overload
    def __getitem__(self, key: int) -> Record: ...
    @overload
    def __getitem__(self, key: slice) -> list[Record]: ...
    def __getitem__(self, key: int | slice) -> Record | list[Record]:
        try:
            return self._records[key]
        except (IndexError, TypeError):
            raise NotFoundError(f"no record {key!r}; there are {len(self)}, numbered from 0") from None

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def is_due(self, step: int) -> bool:
        """Whether a record is to be made after `step` steps although nobody asked for it."""
        return step % self._every == 0

    def add(self, record: Record) -> None:
        """Append a record; one of the same step is replaced."""
        if self._records and self._records[-1].step == record.step:
            self._records.pop()
        self._records.append(record)
        if sum(each.loss is None for each in self._records) > MOST:
            self._every *= 2
            self._records = [
                each for each in self._records if each.loss is not None or each.values or self.is_due(each.step)
            ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"records": [asdict(record) for record in self._records]}

    @public
    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the deviation of every group and of all on a logarithmic axis, and the loss below it, into a file.

        The file's suffix says its format (`.png`, `.svg`, `.pdf`). Raises `MissingDependencyError` without matplotlib,
        `GraphZipError` where there is nothing to draw or the file cannot be written.
        """
        if not self._records:
            raise GraphZipError("there is no record to plot; train with prepared.optimizer(...), or call record()")
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingDependencyError('plots need matplotlib: pip install "graphzip[plot]"') from None
        losses = [(record.step, record.loss) for record in self._records if record.loss is not None]
        figure = Figure(figsize=(7, 7 if losses else 4), layout="constrained")
        axes = figure.subplots(2 if losses else 1, 1, sharex=True, squeeze=False)[:, 0]
        self._draw_deviation(axes[0])
        if losses:
            axes[1].plot(*zip(*losses, strict=True), color="black")
            axes[1].set_ylabel("loss")
        axes[-1].set_xlabel("optimizer step")
        with staged(path, GraphZipError) as temporary:
            try:
                figure.savefig(temporary)
            except ValueError as error:
                raise GraphZipError(f"cannot plot to {os.fspath(path)}: {error}") from None

    def _draw_deviation(self, axes: Any) -> None:
        """Points at zero have no place on a logarithmic axis and are left out."""
        names = list(self._records[-1].groups)
        for name in names[:_LINES]:
            curve = [(r.step, r.groups[name]) for r in self._records if r.groups.get(name, 0.0) > _TINY]
            if curve:
                axes.plot(*zip(*curve, strict=True), ".-", linewidth=0.8, markersize=2, label=name)
        total = [(r.step, r.deviation) for r in self._records if r.deviation > _TINY]
        if total:
            axes.plot(*zip(*total, strict=True), ".-", color="black", markersize=3, label="all")
            axes.set_yscale("log")
            axes.legend(fontsize="x-small", ncols=2)
        axes.set_ylabel("sum of squared kernel deviations")
