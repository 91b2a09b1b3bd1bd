"""What is noted of a model while its plan is carried out, and the report that comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphzip.analysis.cost import Cost, cost_of
from graphzip.analysis.groups import ChannelGroups
from graphzip.calibration import check_alike, drift
from graphzip.calls import Call, Signature, example_of
from graphzip.graph.copies import eval_copy
from graphzip.graph.randomness import generators_kept, random_nodes
from graphzip.graph.state import bytes_of
from graphzip.graph.traced import Traced
from graphzip.process_groups import ALONE, Processes
from graphzip.progress import counted, step
from graphzip.report.card import Scores
from graphzip.report.group_graph import GroupGraph
from graphzip.report.origin import Origin
from graphzip.report.outcome import Bars, Outcome, Table
from graphzip.report.report import GroupChange, Report, TaskChange
from graphzip.rewrite.join_models import task_of
from graphzip.scores import score_of

__all__ = ["Account", "Moves"]

Evaluate = Callable[[nn.Module], float] | Mapping[str, Callable[[nn.Module], float]]
"""A score of a module, or one of the module of each task."""

_NOT_FINITE = "outputs on the calibration data are not finite, so how far they moved is unknown"
_NO_TENSORS = "outputs on the calibration data are no tensors, so how far they moved is unknown"


@dataclass
class Account:
    """Costs before, and what was said of every pass that was carried out."""

    before: Cost
    before_tasks: dict[str, Cost]
    graph: GroupGraph
    groups: list[GroupChange] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    bars: list[Bars] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    changed: bool = False
    losses: list[str] = field(default_factory=list)
    scores: Scores | None = None
    proven: bool = True  # whether what is lost is known without running the model
    processes: Processes = ALONE

    @classmethod
    def of(cls, traced: Traced, groups: ChannelGroups, processes: Processes = ALONE, *decided: Any) -> Account:
        """Begin with a model to which nothing was done, and its channel groups.

        Raises `ProcessesError` where another of the processes begins with another model, or has `decided` otherwise.
        """
        check_alike(processes, traced, *decided)
        return cls(_cost(traced), _task_costs(traced), GroupGraph.of(groups), processes=processes)

    def add(self, kind: str, outcome: Outcome) -> None:
        """Note what a pass did; its graph is not kept."""
        self.groups += [GroupChange(name, before, now) for name, (before, now) in outcome.widths.items()]
        self.tables += outcome.tables
        self.bars += outcome.bars
        self.passes.append({kind: dict(outcome.details)})
        self.changed |= bool(outcome.changed)
        self.proven &= outcome.proven or not outcome.lossless or not outcome.changed
        if not outcome.lossless:
            self.losses.append(outcome.loss or f"{kind} leaves out some of what the model computes")

    def judge(self, evaluate: Evaluate | None, **states: nn.Module) -> None:
        """Note what the user's scores say of each of these models, in eval mode; nothing where there are none."""
        if evaluate is None:
            return
        for name, module in counted(states.items(), "scoring", states):
            found: Any
            if isinstance(evaluate, Mapping):
                parts = {task: module.get_submodule(task) for task in evaluate}
                found = {task: score_of(evaluate[task], eval_copy(part)) for task, part in parts.items()}
            else:
                found = score_of(evaluate, eval_copy(module))
            found = self.processes.agreed(found)
            self.scores = (self.scores or Scores("score", {})).with_value(name, found)

    def moves(
        self,
        original: nn.Module,
        module: nn.Module,
        data: Mapping[str, Iterable[Any]] | None,
        calls: Mapping[str, Call],
        *,
        trained: bool,
    ) -> Moves:
        """How far outputs moved; without data nothing is run where losses are known and no more come of training."""
        if data is None and self.proven and (self.losses or not trained):
            return Moves(dict.fromkeys(calls, 0.0), False, 0.0)
        return Moves.of(original, module, data, calls, self.processes)

    def report(self, traced: Traced, moves: Moves, origin: Origin) -> Report:
        """The report of a model of which this is the graph and whose outputs moved this far."""
        moved = moves.largest
        finite = moved is not None and math.isfinite(moved)
        unknown = _NO_TENSORS if moved is None else _NOT_FINITE if math.isnan(moved) else None
        told = [] if random_nodes(traced.graph) else moves.losses  # two runs of the original differ, too
        losses = list(dict.fromkeys([*self.losses, *told]))
        return Report(
            before=self.before,
            after=_cost(traced),
            groups=tuple(self.groups),
            changed=self.changed,
            lossless=not losses,
            drift=moved if finite and moves.has_data else None,
            notes=(*traced.notes, unknown) if unknown is not None and moves.has_data else traced.notes,
            passes=tuple(self.passes),
            tasks={
                name: TaskChange(self.before_tasks[name], cost, moves.by_task[name] if moves.has_data else None)
                for name, cost in _task_costs(traced).items()
            },
            tables=tuple(self.tables),
            bars=tuple(self.bars),
            losses=tuple(losses),
            origin=origin,
            graph=self.graph,
            scores=self.scores,
        )


@dataclass(frozen=True)
class Moves:
    """How far the outputs of each task moved, of a single model under an empty name, relative to the largest output:
    on the calibration data where the model `has_data`, else on the example inputs; `None` where no tensors come out.
    `eps` is that of the coarsest type.
    """

    by_task: Mapping[str, float | None]
    has_data: bool
    eps: float

    @classmethod
    def of(
        cls,
        original: nn.Module,
        module: nn.Module,
        data: Mapping[str, Iterable[Any]] | None,
        calls: Mapping[str, Call],
        processes: Processes = ALONE,
    ) -> Moves:
        """Run both models in eval mode; each of the processes on its share of the data."""
        found = {}
        step("comparing outputs with the original's")
        for name, call in calls.items():
            old, new = original.get_submodule(name), module.get_submodule(name)
            batches = [example_of(old, call)] if data is None else data[name]
            with generators_kept():
                found[name] = drift(old, new, batches, Signature.of(old, call), processes)
        kinds = {each.dtype for each in (*original.parameters(), *original.buffers()) if each.is_floating_point()}
        return cls(found, data is not None, max((torch.finfo(kind).eps for kind in kinds), default=0.0))

    @property
    def largest(self) -> float | None:
        """Of all tasks; NaN where one of them is."""
        known = (value for value in self.by_task.values() if value is not None)
        return max(known, key=lambda value: math.inf if math.isnan(value) else value, default=None)

    @property
    def losses(self) -> list[str]:
        """That outputs moved by more than rounding explains; an output that is not finite says nothing."""
        if self.largest is None or not self.largest > math.sqrt(self.eps):
            return []
        where = "calibration data" if self.has_data else "example inputs"
        if math.isinf(self.largest):
            return [f"outputs have other shapes on the {where}"]
        return [f"outputs moved by {self.largest:.2e} of the largest output on the {where}"]


def _task_costs(traced: Traced) -> dict[str, Cost]:
    return {task.name: cost_of(task_of(traced, task.name)) for task in traced.tasks}


def _cost(traced: Traced) -> Cost:
    """Of all models together: what they share counts once among the parameters, and in each model's operations."""
    if not traced.tasks:
        return cost_of(traced)
    params = sum(parameter.numel() for parameter in traced.module.parameters())
    return Cost(params, sum(cost.macs for cost in _task_costs(traced).values()), bytes_of(traced.module))
