"""A model between `prepare` and `convert`: it computes what it did, and may be trained under the plan's constraints."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graphzip.analysis.cost import Cost, cost_of
from graphzip.arguments import whole
from graphzip.calibration import drift, placed
from graphzip.compiled import Compiled, task_module
from graphzip.errors import GraphZipError, RewriteError, WeightsError
from graphzip.graph.batches import batch_arguments, check_batches, each_batch, run_batch
from graphzip.graph.copies import computed, deep_copy, flags_kept, in_mode, switches_by_itself
from graphzip.graph.frozen import freeze, thaw
from graphzip.graph.torch_private import pytree
from graphzip.graph.trace import Traced
from graphzip.guard import public, users_own
from graphzip.history import History, Record
from graphzip.plan import Plan
from graphzip.plan_checks import show
from graphzip.results import GroupChange, Report, TaskChange
from graphzip.rewrite.join import module_of, task_of
from graphzip.rewrite.refresh import refresh
from graphzip_passes.base import Calibrated, Feeds, Pass, Restructuring, Staged, Stepwise
from graphzip_passes.table import PASSES

__all__ = ["Prepared", "follow_modes"]

logger = logging.getLogger(__name__)

_OF_THE_PLAN = ("plan", "_progress", "_before", "_before_tasks", "_changes", "_history")

_NOT_FINITE = "outputs on the calibration data are not finite, so how far they moved is unknown"


@dataclass
class _Progress:
    """Where in the plan a prepared model stands.

    The graph is `ahead` where its tensors are the ones that count: the model is out of date, or only borrowed for a
    pass that copies what it changes. The `turn` counts up where what is trained, or under which constraint, changes:
    an optimizer made before is of no use.
    """

    traced: Traced
    seed: int
    position: int = 0
    active: Pass | None = None
    taken: int = 0
    stage: int = 0
    ahead: bool = False
    turn: int = 0


class Prepared(nn.Module):
    """The model to train before `convert`.

    Calling it runs `model`: a deep copy of the user's module until the first pass has been carried out, the rewritten
    module after that. With several models it is called with the inputs of each, `prepared(a=xa, b=xb)`, gives a
    dictionary by task, and the names of its parameters begin with the task's.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Traced,
        plan: Plan,
        *,
        original: nn.Module,
        example_inputs: Any,
        calibration: Any,
        seed: int,
        borrowed: bool = False,
    ) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.plan = plan
        self.seed = seed
        self._hidden: dict[str, Any] = {"original": original, "calibration": calibration, "inputs": example_inputs}
        self._progress = _Progress(traced, seed)
        self._before = _cost(traced)
        self._before_tasks = _task_costs(traced)
        self._changes: list[Pass] = []
        self._history = History()
        self.clusters: torch.Tensor
        self.register_buffer("clusters", torch.zeros(0, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_keep_clusters)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_take_clusters)  # type: ignore[no-untyped-call]
        self._begin()
        self._progress.ahead = borrowed and isinstance(self._progress.active, Stepwise)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the plan, its passes and the graph as one, so that they refer to the same nodes."""
        state = dict(self.__dict__)
        plan = {name: state.pop(name) for name in _OF_THE_PLAN}
        return {**state, "_frozen": freeze(plan)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update(thaw(self.__dict__.pop("_frozen")))

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        """A copy to train; the original model and the calibration data are only read, and shared with it."""
        memo.update({id(value): value for value in self._hidden.values()} | computed([self.model]))
        twin = memo[id(self)] = Prepared.__new__(Prepared)
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.model(*args, **kwargs)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks where several models were prepared; none for one model."""
        return tuple(task.name for task in self._progress.traced.tasks)

    @public
    def task(self, name: str) -> nn.Module:
        """The module of one task, whose parameters are those of `model`, as it is at this stage of the plan.

        Raises `GraphZipError` for an unknown task.
        """
        return task_module(self.model, self.tasks, name)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over a checkpoint of a model that was prepared with the same plan, or the weights of the original one.

        Raises `WeightsError` where they do not fit.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except GraphZipError:
            raise
        except Exception as error:
            raise WeightsError(f"the state does not fit what was prepared: {error}") from error

    @public
    def steps(self) -> Iterator[str]:
        """Stages of the plan that are left, by name. Train in the body of the loop; the next turn carries it out."""
        while (active := self._progress.active) is not None:
            if isinstance(active, Stepwise):
                yield from self._entered(active)
            else:
                for stage in active.stages:
                    yield stage
                    if self._progress.active is active:
                        self._end(stage)
            if self._progress.active is active:
                self._finish()

    @public
    def collapse_(self) -> None:
        """Bring the model into the state that `convert` would leave it in, at its present widths, and train from there.

        Every cluster is set to its centre at once. With `ClusterMerge(compensate="data")` what reads the channels is
        fitted as well: a warm start, for which a short training need not draw filters together first.
        """
        active = self._synced()
        if active is not None:
            with torch.inference_mode(False):
                self._adopt()
            active.collapse_(self._inner())

    @public
    def pull_(self, fraction: float) -> None:
        """Move every clustered slice by `fraction` (0 to 1) of the way to the centre of its cluster."""
        if not isinstance(fraction, int | float) or not 0.0 <= fraction <= 1.0:
            raise GraphZipError(f"pull_ takes a fraction between 0 and 1, got {fraction}")
        active = self._synced()
        if active is not None:
            active.pull_(self._inner(), fraction)

    @public
    def deviation(self) -> float:
        """Sum of squared kernel deviations from the cluster centres (C-SGD, Eq. 7); kernels only."""
        active = self._synced()
        return 0.0 if active is None else active.deviation(self._inner())

    @public
    def residual(self) -> float:
        """Sum of squares of the kernels that go (C-SGD, Eq. 22): what pruning them instead of merging would lose."""
        active = self._synced()
        return 0.0 if active is None else active.residual(self._inner())

    @public
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

        Make it anew for every stage of a plan: a step with that of an earlier stage raises `GraphZipError`. So does an
        optimizer that evaluates the model within its step (LBFGS); "auto" without `steps` raises `PlanError`.
        """
        if steps is not None:
            whole(steps, "steps", least=1)
        active = self._synced()
        optimizer = _made(cls, self.parameters() if params is None else params, options)
        if active is None:
            return optimizer
        active.bind(optimizer, self._inner(), steps=steps)
        bound, turn = optimizer.step, self._progress.turn

        def step(_: Optimizer, *args: Any, **given: Any) -> Any:
            if self._progress.turn != turn:
                raise GraphZipError(
                    "this optimizer was made for a stage that has ended, and would train nothing or break what the "
                    "plan ties; make a new one with prepared.optimizer(...) in every stage"
                )
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

    @public
    def record(self, loss: float | torch.Tensor | None = None, **values: float) -> Record:
        """Add the present deviations to `history`, with the loss and other numbers (an accuracy, say) beside them."""
        active = self._progress.active
        groups = {} if active is None else active.deviations(self._inner())
        told = None if loss is None else _told(loss, "loss")
        residual = 0.0 if active is None else active.residual(self._inner())
        given = {name: _told(value, name) for name, value in values.items()}
        record = Record(self._progress.taken, groups, told, given, residual)
        self._history.add(record)
        return record

    @public
    def regularizer(self) -> torch.Tensor:
        """A term to add to the loss; zero where the current pass has none."""
        active = self._synced()
        term = None if active is None else active.regularizer(self._inner())
        if term is not None:
            return term
        parameter = next(self.model.parameters(), None)
        return torch.zeros(()) if parameter is None else parameter.new_zeros(())

    @public
    def convert(self) -> Compiled:
        """Carry out every pass that is left and give the slimmer model; the prepared one can be thrown away then."""
        unfinished = self._progress.active is not None
        while (active := self._progress.active) is not None:
            if isinstance(active, Stepwise):
                self._enter_rest(active)
            else:
                for stage in active.stages:
                    self._end(stage)
            self._finish()
        original: nn.Module = self._hidden["original"]
        with torch.inference_mode(False):
            traced = self._progress.traced if unfinished else self._adopt()
            module = self.model if unfinished else _with_submodule(self.model, traced.scope, module_of(traced))
            follow_modes(module, original)
            inputs = _examples(self._hidden["inputs"], original, module)
            compiled = Compiled(module, self._report(module), traced, inputs)
        logger.info("%s", compiled.report)
        return compiled

    def _synced(self) -> Pass | None:
        """The current pass, with the clusters of the buffer: a checkpoint or another process may have set them."""
        active = self._progress.active
        if active is not None and not torch.equal(self.clusters.cpu(), active.state()):
            try:
                active.load_state(self.clusters)
            except GraphZipError:
                self.clusters = active.state().to(self.clusters.device)
                raise
        return active

    def _inner(self) -> nn.Module:
        return _inside(self.model, self._progress.traced.scope)

    def _begin(self) -> None:
        progress = self._progress
        if progress.position < len(self.plan.passes):
            options = self.plan.passes[progress.position]
            where = f"passes[{progress.position}].{options.kind}"
            progress.active = PASSES[type(options)](options, progress.traced, seed=self.seed, where=where)
            if isinstance(progress.active, Calibrated) and progress.active.wants_data:
                progress.active.calibrate(self._graph_inputs())
            self._restructure(progress.active)
        else:
            progress.active = None
        progress.taken = progress.stage = 0
        state = torch.zeros(0, dtype=torch.int64) if progress.active is None else progress.active.state()
        self.clusters = state.to(self.clusters.device)
        progress.turn += 1

    def _entered(self, active: Stepwise) -> Iterator[str]:
        """The stages that are left of a pass, each begun before it is given."""
        progress = self._progress
        while progress.stage < len(active.stages):
            stage = active.stages[progress.stage]
            progress.stage += 1
            with torch.inference_mode(False):
                progress.traced = active.enter(stage, self._adopt(), self._feeds())
                self._rebuild()
            yield stage

    def _enter_rest(self, active: Stepwise) -> None:
        """Begin the stages that are left one after the other, with no module to train in between."""
        progress = self._progress
        if progress.stage == len(active.stages):
            return
        with torch.inference_mode(False):
            traced = self._adopt()
            for stage in active.stages[progress.stage :]:
                traced = active.enter(stage, traced, self._feeds())
            progress.traced, progress.stage, progress.ahead = traced, len(active.stages), True

    def _rebuild(self) -> None:
        module = module_of(self._progress.traced)
        follow_modes(module, self.model)
        self.model = module
        self._progress.turn += 1

    def _feeds(self) -> Feeds:
        calibration, inputs = self._hidden["calibration"], self._hidden["inputs"]
        if calibration is None:
            return {}

        def feed(name: str) -> Iterator[tuple[Any, ...]]:
            return (batch_arguments(batch, len(inputs[name])) for batch in each_batch(calibration[name]))

        return {name: partial(feed, name) for name in self.tasks}

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
        root, modes = self.model.training, {module: module.training for module in self.model.modules()}
        calibration, inputs = self._hidden["calibration"], self._hidden["inputs"]
        with flags_kept(self.model):
            self.model.eval()
        try:
            for name in self.tasks or ("",):
                module = self.model.get_submodule(name)
                for batch in each_batch(calibration[name] if name else calibration):
                    run_batch(module, batch_arguments(batch, len(inputs[name] if name else inputs)))
        finally:
            if switches_by_itself(self.model):
                self.model.train(root)
            for module, mode in modes.items():
                module.training = mode

    def _end(self, stage: str) -> None:
        """Let the current pass do what comes between its stages."""
        active = self._synced()
        if isinstance(active, Staged):
            with torch.inference_mode(False):
                active.end_stage(stage, self._inner())
            self.clusters = active.state().to(self.clusters.device)
            self._progress.turn += 1

    def _graph_inputs(self) -> list[tuple[Any, ...]]:
        """What the traced graph takes on every batch of the calibration data."""
        if self._hidden["calibration"] is None:
            return []
        found: list[tuple[Any, ...]] = []

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(tuple(pytree.tree_leaves((args, kwargs))))

        hook = self._inner().register_forward_pre_hook(remember, with_kwargs=True)
        try:
            self._run_calibration()
        finally:
            hook.remove()
        check_batches(self._progress.traced.inputs, found)
        return found

    def _finish(self) -> None:
        """Carry out the current pass on the trained weights and begin the next one."""
        progress = self._progress
        active = self._synced()
        assert active is not None
        if progress.taken and self._history[-1].step != progress.taken:
            self.record()
        with torch.inference_mode(False):
            progress.traced = active.convert(self._adopt())
            slim = module_of(progress.traced)
            follow_modes(slim, self._inner())
            self.model = _with_submodule(self.model, progress.traced.scope, slim)
            progress.ahead = False
            self._changes.append(active)
            progress.position += 1
            self._begin()

    def _adopt(self) -> Traced:
        """The graph with the tensors that the model has now."""
        traced = self._progress.traced
        if self._progress.ahead:
            return traced
        inner = self._inner()
        if traced.adopt_state(in_mode(inner, False) if switches_by_itself(inner) else inner):
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
        after = _cost(traced)
        summaries = tuple(
            {options.kind: change.summary()} for options, change in zip(self.plan.passes, self._changes, strict=True)
        )
        drifts = self._drifts(module)
        moved = max(drifts.values(), key=lambda value: math.inf if value is None or math.isnan(value) else value)
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
            notes=traced.notes if finite else (*traced.notes, _NOT_FINITE),
            passes=summaries,
            tasks={
                name: TaskChange(self._before_tasks[name], cost, drifts[name])
                for name, cost in _task_costs(traced).items()
            },
        )

    def _drifts(self, module: nn.Module) -> dict[str, float | None]:
        """How far the outputs of each task moved; of a single model under an empty name."""
        calibration, inputs, original = (self._hidden[key] for key in ("calibration", "inputs", "original"))
        if not self.tasks:
            return {"": drift(original, module, calibration, len(inputs))}
        return {
            name: drift(
                original.get_submodule(name),
                module.get_submodule(name),
                None if calibration is None else calibration[name],
                len(inputs[name]),
            )
            for name in self.tasks
        }


def _made(cls: type[Optimizer], params: Iterable[Any], options: Mapping[str, Any]) -> Optimizer:
    """An optimizer of the user's choice. Raises `GraphZipError` where it refuses what it is given."""
    if not isinstance(cls, type) or not issubclass(cls, Optimizer):
        raise GraphZipError(f"expected a class of optimizers such as torch.optim.SGD, got {show(cls)}")
    try:
        return cls(params, **options)
    except Exception as error:
        if users_own(error):
            raise
        raise GraphZipError(f"{cls.__name__} refuses its parameters or options: {error}") from error


