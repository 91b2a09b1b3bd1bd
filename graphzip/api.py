"""The public functions: look at a model, prepare it, compile it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from graphzip.analysis.channels import analyse
from graphzip.analysis.cost import Cost, cost_of
from graphzip.analysis.groups import ChannelGroups, channel_groups_of
from graphzip.arguments import check_callable, check_room, check_seed, check_traceable
from graphzip.calibration import check_calibration
from graphzip.compiled import Compiled, load
from graphzip.errors import ExampleInputError, GraphZipError, PlanError, TraceError
from graphzip.graph.copies import borrow, deep_copy, why_not_copied
from graphzip.graph.state import named_state
from graphzip.graph.tasks import check_task_names, joined_module
from graphzip.graph.trace import Traced, trace
from graphzip.guard import call_user, public
from graphzip.plan import Plan
from graphzip.prepared import Prepared
from graphzip.rewrite.forms import trace_in
from graphzip.rewrite.join import join
from graphzip_passes.base import Restructuring, Staged
from graphzip_passes.table import PASSES

__all__ = ["Compiled", "Prepared", "channel_groups", "compile", "cost", "load", "prepare"]

Train = Callable[[Prepared, str], object]
Models = nn.Module | Mapping[str, nn.Module]
Inputs = tuple[Any, ...] | Mapping[str, tuple[Any, ...]]
Calibration = Iterable[Any] | Mapping[str, Iterable[Any]]


@public
def channel_groups(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    mode: str = "eval",
) -> ChannelGroups:
    """The channel groups of `model`: which channels are coupled, and which of them can be merged.

    `example_inputs` are positional arguments, batch first. Nothing is computed on real weights, so a model on the meta
    device will do. `scope` names a submodule to look at alone. `mode` is that of `prepare`.

    Raises `TraceError` for a model that cannot be traced, `ExampleInputError` for inputs it does not accept.
    """
    traced = trace_in(mode, model, example_inputs, scope=scope, dynamic_shapes=dynamic_shapes)
    return channel_groups_of(traced, analyse(traced.graph))


@public
def cost(module: nn.Module, example_inputs: tuple[Any, ...]) -> Cost:
    """Parameters, and multiply-accumulates for one sample of the shape of `example_inputs`.

    Raises `TraceError` for a model that cannot be traced, `ExampleInputError` for inputs it does not accept.
    """
    return cost_of(trace(module, example_inputs))


@public
def prepare(
    model: Models,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    calibration: Calibration | None = None,
    seed: int = 0,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    mode: str = "eval",
) -> Prepared:
    """Decide what the plan does to `model`, and give a copy of it to train before it is done.

    `calibration` is a re-iterable of batches (a tensor, or a tuple of positional inputs; entries beyond the model's
    inputs are left out). `seed` fixes every random choice. `scope` names the submodule to compile inside the model.
    `dynamic_shapes` is handed to `torch.export.export`; by default only the batch is dynamic.

    `mode` says which form of the model the result has. "eval": what the model computes in eval mode, where batch norm
    and dropout follow `.train()` and `.eval()`. "train": the training form, too (other outputs, auxiliary heads, drop
    paths), which the result computes after `.train()`, and the eval form after `.eval()` and in a file. What the
    result does not have, the report says.

    Where the plan has a pass that joins models, `model` is a mapping from task names to modules, and `example_inputs`,
    `calibration` and `dynamic_shapes` (where given) are mappings with the same keys.

    Raises `PlanError` for a plan that does not fit the model, `TraceError`, `ExampleInputError`.
    """
    return _prepare(model, plan, example_inputs, calibration, seed, scope, dynamic_shapes, mode, trained=True)


def _prepare(
    model: Models,
    plan: Plan,
    example_inputs: Inputs | None,
    calibration: Calibration | None,
    seed: int,
    scope: str | None,
    dynamic_shapes: Any | None,
    mode: str,
    *,
    trained: bool,
) -> Prepared:
    """`prepare`; where nothing is `trained`, weights need no copy for a first pass that leaves the model alone."""
    _check(model, plan)
    check_seed(seed)
    borrowed = not trained and _keeps_off(plan)
    with torch.inference_mode(False):
        if isinstance(model, Mapping):
            if scope is not None:
                raise PlanError("scope names a submodule of one model, but several were given; give the submodules")
            if mode != "eval":
                raise PlanError(f"mode={mode!r} is for one model, but several were given; join their eval forms")
            return _prepare_several(model, plan, example_inputs, calibration, seed, dynamic_shapes, borrowed=borrowed)
        inputs: Any = example_inputs if example_inputs is not None else _inputs_of(plan, model)
        trainable = _copy(model, borrowed=borrowed)
        traced = trace_in(mode, trainable, inputs, scope=scope, dynamic_shapes=dynamic_shapes, compare=True)
        if not borrowed:
            _check_own(model, traced)
        check_calibration(calibration, model, len(inputs))
        return Prepared(
            trainable,
            traced,
            plan,
            original=model,
            example_inputs=inputs,
            calibration=calibration,
            seed=seed,
            borrowed=borrowed,
        )


def _prepare_several(
    models: Mapping[str, nn.Module],
    plan: Plan,
    example_inputs: Inputs | None,
    calibration: Calibration | None,
    seed: int,
    dynamic_shapes: Any | None,
    *,
    borrowed: bool,
) -> Prepared:
    """Prepare a joint model: a copy of `models`, or what is `borrowed` from them for a pass that keeps off it."""
    if example_inputs is None:
        raise ExampleInputError("no example inputs: pass a mapping, example_inputs={'a': (xa,), 'b': (xb,)}")
    inputs = _by_task(example_inputs, models, "example_inputs")
    batches = None if calibration is None else _by_task(calibration, models, "calibration")
    shapes = dict.fromkeys(models) if dynamic_shapes is None else _by_task(dynamic_shapes, models, "dynamic_shapes")
    copies = _copy(dict(models), borrowed=borrowed)
    traced = {}
    for name, model in copies.items():
        try:
            traced[name] = trace(model, inputs[name], dynamic_shapes=shapes[name], compare=True)
            check_calibration(None if batches is None else batches[name], models[name], len(inputs[name]))
        except GraphZipError as error:
            raise type(error)(f"task {name!r}: {error}") from error
    arity = {name: len(each) for name, each in inputs.items()}
    return Prepared(
        joined_module(copies, arity),
        join(traced),
        plan,
        original=joined_module(models, arity),
        example_inputs=inputs,
        calibration=batches,
        seed=seed,
        borrowed=borrowed,
    )


@public
def compile(
    model: Models,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    calibration: Calibration | None = None,
    train: Train | None = None,
    seed: int = 0,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    mode: str = "eval",
) -> Compiled:
    """Carry out a plan: `prepare`, then `train(prepared, stage)` for every stage (where given), then `convert`.

    Arguments and errors are those of `prepare`. The model itself stays as it is. A plan that changes nothing returns
    normally and says so in the report. Without training, weights are not copied before they change where the first
    pass allows it: those that are mapped from files are read where they lie.
    """
    check_callable(train, "train", "train(prepared, stage)")
    trained = train is not None
    prepared = _prepare(model, plan, example_inputs, calibration, seed, scope, dynamic_shapes, mode, trained=trained)
    if train is not None:
        for stage in prepared.steps():
            call_user(train, prepared, stage)
    return prepared.convert()


def _keeps_off(plan: Plan) -> bool:
    """Whether the first pass leaves the module alone, so that its weights may be those of the user's model."""
    first = PASSES[type(plan.passes[0])] if plan.passes else None
    return first is not None and not issubclass(first, (Restructuring, Staged))


