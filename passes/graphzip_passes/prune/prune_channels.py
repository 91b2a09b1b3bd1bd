"""Prune channels: of every group those go that a criterion scores lowest, and what reads the group is re-fitted.

Which channels go is decided when the pass is made. With a `strength` they are drawn to zero while the model trains
(`prune.regularizers`). What is left of them is the sum of squared kernel residuals, `phi = sum ||K_j||^2` (Ding et al.,
"Manipulating Identical Filter Redundancy ...", Eq. 22).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from graphzip.analysis.groups import Analysed, ChannelGroup, ChannelGroups
from graphzip.boundary import call_user
from graphzip.errors import PlanError
from graphzip.graph.batches import Given
from graphzip.graph.interpreter import Values
from graphzip.graph.torch_private import foreach_copy_
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.numeric.sharded import local
from graphzip.plan.criteria import CRITERIA
from graphzip.plan.passes import PruneChannels
from graphzip.plan.problems import show
from graphzip.progress import counted
from graphzip.report.outcome import CHANNELS_LOST, Outcome
from graphzip.report.tables import closest
from graphzip.rewrite.layout import Layout
from graphzip.rewrite.merge import drop_channels
from graphzip_passes.base import ByTensor, Constraint, Decision, PassContext, Weights, by_tensor, register_pass
from graphzip_passes.parts.by_tensor import held, refitted, shrunk, streams
from graphzip_passes.parts.compensation import Narrowed, Refit, refit
from graphzip_passes.parts.evidence import Evidence
from graphzip_passes.parts.group_view import GroupView
from graphzip_passes.parts.tied_slices import Place, Rows, rows_of, slices_of
from graphzip_passes.parts.widths import WidthOptions, resolve
from graphzip_passes.prune import criteria  # noqa: F401 (registers those that graphzip brings)
from graphzip_passes.prune.free import compensate_free
from graphzip_passes.prune.ranking import Contest, FloatArray, competing, dropped, normalised, structure
from graphzip_passes.prune.regularizers import attach_growing, scales_of, size_of_scales

__all__ = ["PruneChannelsPass", "prune_channels"]

logger = logging.getLogger(__name__)

_TINY = 1e-12  # keeps the gradient of a norm finite at zero


@register_pass(PruneChannels, decides=True, only_reads=True)
def prune_channels(traced: Traced, options: PruneChannels, context: PassContext) -> Decision:
    """Decide which channels go."""
    pruning = PruneChannelsPass(options, traced, context)
    return Decision(pruning.finish, constraint=pruning)


class PruneChannelsPass(Constraint):
    """`PruneChannels` bound to a model: which channels of each group go is decided here."""

    def __init__(
        self,
        options: PruneChannels,
        traced: Traced,
        context: PassContext,
        *,
        scores: Mapping[str, FloatArray] | None = None,
    ) -> None:
        self.options = options
        self.where = context.where
        self.traced = traced
        known = context.known or Analysed.of(traced)
        self.analysis, self.groups = known.analysis, known.groups
        self.corrected: list[str] = []
        wanted = _widths(options, self.groups, self.where)
        self.scores = _scored(traced, known, list(wanted), options, context) if scores is None else dict(scores)
        counts = self._counts(wanted)
        self.gone: dict[str, tuple[int, ...]] = {
            name: dropped(self.groups[name], self.scores[name], count) for name, count in counts.items()
        }
        for name, gone in self.gone.items():
            logger.info("%s: %d of %d channels go", name, len(gone), self.groups[name].size)
        self._decide()
        self._scales = scales_of([self.groups[name] for name in wanted], traced)
        if options.regularizer == "bn_scale" and options.strength and not self._scales:
            raise PlanError(
                f"{self.where}.regularizer: 'bn_scale': no normalisation with scales acts on the groups that shrink; "
                "use 'lasso'"
            )

    def _counts(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """How many channels each group keeps; not those that keep all."""
        if self.options.ranking == "local":
            return dict(wanted)
        comparable = CRITERIA[self.options.criterion].comparable
        scores = {name: each if comparable else normalised(each) for name, each in self.scores.items()}
        rivals: dict[Hashable, dict[str, int]] = {}
        for name, width in wanted.items():
            alike = structure(self.groups[name], self.traced) if self.options.ranking == "isomorphic" else None
            rivals.setdefault(alike, {})[name] = width
        groups = {name: self.groups[name] for name in wanted}
        counts: dict[str, int] = {}
        for each in rivals.values():
            counts |= competing(groups, Contest(scores, each, self.options.round_to))
        return {name: counts[name] for name in wanted if counts[name] < groups[name].size}

    def _decide(self) -> None:
        singles = {name: tuple((channel,) for channel in gone) for name, gone in self.gone.items()}
        self._slices = slices_of(self.groups, singles, self.traced)

    def finish(self, traced: Traced, context: PassContext) -> Outcome:
        """Drop them, and re-fit what is left as the options say."""
        if self.options.regularizer == "bn_scale" and self.options.strength:
            known = replace(context, known=None)
            return PruneChannelsPass(self.options, traced, known)._finished(traced, context)
        return self._finished(traced, context)

    def _finished(self, traced: Traced, context: PassContext) -> Outcome:
        found = self.narrowed(traced)
        fitted = None
        if self.options.compensate == "data" and self.gone:
            batches = self.batches(context)
            fitted = refit(Values(traced, batches), Values(found.traced, batches), found)
        return self.outcome(found.traced, fitted)

    def batches(self, context: PassContext) -> Given:
        """What the graph is fitted on. Raises `PlanError` where there is nothing."""
        batches = context.graph_inputs()
        if not batches:
            raise PlanError(
                f"{self.where}.compensate: 'data' needs calibration data; pass calibration=, a list of batches, or "
                "use compensate='none'"
            )
        return batches

    def outcome(self, result: Traced, fitted: Refit | None) -> Outcome:
        """What came of it: the slimmer model, and what was fitted in it."""
        details: dict[str, Any] = {"dropped": {name: list(gone) for name, gone in self.gone.items()}}
        if self.options.compensate == "free":
            details["corrected"] = self.corrected
        if fitted is not None:
            details |= {"fitted": list(fitted.fitted), "not_fitted": dict(fitted.left)}
        return Outcome(result, lossless=not self.gone, loss=CHANNELS_LOST, widths=self._widths(), details=details)

    def narrowed(self, traced: Traced) -> Narrowed:
        """The slimmer model before anything is re-fitted; `traced` stays as it is."""
        layout = self.layout()
        slim = drop_channels(traced, layout)
        if self.options.compensate == "free":
            self.corrected = compensate_free(traced, slim, layout)
        return Narrowed(slim, layout, Layout.of(self.analysis, []))

    def layout(self) -> Layout:
        """Where the channels that stay are then."""
        groups = {name: self.groups[name] for name in self.gone}
        drops = [(group.whole_blocks, group.channels, _parts(group, self.gone[name])) for name, group in groups.items()]
        plain = self.options.norms == "plain"
        return Layout.of(self.analysis, drops, drops=True, plain_norms=plain)

    @torch.no_grad()
    def pull_(self, model: nn.Module, fraction: float) -> None:
        for rows, chosen, _ in self._rows(model, kernels=False):
            tensors = rows.tensors()
            values = rows.gather(tensors)
            values[chosen] *= 1.0 - fraction
            foreach_copy_(tensors, rows.parts(values, tensors))

    @torch.no_grad()
    def deviations(self, model: nn.Module) -> dict[str, float]:
        total = np.zeros(len(self.gone))
        for rows, chosen, owner in self._rows(model, kernels=True):
            squares = rows.gather(rows.tensors())[chosen].double().square().sum(1)
            total += rows.by_owner(squares, owner, total.size)
        return dict(zip(self.gone, total.tolist(), strict=True))

    def residual(self, model: nn.Module) -> float:
        return sum(self.deviations(model).values())

    def regularizer(self, model: nn.Module) -> torch.Tensor | None:
        if not self.options.strength or self.options.regularizer == "growing":
            return None
        if self.options.regularizer == "bn_scale":
            return self.options.strength * size_of_scales(self._scales, model)
        terms = []
        for rows, chosen, _ in self._rows(model, kernels=True):
            own = rows.gather([local(place.tensor) for place in rows.places])[chosen]
            terms.append(rows.all_rows((rows.whole_rows(own.square().sum(1)) + _TINY).sqrt().sum()))
        return self.options.strength * torch.stack(terms).sum() if terms else None

    def bind(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, steps: int | None) -> None:
        if self.options.strength and self.options.regularizer == "growing":
            strength, places = self.options.strength, partial(self._places, model)
            attach_growing(optimizer, places, strength=strength, steps=steps, where=self.where)

    def state(self) -> torch.Tensor:
        """One where a channel goes and zero where it stays, group after group."""
        flags = [np.isin(np.arange(self.groups[name].size), gone) for name, gone in self.gone.items()]
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *flags]).astype(np.int64))

    def load_state(self, state: torch.Tensor) -> None:
        parts = torch.split(state.cpu(), [self.groups[name].size for name in self.gone])
        self.gone = {
            name: tuple(np.flatnonzero(part.numpy()).tolist()) for name, part in zip(self.gone, parts, strict=True)
        }
        self._decide()

    def _widths(self) -> dict[str, tuple[int, int]]:
        return {name: (self.groups[name].size, self.groups[name].size - len(gone)) for name, gone in self.gone.items()}

    def _places(self, model: nn.Module) -> list[Place]:
        return [Place.of(model, slices) for slices in self._slices]

    def _rows(self, model: nn.Module, *, kernels: bool) -> list[tuple[Rows, torch.Tensor, IntArray]]:
        """Matrices of slices, the rows of channels that go, and the number of the group of each of those rows."""
        found = []
        for _, rows in rows_of((place, 0) for place in self._places(model) if place.is_kernel or not kernels):
            owner = rows.of_each(lambda each: each.owner)
            chosen = np.flatnonzero(owner >= 0)
            found.append((rows, torch.from_numpy(chosen).to(rows.order.device), owner[chosen]))
        return found


@by_tensor(PruneChannels)
def prune_by_tensor(traced: Traced, options: PruneChannels, context: PassContext, weights: Weights) -> ByTensor:
    """Score a group at a time, drop slices of a parameter at a time, and re-fit a layer at a time.

    Raises `PlanError` for what looks at several layers together.
    """
    if options.compensate == "free":
        raise PlanError(f"{context.where}.compensate: 'free' looks at several layers together; write 'none' or 'data'")
    known = context.known or Analysed.of(traced)
    names = list(_widths(options, known.groups, context.where))
    evidence = _evidence(traced, known, names, options, context)
    evidence.streams = streams(context, weights)
    scores: dict[str, FloatArray] = {}
    groups = sorted(evidence.groups, key=evidence.order_of)
    for group in counted(groups, "scoring", [group.name for group in groups]):
        with held(traced, group, weights):
            scores[group.name] = scores_of(GroupView(group, evidence), options.criterion, evidence.where)
    scores = {name: scores[name] for name in names}
    pruning = PruneChannelsPass(options, traced, replace(context, known=known), scores=scores)
    found, slim = pruning.narrowed(traced), shrunk(pruning.layout(), weights)
    fitted = None
    if options.compensate == "data" and pruning.gone:
        fitted, slim = refitted(traced, found, (weights, slim), context, pruning.batches(context))
    return ByTensor(pruning.outcome(found.traced, fitted), slim)


def _widths(options: PruneChannels, groups: ChannelGroups, where: str) -> dict[str, int]:
    """How many channels each group that shrinks would keep alone."""
    widths = WidthOptions(options.keep, options.exclude, options.round_to)
    return {name: width.count for name, width in resolve(widths, groups, where=where).items()}


def _scored(
    traced: Traced, known: Analysed, names: Sequence[str], options: PruneChannels, context: PassContext
) -> dict[str, FloatArray]:
    """The scores (n,) of these groups."""
    evidence = _evidence(traced, known, names, options, context)
    found = {
        group.name: scores_of(GroupView(group, evidence), options.criterion, evidence.where)
        for group in sorted(evidence.groups, key=evidence.order_of)
    }
    return context.processes.agreed({each: found[each] for each in names})


def _evidence(
    traced: Traced, known: Analysed, names: Sequence[str], options: PruneChannels, context: PassContext
) -> Evidence:
    """What the criterion is given of these groups. Raises `PlanError` where there is no such criterion."""
    name = options.criterion
    if name not in CRITERIA:
        raise PlanError(f"{context.where}.criterion: unknown criterion {name!r}; {closest(name, CRITERIA)}")
    mine = ChannelGroups([known.groups[each] for each in names])
    where = f"{context.where}.criterion: {name!r}"
    return Evidence(traced, known.analysis, mine, context.calibration, context.seed, where)


def scores_of(view: GroupView, criterion: str, where: str) -> FloatArray:
    """What a criterion gives for a group. Raises `PlanError` where it is no finite number for each channel."""
    function = CRITERIA[criterion].function
    found = call_user(function, view)
    try:
        values = torch.as_tensor(found).detach().double().cpu().numpy()
    except (TypeError, ValueError, RuntimeError):
        raise PlanError(f"{where} gave {show(found)} for group {view.name!r}; return {view.size} numbers") from None
    if values.shape != (view.size,):
        raise PlanError(
            f"{where} gave the shape {values.shape} for group {view.name!r}; return a score for each of its "
            f"{view.size} channels, ({view.size},)"
        )
    if not np.isfinite(values).all():
        raise PlanError(f"{where} gave scores that are NaN or infinite for group {view.name!r}; return finite numbers")
    return values


def _parts(group: ChannelGroup, gone: tuple[int, ...]) -> list[list[int]]:
    """A partition in which every channel that goes is behind one of its block that stays."""
    parts = []
    for block in group.blocks:
        stay = [channel for channel in block if channel not in gone]
        parts += [[stay[0], *(channel for channel in block if channel in gone)], *([channel] for channel in stay[1:])]
    return parts
