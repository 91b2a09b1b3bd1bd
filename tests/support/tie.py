"""The smallest pass that joins models: they share one convolution."""

from __future__ import annotations

from typing import ClassVar

from graphzip.canonical.canonicalize import fetch_once
from graphzip.graph.state import attach, find_aliases, named_state
from graphzip.graph.traced import Traced
from graphzip.plan.options import PassOptions
from graphzip.report.outcome import Outcome
from graphzip_passes.base import PassContext

__all__ = ["Tie", "tie"]


class Tie(PassOptions):
    """Let the tasks share the convolution `conv`, as the first task has it."""

    kind: ClassVar[str] = "tie"
    joins: ClassVar[bool] = True


def tie(traced: Traced, options: Tie, context: PassContext) -> Outcome:
    result = traced.copy()
    state = dict(named_state(result.module))
    for task in result.tasks[1:]:
        for leaf in ("weight", "bias"):
            attach(result.module, f"{task.name}.conv.{leaf}", state[f"{result.tasks[0].name}.conv.{leaf}"])
    result.aliases = find_aliases(result.module)
    fetch_once(result.graph, result.aliases)
    result.module.recompile()
    return Outcome(result, changed=True, details={"layers": ["conv"]})
