"""A model between `prepare` and `convert`: it computes what it did, and may be trained under the plan's constraints."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from graphzip.analysis.groups import Analysed
from graphzip.arguments import whole
from graphzip.boundary import public, users_own
from graphzip.calibration import Calibration, Trained, place_of, placed, with_submodule
from graphzip.calls import Call, Signature, call_of
from graphzip.compiled import Compiled, task_module
from graphzip.errors import GraphZipError, RewriteError, WeightsError
from graphzip.graph.copies import computed, follow_modes, in_mode, switches_by_itself
from graphzip.graph.pickling import freeze, thaw
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.numeric.sharded import is_sharded, local, reshard
from graphzip.plan.options import PassOptions
from graphzip.plan.plan import Plan
from graphzip.plan.problems import show
from graphzip.process_groups import sharing
from graphzip.progress import Progress, counted, step, watched
from graphzip.report.card import AFTER, BEFORE, TUNED
from graphzip.report.origin import Origin
from graphzip.report.report import Tuning
from graphzip.rewrite.join_models import module_of
from graphzip.rewrite.refresh import refresh
from graphzip.rewrite.whole_tables import whole_tables
from graphzip.training.account import Account, Evaluate, Moves
from graphzip.training.history import History, Record
from graphzip.training.sharding import (
    check_decisions,
    check_gatherable,
    check_optimizer,
    check_sharded_again,
    only_makes_state,
)
from graphzip.training.tune import Divided, tune_
from graphzip_passes.base import Constraint, Decision, PassContext, Stage, checked_outcome, pass_of
from graphzip_passes.registry import BUILT_IN

__all__ = ["Callbacks", "Prepared"]

logger = logging.getLogger(__name__)
R = TypeVar("R")

_PROGRESS = "progress"  # of the training, in a checkpoint: what is no part of the module
_OF_THE_PLAN = ("plan", "_progress", "_account", "_history")


@dataclass(frozen=True)
class Callbacks:
    """Functions of the user: the `loss` that criteria differentiate, scores, and who is told how far the work is."""

    loss: Callable[..., Any] | None = None
    evaluate: Evaluate | None = None
    progress: Progress = None


def _shown(method: Callable[..., R]) -> Callable[..., R]:
    """Decorator of what takes long: it is shown as `progress=` asked for, and done in all processes together."""

    @functools.wraps(method)
    def told(self: Prepared, *args: Any) -> R:
        with watched(self._hidden["callbacks"].progress), self._hidden["processes"].together(method.__name__):
            return method(self, *args)

    return told


@dataclass
class _Progress:
    """Where in the plan a prepared model stands.

    The graph is `ahead` where its tensors are the ones that count: the model is out of date, or only borrowed for a
    pass that copies what it changes. The `turn` counts up where what is trained, or under which constraint, changes:
    an optimizer made before is of no use. What was spread over processes (`sharded`) and then rewritten is whole again.
    """

    traced: Traced
    position: int = 0
    active: Decision | None = None
    taken: int = 0
    ahead: bool = False
    turn: int = 0
    sharded: bool = False


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
        callbacks: Callbacks | None = None,
        borrowed: bool = False,
        known: Analysed | None = None,
    ) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.plan = plan
        self.seed = seed
        self._hidden: dict[str, Any] = {
            "original": original,
            "calibration": calibration,
            "inputs": example_inputs,
            "callbacks": callbacks or Callbacks(),
            "borrowed": borrowed,
            "processes": sharing(calibration),
        }
        self._progress = _Progress(traced)
        known = known or Analysed.of(traced)
        self._account = Account.of(traced, known.groups, self._hidden["processes"], plan.to_dict(), seed)
        self._history, self._loaded = History(), dict[str, torch.Tensor]()
        self.clusters: torch.Tensor
        self.register_buffer("clusters", torch.zeros(0, dtype=torch.int64))
        _watch_checkpoints(self)
        self._begin(known)
        self._progress.ahead = borrowed and any(stage.rewrite for stage in self._stages())

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

    def _apply(self, *args: Any, **given: Any) -> Any:
        """As every module; `to_empty` leaves what was decided as it was."""
        self._synced()
        super()._apply(*args, **given)  # type: ignore[no-untyped-call]
        self._keep_state()
        return self

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
            for stage in self._stages():
                if self._progress.active is active:
                    self._enter(stage)
                    if self._progress.ahead:
                        self._rebuild()
                    yield stage.name
            if self._progress.active is active:
                self._finish()

    @public
    @_shown
    def collapse_(self) -> None:
        """Bring the model into the state that `convert` would leave it in, at its present widths, and train from there.

        Every cluster is set to its centre at once. With `ClusterMerge(compensate="data")` what reads the channels is
        fitted as well: a warm start, for which a short training need not draw filters together first.
        """
        constraint = self._synced()
        if constraint is not None:
            with torch.inference_mode(False):
                self._adopt()
            constraint.collapse_(self._inner())
            _spare(self)

    @public
    def pull_(self, fraction: float) -> None:
        """Move every clustered slice by `fraction` (0 to 1) of the way to the centre of its cluster."""
        if not isinstance(fraction, int | float) or not 0.0 <= fraction <= 1.0:
            raise GraphZipError(f"pull_ takes a fraction between 0 and 1, got {fraction}")
        constraint = self._synced()
        if constraint is not None:
            constraint.pull_(self._inner(), fraction)

    @public
    def deviation(self) -> float:
        """Sum of squared kernel deviations from the cluster centres (C-SGD, Eq. 7), kernels only: a number, 0 where
        they are equal.
        """
        constraint = self._synced()
        return 0.0 if constraint is None else sum(constraint.deviations(self._inner()).values())

    @public
    def residual(self) -> float:
        """Sum of squares of the kernels that go (C-SGD, Eq. 22): the number that pruning them instead of merging would
        lose.
        """
        constraint = self._synced()
        return 0.0 if constraint is None else constraint.residual(self._inner())

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
        constraint = self._synced()
        check_sharded_again(self, self.model, before=self._progress.sharded)
        check_decisions(self.clusters, self.model)
        _spare(self)
        optimizer = _made(cls, self.parameters() if params is None else params, options)
        bare = optimizer.step
        if self._progress.active is None:
            return optimizer
        if constraint is not None:
            constraint.bind(optimizer, self._inner(), steps=steps)
        _count_steps(self, optimizer, bare)
        return optimizer

    @property
    def history(self) -> History:
        """The deviation of every group, and the loss where `record` was told one, over the optimizer's steps."""
        return self._history

    @public
    def record(self, loss: float | torch.Tensor | None = None, **values: float) -> Record:
        """Add the present deviations to `history`, with the `loss` and other numbers (an accuracy, say) beside them."""
        constraint = None if self._progress.active is None else self._progress.active.constraint
        groups = {} if constraint is None else constraint.deviations(self._inner())
        residual = 0.0 if constraint is None else constraint.residual(self._inner())
        told = None if loss is None else _told(loss, "loss")
        given = {name: _told(value, name) for name, value in values.items()}
        record = Record(self._progress.taken, groups, told, given, residual)
        self._history.add(record)
        return record

    @public
    def regularizer(self) -> torch.Tensor:
        """A term to add to the loss, a scalar; zero where the current pass has none."""
        constraint = self._synced()
        term = None if constraint is None else constraint.regularizer(self._inner(between_passes=True))
        if term is not None:
            return term
        parameter = next(self.model.parameters(), None)
        return torch.zeros(()) if parameter is None else local(parameter).new_zeros(())

    @public
    @_shown
    def convert(self) -> Compiled:
        """Carry out every pass that is left and give the slimmer model; the prepared one can be thrown away then."""
        unfinished = self._progress.active is not None
        while self._progress.active is not None:
            self._carry_out()
        original: nn.Module = self._hidden["original"]
        with torch.inference_mode(False):
            traced = self._progress.traced if unfinished else whole_tables(self._adopt())
            module = self.model if unfinished else with_submodule(self.model, traced.scope, module_of(traced))
            follow_modes(module, original)
            inputs = _examples(self._hidden["inputs"], original, module)
            account, evaluate = self._account, self._hidden["callbacks"].evaluate
            account.judge(evaluate, **{BEFORE: original, AFTER: module})
            tuning = _tuned(module, original, self._hidden["calibration"], traced.scope, self.seed)
            if tuning is not None:
                account.judge(evaluate, **{TUNED: module})
            origin = Origin.of(self.plan, self.seed, self._history)
            report = replace(account.report(traced, self._moves(module), origin), tuning=tuning)
            compiled = Compiled(module, report, traced, inputs)
        logger.info("%s", compiled.report)
        return compiled

    @property
    def _options(self) -> PassOptions:
        """The options of the current pass."""
        return self.plan.passes[self._progress.position]

    def _synced(self) -> Constraint | None:
        """The current constraint, as the buffer has it: a checkpoint or another process may have set clusters there."""
        constraint = None if self._progress.active is None else self._progress.active.constraint
        if constraint is not None and not torch.equal(self.clusters.cpu(), constraint.state()):
            try:
                constraint.load_state(self.clusters)
            except GraphZipError:
                self._keep_state()
                raise
        return constraint

    def _keep_state(self) -> None:
        """Let the buffer have what was decided."""
        constraint = None if self._progress.active is None else self._progress.active.constraint
        state = torch.zeros(0, dtype=torch.int64) if constraint is None else constraint.state()
        self.clusters = state.to(self.clusters.device)

    def _inner(self, *, between_passes: bool = False) -> nn.Module:
        """What is trained; `between_passes`, forward and backward, parameters are left as the model needs them."""
        if not between_passes:
            reshard(self.model)
        scope = self._progress.traced.scope
        return self.model.get_submodule(scope) if scope else self.model

    def _context(self, known: Analysed | None = None) -> PassContext:
        progress = self._progress
        where = f"passes[{progress.position}].{self._options.kind}"
        trained, data = Trained(self.model, progress.traced, progress.ahead), self._data
        shared = self._hidden["callbacks"].loss, self._hidden["processes"]
        calibration = None if data is None else Calibration(data, self._signatures, trained, *shared)
        return PassContext(where, self.seed, trained, calibration, known)

    @property
    def _data(self) -> Mapping[str, Iterable[Any]] | None:
        """The calibration data that passes may see, of every task, of a single model under an empty name."""
        data = self._hidden["calibration"]
        if isinstance(data, Divided):
            return data.training
        return data if self.tasks or data is None else {"": data}

    @property
    def _signatures(self) -> dict[str, Signature]:
        """What each task is called with."""
        original: nn.Module = self._hidden["original"]
        return {name: Signature.of(original.get_submodule(name), call) for name, call in self._calls.items()}

    @property
    def _calls(self) -> dict[str, Call]:
        """The example inputs of each task."""
        inputs, original = self._hidden["inputs"], self._hidden["original"]
        given = {name: inputs[name] for name in self.tasks} or {"": inputs}
        return {name: call_of(original.get_submodule(name), each) for name, each in given.items()}

    def _begin(self, known: Analysed | None = None) -> None:
        """Let the next pass decide, where there is one; `known` is the analysis of the graph, where it was made."""
        progress = self._progress
        if progress.position < len(self.plan.passes):
            step(f"deciding what {self._options.kind} does")
            context = self._context(known)
            decision = pass_of(self._options, context.where).decide(progress.traced, self._options, context)
            progress.active = replace(decision, trained=None)
            if decision.trained is not None:
                progress.traced, inner = decision.trained
                if inner is not self._inner():
                    self.model = with_submodule(self.model, progress.traced.scope, inner)
        else:
            progress.active = None
        progress.taken = 0
        self._keep_state()
        progress.turn += 1

    def _stages(self) -> tuple[Stage, ...]:
        """Those that are left of the current pass."""
        active = self._progress.active
        if active is None:
            return ()
        return (Stage(self._options.kind),) if active.stages is None else active.stages()

    @_shown
    def _enter(self, stage: Stage) -> None:
        """Do what is done when a stage begins. A graph that changed is then ahead of the module."""
        progress = self._progress
        if stage.rewrite is not None:
            with torch.inference_mode(False):
                progress.traced = stage.rewrite(_gathered(self), self._context())
                progress.ahead = True
        if stage.adjust is not None:
            with torch.inference_mode(False):
                if is_sharded(self.model):
                    progress.traced = _gathered(self)
                if progress.ahead:
                    self._rebuild()
                self._synced()
                stage.adjust(self._context())
                self._keep_state()
                progress.turn += 1

    def _carry_out(self) -> None:
        """Go through what is left of the current pass with no training in between."""
        for stage in counted(stages := self._stages(), "beginning", [each.name for each in stages]):
            self._enter(stage)
        self._finish()

    def _rebuild(self) -> None:
        """Train the module of the graph from here on."""
        progress = self._progress
        with torch.inference_mode(False):
            slim = module_of(progress.traced)
            follow_modes(slim, self._inner())
            self.model = with_submodule(self.model, progress.traced.scope, slim)
        progress.ahead = False
        progress.turn += 1

    @_shown
    def _finish(self) -> None:
        """Carry out the current pass on the trained weights and begin the next one."""
        progress = self._progress
        active = progress.active
        assert active is not None
        self._synced()
        if progress.taken and self._history[-1].step != progress.taken:
            self.record()
        with torch.inference_mode(False):
            step(f"carrying out {self._options.kind}")
            traced, context = _gathered(self), self._context()
            own = self._options.kind not in BUILT_IN
            outcome = checked_outcome(active.finish(traced, context), context.where, own=own)
            progress.traced = whole_tables(outcome.traced, last=progress.position + 1 == len(self.plan.passes))
            self._rebuild()
            self._account.add(self._options.kind, outcome)
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

    def _moves(self, module: nn.Module) -> Moves:
        """How far the outputs of each task moved on all of the calibration data."""
        hidden, given = self._hidden, self._hidden["calibration"]
        data = given.everything if isinstance(given, Divided) else self._data
        return self._account.moves(hidden["original"], module, data, self._calls, trained=not hidden["borrowed"])


