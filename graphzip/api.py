"""The public functions: look at a model, prepare it, compile it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from graphzip.analysis.cost import Cost, cost_of
from graphzip.analysis.groups import Analysed, ChannelGroups
from graphzip.arguments import by_task, check_callable, check_room, check_seed, check_traceable
from graphzip.boundary import call_user, public
from graphzip.calibration import check_calibration, with_submodule
from graphzip.calls import Call, Signature, call_of
from graphzip.compiled import Compiled, load
from graphzip.devices import device_in, device_of, fitting, moved
from graphzip.errors import ExampleInputError, GraphZipError, PlanError
from graphzip.graph.copies import borrow, deep_copy, why_not_copied
from graphzip.graph.source import first_line
from graphzip.graph.tasks import check_task_names, joined_module
from graphzip.graph.traced import Traced
from graphzip.plan.plan import Plan, check_plan
from graphzip.process_groups import Processes, sharing
from graphzip.progress import Progress, counted, step, watched
from graphzip.report.tables import closest
from graphzip.rewrite.join_models import join, module_of
from graphzip.rewrite.join_modes import trace_in
from graphzip.traces import Trace, check_own, of_trace, of_traces
from graphzip.tracing.results import Outputs
from graphzip.tracing.trace import trace
from graphzip.training.prepared import Callbacks, Prepared
from graphzip.training.tune import Tune, held_out
from graphzip_passes.base import pass_of

__all__ = ["Compiled", "Prepared", "channel_groups", "compile", "cost", "load", "prepare"]

Train = Callable[[Prepared, str], object]
Models = nn.Module | Trace | Mapping[str, nn.Module] | Mapping[str, Trace]
Loss = Callable[..., Any]
Score = Callable[[nn.Module], float]
Inputs = tuple[Any, ...] | Mapping[str, Any]
Batches = Iterable[Any] | Mapping[str, Iterable[Any]]


@public
def channel_groups(
    model: nn.Module | Trace,
    example_inputs: Inputs | None = None,
    *,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    outputs: Outputs | None = None,
    mode: str = "eval",
) -> ChannelGroups:
    """The channel groups of `model`: which channels are coupled, and which of them can be merged.

    `example_inputs` are a tuple of positional arguments or a mapping of arguments by name, batch first. Nothing is
    computed on real weights, so a model on the meta device will do. `scope` names a submodule to look at alone.
    `outputs` and `mode` are those of `prepare`. With a `Trace` in place of the model, none of them is given.

    Raises `TraceError` for a model that cannot be traced, `ExampleInputError` for inputs it does not accept,
    `NotFoundError` for outputs that it has not.
    """
    view = {"scope": scope, "dynamic_shapes": dynamic_shapes, "outputs": outputs}
    given = of_trace(model, example_inputs=example_inputs, mode=mode, **view)
    if given is not None:
        with torch.inference_mode(False):
            return given.analysed().groups
    return Analysed.of(trace_in(mode, model, example_inputs, **view)).groups  # type: ignore[arg-type]


@public
def cost(module: nn.Module | Trace, example_inputs: Inputs | None = None) -> Cost:
    """Parameters, and multiply-accumulates of `module` for one sample of the shape of `example_inputs`.

    With a `Trace` in its place, its inputs count.

    Raises `TraceError` for a model that cannot be traced, `ExampleInputError` for inputs it does not accept.
    """
    given = of_trace(module, example_inputs=example_inputs)
    if given is not None:
        with torch.inference_mode(False):
            return cost_of(given.current())
    return cost_of(trace(module, example_inputs))  # type: ignore[arg-type]


@public
def prepare(
    model: Models,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    calibration: Batches | None = None,
    loss: Loss | None = None,
    evaluate: Score | Mapping[str, Score] | None = None,
    seed: int = 0,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    outputs: Any | None = None,
    mode: str = "eval",
    tune: bool | int | Tune | None = None,
    progress: Progress = None,
) -> Prepared:
    """Decide what `plan` does to `model`, and give a copy of it to train before it is done.

    `example_inputs` are a tuple of positional arguments, or a mapping of arguments by name (`{"input_ids": ids}`, what
    a tokenizer gives); arguments that they do not have keep their defaults. `calibration` is a re-iterable of batches:
    a tensor, a tuple of positional arguments or a mapping by name; what a batch has beyond the example inputs (labels)
    is left out. `loss(outputs, *labels)`, of what the model gives for a batch and those entries, is what criteria of
    importance differentiate; the mean over a batch. `evaluate(module)` is a score of yours, the higher the better, of
    a module in eval mode; the report has it of the model before, after, and after tuning. Of several models it may be a
    mapping, `{"a": evaluate}`, of functions of the modules of these tasks. `seed` fixes every random choice. `scope`
    names the submodule to compile inside the model.
    `dynamic_shapes` says which sizes the result leaves open beside the batch: `"height,width"`, `"length"`, numbers of
    dimensions (`[2, 3]`), or what `torch.export.export` takes; the others are those of the example.

    `mode` says which form of the model the result has. "eval": what the model computes in eval mode, where batch norm
    and dropout follow `.train()` and `.eval()`. "train": the training form, too (other outputs, auxiliary heads, drop
    paths), which the result computes after `.train()`, and the eval form after `.eval()` and in a file. What the
    result does not have, the report says.

    `outputs` are the results that matter: names (`"logits"`), globs on names (`"hidden_states.*"`) or positions (`0`),
    one or a list; with a `scope` those of the submodule. The others are not computed, so they hold no channel fast and
    what only they read goes. What the result returns keeps its structure, a dict, tuple or class of results, with
    `None` in place of what was left out; `prepared` itself returns everything until its first pass is carried out. With
    the mode "train" they are chosen among those of the eval form, and the training form returns what it did.

    `tune` asks `convert` to fit the outputs of the result to the original's on the calibration data, in eval mode and
    without labels, after all passes: true, a number of epochs, or `graphzip.Tune`. Some of the data is held out from
    the start, from passes too; it judges, and nothing stays that is worse on it. The report says what was gained.

    `progress` is told how far the work is, also that of `convert`: `progress(done, all, what)`, with how many alike
    things are done, how many there are and what comes next. True shows a bar on stderr, with the time that is left, on
    a terminal or in a notebook, and elsewhere a line for every ten per cent.

    Where the plan has a pass that joins models, or none at all, which packs them side by side, `model` is a mapping
    from task names to modules, and `example_inputs`, `calibration`, `dynamic_shapes` and `outputs` (where given) are
    mappings with the same keys. A model may be given as a `Trace` of it, which has its inputs, scope, shapes, outputs
    and mode: then it is not traced again.

    Raises `PlanError` for a plan that does not fit the model, `TraceError`, `ExampleInputError`, `NotFoundError`.
    """
    views = (scope, dynamic_shapes, outputs, mode)
    callbacks, fitted = Callbacks(loss, evaluate, progress), Tune.of(tune)
    with watched(progress):
        return _prepare(model, plan, example_inputs, calibration, callbacks, seed, *views, fitted, trained=True)


def _prepare(
    model: Models,
    plan: Plan,
    example_inputs: Inputs | None,
    calibration: Batches | None,
    callbacks: Callbacks,
    seed: int,
    *views: Any,
    trained: bool,
) -> Prepared:
    """`prepare`, in all processes that have a share of the calibration data."""
    processes = sharing(calibration)
    with processes.together("prepare"):
        if processes.size > 1 and views[-1] is not None:
            raise PlanError(
                "tune: it trains in one process, and several have shares of calibration; leave it out, and train what "
                "prepare gives with DistributedDataParallel"
            )
        data = calibration, callbacks, processes
        return _prepared(model, plan, example_inputs, data, seed, *views, trained=trained)


def _prepared(
    model: Models,
    plan: Plan,
    example_inputs: Inputs | None,
    data: tuple[Batches | None, Callbacks, Processes],
    seed: int,
    scope: str | None,
    dynamic_shapes: Any | None,
    outputs: Any | None,
    mode: str,
    tune: Tune | None,
    *,
    trained: bool,
) -> Prepared:
    """Where nothing is `trained`, weights need no copy for passes that leave the model alone."""
    calibration, callbacks, processes = data
    view = {"scope": scope, "dynamic_shapes": dynamic_shapes, "outputs": outputs}
    given = of_trace(model, example_inputs=example_inputs, mode=mode, **view)
    traces = of_traces(model, example_inputs=example_inputs, **view) if isinstance(model, Mapping) else {}
    source: Any = given.model if given is not None else {name: each.model for name, each in traces.items()} or model
    _check(source, plan)
    plan = plan.expanded(has_data=calibration is not None)
    check_seed(seed)
    _check_callbacks(callbacks, model, calibration, scope)
    borrowed = not trained and _keeps_off(plan)
    with torch.inference_mode(False):
        if isinstance(source, Mapping):
            _check_views_of_several(scope, mode)
            views = _by_tasks(source, dynamic_shapes=dynamic_shapes, outputs=outputs)
            calls: Any = {name: each.call for name, each in traces.items()} or example_inputs
            return _prepare_several(source, traces, plan, calls, data, seed, views, tune, borrowed=borrowed)
        inputs = example_inputs if example_inputs is not None or given is not None else _inputs_of(plan, source)
        call = given.call if given is not None else call_of(source, inputs)
        only_read = borrowed and calibration is None  # else it is run, which may write to its buffers
        trainable = source if only_read else _copy(source, borrowed=borrowed)
        known = None
        if given is not None:
            traced, known = given.for_copy(trainable, borrowed=borrowed)
        else:
            step(f"tracing {type(source).__name__}")
            traced = trace_in(mode, trainable, call, compare=True, **view)
        if not borrowed:
            check_own(source, traced)
        if traced.scope and (outputs if given is None else given.view["outputs"]) is not None:
            _check_around(trainable, traced, call)
        check_calibration(calibration, source, Signature.of(source, call), processes)
        return Prepared(
            trainable,
            traced,
            plan,
            original=source,
            example_inputs=call,
            calibration=held_out(calibration, tune, traced, {"": Signature.of(source, call)}, seed=seed),
            callbacks=callbacks,
            seed=seed,
            borrowed=borrowed,
            known=known,
        )


def _check_views_of_several(scope: str | None, mode: str) -> None:
    if scope is not None:
        raise PlanError("scope names a submodule of one model, but several were given; give the submodules")
    if mode != "eval":
        raise PlanError(f"mode={mode!r} is for one model, but several were given; join their eval forms")


def _check_callbacks(callbacks: Callbacks, model: Models, calibration: Batches | None, scope: str | None) -> None:
    loss = callbacks.loss
    evaluate: Any = callbacks.evaluate
    if not isinstance(evaluate, Mapping):
        evaluate = {"": evaluate}
    elif not isinstance(model, Mapping):
        raise PlanError("evaluate: a mapping is for several models, but one was given; give the function alone")
    elif unknown := [name for name in evaluate if name not in model]:
        raise PlanError(f"evaluate: there is no model {unknown[0]!r}; {closest(str(unknown[0]), list(model))}")
    for name, each in evaluate.items():
        check_callable(each, f"evaluate[{name!r}]" if name else "evaluate", "evaluate(module), which gives a score")
    check_callable(loss, "loss", "loss(outputs, labels)")
    if loss is not None and (isinstance(model, Mapping) or scope is not None):
        raise PlanError("loss= is of what one model gives as a whole; leave it out with several models or a scope")
    if loss is not None and calibration is None:
        raise PlanError("loss= is given and no data; pass calibration=, batches (inputs, labels)")


def _prepare_several(
    models: Mapping[str, nn.Module],
    traces: Mapping[str, Trace],
    plan: Plan,
    example_inputs: Inputs | None,
    data: tuple[Batches | None, Callbacks, Processes],
    seed: int,
    views: Mapping[str, dict[str, Any]],
    tune: Tune | None,
    *,
    borrowed: bool,
) -> Prepared:
    """Prepare a joint model: a copy of `models`, or what is `borrowed` from them for a pass that keeps off it."""
    if example_inputs is None:
        raise ExampleInputError("no example inputs: pass a mapping, example_inputs={'a': (xa,), 'b': (xb,)}")
    calibration, callbacks, processes = data
    given = by_task(example_inputs, models, "example_inputs")
    inputs = {name: _positional(name, models[name], each) for name, each in given.items()}
    batches = None if calibration is None else by_task(calibration, models, "calibration")
    copies = _copy(dict(models), borrowed=borrowed)
    traced = {}
    for name, model in counted(copies.items(), "tracing", copies):
        try:
            if traces:
                traced[name], _ = traces[name].for_copy(model, borrowed=borrowed)
            else:
                traced[name] = trace(model, inputs[name], compare=True, **views[name])
            signature = Signature.of(models[name], inputs[name])
            check_calibration(None if batches is None else batches[name], models[name], signature, processes)
        except GraphZipError as error:
            raise type(error)(f"task {name!r}: {error}") from error
    arity = {name: len(each) for name, each in inputs.items()}
    joint = join(traced)
    signatures = {name: Signature.of(model, inputs[name]) for name, model in models.items()}
    return Prepared(
        joined_module(copies, arity),
        joint,
        plan,
        original=joined_module(models, arity),
        example_inputs=inputs,
        calibration=held_out(batches, tune, joint, signatures, seed=seed),
        callbacks=callbacks,
        seed=seed,
        borrowed=borrowed,
    )


@public
def compile(
    model: Models,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    calibration: Batches | None = None,
    train: Train | None = None,
    loss: Loss | None = None,
    evaluate: Score | Mapping[str, Score] | None = None,
    seed: int = 0,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    outputs: Any | None = None,
    mode: str = "eval",
    tune: bool | int | Tune | None = None,
    device: str | torch.device | None = None,
    progress: Progress = None,
) -> Compiled:
    """Carry out `plan`: `prepare`, then `train(prepared, stage)` for every stage (where given), then `convert`.

    Arguments and errors are those of `prepare`. The model itself stays as it is. A plan that changes nothing returns
    normally and says so in the report. Without training, weights are not copied before they change where the first
    pass allows it: those that are mapped from files are read where they lie.

    With a `device` a copy of the model works there: passes, `train`, `evaluate` and tuning see it and the calibration
    data on that device, and the result is where the model is. Where the memory is not enough for the batches of
    `calibration`, the work begins anew, as if batches of half the size had been given, unless it has a `train` or a
    `loss`.
    """
    check_callable(train, "train", "train(prepared, stage)")
    place = device_of(device)
    views = (scope, dynamic_shapes, outputs, mode)
    fitted, callbacks = Tune.of(tune), Callbacks(loss, evaluate, progress)
    source, inputs = moved(model, example_inputs, place)

    def carried_out(data: Batches | None) -> Compiled:
        with watched(progress):
            trained = train is not None
            prepared = _prepare(source, plan, inputs, data, callbacks, seed, *views, fitted, trained=trained)
        if train is not None:
            for stage in prepared.steps():
                call_user(train, prepared, stage)
        return prepared.convert()

    compiled = fitting(carried_out, calibration, place, splits=loss is None, again=train is None)
    if source is not model:
        compiled.move(device_in(model))
    return compiled


def _keeps_off(plan: Plan) -> bool:
    """Whether the passes leave the module alone, so that its weights may be those of the user's model."""
    each = [pass_of(options, f"passes[{number}].{options.kind}") for number, options in enumerate(plan.passes)]
    return bool(each) and all(known.only_reads for known in each)


