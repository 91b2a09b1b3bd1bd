"""Plans that meet a budget: measure what narrowing each group does to the outputs, then split the budget over them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from graphzip.allocation import Curve, allocate
from graphzip.analysis.channels import analyse
from graphzip.analysis.groups import ChannelGroup, channel_groups_of
from graphzip.analysis.price import Price, prices_of
from graphzip.arguments import check_callable, check_examples, check_name, check_seed, check_traceable, whole
from graphzip.calibration import check_calibration
from graphzip.errors import PlanError, WeightsError
from graphzip.export.measure import latency_of
from graphzip.files import check_target
from graphzip.graph.batches import batch_arguments, check_batches, each_batch
from graphzip.graph.copies import share_copy
from graphzip.graph.modules import to_module
from graphzip.graph.torch_private import pytree
from graphzip.graph.trace import Traced
from graphzip.graph.values import Values
from graphzip.guard import call_user, public
from graphzip.measurements import Measurements, identity, key_of
from graphzip.numeric import all_finite
from graphzip.plan import RECONSTRUCTION, ClusterMerge, PassOptions, Plan
from graphzip.plan_checks import show
from graphzip.rewrite.forms import trace_in
from graphzip.version import __version__
from graphzip_passes.cluster_merge import ClusterMergePass, Known, known_of
from graphzip_passes.clustering import BUILT_IN, clustering_of
from graphzip_passes.layer_rows import layers_of
from graphzip_passes.refit import Effort, refit
from graphzip_passes.widths import resolve

__all__ = ["Sensitivity", "WidthStudy", "plan_for"]

logger = logging.getLogger(__name__)

_BUDGETS: Final = ("macs", "params", "bytes", "latency")

_SHARES: Final = (0.75, 0.5, 0.25, 0.125)
"""Widths that a group is measured at, and its smallest one; in between, losses lie on straight lines."""

_SAMPLES: Final = 384  # of the calibration data, for a measurement; a plan is carried out with all of it
_FITTED: Final = 0.7  # of these for fits; outputs are judged on the others
_FOLLOWING: Final = 8  # layers that are fitted from the first on that reads a group, for a measurement
_QUICK: Final = Effort(rows=1 << 14, rounds=1)
_TRIES: Final = 8  # bisections of a latency
_WORST: Final = 1e12  # a loss that no plan would take

Progress = Callable[[int, int, str], object]
"""`(done, all, what is next)`."""


@dataclass(frozen=True)
class Sensitivity:
    """How far the outputs move when one group alone is narrowed.

    `points` are pairs of a width and a loss: the mean square of the change of the outputs relative to their variance,
    or what `evaluate` loses.
    """

    group: str
    size: int
    points: tuple[tuple[int, float], ...]


@public
def plan_for(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
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
    mode: str = "eval",
    progress: Progress | None = None,
) -> Plan:
    """A plan that brings the model within a budget and moves its outputs as little as possible.

    One of `macs`, `params`, `bytes` (of parameters and buffers) and `latency` (of one sample in onnxruntime on this
    machine) is given: a float of at most 1 is a share of the original's, anything else absolute (milliseconds for a
    latency). `calibration` is as for `compile`; the plan then asks for reconstruction and compensation, so compile it
    with the same data. Without it, the example inputs take its place and the plan needs no data. `evaluate` takes a
    module in eval mode and returns a score, the higher the better; with it, widths are judged by the score instead of
    by the outputs. `passes` are the plan's passes, the first `ClusterMerge` of which gets its `keep` here; its other
    options hold.

    `mode` is that of `compile`: with "train" the plan is for both forms of the model, the outputs of both count, and
    multiply-accumulates and latency are those of the eval form.

    `cache` is a file that keeps measurements, so that a stopped run goes on where it was. What is kept counts for the
    same model, weights, data, options and version alone, and for the same `evaluate`: that is told by its code and all
    that it reads, or by `evaluate_name`, a name of yours, where that cannot be told (a name that stays means a score
    that stays).

    Raises `PlanError` where no budget or several are given, or the budget is out of reach, before anything is measured:
    the message says what can be reached. Raises `TraceError` and `ExampleInputError` as `compile` does.
    """
    budget = {"macs": macs, "params": params, "bytes": bytes, "latency": latency}
    given = {what: amount for what, amount in budget.items() if amount is not None}
    _one(given)
    check_callable(progress, "progress", "progress(done, all, what)")
    study = WidthStudy(
        model,
        example_inputs,
        calibration=calibration,
        evaluate=evaluate,
        evaluate_name=evaluate_name,
        passes=passes,
        cache=cache,
        seed=seed,
        mode=mode,
    )
    study.check(**given)
    study.measure(progress)
    return study.plan(**given)


class WidthStudy:
    """What `plan_for` does, step by step: `check` a budget, `measure` the sensitivities once, make any number of plans.

    The arguments are those of `plan_for`.
    """

    @public
    def __init__(
        self,
        model: nn.Module,
        example_inputs: tuple[Any, ...],
        *,
        calibration: Iterable[Any] | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        evaluate_name: str | None = None,
        passes: Sequence[PassOptions] = (),
        cache: str | os.PathLike[str] | None = None,
        seed: int = 0,
        mode: str = "eval",
    ) -> None:
        check_traceable(model)
        check_examples(example_inputs)
        check_seed(seed)
        check_callable(evaluate, "evaluate", "evaluate(module), which gives a score")
        if evaluate_name is not None:
            check_name(evaluate_name, "evaluate_name")
        if cache is not None:
            check_target(cache, PlanError)
        check_calibration(calibration, model, len(example_inputs))
        self.model, self.example_inputs, self.seed = model, example_inputs, seed
        self.evaluate = evaluate
        self.has_data = calibration is not None
        self.passes, self.options = _passes_of(passes, has_data=self.has_data)
        with torch.inference_mode(False):
            self.traced = trace_in(mode, share_copy(model), example_inputs)
            self.analysis = analyse(self.traced.graph)
            self.groups = channel_groups_of(self.traced, self.analysis)
        self.batches = _leaves(calibration if calibration is not None else [example_inputs], len(example_inputs))
        check_batches(self.traced.inputs, self.batches)
        self.choices = self._choices()
        self.prices = prices_of(self.traced, self.analysis, [self.groups[name] for name in self.choices])
        key = None if cache is None else self._key(evaluate_name)
        self.cache = None if cache is None or key is None else Measurements(cache, key)
        self.sensitivities: tuple[Sensitivity, ...] = ()

    @public
    def check(self, **budget: float) -> None:
        """Raises `PlanError` unless exactly one budget is given and it can be met."""
        what, amount = _one(budget)
        if what == "latency":
            whole, least = self._latency({}), self._latency(self._narrowest())
        else:
            price = self._price(what)
            gone = np.array([choice[-1] for choice in self.choices.values()], dtype=np.float64)
            whole, least = price.whole, price.at(gone)
        if _absolute(amount, whole) < least:
            raise PlanError(
                f"{what}: {_shown(amount, what)} is out of reach; with every group at its smallest width the model "
                f"keeps {_shown(least, what)} of {_shown(whole, what)} ({least / whole:.3g} of the original). Ask for "
                "that much, or let more groups shrink"
            )

    @public
    @torch.no_grad()
    def measure(self, progress: Progress | None = None) -> tuple[Sensitivity, ...]:
        """Narrow every group alone to some widths and see what that does; nothing is measured twice."""
        wanted = [(name, width) for name in self.choices for width in self._measured_widths(name)]
        missing = [key for key in wanted if self.cache is None or self.cache.get(*key) is None]
        lab = _Laboratory(self) if missing else None
        found: dict[tuple[str, int], float] = {}
        for number, (name, width) in enumerate(wanted):
            loss = None if self.cache is None else self.cache.get(name, width)
            if loss is None:
                if progress is not None:
                    call_user(progress, number, len(wanted), f"{name}: {width} channels")
                assert lab is not None
                loss = lab.loss(name, width)
                logger.info("%s: %d of %d channels move the outputs by %.3g", name, width, self.groups[name].size, loss)
                if self.cache is not None:
                    self.cache.put(name, width, loss)
            found[name, width] = loss
        if progress is not None:
            call_user(progress, len(wanted), len(wanted), "")
        self.sensitivities = tuple(
            Sensitivity(
                name,
                self.groups[name].size,
                tuple((width, found[name, width]) for width in self._measured_widths(name)),
            )
            for name in self.choices
        )
        return self.sensitivities

    @public
    def plan(self, **budget: float) -> Plan:
        """The plan for a budget; `measure` comes first."""
        what, amount = _one(budget)
        if what == "latency":
            return self._plan_of(self._for_latency(amount))
        price = self._price(what)
        return self._plan_of(self._allocated(price, _absolute(amount, price.whole), what))

    @public
    def frontier(self, what: str = "macs", steps: int = 12) -> list[tuple[float, float]]:
        """Pairs of a cost (a share of the original's) and the sum of losses that is expected there."""
        price, found = self._price(what), []
        whole(steps, "steps", least=2, most=10_000)
        curves = self._curves()
        for share in np.linspace(0.1, 1.0, steps):
            gone = allocate(curves, price, share * price.whole)
            if gone is not None:
                loss = sum(
                    float(np.interp(count, curve.gone, curve.loss)) for count, curve in zip(gone, curves, strict=True)
                )
                found.append((price.at(gone.astype(np.float64)) / price.whole, loss))
        return found

    # ------------------------------------------------------------------------------------------------- widths

    def _choices(self) -> dict[str, tuple[int, ...]]:
        """How many channels may go of each group that may shrink: 0 first, ascending."""
        everything = resolve(self.options.model_copy(update={"keep": 1e-9, "round_to": 1}), self.groups)
        found = {}
        for name in everything:
            group = self.groups[name]
            if group.whole_blocks:
                continue
            step = len(group.blocks) * _step(self.options, group)
            widths = [*range(step, group.size, step)] or [len(group.blocks)]
            found[name] = (0, *(group.size - width for width in reversed(widths)))
        if not found:
            raise PlanError("no group of the model may shrink; look at graphzip.channel_groups(model, example_inputs)")
        return found

    def _measured_widths(self, name: str) -> list[int]:
        size = self.groups[name].size
        widths = np.array([size - gone for gone in self.choices[name][1:]])
        near = {int(widths[np.abs(widths - share * size).argmin()]) for share in _SHARES}
        return sorted({*near, int(widths.min())}, reverse=True)

    def _narrowest(self) -> dict[str, int]:
        return {name: self.groups[name].size - gone[-1] for name, gone in self.choices.items()}

    def _curves(self) -> list[Curve]:
        if not self.sensitivities:
            raise PlanError("nothing is measured yet; call measure() before plan() and frontier()")
        return [
            Curve.through(self.choices[each.group], [(each.size - width, loss) for width, loss in each.points])
            for each in self.sensitivities
        ]

    def _price(self, what: str) -> Price:
        if what not in ("macs", "params", "bytes"):
            raise PlanError(f"{what!r} has no price; ask for macs, params or bytes")
        price: Price = getattr(self.prices, what)
        return price

    def _allocated(self, price: Price, budget: float, what: str) -> dict[str, int]:
        gone = allocate(self._curves(), price, budget)
        if gone is None:
            raise PlanError(f"{what}: the budget is out of reach; call check() to see what can be reached")
        return {name: self.groups[name].size - int(count) for name, count in zip(self.choices, gone, strict=True)}

    def _plan_of(self, widths: Mapping[str, int]) -> Plan:
        shapes = [tuple(value.shape) for value in self.example_inputs if isinstance(value, torch.Tensor)]
        merge = self._merge(widths)
        return Plan([merge if options is self.options else options for options in self.passes], inputs=shapes)

    def _merge(self, widths: Mapping[str, int]) -> ClusterMerge:
        """Every group that may shrink by name, those with a `#n` first, for a name without one matches them too."""
        keep = {
            name: widths.get(name, self.groups[name].size) for name in sorted(self.choices, key=lambda n: "#" not in n)
        }
        return self.options.model_copy(update={"keep": keep, "round_to": 1})

    # ------------------------------------------------------------------------------------------------- latency

    def _latency(self, widths: Mapping[str, int]) -> float:
        merge = ClusterMerge(keep=dict(self._merge(widths).keep), clustering="even", norms=self.options.norms)  # type: ignore[arg-type]
        found = ClusterMergePass(merge, self.traced, seed=self.seed, where="cluster_merge", known=self.nothing_known)
        return latency_of(found.merged(self.traced).traced)

    def _for_latency(self, amount: float) -> dict[str, int]:
        """Bisect the multiply-accumulates, for these are what latency can be steered by, and measure."""
        whole = self._latency({})
        wanted = _absolute(amount, whole)
        if wanted >= whole:
            return {}
        low, high, best = 0.0, 1.0, self._narrowest()
        for _ in range(_TRIES):
            middle = (low + high) / 2
            gone = allocate(self._curves(), self.prices.macs, middle * self.prices.macs.whole)
            if gone is None:
                low = middle
                continue
            widths = {name: self.groups[name].size - int(count) for name, count in zip(self.choices, gone, strict=True)}
            taken = self._latency(widths)
            logger.info("%.0f %% of the MACs take %.3f ms", 100 * middle, taken)
            if taken <= wanted:
                low, best = middle, widths
            else:
                high = middle
        return best

    # ------------------------------------------------------------------------------------------------- bookkeeping

    @property
    def nothing_known(self) -> Known:
        """The analysis, which passes need not repeat, and nothing of the data."""
        return Known(self.analysis, self.groups, {}, {})

    def _key(self, evaluate_name: str | None) -> str | None:
        """What the measurements of this study are kept under; nothing where it cannot be told from another one."""
        clustering = self.options.clustering
        called: dict[str, Any] = {"clustering": None if clustering in BUILT_IN else clustering_of(clustering)}
        called["evaluate"] = self.evaluate
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
        options = self.options.model_copy(update={"keep": 1.0}).to_dict()
        constants = [_SHARES, _SAMPLES, _FITTED, _FOLLOWING, _QUICK.rows, _QUICK.rounds]
        versions = [__version__, torch.__version__]
        return key_of(self.traced, self.batches, options, self.seed, self.has_data, constants, versions, told)


class _Laboratory:
    """Narrows one group at a time and compares. Groups come in the order of `names`."""

    def __init__(self, study: WidthStudy) -> None:
        self.study, self.traced = study, study.traced
        self.known = known_of(
            study.options, self.traced, study.analysis, study.groups, list(study.choices), study.batches
        )
        self.score = self._scored(self.traced) if study.evaluate is not None else 0.0
        self.layers = [layer.name for layer in layers_of(self.traced).values()]
        fitted, judged = _parts(study.batches)
        self.fitting, self.judging = Values(self.traced, fitted), Values(self.traced, judged)
        if study.evaluate is None:
            self.wanted = _flat(Values(self.traced, judged).outputs())
            if not all_finite(self.wanted):
                raise WeightsError(
                    "the model's outputs are NaN or infinite on the data that widths are judged by; check the data and "
                    "the model's weights"
                )

    def loss(self, name: str, width: int) -> float:
        """With all groups but this one as they are."""
        study = self.study
        merge = ClusterMergePass(
            study.options.model_copy(update={"keep": {name: width}, "round_to": 1}),
            self.traced,
            seed=study.seed,
            where="cluster_merge",
            known=self.known,
        )
        if merge.wants_data:
            merge.calibrate(study.batches)
        if study.evaluate is not None:
            fitted = merge.options.compensate == "data"
            slim = merge.convert(self.traced) if fitted else merge.merged(self.traced).traced
            return max(self.score - self._scored(slim), 0.0)
        merged = merge.merged(self.traced)
        start = self._first_node(name, merged.traced)
        if study.options.compensate == "data":
            self.fitting = _just_before(start, self.fitting)
            old, new = self.fitting.fork(self.traced), self.fitting.fork(merged.traced)
            refit(old, new, merged.layout, merged.means, only=self._nearby(name), effort=_QUICK)
        self.judging = _just_before(start, self.judging)
        return _relative(self.wanted, _flat(self.judging.fork(merged.traced).outputs()))

    def _scored(self, traced: Traced) -> float:
        """What `evaluate` says of a model. Raises `PlanError` where that is no score."""
        assert self.study.evaluate is not None
        found: Any = call_user(self.study.evaluate, _module(traced))
        if isinstance(found, torch.Tensor | np.ndarray) and math.prod(found.shape) == 1:
            found = found.item()
        if isinstance(found, bool) or not isinstance(found, Real):
            raise PlanError(f"evaluate gave {show(found)}, which is no number; give a score, the higher the better")
        score = float(found)
        if not math.isfinite(score):
            raise PlanError(f"evaluate gave {score}; give a finite score, the higher the better")
        return score

    def _params(self, name: str, *roles: str) -> set[str]:
        prefix = f"{self.traced.scope}." if self.traced.scope else ""
        return {each.param.removeprefix(prefix) for each in self.study.groups[name].params if each.role in roles}

    def _first_node(self, name: str, slim: Traced) -> torch.fx.Node:
        """The first operator that a change of the group can touch: by its parameters, or by its size in `slim`."""
        params = self._params(name, "producer", "pointwise", "consumer")
        users = [
            user
            for node in self.traced.graph.nodes
            if node.op == "get_attr" and str(node.target) in params
            for user in node.users
        ]
        sizes = {node.name: _sizes(node) for node in slim.graph.nodes}
        resized = [
            node
            for node in self.traced.graph.nodes
            if node.op == "call_function" and sizes.get(node.name) != _sizes(node)
        ]
        first: torch.fx.Node = min([*users, *resized], key=self.judging.place.__getitem__)
        return first

    def _nearby(self, name: str) -> set[str]:
        """The layers that read the group, those that make it after that, and the first ones that follow."""
        readers = self._params(name, "consumer")
        first = min((number for number, layer in enumerate(self.layers) if layer in readers), default=0)
        return {*self.layers[first : first + _FOLLOWING], *readers, *self._params(name, "producer")}


def _sizes(node: torch.fx.Node) -> tuple[str, ...]:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else ()


def _passes_of(passes: Sequence[PassOptions], *, has_data: bool) -> tuple[list[PassOptions], ClusterMerge]:
    """The plan's passes and the one of them whose widths are found."""
    listed = list(Plan(passes).passes) or [ClusterMerge()]
    number = next((n for n, options in enumerate(listed) if isinstance(options, ClusterMerge)), None)
    if number is None:
        raise PlanError("passes: none of them is a ClusterMerge, whose widths could be found; add ClusterMerge()")
    given = listed[number]
    assert isinstance(given, ClusterMerge)
    fixed = {"keep", "clusters"} & given.model_fields_set
    if fixed:
        raise PlanError(f"passes[{number}].cluster_merge.{min(fixed)}: widths are found here; leave it out")
    defaults: dict[str, Any] = {"compensate": "data" if has_data else "free"}
    if has_data and "features" not in given.model_fields_set:  # these are for clusterings that compare channels
        defaults["clustering"] = RECONSTRUCTION
    options = ClusterMerge(**(defaults | given.to_dict()))
    listed[number] = options
    return listed, options


def _step(options: ClusterMerge, group: ChannelGroup) -> int:
    """Widths are multiples of this in a block: what the plan asks for, or a sixteenth of the width, of 8 at most.

    onnxruntime computes convolutions in blocks of 8 or 16 channels, and matrix products likewise.
    """
    if "round_to" in options.model_fields_set:
        return options.round_to
    width = group.size // len(group.blocks)
    return min(8, max(1, 1 << max(width // 16, 1).bit_length() - 1))


def _one(budget: Mapping[str, float]) -> tuple[str, float]:
    if len(budget) != 1:
        given = ", ".join(budget) or "none"
        raise PlanError(f"give one budget of macs, params, bytes and latency; got {given}")
    ((what, amount),) = budget.items()
    if what not in _BUDGETS:
        raise PlanError(f"{what} is no budget; give one of {', '.join(_BUDGETS)}")
    number = isinstance(amount, int | float) and not isinstance(amount, bool)
    if not number or not amount > 0 or not math.isfinite(amount):
        raise PlanError(f"{what}: {amount!r} is not a budget; write a share such as 0.5, or an amount above 1")
    return what, amount


def _absolute(amount: float, whole: float) -> float:
    return amount * whole if isinstance(amount, float) and amount <= 1.0 else float(amount)


def _shown(amount: float, what: str) -> str:
    if isinstance(amount, float) and amount <= 1.0:
        return f"{amount:.3g}"
    return f"{amount:.3f} ms" if what == "latency" else f"{amount:,.0f} {what}"


def _leaves(batches: Iterable[Any], inputs: int) -> list[tuple[Any, ...]]:
    return [tuple(pytree.tree_leaves(batch_arguments(batch, inputs))) for batch in each_batch(batches)]


def _parts(batches: Sequence[tuple[Any, ...]]) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Batches that layers are fitted on for a measurement, and those that outputs are judged on: others, if any."""
    found: list[tuple[Any, ...]] = []
    count, fitted = 0, 0
    for batch in batches:
        if count >= _SAMPLES:
            break
        found.append(batch)
        count += next((len(leaf) for leaf in batch if isinstance(leaf, torch.Tensor) and leaf.dim()), 1)
        fitted = len(found) if count <= _FITTED * _SAMPLES else fitted
    fitted = min(fitted or 1, max(len(found) - 1, 1))
    return found[:fitted], found[fitted:] or found


def _just_before(node: torch.fx.Node, values: Values) -> Values:
    """The values of the same graph where all before the node has run and nothing else has."""
    found = values if values.done <= values.place[node] else Values(values.traced, values.batches)
    found.run_before(node)
    return found


def _flat(outputs: Any) -> torch.Tensor:
    """All floating-point outputs on all batches."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return torch.cat([leaf.detach().double().flatten() for leaf in leaves if leaf.is_floating_point()])


def _relative(wanted: torch.Tensor, given: torch.Tensor) -> float:
    """At most `_WORST`, which stands for outputs that are not finite too."""
    spread = wanted.var(correction=0) if wanted.numel() else wanted.new_zeros(())
    found = float((wanted - given).square().mean() / spread.clamp(min=torch.finfo(wanted.dtype).tiny))
    return min(found, _WORST) if math.isfinite(found) else _WORST


def _module(traced: Traced) -> nn.Module:
    return to_module(traced).eval()
