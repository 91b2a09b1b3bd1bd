"""`torch.export` a model into the graph that everything else works on.

The graph is flat: placeholders, `get_attr` of parameters and buffers under their original names, ATen calls, one
output. It is functional (no in-place operator is left) and was traced in eval mode with a symbolic batch dimension.
The user's model is never touched: a structural copy that shares its tensors is traced.
"""

from __future__ import annotations

import copy
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.utils import _pytree as pytree

from graphzip.errors import ExampleInputError, TraceError
from graphzip.graph.asked import asked
from graphzip.graph.blocks import open_blocks
from graphzip.graph.clean import clean
from graphzip.graph.conditions import conditions_of
from graphzip.graph.copies import flags_kept, in_mode
from graphzip.graph.inputs import InputSpec, input_specs, with_batch_of_two
from graphzip.graph.modes import lost_in_training, mark_cumulative, module_types, settle_modes, unread
from graphzip.graph.other_forms import OtherForms
from graphzip.graph.randomness import random_notes
from graphzip.graph.source import first_line
from graphzip.graph.state import (
    Aliases,
    attach,
    drop_unread,
    find_aliases,
    graph_module,
    is_persistent,
    named_state,
    rebuild_state,
    share_tree,
)
from graphzip.graph.tasks import Task

__all__ = ["Traced", "trace"]

logger = logging.getLogger(__name__)

_TORCH_HOME = f"{Path(torch.__file__).parent}/"


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


@contextmanager
def _tracing_mode() -> Iterator[None]:
    """The fused attention fast path may not hide the graph, and the caller's grad mode may not shape it."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


_CHATTY = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the terminal what torch prints where an export fails: half a graph, and the traceback of an operator.

    And what it says of every recurrent layer, which looks after its list of weights by itself.

    The error that is raised says what matters. What a model itself prints comes out after a successful export.
    """
    loggers = [logging.getLogger(name) for name in _CHATTY]
    silent = [chatty.disabled for chatty in loggers]
    spill = io.StringIO()
    try:
        for chatty in loggers:
            chatty.disabled = True
        with redirect_stderr(spill), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*_flat_weights.* were assigned during export")
            yield
        sys.stderr.write(spill.getvalue())
    except Exception:
        logger.debug("%s", spill.getvalue())
        raise
    finally:
        for chatty, was in zip(loggers, silent, strict=True):
            chatty.disabled = was


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
    if not isinstance(model, nn.Module):
        raise TraceError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"{type(model).__name__} is TorchScript, which hides its source; pass the nn.Module it is from"
        )
    if not isinstance(example_inputs, tuple):
        raise ExampleInputError(
            f"example_inputs must be a tuple of positional arguments, got {type(example_inputs).__name__}; "
            "for a single input write (x,)"
        )
    with torch.inference_mode(False), flags_kept(model):
        skeleton = _skeleton(model)
        given: Call = (_separate(example_inputs), {})
        if scope:
            skeleton, given = _enter_scope(model, skeleton, scope, given[0])
        _check_names(skeleton)
        mark_cumulative(skeleton)
        with asked() as questions:
            program, call = _program(skeleton, given, dynamic_shapes)
        other = OtherForms(
            skeleton, questions, lambda twin: _export(twin, call, dynamic_shapes), lambda twin: _run(twin, call)
        )
        return _to_traced(program, skeleton, call, scope or "", other, compare=compare)


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def _separate(inputs: Any) -> Any:
    """Tensors of their own: `torch.export` takes one tensor passed twice for one input."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, inputs)


def _skeleton(model: nn.Module) -> nn.Module:
    try:
        return in_mode(model, False)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}); graphzip works on a copy so that your model stays as "
            "it is. Make copy.deepcopy(model) work first (a non-leaf tensor kept as an attribute is the usual cause)"
        ) from error


def _batch_is_dynamic(call: Call) -> ShapesCollection:
    """The first dimension of every tensor that has the batch there is dynamic."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in tensors:
        if tensor.shape[0] == tensors[0].shape[0]:
            shapes[tensor] = {0: Dim.AUTO}
    return shapes


