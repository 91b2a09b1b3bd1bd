"""A model between `prepare` and `convert`: it computes what it did, and may be trained under the plan's constraints."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from graphzip.analysis.cost import Cost, cost_of
from graphzip.compiled import Compiled
from graphzip.errors import ExampleInputError, GraphZipError, RewriteError
from graphzip.graph.modules import to_module
from graphzip.graph.trace import Traced, share_copy
from graphzip.history import History, Record
from graphzip.plan import Plan
from graphzip.results import GroupChange, Report
from graphzip.rewrite.shrink import refresh
from passes.base import Pass, Restructuring
from passes.table import PASSES

__all__ = ["Prepared", "drift", "follow_modes"]

logger = logging.getLogger(__name__)

_NOT_FINITE = "outputs on the calibration data are not finite, so how far they moved is unknown"


@dataclass
class _Progress:
    """Where in the plan a prepared model stands."""

    traced: Traced
    seed: int
    position: int = 0
    active: Pass | None = None
    taken: int = 0


class Prepared(nn.Module):
    """The model to train before `convert`.

    Calling it runs `model`: a deep copy of the user's module until the first pass has been carried out, the rewritten
    module after that.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Traced,
        plan: Plan,
        *,
        original: nn.Module,
        example_inputs: tuple[Any, ...],
        calibration: Iterable[Any] | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.plan = plan
        self.seed = seed
        self._hidden: dict[str, Any] = {"original": original, "calibration": calibration, "inputs": example_inputs}
        self._progress = _Progress(traced, seed)
        self._before: Cost = cost_of(traced)
        self._changes: list[Pass] = []
        self._history = History()
        self.clusters: torch.Tensor
        self.register_buffer("clusters", torch.zeros(0, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_keep_clusters)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_take_clusters)  # type: ignore[no-untyped-call]
        self._begin()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.model(*args, **kwargs)

    def steps(self) -> Iterator[str]:
        """Stages of the plan that are left, by name. Train in the body of the loop; the next turn carries it out."""
        while (active := self._progress.active) is not None:
            yield from active.stages
            if self._progress.active is active:
                self._finish()

    def collapse_(self) -> None:
        """Set every cluster of the current pass to its centre at once."""
        active = self._synced()
        if active is not None:
            active.collapse_(self._inner())

    def pull_(self, fraction: float) -> None:
        """Move every clustered slice by `fraction` (0 to 1) of the way to the centre of its cluster."""
        if not 0.0 <= fraction <= 1.0:
            raise GraphZipError(f"pull_ takes a fraction between 0 and 1, got {fraction}")
        active = self._synced()
        if active is not None:
            active.pull_(self._inner(), fraction)

    def deviation(self) -> float:
        """Sum of squared kernel deviations from the cluster centres (C-SGD, Eq. 7); kernels only."""
        active = self._synced()
        return 0.0 if active is None else active.deviation(self._inner())

    def residual(self) -> float:
        """Sum of squares of the kernels that go (C-SGD, Eq. 22): what pruning them instead of merging would lose."""
        active = self._synced()
        return 0.0 if active is None else active.residual(self._inner())

    def optimizer(
        self, cls: type[Optimizer], params: Iterable[Any] | None = None, *, steps: int | None = None, **options: Any
    ) -> Optimizer:
        """`cls(params, **options)` that also brings the current pass about: for `ClusterMerge` Centripetal SGD.

        It is a `cls`, and is used like one. Gradients are averaged over every cluster, weights decay, and what a
        cluster's members are apart is multiplied by `1 - lr * (weight_decay + strength)` a step, at the learning rate
        of the step (C-SGD, Eq. 6 and 18 to 20), for kernels, biases and batch norm parameters of the pacesetter and
        all followers. Without momentum `torch.optim.SGD` then is Eq. 6; momentum, Nesterov and Adam work on the
        averaged gradient, and the deviation falls by the same number a step. Running statistics and frozen parameters
        are brought together too, at the first parameter group's learning rate and without its weight decay.

        `params` is what `cls` takes, parameters or parameter groups; by default all parameters. A group may bring a
        `strength` of its own. `steps` is the planned number of optimizer steps, which `strength="auto"` needs: then
        the deviation falls evenly, whatever the learning rate does, and is gone after three quarters of them.

        Make it anew for every stage of a plan. Raises `PlanError` for "auto" without `steps`, `GraphZipError` for an
        optimizer that evaluates the model within its step (LBFGS).
        """
        active = self._synced()
        optimizer = cls(self.parameters() if params is None else params, **options)
        if active is None:
            return optimizer
        active.bind(optimizer, self._inner(), steps=steps)
        bound = optimizer.step

        def step(_: Optimizer, *args: Any, **given: Any) -> Any:
            if self._progress.taken == 0:
                self._synced()  # DistributedDataParallel has told every process the clusters of the first one by now
                self.record()
            result = bound(*args, **given)
            self._progress.taken += 1
            if self._history.is_due(self._progress.taken):
                self.record()
            return result

        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
        return optimizer

    @property
    def history(self) -> History:
        """The deviation of every group, and the loss where `record` was told one, over the optimizer's steps."""
        return self._history

    def record(self, loss: float | torch.Tensor | None = None, **values: float) -> Record:
        """Add the present deviations to `history`, with the loss and other numbers (an accuracy, say) beside them."""
        active = self._progress.active
        groups = {} if active is None else active.deviations(self._inner())
        told = float(loss.detach() if isinstance(loss, torch.Tensor) else loss) if loss is not None else None
        residual = 0.0 if active is None else active.residual(self._inner())
        given = {name: float(value) for name, value in values.items()}
        record = Record(self._progress.taken, groups, told, given, residual)
        self._history.add(record)
        return record

    def regularizer(self) -> torch.Tensor:
        """A term to add to the loss; zero where the current pass has none."""
        active = self._synced()
        term = None if active is None else active.regularizer(self._inner())
        if term is not None:
            return term
        parameter = next(self.model.parameters(), None)
        return torch.zeros(()) if parameter is None else parameter.new_zeros(())

    def convert(self) -> Compiled:
        """Carry out every pass that is left and give the slimmer model; the prepared one can be thrown away then."""
        unfinished = self._progress.active is not None
        for _ in self.steps():
            pass
        original: nn.Module = self._hidden["original"]
        with torch.inference_mode(False):
            traced = self._progress.traced if unfinished else self._adopt()
            module = self.model if unfinished else _with_submodule(self.model, traced.scope, to_module(traced))
            follow_modes(module, original)
            inputs = _placed(self._hidden["inputs"], original, module) if traced.scope else traced.example_inputs
            compiled = Compiled(module, self._report(module), traced, inputs)
        logger.info("%s", compiled.report)
        return compiled

    def _synced(self) -> Pass | None:
        """The current pass, with the clusters of the buffer: a checkpoint or another process may have set them."""
        active = self._progress.active
        if active is not None and not torch.equal(self.clusters.cpu(), active.state()):
            active.load_state(self.clusters)
        return active

    def _inner(self) -> nn.Module:
        return _inside(self.model, self._progress.traced.scope)

    def _begin(self) -> None:
        progress = self._progress
        if progress.position < len(self.plan.passes):
            options = self.plan.passes[progress.position]
            where = f"passes[{progress.position}].{options.kind}"
            progress.active = PASSES[type(options)](options, progress.traced, seed=self.seed, where=where)
            self._restructure(progress.active)
        else:
            progress.active = None
        progress.taken = 0
        state = torch.zeros(0, dtype=torch.int64) if progress.active is None else progress.active.state()
        self.clusters = state.to(self.clusters.device)

    def _restructure(self, active: Pass) -> None:
        """Give the model the parameters that the pass trains."""
        if isinstance(active, Restructuring):
            run = None if self._hidden["calibration"] is None else self._run_calibration
            traced, inner = active.restructure(self._progress.traced, self._inner(), run)
            self._progress.traced = traced
            if inner is not self._inner():
                self.model = _with_submodule(self.model, traced.scope, inner)

    @torch.no_grad()
    def _run_calibration(self) -> None:
        """Run the model in eval mode on the calibration data."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        for batch in self._hidden["calibration"]:
            run_batch(self.model, batch_arguments(batch, len(self._hidden["inputs"])))
        for module, mode in modes.items():
            module.training = mode

    def _finish(self) -> None:
        """Carry out the current pass on the trained weights and begin the next one."""
        progress = self._progress
        active = self._synced()
        assert active is not None
        if progress.taken and self._history[-1].step != progress.taken:
            self.record()
        with torch.inference_mode(False):
            progress.traced = active.convert(self._adopt())
            slim = to_module(progress.traced)
            follow_modes(slim, self._inner())
            self.model = _with_submodule(self.model, progress.traced.scope, slim)
            self._changes.append(active)
            progress.position += 1
            self._begin()

    def _adopt(self) -> Traced:
        """The graph with the tensors that the model has now."""
        traced = self._progress.traced
        if traced.adopt_state(self._inner()):
            try:
                refresh(traced)
            except RewriteError as error:
                raise RewriteError(
                    f"the prepared model was moved to a dtype or device that its graph does not fit ({error}); "
                    "move the model first and prepare it then"
                ) from error
        return traced

    def _report(self, module: nn.Module) -> Report:
        traced = self._progress.traced
        widths = [item for change in self._changes for item in change.widths().items()]
        after = cost_of(traced)
        summaries = tuple(
            {options.kind: change.summary()} for options, change in zip(self.plan.passes, self._changes, strict=True)
        )
        moved = drift(self._hidden["original"], module, self._hidden["calibration"], len(self._hidden["inputs"]))
        finite = moved is None or math.isfinite(moved)
        changed = bool(widths) or any(
            found.get("folded") or found.get("layers") for summary in summaries for found in summary.values()
        )
        return Report(
            before=self._before,
            after=after,
            groups=tuple(GroupChange(name, before, now) for name, (before, now) in widths),
            changed=changed,
            exact=not any(
                summary.get("cluster_merge", {}).get("plain_norms") or summary.get("prune_channels", {}).get("dropped")
                for summary in summaries
            ),
            drift=moved if finite else None,
            notes=traced.training_only if finite else (*traced.training_only, _NOT_FINITE),
            passes=summaries,
        )


def _keep_clusters(module: Prepared, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let the weights of the original model be loaded, which have no clusters."""
    state.setdefault(f"{prefix}clusters", module.clusters)


