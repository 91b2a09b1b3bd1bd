"""`torch.export` a model into the graph that everything else works on.

The graph is flat: placeholders, `get_attr` of parameters and buffers under their original names, ATen calls, one
output. It is functional (no in-place operator is left) and was traced in eval mode with a symbolic batch dimension.
The user's model is never touched: a structural copy that shares its tensors is traced.
"""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from graphzip.errors import ExampleInputError, TraceError
from graphzip.graph.clean import clean
from graphzip.graph.inputs import InputSpec, input_specs, with_batch_of_two
from graphzip.graph.state import (
    Aliases,
    attach,
    drop_unread,
    find_aliases,
    graph_module,
    is_persistent,
    named_state,
    rebuild_state,
)

__all__ = ["Traced", "share_copy", "trace"]

logger = logging.getLogger(__name__)

_TORCH_HOME = str(Path(torch.__file__).parent)


@dataclass
class Traced:
    """A model as a flat ATen graph.

    `module` holds the graph and, under their original names, the parameters and buffers (shared with the model it
    was traced from). `node.meta["val"]` is a fake tensor whose batch dimension is symbolic, `node.meta["owner"]` the
    name of the submodule that ran the operator, `node.meta["source"]` its line in the model's source.
    """

    module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    example_inputs: tuple[Any, ...]
    example_kwargs: dict[str, Any] = field(default_factory=dict)
    aliases: Aliases = field(default_factory=dict)
    module_types: dict[str, str] = field(default_factory=dict)
    scope: str = ""
    training_only: tuple[str, ...] = ()
    batch_dynamic: bool = True

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def qualified(self, name: str) -> str:
        """The name of a parameter or module in the user's model: inside `scope`, where one was given."""
        return f"{self.scope}.{name}" if self.scope else name

    def copy(self) -> Traced:
        """A graph of its own that shares all tensors with this one."""
        graph = copy.deepcopy(self.module.graph, _fake_memo(self.module))
        module = graph_module(share_copy(self.module), graph, type(self.module).__name__)
        return replace(self, module=module)

    def adopt_state(self, module: nn.Module) -> None:
        """Take over copies of the current tensors of `module`, found by name, in place of the ones held."""
        current = dict(named_state(module))
        own: dict[int, torch.Tensor] = {}
        for name, old in list(named_state(self.module)):
            tensor = current.get(name)
            if tensor is None:
                continue
            if id(tensor) not in own:
                value = tensor.detach().clone()
                own[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(old, nn.Parameter) else value
            attach(self.module, name, own[id(tensor)], persistent=is_persistent(self.module, name))


def _fake_memo(module: fx.GraphModule) -> dict[int, Any]:
    values = pytree.tree_leaves([node.meta.get("val") for node in module.graph.nodes])
    return {id(value): value for value in values}


def share_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the module structure that shares every parameter and buffer with `model`."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


@contextmanager
def _tracing_mode() -> Iterator[None]:
    """Neither the caller's grad mode nor the fused attention fast path may shape the graph."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def trace(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
) -> Traced:
    """Trace `model` on `example_inputs` (positional arguments, batch first).

    An example batch of one is repeated to two, because `torch.export` bakes a batch of one into the graph.
    `scope` names a submodule: only it is traced, on the inputs it gets inside the model. `dynamic_shapes` is handed to
    `torch.export.export`; by default the first dimension is dynamic and all others are fixed.

    Raises `ExampleInputError` where the model does not accept the inputs, `TraceError` where it cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    if not isinstance(example_inputs, tuple):
        raise ExampleInputError(
            f"example_inputs must be a tuple of positional arguments, got {type(example_inputs).__name__}; "
            "for a single input write (x,)"
        )
    skeleton = _eval_copy(model)
    kwargs: dict[str, Any] = {}
    args = with_batch_of_two(_separate(example_inputs))
    if scope:
        skeleton, args, kwargs = _enter_scope(model, skeleton, scope, args)
    _check_names(skeleton)
    program = _export(skeleton, args, kwargs, dynamic_shapes)
    return _to_traced(program, skeleton, args, kwargs, scope or "")


def _separate(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors of their own: `torch.export` takes one tensor passed twice for one input."""
    separate: tuple[Any, ...] = pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, inputs
    )
    return separate


def _eval_copy(model: nn.Module) -> nn.Module:
    try:
        return share_copy(model).eval()
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}); graphzip works on a copy so that your model stays as "
            "it is. Make copy.deepcopy(model) work first (a non-leaf tensor kept as an attribute is the usual cause)"
        ) from error


def _batch_is_dynamic(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """`dynamic_shapes` by argument name: the first dimension of every tensor that has the batch there."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    batch = tensors[0].shape[0] if tensors else None

    def of(leaf: Any) -> dict[int, Any] | None:
        if isinstance(leaf, torch.Tensor):
            return {0: Dim.AUTO} if leaf.dim() and leaf.shape[0] == batch else {}
        return None

    signature = inspect.signature(module.forward)
    bound: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return {name: pytree.tree_map(of, value) for name, value in bound.items()}


def _export(skeleton: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any | None) -> ExportedProgram:
    try:
        shapes = shapes if shapes is not None else _batch_is_dynamic(skeleton, args, kwargs)
        with _tracing_mode():
            return export(skeleton, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _explain(skeleton, args, kwargs, error) from error


def _explain(skeleton: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> Exception:
    """Tell inputs that the model itself refuses from a model that runs but does not trace."""
    name = type(skeleton).__name__
    try:
        with torch.no_grad():
            copy.deepcopy(skeleton)(*args, **kwargs)
    except Exception as own:
        shapes = ", ".join(_describe(arg) for arg in (*args, *kwargs.values()))
        return ExampleInputError(
            f"{name} itself fails on the example inputs ({shapes}): {_first_line(own)}{_where(own)}; "
            "pass example_inputs that model(*example_inputs) accepts"
        )
    return TraceError(
        f"{name} runs but torch.export cannot trace it: {_first_line(error)}{_where(error)}; make the control "
        "flow there independent of tensor values (or compile only the part that traces: scope='name.of.submodule')"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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


def _enter_scope(
    model: nn.Module, skeleton: nn.Module, scope: str, args: tuple[Any, ...]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The submodule `scope` and the first inputs that reach it when the whole model runs."""
    try:
        inner = skeleton.get_submodule(scope)
    except AttributeError:
        known = ", ".join(name for name, _ in model.named_children())
        raise TraceError(
            f"scope {scope!r} is not a submodule of {type(model).__name__}; its children are {known}"
        ) from None
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    runner = copy.deepcopy(skeleton)

    def remember(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append((inputs, keywords))

    runner.get_submodule(scope).register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with torch.no_grad():
            runner(*args)
    except Exception as error:
        raise ExampleInputError(
            f"{type(model).__name__} fails on the example inputs: {_first_line(error)}{_where(error)}"
        ) from error
    if not seen:
        raise TraceError(
            f"scope {scope!r} is not run by {type(model).__name__} on the example inputs; choose one that is"
        )
    inputs, keywords = pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, seen[0]
    )
    return inner, with_batch_of_two(inputs), keywords


def _to_traced(
    program: ExportedProgram,
    source: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    scope: str,
) -> Traced:
    unlifted = program.module(check_guards=False)
    assert isinstance(unlifted, fx.GraphModule)
    aliases = find_aliases(source)
    graph = unlifted.graph
    root = rebuild_state(source, unlifted, aliases)
    module = graph_module(root, graph, type(source).__name__)
    clean(module, aliases)
    drop_unread(module, module.graph)
    specs = input_specs(module.graph)
    if not any(None in spec.shape for spec in specs):
        logger.warning("%s fixes its batch size to that of the example inputs", type(source).__name__)
    return Traced(
        module=module,
        inputs=specs,
        example_inputs=args,
        example_kwargs=kwargs,
        aliases=aliases,
        module_types=_leaf_types(source),
        scope=scope,
        training_only=_training_only(source, module.graph),
        batch_dynamic=any(None in spec.shape for spec in specs),
    )


_TAKEN = {name for name in dir(fx.GraphModule) if not hasattr(nn.Module, name)} | {"meta"}


def _check_names(source: nn.Module) -> None:
    """A graph module has attributes of its own that a submodule or parameter cannot be named after."""
    for name in [*source._modules, *source._parameters, *source._buffers]:
        if name in _TAKEN:
            raise TraceError(
                f"{type(source).__name__} has an attribute {name!r}, which torch.fx.GraphModule keeps for itself; "
                "rename it"
            )


def _leaf_types(source: nn.Module) -> dict[str, str]:
    """Exact classes of the torch.nn modules, by name: what may become such a module again."""
    return {
        name: type(module).__name__
        for name, module in source.named_modules()
        if type(module).__module__.startswith("torch.nn.modules.") and not hasattr(module, "parametrizations")
    }


def _training_only(source: nn.Module, graph: fx.Graph) -> tuple[str, ...]:
    """Submodules that hold parameters or drop paths and leave no operator in the eval graph."""
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    owners = {node.meta.get("owner", "") for node in graph.nodes if node.op == "call_function"}
    notes: list[str] = []
    for name, module in source.named_modules():
        own = {f"{name}.{key}" if name else key for key, _ in module.named_parameters()}
        nested = any(name.startswith(note.split("'")[1] + ".") for note in notes)
        if own and not own & used and not nested:
            notes.append(
                f"'{name}' ({type(module).__name__}) is not part of the eval graph; its parameters are left out"
            )
        elif type(module).__name__ in {"StochasticDepth", "DropPath"} and name not in owners:
            notes.append(f"'{name}' ({type(module).__name__}) acts only in training and is left out")
    return tuple(notes)