def _check(model: Models, plan: Plan) -> None:
    several = isinstance(model, Mapping)
    if not several:
        check_traceable(model)
    if not isinstance(plan, Plan):
        raise PlanError(f"expected a graphzip.Plan, got {type(plan).__name__}; write Plan([...]) or Plan.load(path)")
    joins = [f"passes[{number}].{options.kind}" for number, options in enumerate(plan.passes) if options.joins]
    if several and not joins:
        raise PlanError("several models were given, but no pass of the plan joins models; give one nn.Module")
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


def _by_task(given: Any, models: Mapping[str, nn.Module], what: str) -> dict[str, Any]:
    """A mapping with the keys of `models`, in their order."""
    wanted = ", ".join(map(repr, models))
    if not isinstance(given, Mapping):
        raise ExampleInputError(
            f"{what} is a {type(given).__name__}, but several models were given; pass a mapping with the keys {wanted}"
        )
    if set(given) != set(models):
        keys = ", ".join(map(repr, given)) or "none"
        raise ExampleInputError(f"{what} has the keys {keys}, the models have {wanted}; give one entry per task")
    return {name: given[name] for name in models}


def _copy(model: Any, *, borrowed: bool = False) -> Any:
    """A deep copy of a model, or of several, in which what they share stays shared; `borrowed`, with its parameters."""
    try:
        return borrow(model) if borrowed else deep_copy(model)
    except Exception as error:
        what = "one of the models" if isinstance(model, dict) else type(model).__name__
        raise GraphZipError(why_not_copied(what, error)) from error


def _check_own(model: nn.Module, traced: Traced) -> None:
    """Raises `TraceError` where the copy of a model computes with the tensors of the model itself."""
    theirs = {value.data_ptr(): name for name, value in named_state(model) if value.numel() and not value.is_meta}
    for _, value in named_state(traced.module):
        name = None if value.is_meta or value.layout != torch.strided else theirs.get(value.data_ptr())
        if name is not None:
            raise TraceError(
                f"a copy of {type(model).__name__} reads {name!r} of the model itself: a function that was set on it "
                "(its forward, say) holds the model; write it as a method, or bind it (types.MethodType)"
            )


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
