"""The public functions: look at a model, prepare it, compile it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from graphzip.analysis.channels import analyse
from graphzip.analysis.cost import Cost, cost_of
from graphzip.analysis.groups import ChannelGroups, channel_groups_of
from graphzip.compiled import Compiled, load
from graphzip.errors import ExampleInputError, GraphZipError, PlanError
from graphzip.graph.trace import trace
from graphzip.plan import Plan
from graphzip.prepared import Prepared, check_calibration

__all__ = ["Compiled", "Prepared", "channel_groups", "compile", "cost", "load", "prepare"]

Train = Callable[[Prepared, str], object]


def channel_groups(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
) -> ChannelGroups:
    """The channel groups of `model`: which channels are coupled, and which of them can be merged.

    `example_inputs` are positional arguments, batch first. Nothing is computed on real weights, so a model on the meta
    device will do. `scope` names a submodule to look at alone.

    Raises `TraceError` for a model that cannot be traced, `ExampleInputError` for inputs it does not accept.
    """
    traced = trace(model, example_inputs, scope=scope, dynamic_shapes=dynamic_shapes)
    return channel_groups_of(traced, analyse(traced.graph))


def cost(module: nn.Module, example_inputs: tuple[Any, ...]) -> Cost:
    """Parameters, and multiply-accumulates for one sample of the shape of `example_inputs`.

    Raises `TraceError` for a model that cannot be traced, `ExampleInputError` for inputs it does not accept.
    """
    return cost_of(trace(module, example_inputs))


def prepare(
    model: nn.Module,
    plan: Plan,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
) -> Prepared:
    """Decide what the plan does to `model`, and give a copy of it to train before it is done.

    `calibration` is a re-iterable of batches (a tensor, or a tuple of positional inputs; entries beyond the model's
    inputs are left out). `seed` fixes every random choice. `scope` names the submodule to compile inside the model.
    `dynamic_shapes` is handed to `torch.export.export`; by default only the batch is dynamic.

    Raises `PlanError` for a plan that does not fit the model, `TraceError`, `ExampleInputError`.
    """
    _check(model, plan)
    with torch.inference_mode(False):
        inputs = example_inputs if example_inputs is not None else _inputs_of(plan, model)
        trainable = _copy(model)
        traced = trace(trainable, inputs, scope=scope, dynamic_shapes=dynamic_shapes)
        check_calibration(calibration, model, len(inputs))
        return Prepared(
            trainable,
            traced,
            plan,
            original=model,
            example_inputs=inputs,
            calibration=calibration,
            seed=seed,
        )


def compile(
    model: nn.Module,
    plan: Plan,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    train: Train | None = None,
    seed: int = 0,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
) -> Compiled:
    """Carry out a plan: `prepare`, then `train(prepared, stage)` for every stage (where given), then `convert`.

    Arguments and errors are those of `prepare`. The model itself stays as it is. A plan that changes nothing returns
    normally and says so in the report.
    """
    prepared = prepare(
        model,
        plan,
        example_inputs,
        calibration=calibration,
        seed=seed,
        scope=scope,
        dynamic_shapes=dynamic_shapes,
    )
    if train is not None:
        for stage in prepared.steps():
            train(prepared, stage)
    return prepared.convert()


def _check(model: nn.Module, plan: Plan) -> None:
    if isinstance(model, Mapping):
        raise PlanError("several models were given, but no pass of the plan joins models; give one nn.Module")
    if not isinstance(model, nn.Module):
        raise GraphZipError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    if not isinstance(plan, Plan):
        raise PlanError(f"expected a graphzip.Plan, got {type(plan).__name__}; write Plan([...]) or Plan.load(path)")


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise GraphZipError(
            f"{type(model).__name__} cannot be copied ({error}); graphzip works on a copy so that your model stays as "
            "it is. Make copy.deepcopy(model) work first (a non-leaf tensor kept as an attribute is the usual cause)"
        ) from error


def _inputs_of(plan: Plan, model: nn.Module) -> tuple[torch.Tensor, ...]:
    """Random inputs of the shapes that the plan names, in the model's dtype."""
    if not plan.inputs:
        raise ExampleInputError(
            "no example inputs: pass example_inputs=(x,), or give the plan `inputs: [[1, 3, 224, 224]]`"
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(tuple(shape), generator=generator) for shape in plan.inputs)
    return tuple(value.to(device=like.device, dtype=like.dtype) for value in made)