def _tuned(module: nn.Module, original: nn.Module, data: Any, scope: str, seed: int) -> Tuning | None:
    """What tuning the slim model gained, where that was asked for."""
    return tune_(module, original, data, scope=scope, seed=seed) if isinstance(data, Divided) else None


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


def _gathered(prepared: Prepared) -> Traced:
    """The graph as `_adopt` gives it, to be changed; a model that is spread over processes is built of it then."""
    if not is_sharded(prepared.model):
        return prepared._adopt()
    prepared._synced()
    check_gatherable(prepared.model, prepared._progress.traced.scope, switches=switches_by_itself(prepared.model))
    traced = prepared._adopt()
    prepared._progress.ahead = prepared._progress.sharded = True
    return traced


def _spare(prepared: Prepared) -> None:
    """Hold the weights once: where processes have parts of them, whole ones in the graph are not kept."""
    if not prepared._progress.ahead and is_sharded(prepared.model):
        prepared._progress.traced.forget_state()


def _count_steps(prepared: Prepared, optimizer: Optimizer, bare: Callable[..., Any]) -> None:
    """Let every step be noted in `history`, and be refused where its stage has ended."""
    progress, bound = prepared._progress, optimizer.step
    turn = progress.turn

    def step(_: Optimizer, *args: Any, **given: Any) -> Any:
        if progress.turn != turn:
            raise GraphZipError(
                "this optimizer was made for a stage that has ended, and would train nothing or break what the "
                "plan ties; make a new one with prepared.optimizer(...) in every stage"
            )
        if only_makes_state(optimizer):
            return bare(*args, **given)
        reshard(prepared.model)
        if progress.taken == 0:
            check_optimizer(optimizer, prepared.model)
            prepared._synced()  # DistributedDataParallel has told every process the clusters of the first one by now
            prepared.record()
        result = bound(*args, **given)
        progress.taken += 1
        if prepared._history.is_due(progress.taken):
            prepared.record()
        return result

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]