def _take_clusters(module: Prepared, _: Any) -> None:
    """Use the clusters that were loaded."""
    module._synced()


def _inside(model: nn.Module, scope: str) -> nn.Module:
    return model.get_submodule(scope) if scope else model


def _with_submodule(model: nn.Module, scope: str, value: nn.Module) -> nn.Module:
    """A copy of `model` with `value` in place of the submodule `scope`, under each of its names."""
    if not scope:
        return value
    whole = copy.deepcopy(model)
    old = whole.get_submodule(scope)
    for name, inner in list(whole.named_modules(remove_duplicate=False)):
        if inner is old:
            owner, _, leaf = name.rpartition(".")
            setattr(whole.get_submodule(owner), leaf, value)
    return whole


def follow_modes(module: nn.Module, source: nn.Module) -> None:
    """Give every submodule the training mode of the one with the same name, or of the nearest one around it."""
    modes = {name: inner.training for name, inner in source.named_modules(remove_duplicate=False)}
    for name, inner in module.named_modules():
        while name not in modes:
            name = name.rpartition(".")[0]
        inner.training = modes[name]


@torch.no_grad()
def drift(before: nn.Module, after: nn.Module, calibration: Iterable[Any] | None, inputs: int) -> float | None:
    """Largest difference of outputs relative to the largest output, both in eval mode.

    `None` without calibration data, NaN where an output is not finite.
    """
    if calibration is None:
        return None
    old, new = share_copy(before).eval(), share_copy(after).eval()
    worst = scale = 0.0
    for batch in calibration:
        args = batch_arguments(batch, inputs)
        expected = run_batch(old, args)
        for left, right in zip(_leaves(expected), _leaves(run_batch(new, _placed(args, old, new))), strict=True):
            if left.numel():
                apart, size = float((left - right.to(left.device)).abs().max()), float(left.abs().max())
                if not math.isfinite(apart):
                    return math.nan
                worst, scale = max(worst, apart), max(scale, size)
    return worst / scale if scale else worst


