"""Pictures: the channel groups of a model, what narrowing them does, and the clusters that two models share.

Of channel groups every layer is a row, and every group a line along the layers that it couples.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from graphzip.arguments import whole
from graphzip.boundary import public
from graphzip.errors import GraphZipError, MissingDependencyError
from graphzip.files import check_picture, staged
from graphzip.report.group_graph import DrawnGroups, GroupGraph
from graphzip.report.origin import COSTS
from graphzip.report.report import Report

__all__ = ["draw_groups", "draw_sharing", "draw_study"]

_ROW, _LANE = 0.24, 0.3
"""Height of a row and width of a lane, in inches."""

_GREY = "0.6"
_LEGEND = 20  # groups that a legend can name


class DrawnSensitivity(Protocol):
    """What is drawn of a group's sensitivity."""

    @property
    def group(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def points(self) -> tuple[tuple[int, float], ...]: ...


class DrawnStudy(Protocol):
    """Sensitivities of all groups, and what the best splits lose."""

    @property
    def sensitivities(self) -> Sequence[DrawnSensitivity]: ...
    @property
    def chosen(self) -> tuple[str, float, float] | None: ...
    def frontier(self, what: str) -> list[tuple[float, float]]: ...


@public
def draw_groups(groups: DrawnGroups, path: str | os.PathLike[str]) -> Path:
    """Write a picture of `groups`, those of `gz.channel_groups(...)`, to `path` (.svg, .png or .pdf) and give the path.

    Layers stand below each other in execution order. A group is a vertical line: a full dot at each layer that makes
    its channels, a ring at each that sums over them; one colour per group. Groups that cannot shrink are dashed and
    grey with a cross.

    Raises `GraphZipError` for another kind of file or a directory that does not exist, `MissingDependencyError`
    without matplotlib.
    """
    if not hasattr(groups, "order"):
        raise GraphZipError(f"expected what graphzip.channel_groups gave, got {type(groups).__name__}; pass that")
    graph = GroupGraph.of(groups)
    longest = max(map(len, graph.layers), default=0)
    width, height = 2.5 + _LANE * max(graph.lanes, 1) + 0.06 * longest, 0.8 + _ROW * max(len(graph.layers), 4)
    with _picture(path, width, height) as picture:
        import matplotlib as mpl

        _draw(picture.figure.add_subplot(), graph, mpl.colormaps["tab20"])
    return picture.target


@public
def draw_sharing(report: Report, path: str | os.PathLike[str], *, largest: int = 10) -> Path:
    """Write how large the clusters of `CrossDomainShare` are as bars to `path` (.svg, .png or .pdf), from the `report`
    of what was compiled; give the path.

    One panel per layer, one bar for each of its `largest` clusters, divided into the channels of each task (Fig. 6 of
    Gao, Deng and Huang, "Cross Domain Model Compression by Structurally Weight Sharing").

    Raises `GraphZipError` for a report without such clusters, another kind of file or a directory that does not exist,
    `MissingDependencyError` without matplotlib.
    """
    if not isinstance(report, Report):
        raise GraphZipError(f"expected the report of a compiled model, got {type(report).__name__}; pass its .report")
    whole(largest, "largest", least=1)
    if not report.bars:
        raise GraphZipError("the report has no shared weights to draw; pass that of a plan with CrossDomainShare")
    columns = min(len(report.bars), 4)
    rows = -(-len(report.bars) // columns)
    with _picture(path, 0.6 + 2.6 * columns, 0.4 + 2.1 * rows) as picture:
        for number, panel in enumerate(report.bars, start=1):
            axes = picture.figure.add_subplot(rows, columns, number)
            below = [0] * largest
            for part, heights in panel.parts.items():
                shown = heights[:largest]
                axes.bar(range(1, len(shown) + 1), shown, bottom=below[: len(shown)], label=part)
                below = [sum(pair) for pair in zip(below, shown, strict=False)]
            axes.set_title(panel.title, fontsize=7)
            axes.tick_params(labelsize=7)
            if number == 1:
                axes.set_ylabel(panel.label, fontsize=7)
                axes.legend(fontsize=7)
    return picture.target


@public
def draw_study(study: DrawnStudy, path: str | os.PathLike[str]) -> Path:
    """Write a picture of `study`, a measured `gz.WidthStudy`, to `path` (.svg, .png or .pdf) and give the path.

    Left, how far the outputs move as each group alone is narrowed; right, the loss that is expected of the best split
    at each share of what the budget is of (of multiply-accumulates before `plan`), with the point that `plan` chose.

    Raises `GraphZipError` where nothing is measured yet; other errors are those of `draw_groups`.
    """
    if not getattr(study, "sensitivities", ()):
        raise GraphZipError(f"{type(study).__name__} is no graphzip.WidthStudy that has measured; call measure() first")
    with _picture(path, 11, 4.5) as picture:
        import matplotlib as mpl

        left, right = picture.figure.subplots(1, 2)
        for number, each in enumerate(study.sensitivities):
            widths, losses = zip((each.size, 0.0), *each.points, strict=True)
            shares = [width / each.size for width in widths]
            left.plot(shares, losses, marker=".", label=each.group, color=mpl.colormaps["tab20"](number % 20))
        left.set(xlabel="width of one group, share", ylabel="loss")
        left.set_yscale("symlog", linthresh=1e-3)
        if len(study.sensitivities) <= _LEGEND:
            left.legend(fontsize=6)
        what, *chosen = study.chosen or ("macs",)
        points = study.frontier(what)
        right.plot([cost for cost, _ in points], [loss for _, loss in points], marker="o", label="best splits")
        if chosen:
            right.plot(*[[value] for value in chosen], marker="*", markersize=14, linestyle="", label="the plan")
            right.legend(fontsize=7)
        right.set(xlabel=f"{COSTS[what]}, share", ylabel="expected loss")
    return picture.target


@dataclass(frozen=True)
class _Picture:
    """A figure, and the file that it goes to."""

    target: Path
    figure: Any


@contextmanager
def _picture(path: str | os.PathLike[str], width: float, height: float) -> Iterator[_Picture]:
    """A figure of this size in inches, which is written when it is done."""
    target = check_picture(path, GraphZipError)
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("drawing needs matplotlib: pip install 'graphzip[plot]'") from error
    with mpl.rc_context({"svg.hashsalt": "graphzip", "svg.fonttype": "none"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield _Picture(target, figure)
        with staged(target, GraphZipError) as file:
            figure.savefig(file, format=target.suffix[1:], metadata={"Date": None} if target.suffix == ".svg" else None)


def _draw(axes: Any, graph: GroupGraph, colours: Any) -> None:
    layers = graph.layers
    for number, line in enumerate(graph.lines):
        lane = line.lane
        colour, mark = (_GREY, "X") if line.reason else (colours(number % 20), "o")
        axes.plot([lane, lane], [line.top, line.bottom], color=colour, lw=2, ls=":" if line.reason else "-", zorder=1)
        axes.scatter([lane] * len(line.makers), line.makers, s=34, color=colour, zorder=3, marker=mark)
        readers = [row for row in line.readers if row not in line.makers]
        axes.scatter([lane] * len(readers), readers, s=30, facecolor="white", edgecolor=colour, linewidth=1.5, zorder=2)
        axes.text(lane + 0.14, line.top - 0.22, str(line.size), fontsize=6, color=colour, ha="left", va="center")
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_ylim(len(layers) - 0.4, -0.8)
    axes.set_xlim(-0.6, max(graph.lanes, 1) - 0.2)
    axes.set_xticks([])
    axes.grid(axis="y", color="0.93")
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title("● makes   ○ sums over   ✕ cannot shrink", fontsize=7, loc="left", color="0.4")
