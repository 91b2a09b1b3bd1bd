"""`torch.export` a model into the graph that everything else works on.

The graph is flat: placeholders, `get_attr` of parameters and buffers under their original names, ATen calls, one
output. It is functional (no in-place operator is left) and was traced in eval mode with a symbolic batch dimension.
The user's model is never touched: a structural copy that shares its tensors is traced.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from graphzip.arguments import check_examples, check_module, check_name
from graphzip.errors import ExampleInputError, TraceError
from graphzip.graph.asked import asked
from graphzip.graph.copies import flags_kept, in_mode
from graphzip.graph.flat import Flat, flatten
from graphzip.graph.inputs import InputSpec, input_specs
from graphzip.graph.modes import lost_in_training, mark_cumulative, module_types, settle_modes, unread
from graphzip.graph.one import settle
from graphzip.graph.other_forms import OtherForms
from graphzip.graph.program import Call, export_program, run_model, separate, where
from graphzip.graph.randomness import random_notes
from graphzip.graph.source import first_line
from graphzip.graph.state import (
    Aliases,
    attach,
    drop_unread,
    graph_module,
    is_persistent,
    named_state,
    share_tree,
)
from graphzip.graph.tasks import Task

__all__ = ["Traced", "trace"]

logger = logging.getLogger(__name__)


@dataclass
class Traced:
    """A model as a flat ATen graph.

    `module` holds the graph and, under their original names, the parameters and buffers (shared with the model it
    was traced from). `node.meta["val"]` is a fake tensor whose batch dimension is symbolic, `node.meta["owner"]` the
    name of the submodule that ran the operator, `node.meta["source"]` its line in the model's source. The graph is the
    model only for inputs that fit `inputs` and `conditions`. Where several models were joined, `tasks` lists them, and
    the names of modules and parameters begin with the name of the task. `notes` are sentences on what the graph does
    not hold of the model, such as branches that exist only in training; they become the report's.
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

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def qualified(self, name: str) -> str:
        """The name of a parameter or module in the user's model: inside `scope`, where one was given."""
        return f"{self.scope}.{name}" if self.scope else name

    def copy(self, *, compiled: bool = True) -> Traced:
        """A graph of its own that shares all tensors with this one; `recompile` it where it is not `compiled`."""
        graph = copy.deepcopy(self.module.graph, _fake_memo(self.module))
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


def _fake_memo(module: fx.GraphModule) -> dict[int, Any]:
    values = pytree.tree_leaves([node.meta.get("val") for node in module.graph.nodes])
    return {id(value): value for value in values}


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
    check_module(model)
    check_examples(example_inputs)
    if scope is not None:
        check_name(scope, "scope")
    with torch.inference_mode(False), flags_kept(model):
        skeleton = _skeleton(model)
        given: Call = (separate(example_inputs), {})
        if scope:
            skeleton, given = _enter_scope(model, skeleton, scope, given[0])
        _check_names(skeleton)
        mark_cumulative(skeleton)
        with asked() as questions:
            program = export_program(skeleton, given, dynamic_shapes)
        other = OtherForms(
            skeleton, questions, lambda twin: flat.program.again(twin), lambda twin: run_model(twin, flat.program.call)
        )
        form_of = other.eval_form if compare else None
        with asked():
            flat = settle(skeleton, given, flatten(program, skeleton, form_of), form_of)
        return _to_traced(flat, skeleton, scope or "", other)


def _skeleton(model: nn.Module) -> nn.Module:
    try:
        return in_mode(model, False)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}); graphzip works on a copy so that your model stays as "
            "it is. Make copy.deepcopy(model) work first (a non-leaf tensor kept as an attribute is the usual cause)"
        ) from error


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
    runner = copy.deepcopy(skeleton)

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


def _to_traced(flat: Flat, source: nn.Module, scope: str, other: OtherForms) -> Traced:
    module, call = flat.module, flat.program.call
    types = module_types(source)
    settle_modes(module, source, types, flat.aliases, lambda: other.training().graph)
    module.recompile()
    drop_unread(module, module.graph)
    _mark_constants(module, source)
    lost = unread(source, module.graph, flat.aliases) | lost_in_training(source)
    notes = [*flat.all_notes(), *other.draws()]
    if flat.form is not None:
        notes += other.notes(flat.form, tuple(lost))
    specs = input_specs(module.graph)
    batch_dynamic = any(None in spec.shape for spec in specs)
    if not batch_dynamic:
        logger.warning("%s fixes its batch size to that of the example inputs", type(source).__name__)
    return Traced(
        module=module,
        inputs=specs,
        example_inputs=call[0],
        example_kwargs=call[1],
        aliases=flat.aliases,
        module_types=types,
        scope=scope,
        notes=(*lost.values(), *random_notes(module.graph), *notes),
        batch_dynamic=batch_dynamic,
        conditions=flat.conditions,
    )


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