def _leaves(output: Any) -> list[torch.Tensor]:
    return [leaf.double() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def run_batch(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """The output for one calibration batch. Raises `ExampleInputError` for a batch that the model does not accept."""
    try:
        return model(*args)
    except GraphZipError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(arg.shape)) if isinstance(arg, torch.Tensor) else repr(arg) for arg in args)
        raise ExampleInputError(
            f"calibration: {type(model).__name__} fails on a batch ({shapes}): {error}; make it yield batches that "
            "model(*batch) accepts"
        ) from error


def check_calibration(calibration: Iterable[Any] | None, model: nn.Module, inputs: int) -> None:
    """Raises `ExampleInputError` unless `calibration` can be gone through again and `model` takes its first batch."""
    if calibration is None:
        return
    if isinstance(calibration, torch.Tensor | Mapping | str):
        raise ExampleInputError(
            f"calibration is a {type(calibration).__name__}; pass a list of batches or a DataLoader"
        )
    batches = iter(calibration)
    if batches is calibration:
        raise ExampleInputError(
            f"calibration is a {type(calibration).__name__}, which can be gone through only once; pass a list of "
            "batches or a DataLoader"
        )
    first = next(batches, None)
    if first is None:
        raise ExampleInputError("calibration yields no batch; pass at least one")
    with torch.no_grad():
        run_batch(share_copy(model).eval(), batch_arguments(first, inputs))


def batch_arguments(batch: Any, inputs: int) -> tuple[Any, ...]:
    """The positional inputs of one calibration batch; what a loader yields beyond them (labels) is left out."""
    if isinstance(batch, Mapping):
        raise ExampleInputError("calibration yields a mapping; make it yield a tensor or a tuple of positional inputs")
    args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if len(args) > inputs:
        logger.info("calibration batches have %d entries, the model takes %d: the rest is left out", len(args), inputs)
    return args[:inputs]


def _placed(values: tuple[Any, ...], before: nn.Module, after: nn.Module) -> tuple[Any, ...]:
    """Inputs of `before` on the device and in the floating dtype of `after`, where the two differ."""
    old, new = (
        next(((p.dtype, p.device) for p in model.parameters() if p.is_floating_point()), None)
        for model in (before, after)
    )
    if old is None or new is None or old == new:
        return values

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(new[1], new[0] if value.dtype == old[0] else value.dtype)

    placed: tuple[Any, ...] = pytree.tree_map(move, values)
    return placed
