"""Charts of a report as SVG text: no network, no fonts of their own, colours from the page's style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from graphzip.report.group_graph import GroupGraph

__all__ = ["ChartLine", "groups_charts", "lines_chart", "widths_charts"]

_ROW: Final = 22  # pixels of a bar
_LEFT: Final = 220
_WIDE: Final = 420
_HIGH: Final = 220
_COLOURS: Final = 8  # that the style has
_LANE: Final = 78  # pixels between two lines, if there is room
_PAGE: Final = 40  # rows that are printed on one page


@dataclass(frozen=True)
class ChartLine:
    """One line of a chart; without `joined`, a mark at every point."""

    title: str
    points: tuple[tuple[float, float], ...]
    joined: bool = True


def widths_charts(widths: Sequence[tuple[str, int, int]]) -> list[str]:
    """A bar for each group, its channels before and the part that is left, in parts that fit a page each."""
    most = max((before for _, before, _ in widths), default=1)
    return [_widths_part(widths[first : first + _PAGE], most) for first in range(0, len(widths), _PAGE)]


def _widths_part(widths: Sequence[tuple[str, int, int]], most: int) -> str:
    rows = []
    for number, (name, before, after) in enumerate(widths):
        y, whole, left = number * _ROW, _WIDE * before / most, _WIDE * after / most
        rows.append(
            f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(_short(name))}</text>'
            f'<rect class="before" x="{_LEFT}" y="{y + 4}" width="{whole:.1f}" height="{_ROW - 8}"/>'
            f'<rect class="after" x="{_LEFT}" y="{y + 4}" width="{left:.1f}" height="{_ROW - 8}"/>'
            f'<text x="{_LEFT + whole + 6:.1f}" y="{y + 15}">{before} → {after}</text>'
        )
    return _svg(_LEFT + _WIDE + 110, len(widths) * _ROW + 4, rows, "channels of each group before and after")


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def groups_charts(graph: GroupGraph, after: Mapping[str, int]) -> list[str]:
    """The channel groups of a model as lines along its layers, in parts that fit a page each, from top to bottom.

    `after` has the widths of groups that were narrowed. Where the lanes are few, each line says how wide it is.
    """
    lane = max(_LANE / 5, min(_LANE, 900 / max(graph.lanes, 1)))
    parts = range(0, len(graph.layers), _PAGE)
    return [_groups_part(graph, after, lane, range(first, min(first + _PAGE, len(graph.layers)))) for first in parts]


def _groups_part(graph: GroupGraph, after: Mapping[str, int], lane: float, rows: range) -> str:
    wide = graph.lanes * lane + 40

    def y(row: float) -> float:
        return 18 + (row - rows.start) * _ROW

    parts = [
        f'<line class="frame" x1="{_LEFT}" x2="{_LEFT + wide:.0f}" y1="{y(row):.0f}" y2="{y(row):.0f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(row) + 4:.0f}" text-anchor="end">{escape(_short(graph.layers[row]))}</text>'
        for row in rows
    ]
    for number, line in enumerate(graph.lines):
        if line.bottom < rows.start or line.top >= rows.stop:
            continue
        x, now = _LEFT + 20 + line.lane * lane, after.get(line.name, line.size)
        narrowed = "narrowed " if now < line.size else ""
        colour = "pinned" if line.reason else f"{narrowed}c{number % (_COLOURS - 1)}"
        top, bottom = max(line.top, rows.start - 0.5), min(line.bottom, rows.stop - 0.5)
        width = f"{line.size} → {now}" if narrowed else str(line.size)
        told = f"{line.name}: {width} channels" + (f"; it cannot shrink: {line.reason}" if line.reason else "")
        marks = [f'<circle class="maker" cx="{x:.1f}" cy="{y(row):.0f}" r="5"/>' for row in line.makers if row in rows]
        marks += [
            f'<circle class="reader" cx="{x:.1f}" cy="{y(row):.0f}" r="4"/>'
            for row in line.readers
            if row in rows and row not in line.makers
        ]
        if line.top in rows and lane == _LANE:
            marks.append(f'<text x="{x + 7:.1f}" y="{y(line.top) - 4:.0f}">{width}</text>')
        parts.append(
            f'<g class="group {colour}"><title>{escape(told)}</title>'
            f'<path d="M{x:.1f} {y(top):.0f}V{y(bottom):.0f}"/>{"".join(marks)}</g>'
        )
    title = f"channel groups of the layers from {graph.layers[rows.start]} on"
    return _svg(_LEFT + wide + 40, len(rows) * _ROW + 14, parts, title)


def lines_chart(lines: Sequence[ChartLine], x: str, y: str, *, logarithmic: bool = False) -> str:
    """Lines in one frame, with the range of both axes; `logarithmic` of what is above zero."""
    shown = [
        ChartLine(line.title, kept, line.joined)
        for line in lines
        if (kept := tuple((a, b) for a, b in line.points if math.isfinite(b) and (b > 0 or not logarithmic)))
    ]
    if not shown:
        return ""
    values = [(a, math.log10(b) if logarithmic else b) for line in shown for a, b in line.points]
    xs, ys = [a for a, _ in values], [b for _, b in values]
    low, high = (min(xs), min(ys)), (max(xs), max(ys))
    spans = [above - below or 1.0 for below, above in zip(low, high, strict=True)]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        value = math.log10(point[1]) if logarithmic else point[1]
        return 70 + (point[0] - low[0]) / spans[0] * _WIDE, 10 + (1 - (value - low[1]) / spans[1]) * _HIGH

    parts = [f'<rect class="frame" x="70" y="10" width="{_WIDE}" height="{_HIGH}"/>']
    for number, line in enumerate(shown):
        places = [place(point) for point in line.points]
        colour = f"c{number % _COLOURS}"
        title = f"<title>{escape(line.title)}</title>"
        if line.joined:
            text = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline class="line {colour}" points="{text}">{title}</polyline>')
        else:
            parts += [
                f'<circle class="mark {colour}" cx="{a:.1f}" cy="{b:.1f}" r="7">{title}</circle>' for a, b in places
            ]
    ends = [10**value if logarithmic else value for value in (low[1], high[1])]
    parts += [
        f'<text x="64" y="{10 + _HIGH}" text-anchor="end">{ends[0]:.3g}</text>',
        f'<text x="64" y="20" text-anchor="end">{ends[1]:.3g}</text>',
        f'<text x="70" y="{_HIGH + 28}">{low[0]:.4g}</text>',
        f'<text x="{70 + _WIDE}" y="{_HIGH + 28}" text-anchor="end">{high[0]:.4g}</text>',
        f'<text x="{70 + _WIDE / 2}" y="{_HIGH + 28}" text-anchor="middle">{escape(x)}</text>',
        f'<text x="14" y="{10 + _HIGH / 2}" text-anchor="middle" transform="rotate(-90 14 {10 + _HIGH / 2})">'
        f"{escape(y)}</text>",
    ]
    legend = [
        f'<text class="key c{number % _COLOURS}" x="{_WIDE + 82}" y="{22 + 15 * number}">'
        f"{escape(_short(line.title, 26))}</text>"
        for number, line in enumerate(shown[:14])
    ]
    return _svg(_WIDE + 260, _HIGH + 36, [*parts, *legend], f"{y} over {x}")


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