def _check(model: nn.Module | Mapping[str, nn.Module], plan: Plan) -> None:
    several = isinstance(model, Mapping)
    if not several:
        check_traceable(model)
    check_plan(plan)
    joins = [f"passes[{number}].{options.kind}" for number, options in enumerate(plan.passes) if options.joins]
    if several and plan.passes and not joins:
        raise PlanError(
            "several models were given, but no pass of the plan joins models; give one nn.Module, or an empty plan, "
            "which packs them side by side"
        )
    if joins and not several:
        raise PlanError(f"{joins[0]} joins several models, but one was given; give a mapping from task names to models")
    if isinstance(model, Mapping):
        _check_models(model)


def _check_models(models: Mapping[str, nn.Module]) -> None:
    if len(models) < 2:
        raise GraphZipError(f"a mapping of models needs at least two tasks, got {list(models)}; add the others")
    check_task_names(models)
    for name, model in models.items():
        check_traceable(model, f"task {name!r}")


def _by_tasks(models: Mapping[str, nn.Module], **given: Any) -> dict[str, dict[str, Any]]:
    """For every task its part of each option, which is a mapping, or `None` for all tasks."""
    parts = {
        what: dict.fromkeys(models) if each is None else by_task(each, models, what) for what, each in given.items()
    }
    return {name: {what: part[name] for what, part in parts.items()} for name in models}


