"""`torch.export` a model into the graph that everything else works on.

The graph is flat: placeholders, `get_attr` of parameters and buffers under their original names, ATen calls, one
output. It is functional (no in-place operator is left) and was traced in eval mode with a symbolic batch dimension.
The user's model is never touched: a structural copy that shares its tensors is traced.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from graphzip.arguments import check_examples, check_name, check_traceable
from graphzip.errors import ExampleInputError, TraceError
from graphzip.graph.asked import asked
from graphzip.graph.copies import deep_copy, flags_kept, in_mode, why_not_copied
from graphzip.graph.flat import Flat, flatten
from graphzip.graph.follow import Follower
from graphzip.graph.forms import Form
from graphzip.graph.frozen import Freezable
from graphzip.graph.inputs import InputSpec, input_specs
from graphzip.graph.modes import (
    FROZEN,
    lost_in_training,
    mark_cumulative,
    module_types,
    settle_modes,
    spectral_norms,
    unread,
)
from graphzip.graph.one import settle
from graphzip.graph.other_forms import OtherForms
from graphzip.graph.program import Call, export_program, run_model, separate, where
from graphzip.graph.randomness import random_notes
from graphzip.graph.source import first_line
from graphzip.graph.state import (
    Aliases,
    attach,
    drop_unread,
    fake_memo,
    graph_module,
    is_persistent,
    named_state,
    share_tree,
)
from graphzip.graph.tasks import Task
from graphzip.graph.torch_private import FakeTensor, pytree
from graphzip.graph.two_forms import Forms

__all__ = ["Traced", "trace", "trace_training"]

logger = logging.getLogger(__name__)


@dataclass
class Traced(Freezable):
    """A model as a flat ATen graph.

    `module` holds the graph and, under their original names, the parameters and buffers (shared with the model it
    was traced from). `node.meta["val"]` is a fake tensor whose batch dimension is symbolic, `node.meta["owner"]` the
    name of the submodule that ran the operator, `node.meta["source"]` its line in the model's source. The graph is the
    model only for inputs that fit `inputs` and `conditions`. Where several models were joined, `tasks` lists them, and
    the names of modules and parameters begin with the name of the task. Where `forms` is given, the graph computes the
    training form, too. `notes` are sentences on what the graph does not hold of the model, such as branches that exist
    only in training; they become the report's.
    """

    module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    example_inputs: tuple[Any, ...]
    example_kwargs: dict[str, Any] = field(default_factory=dict)
    aliases: Aliases = field(default_factory=dict)
    module_types: dict[str, str] = field(default_factory=dict)
    scope: str = ""
    notes: tuple[str, ...] = ()
    batch_dynamic: bool = True
    conditions: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
    forms: Forms | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def qualified(self, name: str) -> str:
        """The name of a parameter or module in the user's model: inside `scope`, where one was given."""
        return f"{self.scope}.{name}" if self.scope else name

    def copy(self, *, compiled: bool = True) -> Traced:
        """A graph of its own that shares all tensors with this one; `recompile` it where it is not `compiled`."""
        graph = copy.deepcopy(self.module.graph, fake_memo(self.module))
        module = graph_module(share_tree(self.module), graph, type(self.module).__name__, compiled=compiled)
        return replace(self, module=module)

    def adopt_state(self, module: nn.Module, *, copies: bool = True) -> bool:
        """Take over copies of the current tensors of `module`, found by name, in place of the ones held.

        Without `copies` it is the tensors themselves, which training then changes here, too. Where they are of another
        dtype or on another device, constants and inputs follow; whether that was so. The fake values of operators are
        then out of date.
        """
        current = dict(named_state(module))
        traced_as = {str(node.target): node.meta.get("val") for node in self.graph.nodes if node.op == "get_attr"}
        own: dict[int, torch.Tensor] = {}
        moves: dict[_Place, _Place] = {}
        held = [(name, old, current.get(name)) for name, old in named_state(self.module)]
        for name, old, tensor in held:
            if tensor is None:
                continue
            known = traced_as.get(name)  # the tensor held may be the model's own, moved in place
            before = _place(old if known is None else known)
            if before != _place(tensor):
                moves[before] = _place(tensor)
            if id(tensor) not in own:
                own[id(tensor)] = _copy_of(tensor, isinstance(old, nn.Parameter)) if copies else tensor
            attach(self.module, name, own[id(tensor)], persistent=is_persistent(self.module, name))
        if not moves:
            return False
        for name, old, tensor in held:
            if tensor is None:
                attach(self.module, name, _moved(old, moves), persistent=is_persistent(self.module, name))
        self._move_inputs(moves)
        return True

    def _move_inputs(self, moves: dict[_Place, _Place]) -> None:
        self.example_inputs, self.example_kwargs = pytree.tree_map(
            lambda leaf: _moved(leaf, moves) if isinstance(leaf, torch.Tensor) else leaf,
            (self.example_inputs, self.example_kwargs),
        )
        specs = []
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, self.inputs, strict=True):
            value = node.meta["val"]
            if isinstance(value, FakeTensor):
                with value.fake_mode:
                    value = node.meta["val"] = _moved(value, moves)
            specs.append(spec if spec.dtype is None else replace(spec, dtype=value.dtype))
        self.inputs = tuple(specs)


