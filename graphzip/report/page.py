"""A report as a page of HTML that needs nothing else, and as a fragment for notebooks."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, StrictUndefined

from graphzip.report.charts import ChartLine, groups_charts, lines_chart, widths_charts
from graphzip.report.origin import COSTS, Study
from graphzip.report.tables import change, quantity

if TYPE_CHECKING:
    from graphzip.report.report import Report

__all__ = ["fragment_of", "page_of", "study_fragment"]


def page_of(report: Report) -> str:
    """The whole page."""
    return str(_template("page.html.jinja").render(**_contents(report), style=_style()))


def fragment_of(report: Report) -> str:
    """The figures and widths alone, for a notebook."""
    return str(_template("fragment.html.jinja").render(**_contents(report), style=_style()))


@cache
def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _template(name: str) -> Any:
    return _environment().from_string(files(__package__).joinpath(name).read_text(encoding="utf-8"))


@cache
def _style() -> str:
    return files(__package__).joinpath("page.css").read_text(encoding="utf-8")


def _contents(report: Report) -> dict[str, Any]:
    origin, study = report.origin, report.study
    after = {each.name: each.after for each in report.groups}
    return {
        "report": report,
        "figures": report.card.rows(report.scores) if report.card is not None else _counted(report),
        "machine": report.card.machine if report.card is not None else "",
        "measuring": report.card.notes if report.card is not None else (),
        "widths": widths_charts([(each.name, each.before, each.after) for each in report.groups]),
        "graph": [] if report.graph is None else groups_charts(report.graph, after),
        "sensitivities": "" if study is None else _sensitivities(study),
        "frontier": "" if study is None else _frontier(study),
        "curves": [] if origin is None else [(each.title, _curve(each.title, each.points)) for each in origin.curves],
        "plan": "" if origin is None else yaml.safe_dump(origin.plan, sort_keys=False, allow_unicode=True).rstrip(),
    }


def _counted(report: Report) -> list[tuple[str, ...]]:
    """Without a card: what is counted, and scores."""
    before, after, scores = report.before, report.after, report.scores
    rows: list[tuple[str, ...]] = [("", "before", "after", "change")]
    for what, old, new in (("parameters", before.params, after.params), ("MACs per sample", before.macs, after.macs)):
        rows.append((what, quantity(old), quantity(new), change(old, new)))
    for each in [] if scores is None else scores.each():
        first = next(iter(each.values))
        rows += [
            (f"{each.title}, {name}", each.text(first), each.text(name), each.gain(name))
            for name in each.values
            if name != first
        ]
    return rows


def study_fragment(study: Study) -> str:
    """Both charts of a study, for a notebook."""
    return f'<style>{_style()}</style><div class="graphzip">{_sensitivities(study)}{_frontier(study)}</div>'


def _sensitivities(study: Study) -> str:
    lines = [
        ChartLine(group, tuple(sorted([(1.0, 0.0), *((width / size, loss) for width, loss in points)])))
        for group, size, points in study.sensitivities
    ]
    return lines_chart(lines, "width of one group, share", "how far outputs move")


def _frontier(study: Study) -> str:
    lines = [ChartLine("best splits", study.frontier)]
    lines += [] if study.chosen is None else [ChartLine("the plan", (study.chosen,), joined=False)]
    return lines_chart(lines, f"{COSTS.get(study.what, study.what)}, share", "expected loss")


def _curve(title: str, points: tuple[tuple[int, float], ...]) -> str:
    return lines_chart([ChartLine(title, points)], "optimizer step", title, logarithmic=title != "loss")
