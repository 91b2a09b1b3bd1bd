"""Passes of a plan in front of the one whose widths are found: these are of what they leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphzip.analysis.groups import Analysed
from graphzip.api import compile
from graphzip.compiled import Compiled
from graphzip.graph.traced import Traced
from graphzip.plan.options import PassOptions
from graphzip.plan.passes import DropBlocks
from graphzip.plan.plan import Plan
from graphzip.study.cost_model import Prices, prices_of
from graphzip.traces import Trace
from graphzip_passes.parts.widths import matches

__all__ = ["Begun", "begun"]


@dataclass(frozen=True)
class Begun:
    """What `passes` made of a model: `compiled`, where there were any, with the `prices` of before. `original` is the
    graph of before, and `known` the analysis of the graph of after.
    """

    passes: tuple[PassOptions, ...]
    compiled: Compiled | None
    original: Traced
    prices: Prices | None
    known: Analysed

    @property
    def traced(self) -> Traced:
        """The graph that widths are found for."""
        return self.original if self.compiled is None else self.compiled.traced


def begun(
    passes: Sequence[PassOptions],
    source: nn.Module | Trace,
    original: Traced,
    known: Analysed,
    options: Mapping[str, Any],
) -> Begun:
    """Carry out `passes` of a model whose graph is `original`; `options` are those of `compile`."""
    if not passes:
        return Begun((), None, original, None, known)
    compiled = compile(source, Plan(passes), **options)
    told = zip(passes, compiled.report.passes, strict=True)
    done = tuple(_as_done(each, details[each.kind]) for each, details in told)
    return Begun(done, compiled, original, prices_of(original, known.analysis, []), Analysed.of(compiled.traced))


def _as_done(options: PassOptions, details: Mapping[str, Any]) -> PassOptions:
    """What leads to the same, whatever data it is carried out with: groups are called by what is there."""
    if not isinstance(options, DropBlocks):
        return options
    dropped, kept = details["dropped"], details["kept"]
    alike = any(matches(glob, name) for glob in dropped for name in kept)
    return options if alike or not dropped else DropBlocks(keep=0, blocks=tuple(dropped))