def _program(skeleton: nn.Module, given: Call, dynamic_shapes: Any | None) -> tuple[ExportedProgram, Call]:
    """The exported program and the arguments it was made with: with a batch of at least two, where the model takes one.

    Inputs that the model itself refuses are told from a model that runs but does not trace.
    """
    call: Call = with_batch_of_two(given)
    try:
        return _export(skeleton, call, dynamic_shapes), call
    except Exception as error:
        _check_accepts(skeleton, given)
        if call is given or _accepts(skeleton, call):
            raise _untraceable(skeleton, error) from error
    name = type(skeleton).__name__
    logger.warning("%s takes a batch of one and no other; the result takes a batch of one, too", name)
    try:
        return _export(skeleton, given, {}), given
    except Exception as error:
        raise _untraceable(skeleton, error) from error


def _export(skeleton: nn.Module, call: Call, shapes: Any | None) -> ExportedProgram:
    shapes = shapes if shapes is not None else _batch_is_dynamic(call)
    with _tracing_mode(), _quiet():
        return export(skeleton, *call, dynamic_shapes=shapes or None, strict=False)


def _accepts(skeleton: nn.Module, call: Call) -> bool:
    try:
        _run(skeleton, call)
    except Exception:
        return False
    return True


def _run(skeleton: nn.Module, call: Call) -> Any:
    with torch.no_grad():
        return copy.deepcopy(skeleton)(*_separate(call[0]), **_separate(call[1]))


def _check_accepts(skeleton: nn.Module, call: Call) -> None:
    try:
        _run(skeleton, call)
    except Exception as error:
        shapes = ", ".join(_describe(arg) for arg in (*call[0], *call[1].values()))
        raise ExampleInputError(
            f"{type(skeleton).__name__} itself fails on the example inputs ({shapes}): "
            f"{first_line(error)}{_where(error)}; pass example_inputs that model(*example_inputs) accepts"
        ) from error


def _untraceable(skeleton: nn.Module, error: Exception) -> TraceError:
    text = first_line(error)
    advice = (
        "make the control flow there independent of tensor values (or compile only the part that traces: "
        "scope='name.of.submodule')"
    )
    if "dynamic_shapes" in text or "Constraints violated" in text:
        advice = "give dynamic_shapes that the model allows (torch.export.export describes them)"
    elif "register" in text:
        advice = "pass and return tensors, numbers, tuples, lists and dicts, or register the type"
    elif "nference" in text:
        advice = "use torch.no_grad() instead of torch.inference_mode() inside the model"
    return TraceError(
        f"{type(skeleton).__name__} runs but torch.export cannot trace it: {text}{_where(error)}; {advice}"
    )


def _where(error: BaseException) -> str:
    """` at file:line in function`, the innermost frame that is not torch's own."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_TORCH_HOME) and frame.filename != __file__ and frame.filename[:1] != "<"
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f" (at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line})"


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


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
            seen.append((_separate(inputs), _separate(keywords)))

    runner.get_submodule(scope).register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with torch.no_grad():
            runner(*args)
    except Exception as error:
        raise ExampleInputError(
            f"{type(model).__name__} fails on the example inputs: {first_line(error)}{_where(error)}"
        ) from error
    if not seen:
        raise TraceError(
            f"scope {scope!r} is not run by {type(model).__name__} on the example inputs; choose one that is"
        )
    return inner, seen[0]


def _to_traced(
    program: ExportedProgram, source: nn.Module, call: Call, scope: str, other: OtherForms, *, compare: bool
) -> Traced:
    unlifted = program.module(check_guards=False)
    assert isinstance(unlifted, fx.GraphModule)
    conditions = conditions_of(unlifted.graph)
    notes = open_blocks(unlifted)
    evaluated = other.eval_form(unlifted) if compare else None
    aliases = find_aliases(source)
    graph = unlifted.graph
    root = rebuild_state(source, unlifted, aliases)
    module = graph_module(root, graph, type(source).__name__, compiled=False)
    clean(module, aliases)
    types = module_types(source)
    settle_modes(module, source, types, aliases, lambda: other.training().graph)
    module.recompile()
    drop_unread(module, module.graph)
    _mark_constants(module, source)
    lost = unread(source, module.graph, aliases) | lost_in_training(source)
    notes += other.draws()
    if evaluated is not None:
        notes += other.notes(evaluated, tuple(lost))
    specs = input_specs(module.graph)
    if not any(None in spec.shape for spec in specs):
        logger.warning("%s fixes its batch size to that of the example inputs", type(source).__name__)
    return Traced(
        module=module,
        inputs=specs,
        example_inputs=call[0],
        example_kwargs=call[1],
        aliases=aliases,
        module_types=types,
        scope=scope,
        notes=(*lost.values(), *random_notes(module.graph), *notes),
        batch_dynamic=any(None in spec.shape for spec in specs),
        conditions=conditions,
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
