"""Measure what narrowing each group does to the outputs, then split budgets over them."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from graphzip.analysis.groups import Analysed
from graphzip.arguments import check_callable, check_name, check_seed, check_traceable, whole
from graphzip.boundary import call_user, public
from graphzip.calibration import Calibration, Trained, check_alike, check_calibration, with_submodule
from graphzip.calls import Signature, call_of, example_of
from graphzip.devices import device_of, moved, on_device
from graphzip.errors import PlanError
from graphzip.files import check_target
from graphzip.graph.batches import leading
from graphzip.graph.copies import share_copy
from graphzip.graph.traced import Traced
from graphzip.plan.criteria import CRITERIA
from graphzip.plan.options import PassOptions
from graphzip.plan.passes import ClusterMerge
from graphzip.plan.plan import Plan
from graphzip.process_groups import sharing
from graphzip.progress import Progress, step, watched
from graphzip.report.origin import Study
from graphzip.report.page import study_fragment
from graphzip.report.tables import preformatted
from graphzip.rewrite.join_modes import trace_in
from graphzip.study.allocation import Budget, Curve, cheapest
from graphzip.study.amounts import LATENCY, absolute, checked, shown
from graphzip.study.config_widths import sayable
from graphzip.study.correction import corrected
from graphzip.study.cost_model import Price
from graphzip.study.earlier import begun
from graphzip.study.laboratory import CONSTANTS
from graphzip.study.latency import Stopwatch
from graphzip.study.measurements import Measurements, identity, key_of
from graphzip.study.planned import planned_passes
from graphzip.study.sensitivities import CHECKS, EFFORTS, Sensitivity, Subject, Survey, measured_on
from graphzip.study.units import Units, ranked_layers
from graphzip.study.widths import WidthRules
from graphzip.traces import Trace, of_trace
from graphzip.tracing.results import Outputs
from graphzip.version import __version__
from graphzip_passes.base import PassContext
from graphzip_passes.cluster_merge.cluster_merge import Known
from graphzip_passes.parts.clustering import BUILT_IN, clustering_of

__all__ = ["Sensitivity", "WidthStudy"]

logger = logging.getLogger(__name__)

R = TypeVar("R")


def _together(method: Callable[..., R]) -> Callable[..., R]:
    """Decorator of what is done in all processes that have a share of the data."""

    @functools.wraps(method)
    def done(self: WidthStudy, *args: Any, **options: Any) -> R:
        with self.processes.together(method.__name__):
            return method(self, *args, **options)

    return done


class WidthStudy:
    """What `plan_for` does, step by step: `check` a budget, `measure` the sensitivities once, make any number of plans.

    `calibration` is as for `compile`; plans then ask for reconstruction and compensation. Without it, the example
    inputs take its place and plans need no data. `evaluate` takes a module in eval mode and returns a score, the higher
    the better; with it, widths are judged by the score instead of by the outputs. `passes` are the plan's; the first
    `ClusterMerge` or `PruneChannels` of them gets its `keep` here, and a `LowRank` without `rank` and `energy` its
    `rank`. With both a layer is narrowed, thinned, both or neither; as good as widths or ranks alone on that part of
    the data on which splits of the budget are tried. Passes in front of these are carried out first: widths are found
    for what they leave, and budgets are shares of the original.

    `scope`, `dynamic_shapes`, `outputs` and `mode` are those of `compile`, or a `Trace` has them. The budget is the
    scope's, and its outputs count; with the mode "train" those of both forms, and the cost of the eval form.

    `effort` is what finding the widths may cost: it grows with the depth of the network for `"normal"`, with its square
    for `"thorough"`, which measures every group at five widths. Both try some ways to split the budget on a part of the
    data; `"fast"` estimates alone. `cache` names a file to go on from where a run was stopped. What it keeps counts for
    the same model, weights, data, options and version alone, and for the same `evaluate`: that is told by its code and
    all that it reads, or by `evaluate_name`, a name of yours, where that cannot be told (a name that stays means a
    score that stays).

    Widths are multiples of `round_to` channels, or of what a `target` computes at once: `"onnxruntime-cpu"` and
    `"tensorrt"` (8), `"arm"` (4); where blocks such as heads keep the same number, so is that of each. No group that
    shrinks keeps less than `min_width`; groups that have no such width stay whole, which is said in the log. With
    `uniform` groups of the same kind keep the same number, for formats that have one number for all layers: groups of
    one size whose tensors have names that differ in numbers alone (`layers.3.mlp.fc1.weight`). Of a model of
    `transformers` those shrink then whose widths its config can say, so that `save_pretrained` takes the result.
    Stacked experts keep multiples of 16 bytes then, 4 channels of float32, for PyTorch's `grouped_mm` takes no others.

    With a `device` a copy of the model is measured there, on batches that are moved there, and `evaluate` is given it.
    """

    sensitivities: tuple[Sensitivity, ...] = ()
    """What `measure` found."""

    chosen: tuple[str, float, float] | None = None
    """What `plan` chose: what the budget was of, the cost, a share of the original's, and the loss that is expected."""

    widths: Mapping[str, int] = MappingProxyType({})
    """What `plan` left of groups and layers, by name."""

    @public
    def __init__(
        self,
        model: nn.Module | Trace,
        example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
        *,
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
    ) -> None:
        model, example_inputs = moved(model, example_inputs, place := device_of(device))
        calibration = on_device(calibration, place)
        view: dict[str, Any] = {"scope": scope, "dynamic_shapes": dynamic_shapes, "outputs": outputs}
        given = of_trace(model, example_inputs=example_inputs, mode=mode, **view)
        source: Any = model if given is None else given.model
        check_traceable(source)
        call = call_of(source, example_inputs) if given is None else given.call
        signature = Signature.of(source, call)
        check_seed(seed)
        check_callable(evaluate, "evaluate", "evaluate(module), which gives a score")
        if effort not in EFFORTS:
            raise PlanError(f"effort={effort!r} is none of {', '.join(map(repr, EFFORTS))}")
        if evaluate_name is not None:
            check_name(evaluate_name, "evaluate_name")
        self.processes = sharing(calibration)
        if cache is not None and self.processes.rank == 0:
            check_target(cache, PlanError)
        self.model, self.example_inputs, self.seed = source, example_of(source, call), seed
        self.evaluate, self.effort, self.has_data = evaluate, effort, calibration is not None
        self.passes, self.options, self.low_rank = planned_passes(passes, has_data=self.has_data)
        rules = {"round_to": round_to, "min_width": min_width, "target": target, "uniform": uniform}
        self.rules = WidthRules.of(self.options, **rules)
        with torch.inference_mode(False), self.processes.together("WidthStudy"):
            check_calibration(calibration, source, signature, self.processes)
            whole = share_copy(source)
            if given is not None:
                traced, known = given.for_copy(whole, borrowed=True)
            else:
                step(f"tracing {type(source).__name__}")
                traced = trace_in(mode, whole, call, **view)
                known = Analysed.of(traced)
            told = [each.to_dict() for each in self.passes], seed, effort, rules
            check_alike(self.processes, traced, *told)
            self._begin(given, traced, known, {"calibration": calibration, "seed": seed}, {**view, "mode": mode})
            self._feed([self.example_inputs] if calibration is None else calibration, signature, whole)
            self._look(cache, evaluate_name, given or source, {**view, "mode": mode})
        self.sensitivities: tuple[Sensitivity, ...] = ()

    def _begin(
        self, given: Trace | None, traced: Traced, known: Analysed, data: Mapping[str, Any], view: Mapping[str, Any]
    ) -> None:
        """Carry out the passes in front of those whose widths and ranks are found."""
        first = min(self.passes.index(each) for each in (self.options, self.low_rank) if each is not None)
        own: dict[str, Any] = {} if given is not None else {"example_inputs": self.example_inputs, **view}
        self.begun = begun(self.passes[:first], given or self.model, traced, known, {**data, **own})
        self.passes[:first] = self.begun.passes
        self.traced, self.analysis, self.groups = self.begun.traced, self.begun.known.analysis, self.begun.known.groups

    def _look(
        self,
        cache: str | os.PathLike[str] | None,
        evaluate_name: str | None,
        source: nn.Module | Trace,
        view: Mapping[str, Any],
    ) -> None:
        """See what may shrink, and what was measured of it before."""
        batches = leading(self.batches, measured_on(self.effort, self.batches))
        layers = ranked_layers(self.traced, self.low_rank, self.rules, batches, self._where(self.low_rank))
        parts = self.traced, self.begun.known, self.options, layers, self.rules
        self.units = Units(*parts)
        if self.rules.uniform:
            own = {**view, "example_inputs": self.example_inputs}
            said = sayable(self.units, self.options, self.begun, source, own)
            self.units = self.units if said is None else Units(*parts, by_number=said)
        self.choices, self.prices, self.kinds = self.units.choices, self.units.prices, self.units.kinds
        key = None if cache is None else self._key(evaluate_name)
        self.cache = None if cache is None or key is None else Measurements(cache, key, self.processes)

    def _feed(self, data: Iterable[Any], signature: Signature, whole: nn.Module) -> None:
        """Read what layers are fitted and outputs judged on; passes are told of it where it is the user's data."""
        trained = Trained(whole if self.begun.compiled is None else self.begun.compiled.module, self.traced)
        fed = Calibration({"": data}, {"": signature}, trained, processes=self.processes)
        self.batches = fed.graph_inputs()
        where = self._where(self.options or self.low_rank)
        self.context = PassContext(where, self.seed, trained, fed if self.has_data else None, self.begun.known)

    def _where(self, options: PassOptions | None) -> str:
        """The path of one of the passes in the plan."""
        return "" if options is None else f"passes[{self.passes.index(options)}].{options.kind}"

    @public
    @_together
    def check(self, **budget: float) -> None:
        """Raises `PlanError` unless budgets are given and each of them can be met."""
        for what, amount in checked(budget).items():
            if what == LATENCY:
                whole, least = self.stopwatch.whole, self.stopwatch.milliseconds(self.stopwatch.least())
            else:
                price, whole = self._price(what), self._whole(what)
                least = price.at(cheapest([*self.choices.values()], price).astype(np.float64))
            if absolute(amount, whole) < least:
                raise PlanError(
                    f"{what}: {shown(amount, what)} is out of reach; with every {self.units.smallest} the model "
                    f"keeps {shown(least, what)} of {shown(whole, what)} ({least / whole:.3g} of the original). Ask "
                    "for that much, or let more groups shrink"
                )

    @public
    @_together
    @torch.no_grad()
    def measure(self, progress: Progress = None) -> tuple[Sensitivity, ...]:
        """How far the outputs move when each group alone is narrowed; nothing is measured twice."""
        with watched(progress):
            self.sensitivities = self.survey.run()
        return self.sensitivities

    @public
    @_together
    @torch.no_grad()
    def plan(self, progress: Progress = None, /, **budget: float) -> Plan:
        """The plan for a budget, or for several that are to be met; `measure` comes first.

        Some ways to split it are tried, unless the effort is "fast" or a latency is asked for; `progress` is told.
        """
        amounts = checked(budget)
        with watched(progress):
            self.widths = self._found(amounts)
        return self._plan_of(self.widths, timed=LATENCY in amounts)

    def _found(self, amounts: Mapping[str, float]) -> dict[str, int]:
        """The widths and ranks for budgets. Raises `PlanError` where there are none."""
        curves = self._curves()
        if LATENCY in amounts:
            return self.stopwatch.found(curves, amounts[LATENCY])
        limits = [Budget(self._price(what), absolute(amount, self._whole(what))) for what, amount in amounts.items()]
        found = [self._split(each, limits) for each in self.units.alone(curves)]
        splits = [gone for gone in found if gone is not None]
        if not splits:
            raise PlanError(f"{', '.join(amounts)}: out of reach; call check() to see what can be reached")
        gone = splits[0]
        if len(splits) > 1:
            gone = min(splits, key=lambda each: self.survey.together(self.units.widths(each)))
        self.chosen = self._point(next(iter(amounts)), curves, gone)
        return self.units.widths(gone)

    def _split(self, curves: Sequence[Curve], limits: Sequence[Budget]) -> NDArray[np.int64] | None:
        return corrected(
            curves,
            lambda bent: self.kinds.allocate(bent, limits),
            lambda tried, number: self.survey.together(self.units.widths(tried), number),
            most=CHECKS[self.effort],
            order=self.units.order,
        )

    @public
    def frontier(self, what: str = "macs", steps: int = 12) -> list[tuple[float, float]]:
        """Pairs of a cost (a share of the original's `what`: macs, params, bytes) and the sum of losses expected there,
        `steps` of them.
        """
        price, found = self._price(what), []
        whole(steps, "steps", least=2, most=10_000)
        curves = self._curves()
        for fraction in np.linspace(0.1, 1.0, steps):
            gone = self.kinds.allocate(curves, [Budget(price, fraction * self._whole(what))])
            if gone is not None:
                found.append(self._point(what, curves, gone)[1:])
        return found

    def _point(self, what: str, curves: Sequence[Curve], gone: NDArray[np.int64]) -> tuple[str, float, float]:
        """Of a split: its cost, a share of the original's, and the sum of losses that is expected there."""
        price = self._price(what)
        each = (float(np.interp(count, curve.gone, curve.loss)) for count, curve in zip(gone, curves, strict=True))
        return what, float(price.at(gone.astype(np.float64)) / self._whole(what)), sum(each)

    # ------------------------------------------------------------------------------------------------- widths

    @public
    def summary(self, what: str = "macs") -> Study:
        """What was measured, for a report: how far each group alone moves the outputs, and the frontier along a cost.

        After `plan` the frontier is along the cost that the budget was of, and the point that was chosen is marked.
        """
        what = self.chosen[0] if self.chosen is not None else what
        return Study(
            tuple((each.group, each.size, tuple(each.points)) for each in self.sensitivities),
            what,
            tuple(self.frontier(what)),
            None if self.chosen is None else self.chosen[1:],
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: sensitivities and frontier, once they are measured."""
        return study_fragment(self.summary()) if self.sensitivities else preformatted(repr(self))

    def _curves(self) -> list[Curve]:
        if not self.sensitivities:
            raise PlanError("nothing is measured yet; call measure() before plan() and frontier()")
        return [
            Curve.through(
                self.choices[each.group], [(self.units.size(each.group) - width, loss) for width, loss in each.points]
            )
            for each in self.sensitivities
        ]

    def _price(self, what: str) -> Price:
        if what not in ("macs", "params", "bytes"):
            raise PlanError(f"{what!r} has no price; ask for macs, params or bytes")
        price: Price = getattr(self.prices, what)
        return price

    def _whole(self, what: str) -> float:
        """What the original costs."""
        price: Price = getattr(self.begun.prices or self.prices, what)
        return price.whole

    def _plan_of(self, widths: Mapping[str, int], *, timed: bool = False) -> Plan:
        inputs: Any = () if isinstance(self.example_inputs, Mapping) else self.example_inputs
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        plain = all(value.is_floating_point() for value in tensors)  # a plan holds shapes, and no tokens
        shapes = [tuple(value.shape) for value in tensors] if plain else []
        found: dict[int, PassOptions] = (
            {} if self.options is None else {id(self.options): self.units.narrowed(self.options, widths)}
        )
        if self.low_rank is not None:
            found[id(self.low_rank)] = self.units.thinned(self.low_rank, widths).model_copy(
                update={"timed": True} if timed else {}
            )
        return Plan([found.get(id(options), options) for options in self.passes], inputs=shapes or None)

    # ------------------------------------------------------------------------------------------------- bookkeeping

    @cached_property
    def survey(self) -> Survey:
        """Measures, and keeps what it needs for that."""
        return Survey(self.subject, self.effort, self.cache)

    @property
    def subject(self) -> Subject:
        """What is measured."""
        return Subject(
            self.traced,
            self.begun.original,
            self.analysis,
            self.groups,
            self.choices,
            self.options,
            self.low_rank,
            self.units.layers,
            self.context,
            self.batches,
            self._judge if self.evaluate is not None else None,
            self.seed,
        )

    def _judge(self, module: nn.Module) -> float:
        """The user's score of the model with this module in its scope."""
        assert self.evaluate is not None
        scope = self.traced.scope
        return call_user(self.evaluate, with_submodule(self.model, scope, module).eval() if scope else module)

    @cached_property
    def stopwatch(self) -> Stopwatch:
        """Measures how long the model takes."""
        known = Known(self.analysis, self.groups, {}, {})
        path = None if self.cache is None else self.cache.path
        return Stopwatch(self.units, self.options, self.low_rank, known, self.processes, self.begun.original, path)

    def _key(self, evaluate_name: str | None) -> str | None:
        """What the measurements of this study are kept under; nothing where it cannot be told from another one."""
        called: dict[str, Any] = {"evaluate": self.evaluate}
        if isinstance(self.options, ClusterMerge):
            clustering = self.options.clustering
            called["clustering"] = None if clustering in BUILT_IN else clustering_of(clustering)
        elif self.options is not None:
            criterion = CRITERIA.get(self.options.criterion)
            called["criterion"] = None if criterion is None or criterion.built_in else criterion.function
        told = {}
        for what, function in called.items():
            if what == "evaluate" and evaluate_name is not None:
                told[what] = f"name {evaluate_name}"
            elif function is not None:
                try:
                    told[what] = f"code {identity(function)}"
                except ValueError as error:
                    logger.warning(
                        "measurements are not kept: the %s function holds %s, which cannot be told from another; "
                        "give evaluate_name= a name for what evaluate computes",
                        what,
                        error,
                    )
                    return None
        options = None if self.options is None else self.options.model_copy(update={"keep": 1.0}).to_dict()
        low_rank = None if self.low_rank is None else [self.low_rank.to_dict(), *(map(str, self.units.layers))]
        earlier = [options.to_dict() for options in self.begun.passes]
        constants = [*CONSTANTS, measured_on(self.effort, self.batches), *earlier]
        versions = [__version__, torch.__version__]
        return key_of(self.traced, self.batches, options, low_rank, self.seed, self.has_data, constants, versions, told)