def _told(value: Any, name: str) -> float:
    """A number for the history; one that is not finite is a number too."""
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise GraphZipError(f"{name}: {show(value)} is not a number") from None


def _watch_checkpoints(module: Any) -> None:
    module.register_state_dict_post_hook(_add_progress)
    module.register_load_state_dict_pre_hook(_keep_clusters)
    module.register_load_state_dict_post_hook(_take_clusters)


def _add_progress(module: Prepared, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put what else the training goes on from into a checkpoint."""
    constraint = None if module._progress.active is None else module._progress.active.constraint
    for name, tensor in ({} if constraint is None else constraint.progress()).items():
        state[f"{prefix}{_PROGRESS}.{name}"] = tensor


def _keep_clusters(module: Prepared, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let the weights of the original model be loaded, which have no clusters; put aside what else was kept."""
    state.setdefault(f"{prefix}clusters", module.clusters)
    own = f"{prefix}{_PROGRESS}."
    module._loaded = {name.removeprefix(own): state.pop(name) for name in list(state) if name.startswith(own)}


def _take_clusters(module: Prepared, _: Any) -> None:
    """Use the clusters that were loaded, and go on from where the training was."""
    constraint, progress = module._synced(), module._loaded
    module._loaded = {}
    if constraint is not None and progress:
        constraint.load_progress(progress)


def _examples(given: Any, original: nn.Module, module: nn.Module) -> Any:
    """The user's example inputs, as copies where `module` runs; the graph may hold a batch of one as two."""
    if isinstance(given, dict):
        return {task: _examples(each, original, module) for task, each in given.items()}
    own = pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, given)
    return placed(own, place_of(original), place_of(module))
