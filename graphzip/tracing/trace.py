"""`torch.export` a model into the graph that everything else works on.

The graph is flat: placeholders, `get_attr` of parameters and buffers under their original names, ATen calls, one
output. It is functional (no in-place operator is left) and was traced in eval mode with a symbolic batch dimension.
The user's model is never touched: a structural copy that shares its tensors is traced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from graphzip.arguments import check_name, check_traceable
from graphzip.calls import Call, call_of, folded
from graphzip.canonical.shared_tables import tables_apart
from graphzip.errors import ExampleInputError, TraceError
from graphzip.graph.copies import deep_copy, flags_kept, in_mode, why_not_copied
from graphzip.graph.inputs import input_specs
from graphzip.graph.layers.factored import mark_calls
from graphzip.graph.meta import meta_of
from graphzip.graph.modes import (
    FROZEN,
    lost_in_training,
    mark_cumulative,
    module_types,
    settle_modes,
    spectral_norms,
    unread,
)
from graphzip.graph.randomness import random_notes
from graphzip.graph.source import first_line
from graphzip.graph.state import (
    drop_unread,
    named_state,
)
from graphzip.graph.traced import Traced
from graphzip.tracing.align_modes import Follower
from graphzip.tracing.batch_of_one import settle
from graphzip.tracing.compare_modes import Form
from graphzip.tracing.flatten import Flat, flatten
from graphzip.tracing.mode_queries import asked
from graphzip.tracing.other_modes import OtherForms
from graphzip.tracing.program import export_program, run_model, separate, where
from graphzip.tracing.results import Outputs, check_outputs, choose_outputs

__all__ = ["trace", "trace_training"]

logger = logging.getLogger(__name__)


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    outputs: Outputs | None = None,
    compare: bool = False,
) -> Traced:
    """Trace `model` on `example_inputs` (positional arguments, or arguments by name; batch first).

    An example batch of one is repeated to two, because `torch.export` bakes a batch of one into the graph; a model that
    takes no batch but one is traced with it. `scope` names a submodule: only it is traced, on the inputs it gets inside
    the model. `dynamic_shapes` is handed to `torch.export.export`; by default the first dimension is dynamic and all
    others are fixed. `outputs` are those that matter (`choose_outputs`). `compare` looks for what the model computes
    otherwise in training, for `Traced.notes`; where its code asks for its mode, that takes a second trace.

    Raises `ExampleInputError` where the model does not accept the inputs, `TraceError` where it cannot be traced, and
    `NotFoundError` where it has not the outputs.
    """
    _check(model, example_inputs, scope, outputs)
    with torch.inference_mode(False), flags_kept(model):
        source = _Source.of(model, example_inputs, scope)
        flat, other = source.flat(dynamic_shapes, other_forms=compare)
        traced = source.traced(flat, lambda: other.training_module().graph)
        left_out = _choose(traced, outputs)
        skeleton = source.skeleton
        lost = unread(skeleton, [traced.graph], traced.aliases) | lost_in_training(skeleton) | spectral_norms(skeleton)
        more = () if flat.form is None else other.notes(flat.form, tuple(lost))
        drop_unread(traced.module, traced.graph)
        drawn = random_notes(traced.graph)
        traced.notes = (*left_out, *lost.values(), *drawn, *flat.all_notes(), *other.draws(), *more)
        return traced


def trace_training(
    model: nn.Module,
    example_inputs: Any,
    *,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    outputs: Outputs | None = None,
) -> tuple[Traced, Traced | None]:
    """Trace the eval form and the training form; none where training is the same but for batch norm and dropout.

    In the training form, too, batch norms and dropouts are as in eval: the module made of it lets them follow its mode.
    The notes of both say what neither form holds. Arguments and errors are those of `trace`; `outputs` are those of the
    eval form, and the training form has all of its own. `TraceError` too where the training form cannot be traced, or
    wants other weights or inputs than the eval form.
    """
    _check(model, example_inputs, scope, outputs)
    with torch.inference_mode(False), flags_kept(model):
        source = _Source.of(model, example_inputs, scope)
        flat, other = source.flat(dynamic_shapes, other_forms=True)
        traced = source.traced(flat, lambda: other.training_module().graph)
        trained = None
        if flat.form is not None and (other.asks or lost_in_training(source.skeleton)):
            trained = _trained(source, other, flat.form, traced)
        left_out = _choose(traced, outputs)
        graphs = [each.graph for each in (traced, trained) if each is not None]
        lost = unread(source.skeleton, graphs, traced.aliases) | spectral_norms(source.skeleton)
        for each in (traced, trained):
            if each is not None:
                drop_unread(each.module, each.graph)
        traced.notes = (*left_out, *lost.values(), *random_notes(traced.graph), *flat.all_notes(), *other.draws())
        return traced, trained


def _trained(source: _Source, other: OtherForms, evaluated: Form, traced: Traced) -> Traced:
    """The training form in the words of the eval form."""
    name = type(source.skeleton).__name__
    advice = "compile the eval form (mode='eval'), or a part of the model alone (scope='name.of.submodule')"
    try:
        program = other.training()
    except Exception as error:
        text = f"{first_line(error)}{where(error)}"
        raise TraceError(f"the training form of {name} cannot be traced: {text}; {advice}") from error
    if other.has_own_weights:
        raise TraceError(
            f"train() and eval() of {name} change its weights, so its two forms cannot share them; {advice}"
        )
    follower = Follower(source.skeleton, evaluated)
    flat = flatten(program, source.skeleton, follower.rewrite)
    flat = settle(other.twin(), source.given, flat, follower.rewrite)
    trained = source.traced(flat, None)
    if trained.inputs != traced.inputs:
        raise TraceError(f"the training form of {name} takes {trained.inputs}, the eval form {traced.inputs}; {advice}")
    frozen = {trained.aliases.get(mean, mean): FROZEN for mean in follower.frozen}
    notes = (*follower.notes, *(f"in training mode, {note}" for note in flat.all_notes()))
    return replace(trained, module_types=trained.module_types | frozen, notes=notes)


@dataclass(frozen=True)
class _Source:
    """A copy of the model in eval mode, the inputs it is given, and its name in the user's model."""

    skeleton: nn.Module
    given: Call
    scope: str

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, scope: str | None) -> _Source:
        skeleton = _skeleton(model)
        given: Call = separate(call_of(model, example_inputs))
        if scope:
            skeleton, given = _enter_scope(model, skeleton, scope, given)
        _check_source(skeleton, scope or "")
        _check_names(skeleton)
        mark_cumulative(skeleton)
        return cls(skeleton, given, scope or "")

    def flat(self, dynamic_shapes: Any | None, *, other_forms: bool) -> tuple[Flat, OtherForms]:
        """The graph of the eval form; with `other_forms` it is kept in the form that others are compared with."""
        with asked() as questions:
            program = export_program(self.skeleton, self.given, dynamic_shapes)
        other = OtherForms(
            self.skeleton,
            questions,
            lambda twin: flat.program.again(twin),
            lambda twin: run_model(twin, flat.program.call),
        )
        form_of = other.eval_form if other_forms else None
        with asked():
            flat = settle(self.skeleton, self.given, flatten(program, self.skeleton, form_of), form_of)
        return flat, other

    def traced(self, flat: Flat, training: Callable[[], fx.Graph] | None) -> Traced:
        """A form of the model, with all its parameters; `training` gives the raw graph of the training mode."""
        module, call = flat.module, flat.program.call
        types = module_types(self.skeleton)
        if training is not None:
            settle_modes(module, self.skeleton, types, flat.aliases, training)
        tables_apart(module)
        module.recompile()
        _mark_constants(module, self.skeleton)
        mark_calls(module.graph, self.skeleton)
        specs = input_specs(module.graph)
        batch_dynamic = any(None in spec.shape for spec in specs)
        if not batch_dynamic:
            logger.warning("%s fixes its batch size to that of the example inputs", type(self.skeleton).__name__)
        return Traced(
            module=module,
            inputs=specs,
            example_inputs=call[0],
            example_kwargs=call[1],
            aliases=flat.aliases,
            module_types=types,
            scope=self.scope,
            batch_dynamic=batch_dynamic,
            conditions=flat.conditions,
        )