def _positional(task: str, model: nn.Module, given: Any) -> tuple[Any, ...]:
    """The inputs of one of several models, which has no arguments by name in a joint one."""
    try:
        call = call_of(model, given)
    except ExampleInputError as error:
        raise ExampleInputError(f"task {task!r}: {error}") from error
    if call.kwargs:
        raise ExampleInputError(
            f"task {task!r}: {next(iter(call.kwargs))!r} does not follow the other arguments of "
            f"{type(model).__name__}; where several models are given, give those between as well"
        )
    return call.args


def _check_around(model: nn.Module, traced: Traced, inputs: Call) -> None:
    """Raises `ExampleInputError` where the model around the scope reads an output of it that is left out."""
    around = with_submodule(model, traced.scope, module_of(traced)).eval()
    try:
        with torch.no_grad():
            around(*inputs.args, **inputs.kwargs)
    except Exception as error:
        raise ExampleInputError(
            f"outputs: {type(model).__name__} reads more of what its {traced.scope!r} returns, and fails without it "
            f"({first_line(error)}); choose that, too"
        ) from error


def _copy(model: Any, *, borrowed: bool = False) -> Any:
    """A deep copy of a model, or of several, in which what they share stays shared; `borrowed`, with its parameters."""
    try:
        return borrow(model) if borrowed else deep_copy(model)
    except Exception as error:
        what = "one of the models" if isinstance(model, dict) else type(model).__name__
        raise GraphZipError(why_not_copied(what, error)) from error


def _inputs_of(plan: Plan, model: nn.Module) -> tuple[torch.Tensor, ...]:
    """Random inputs of the shapes that the plan names, in the model's dtype."""
    if not plan.inputs:
        raise ExampleInputError(
            "no example inputs: pass example_inputs=(x,), or give the plan `inputs: [[1, 3, 224, 224]]`"
        )
    check_room(plan.inputs)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(tuple(shape), generator=generator) for shape in plan.inputs)
    return tuple(value.to(device=like.device, dtype=like.dtype) for value in made)