def _told(value: Any, name: str) -> float:
    """A number for the history; one that is not finite is a number too."""
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise GraphZipError(f"{name}: {show(value)} is not a number") from None


def _keep_clusters(module: Prepared, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let the weights of the original model be loaded, which have no clusters."""
    state.setdefault(f"{prefix}clusters", module.clusters)


def _take_clusters(module: Prepared, _: Any) -> None:
    """Use the clusters that were loaded."""
    module._synced()


def _examples(given: Any, original: nn.Module, module: nn.Module) -> Any:
    """The user's example inputs, as copies where `module` runs; the graph may hold a batch of one as two."""
    if isinstance(given, dict):
        return {task: _examples(each, original, module) for task, each in given.items()}
    own = pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, given)
    return placed(own, original, module)


def _task_costs(traced: Traced) -> dict[str, Cost]:
    return {task.name: cost_of(task_of(traced, task.name)) for task in traced.tasks}


def _cost(traced: Traced) -> Cost:
    """Of all models together: what they share counts once among the parameters, and in each model's operations."""
    if not traced.tasks:
        return cost_of(traced)
    params = sum(parameter.numel() for parameter in traced.module.parameters())
    return Cost(params, sum(cost.macs for cost in _task_costs(traced).values()))


def _inside(model: nn.Module, scope: str) -> nn.Module:
    return model.get_submodule(scope) if scope else model


def _with_submodule(model: nn.Module, scope: str, value: nn.Module) -> nn.Module:
    """A copy of `model` with `value` in place of the submodule `scope`, under each of its names."""
    if not scope:
        return value
    whole = deep_copy(model)
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