def _choose(traced: Traced, outputs: Outputs | None) -> tuple[str, ...]:
    """Leave out the outputs that do not matter; a sentence on them, where there are some."""
    left_out = () if outputs is None else choose_outputs(traced.module, outputs)
    return (f"left out of the results, as asked for (outputs=): {', '.join(left_out)}",) if left_out else ()


def _check(model: nn.Module, example_inputs: Any, scope: str | None, outputs: Outputs | None) -> None:
    check_traceable(model)
    call_of(model, example_inputs)
    if scope is not None:
        check_name(scope, "scope")
    if outputs is not None:
        check_outputs(outputs)


def _skeleton(model: nn.Module) -> nn.Module:
    try:
        return in_mode(model, False)
    except Exception as error:
        raise TraceError(why_not_copied(type(model).__name__, error)) from error


def _check_source(skeleton: nn.Module, scope: str) -> None:
    """Raises `TraceError` where a part of what is traced has no source in Python."""
    for name, module in skeleton.named_modules(prefix=scope):
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"{name!r} is TorchScript, which hides its source; put the nn.Module it is from in its place, or "
                "compile a part of the model beside it (scope='name.of.submodule')"
            )


def _enter_scope(model: nn.Module, skeleton: nn.Module, scope: str, given: Call) -> tuple[nn.Module, Call]:
    """The submodule `scope` and the first inputs that reach it when the whole model runs."""
    try:
        inner = skeleton.get_submodule(scope)
    except AttributeError:
        known = ", ".join(name for name, _ in model.named_children())
        raise TraceError(
            f"scope {scope!r} is not a submodule of {type(model).__name__}; its children are {known}"
        ) from None
    seen: list[Call] = []
    runner = deep_copy(skeleton)

    def remember(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not seen:
            seen.append(folded(inner, Call(separate(inputs), separate(keywords))))

    runner.get_submodule(scope).register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with torch.no_grad():
            runner(*given.args, **given.kwargs)
    except Exception as error:
        raise ExampleInputError(
            f"{type(model).__name__} fails on the example inputs: {first_line(error)}{where(error)}"
        ) from error
    if not seen:
        raise TraceError(
            f"scope {scope!r} is not run by {type(model).__name__} on the example inputs; choose one that is"
        )
    return inner, seen[0]


def _mark_constants(module: fx.GraphModule, source: nn.Module) -> None:
    """Tell tensors that stand in the model's code from its parameters and buffers."""
    named = {name for name, _ in named_state(source)}
    for node in module.graph.nodes:
        own = "numbers" in meta_of(node) or "choice" in meta_of(node)
        if node.op == "get_attr" and node.target not in named and not own:
            meta_of(node)["constant"] = True


_TAKEN = {name for name in dir(fx.GraphModule) if not hasattr(nn.Module, name)} | {"meta"}


def _check_names(source: nn.Module) -> None:
    """A graph module has attributes of its own that a submodule or parameter cannot be named after."""
    for name in [*source._modules, *source._parameters, *source._buffers]:
        if name in _TAKEN:
            raise TraceError(
                f"{type(source).__name__} has an attribute {name!r}, which torch.fx.GraphModule keeps for itself; "
                "rename it"
            )
