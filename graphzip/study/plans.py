"""Plans that meet a budget, of width, or of depth and width.

A residual branch that is left out costs nothing any more, which its widths cannot bring about. For 0, 1, 2, 3, 4, 6, 8,
12, 16, ... branches, those that are missed least first, widths are estimated and carried out on a part of the data, and
the outputs compared with those of the original. The search ends where two numbers in turn are worse than the best one
before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from graphzip.boundary import public
from graphzip.devices import device_of, fitting, moved
from graphzip.errors import PlanError
from graphzip.plan.options import PassOptions
from graphzip.plan.passes import DropBlocks
from graphzip.plan.plan import Plan
from graphzip.process_groups import sharing
from graphzip.progress import Progress, told, unwatched, watched
from graphzip.study.amounts import given
from graphzip.study.budget import WidthStudy
from graphzip.study.measurements import beside_others
from graphzip.study.planned import open_depth, planned_passes
from graphzip.traces import Trace, trace
from graphzip.tracing.results import Outputs
from graphzip_passes.drop_blocks import chosen_blocks

__all__ = ["plan_for"]

logger = logging.getLogger(__name__)

_WORSE: Final = 2  # numbers in a row that end the search


@public
def plan_for(
    model: nn.Module | Trace,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    latency: float | None = None,
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    evaluate_name: str | None = None,
    passes: Sequence[PassOptions] = (),
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    outputs: Outputs | None = None,
    mode: str = "eval",
    effort: str = "normal",
    round_to: int | None = None,
    min_width: int | None = None,
    target: str | None = None,
    uniform: bool = False,
    device: str | torch.device | None = None,
    progress: Progress = None,
) -> Plan:
    """A plan that brings the model within a budget and moves its outputs as little as possible.

    `macs`, `params` and `bytes` (of parameters and buffers) may be given together, and all are met; or `latency` (of
    one sample in onnxruntime here) alone. A float of at most 1 is a share, anything else absolute (a latency in
    milliseconds). The other arguments are those of `WidthStudy`, and `progress` is that of `compile`. Compile the plan
    with the same data.

    A `DropBlocks` without `keep` in front of the other `passes` mixes depth and width: how many residual branches go is
    found, too. That takes as long as plans of the effort "fast" for some numbers of branches, and then one of yours.

    Where the memory is not enough for the batches of `calibration`, the measurements begin anew, as if batches of half
    the size had been given.

    Raises `PlanError` where no budget is given, or one is out of reach: before anything is measured, with what can be
    reached. Other errors are those of `compile`.
    """
    budgets, listed = given(macs=macs, params=params, bytes=bytes, latency=latency), Plan(passes).passes
    place = device_of(device)
    source, inputs = moved(model, example_inputs, place)
    judged: dict[str, Any] = {"evaluate": evaluate, "evaluate_name": evaluate_name, "seed": seed}
    view: dict[str, Any] = {"scope": scope, "dynamic_shapes": dynamic_shapes, "outputs": outputs, "mode": mode}
    rules: dict[str, Any] = {"round_to": round_to, "min_width": min_width, "target": target, "uniform": uniform}

    def measured(data: Iterable[Any] | None) -> Plan:
        with sharing(data).together("plan_for"):
            studied: Callable[..., WidthStudy] = partial(WidthStudy, calibration=data, **judged, **rules)
            return _planned(studied, source, inputs, view, (listed, effort, cache), budgets)

    with watched(progress):
        return fitting(measured, calibration, place)


def _planned(
    studied: Callable[..., WidthStudy],
    model: nn.Module | Trace,
    inputs: Any,
    view: Mapping[str, Any],
    how: tuple[Sequence[PassOptions], str, str | os.PathLike[str] | None],
    budgets: Mapping[str, float],
) -> Plan:
    passes, effort, cache = how
    if (place := open_depth(passes)) is None:
        study = studied(model, inputs, passes=passes, effort=effort, cache=cache, **view)
    else:  # many studies of one model
        known = model if isinstance(model, Trace) else trace(model, inputs, **view)
        studied = partial(studied, known, cache=cache)
        with beside_others():
            chosen, plan = _with_depth(partial(studied, effort="fast"), passes, place, budgets)
            if effort == "fast":
                return plan
            study = studied(passes=chosen, effort=effort)
    study.check(**budgets)
    study.measure()
    return study.plan(**budgets)


def _with_depth(
    studied: Callable[..., WidthStudy], passes: Sequence[PassOptions], place: int, budgets: Mapping[str, float]
) -> tuple[Sequence[PassOptions], Plan]:
    """The passes with the number of residual branches that is best in the one at `place`, and their plan.

    Raises `PlanError` where no budget can be met.
    """
    options, others = passes[place], [*passes[:place], *passes[place + 1 :]]
    assert isinstance(options, DropBlocks)
    planned_passes([*others[:place], DropBlocks(keep=0), *others[place:]], has_data=True)
    whole = studied(passes=others)
    most = len(chosen_blocks(whole.traced, options, f"passes[{place}].{options.kind}"))
    tried = {0: others} | {
        gone: [*others[:place], DropBlocks(keep=most - gone, blocks=options.blocks), *others[place:]]
        for gone in _counts(most)
    }
    losses: dict[int, float] = {}
    plans: dict[int, Plan] = {}
    unmet: PlanError | None = None
    for number, (gone, chosen) in enumerate(tried.items()):
        told(number, len(tried), f"leaving out {gone} of {most} residual blocks")
        with unwatched():
            try:
                study = studied(passes=chosen) if gone else whole
                study.check(**budgets)
            except PlanError as error:  # with fewer branches left it may be met
                unmet = error
                continue
            study.measure()
            plans[gone] = study.plan(**budgets)
            losses[gone] = study.survey.together(study.widths)
        logger.info("without %d of %d residual blocks the outputs move by %.3g", gone, most, losses[gone])
        if _is_over([*losses.values()]):
            break
    if not losses and unmet is not None:
        raise unmet
    best = min(losses, key=lambda gone: losses[gone])
    return tried[best], plans[best]


def _is_over(losses: Sequence[float]) -> bool:
    """Whether the last of them are worse than the best one before."""
    before = losses[:-_WORSE]
    return bool(before) and min(losses[-_WORSE:]) > min(before)


def _counts(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ..., and `most`."""
    count, further = 1, 1
    while count < most:
        yield count
        further = 2 * further if count >= 4 * further else further
        count += further
    yield most