def _copy_of(tensor: torch.Tensor, is_parameter: bool) -> torch.Tensor:
    value = tensor.detach().clone()
    return nn.Parameter(value, tensor.requires_grad) if is_parameter else value


_Place = tuple[torch.dtype, torch.device]


def _place(tensor: torch.Tensor) -> _Place:
    return tensor.dtype, tensor.device


def _moved(tensor: torch.Tensor, moves: dict[_Place, _Place]) -> torch.Tensor:
    """Where tensors of its kind went; where there were none, to the device that others went to."""
    if _place(tensor) in moves:
        dtype, device = moves[_place(tensor)]
        return tensor.to(device, dtype)
    devices = {old: new for (_, old), (_, new) in moves.items()}
    return tensor.to(devices.get(tensor.device, tensor.device))


def trace(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    compare: bool = False,
) -> Traced:
    """Trace `model` on `example_inputs` (positional arguments, batch first).

    An example batch of one is repeated to two, because `torch.export` bakes a batch of one into the graph; a model that
    takes no batch but one is traced with it. `scope` names a submodule: only it is traced, on the inputs it gets inside
    the model. `dynamic_shapes` is handed to `torch.export.export`; by default the first dimension is dynamic and all
    others are fixed. `compare` looks for what the model computes otherwise in training, for `Traced.notes`; where its
    code asks for its mode, that takes a second trace.

    Raises `ExampleInputError` where the model does not accept the inputs, `TraceError` where it cannot be traced.
    """
    _check(model, example_inputs, scope)
    with torch.inference_mode(False), flags_kept(model):
        source = _Source.of(model, example_inputs, scope)
        flat, other = source.flat(dynamic_shapes, other_forms=compare)
        traced = source.traced(flat, lambda: other.training_module().graph)
        skeleton = source.skeleton
        lost = unread(skeleton, [traced.graph], traced.aliases) | lost_in_training(skeleton) | spectral_norms(skeleton)
        more = () if flat.form is None else other.notes(flat.form, tuple(lost))
        drop_unread(traced.module, traced.graph)
        traced.notes = (*lost.values(), *random_notes(traced.graph), *flat.all_notes(), *other.draws(), *more)
        return traced


def trace_training(
    model: nn.Module, example_inputs: tuple[Any, ...], *, scope: str | None = None, dynamic_shapes: Any | None = None
) -> tuple[Traced, Traced | None]:
    """Trace the eval form and the training form; none where training is the same but for batch norm and dropout.

    In the training form, too, batch norms and dropouts are as in eval: the module made of it lets them follow its mode.
    The notes of both say what neither form holds. Arguments and errors are those of `trace`; `TraceError` too where the
    training form cannot be traced, or wants other weights or inputs than the eval form.
    """
    _check(model, example_inputs, scope)
    with torch.inference_mode(False), flags_kept(model):
        source = _Source.of(model, example_inputs, scope)
        flat, other = source.flat(dynamic_shapes, other_forms=True)
        traced = source.traced(flat, lambda: other.training_module().graph)
        trained = None
        if flat.form is not None and (other.asks or lost_in_training(source.skeleton)):
            trained = _trained(source, other, flat.form, traced)
        graphs = [each.graph for each in (traced, trained) if each is not None]
        lost = unread(source.skeleton, graphs, traced.aliases) | spectral_norms(source.skeleton)
        for each in (traced, trained):
            if each is not None:
                drop_unread(each.module, each.graph)
        traced.notes = (*lost.values(), *random_notes(traced.graph), *flat.all_notes(), *other.draws())
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
    def of(cls, model: nn.Module, example_inputs: tuple[Any, ...], scope: str | None) -> _Source:
        skeleton = _skeleton(model)
        given: Call = (separate(example_inputs), {})
        if scope:
            skeleton, given = _enter_scope(model, skeleton, scope, given[0])
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
        module.recompile()
        _mark_constants(module, self.skeleton)
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


def _check(model: nn.Module, example_inputs: tuple[Any, ...], scope: str | None) -> None:
    check_traceable(model)
    check_examples(example_inputs)
    if scope is not None:
        check_name(scope, "scope")


def _skeleton(model: nn.Module) -> nn.Module:
    try:
        return in_mode(model, False)
    except Exception as error:
        raise TraceError(why_not_copied(type(model).__name__, error)) from error


def _enter_scope(model: nn.Module, skeleton: nn.Module, scope: str, args: tuple[Any, ...]) -> tuple[nn.Module, Call]:
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
            seen.append((separate(inputs), separate(keywords)))

    runner.get_submodule(scope).register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with torch.no_grad():
            runner(*args)
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
        if node.op == "get_attr" and node.target not in named and "numbers" not in node.meta:
            node.meta["constant"] = True


_TAKEN = {name for name in dir(fx.GraphModule) if not hasattr(nn.Module, name)} | {"meta"}


def _check_names(source: nn.Module) -> None:
    """A graph module has attributes of its own that a submodule or parameter cannot be named after."""
    for name in [*source._modules, *source._parameters, *source._buffers]:
        if name in _TAKEN:
            raise TraceError(
                f"{type(source).__name__} has an attribute {name!r}, which torch.fx.GraphModule keeps for itself; "
                "rename it"
            )
