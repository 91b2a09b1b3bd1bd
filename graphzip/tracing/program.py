"""Run `torch.export` on a model: with an open batch where the model allows one, and with words for what fails."""

from __future__ import annotations

import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export

from graphzip.calls import Call
from graphzip.errors import ExampleInputError, TraceError
from graphzip.global_lock import ALONE
from graphzip.graph.branches import Watch, watched
from graphzip.graph.copies import deep_copy, recomputed, share_copy
from graphzip.graph.inputs import has_batch_of_one, with_batch_of_two
from graphzip.graph.source import OWN_HOME, TORCH_HOME, first_line
from graphzip.graph.torch_private import combine_args, pytree, tree_map_with_path
from graphzip.tracing.module_names import name_owners
from graphzip.tracing.open_sizes import by_name, named_dims
from graphzip.tracing.untraced_calls import ShowUnseen

__all__ = [
    "TRACED_AS_TWO",
    "Program",
    "asked_dims",
    "asked_minima",
    "automatic",
    "export_program",
    "is_free",
    "run_export",
    "run_model",
    "separate",
    "untraceable",
    "where",
]

logger = logging.getLogger(__name__)


TRACED_AS_TWO = "the example has a batch of one; it was traced with two rows, and the result takes one row and more"


@dataclass(frozen=True)
class Program:
    """An exported model, the arguments and shapes it was exported with, what it asked of sizes, and notes to report."""

    exported: ExportedProgram
    call: Call
    shapes: Any
    watch: Watch
    notes: tuple[str, ...] = ()

    def again(self, model: nn.Module) -> Program:
        """Another form of the model, exported in the same way. Raises what `torch.export` raises.

        Sizes that this form fixed are fixed in the other, too.
        """
        return run_export(model, self.call, self._still_open(model))

    def _still_open(self, model: nn.Module) -> Any:
        """The shapes as they were asked for, or where some sizes were fixed all the same, those that are open."""
        inputs = set(self.exported.graph_signature.user_inputs)
        nodes = [node for node in self.exported.graph.nodes if node.op == "placeholder" and node.name in inputs]
        leaves, asked = pytree.tree_leaves(self.call), asked_dims(model, self)
        open_ = {
            number: [dim for dim in dims if is_free(nodes[number].meta["val"].shape[dim])]
            for number, dims in asked.items()
        }
        if open_ == asked:
            return self.shapes
        return automatic([leaves[number] for number in open_], list(open_.values()))

    def unlifted(self) -> fx.GraphModule:
        module = self.exported.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        return module


def separate(inputs: Any) -> Any:
    """Tensors of their own: `torch.export` takes one tensor passed twice for one input."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, inputs)


def export_program(skeleton: nn.Module, given: Call, dynamic_shapes: Any | None) -> Program:
    """Export with a batch of at least two, where the model takes one, and with an open one, where it traces so.

    Inputs that the model itself refuses are told from a model that runs but does not trace.
    """
    call: Call = with_batch_of_two(given)
    try:
        found = run_export(skeleton, call, dynamic_shapes)
    except ExampleInputError:
        raise
    except Exception as error:
        return _second_choice(skeleton, given, call, dynamic_shapes, error)
    return found if call is given else _noted(found, TRACED_AS_TWO)


def _second_choice(
    skeleton: nn.Module, given: Call, call: Call, dynamic_shapes: Any | None, error: Exception
) -> Program:
    """Another form of the example, for a model that does not trace in the usual one."""
    _check_accepts(skeleton, given)
    name = type(skeleton).__name__
    choices: list[tuple[Call, Any, str]] = []
    if has_batch_of_one(given):
        taken = _accepts(skeleton, call)
        if not taken:
            choices.append((with_batch_of_two(given, only_first=True), dynamic_shapes, TRACED_AS_TWO))
        why = f"it cannot be traced with two: {first_line(error)}" if taken else "the model takes no batch but one"
        note = f"the batch is fixed at one, as in the example ({why}); the result takes a batch of one and no other"
        choices.append((given, dynamic_shapes or {}, note))
    elif dynamic_shapes is None:
        note = f"all sizes are fixed, the batch too, to those of the example: with an open batch, {first_line(error)}"
        choices.append((given, {}, f"{note}{where(error)}"))
    for inputs, shapes, note in choices:
        try:
            found = run_export(skeleton, _fresh(inputs), shapes)
        except Exception:  # the first failure is the one to tell
            continue
        logger.warning("%s: %s", name, note)
        return _noted(found, note)
    raise untraceable(skeleton, error) from error


def _fresh(call: Call) -> Call:
    """Copies without the marks that `torch.export` leaves on the tensors where it fails."""
    fresh: Call = separate(call)
    return fresh


def _noted(program: Program, note: str) -> Program:
    return replace(program, notes=(*program.notes, note))


def run_export(skeleton: nn.Module, call: Call, shapes: Any | None) -> Program:
    """`torch.export` with dimensions as `shapes` says, by default with an open batch. Raises what it raises.

    A copy is exported: what a model keeps of its inputs would stay in it, and is of no use outside of the export.
    """
    names = by_name(shapes)
    if names is not None:
        shapes = automatic(*named_dims(names, call))
    shapes = shapes if shapes is not None else _batch_is_dynamic(call)
    with ALONE, _tracing_mode(), _quiet(skeleton), watched() as watch:
        twin = share_copy(skeleton)
        exported = export(twin, *call, dynamic_shapes=shapes or None, strict=False)
    name_owners(exported.graph_module, twin)
    return Program(exported, call, shapes, watch)


def _batch_is_dynamic(call: Call) -> ShapesCollection | dict[str, Any]:
    """The first dimension of every tensor that has the batch there is dynamic."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    return automatic(tensors, [[0] if tensor.shape[0] == tensors[0].shape[0] else [] for tensor in tensors])


def automatic(tensors: list[torch.Tensor], dims: list[list[int]]) -> ShapesCollection | dict[str, Any]:
    """Shapes for `torch.export` in which these dimensions of these tensors are free, as far as the trace lets them."""
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, free in zip(tensors, dims, strict=True):
        if free:
            shapes[tensor] = dict.fromkeys(free, Dim.AUTO)
    return shapes if any(dims) else {}


def is_free(size: Any) -> bool:
    """Whether a size of a trace is no number."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def asked_dims(model: nn.Module, program: Program) -> dict[int, list[int]]:
    """The dimensions that were to be open, by the number of the tensor among all leaves of the arguments."""
    given: Any = combine_args(model, *program.call)
    shapes = _shapes_of(model, program)
    if isinstance(shapes, list | tuple) and shapes:
        shapes = dict(zip(given, shapes, strict=True))
    found: dict[int, list[int]] = {}
    if not shapes:
        return found
    numbers = count()

    def note(path: Any, leaf: Any, asked: Any) -> None:
        number = next(numbers)
        if isinstance(leaf, torch.Tensor) and asked:
            dims = asked.items() if isinstance(asked, dict) else enumerate(asked)
            found[number] = [dim % max(leaf.dim(), 1) for dim, size in dims if size not in (None, Dim.STATIC)]

    tree_map_with_path(note, given, shapes, tree_name="inputs")
    return found


def asked_minima(model: nn.Module, program: Program) -> set[int]:
    """The smallest sizes that open dimensions were to have, where that was said."""
    leaves = pytree.tree_leaves(_shapes_of(model, program))
    bounds = (getattr(getattr(leaf, "root", leaf), "min", None) for leaf in leaves)
    return {bound for bound in bounds if isinstance(bound, int)}


def _shapes_of(model: nn.Module, program: Program) -> Any:
    shapes = program.shapes
    if isinstance(shapes, ShapesCollection):
        shapes = shapes.dynamic_shapes(model, *program.call)  # type: ignore[no-untyped-call]
    return shapes


@contextmanager
def _tracing_mode() -> Iterator[None]:
    """The fused attention fast path may not hide the graph, and the caller's grad mode may not shape it.

    Nor may a dropout that does not act be taken for its input.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad(), ShowUnseen():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


_CHATTY = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Keep off the terminal what torch prints where an export fails: half a graph, and the traceback of an operator.

    And what it says of every recurrent layer, which looks after its list of weights by itself, and of weights that are
    computed before every call.

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
            names = "|".join(re.escape(f"self.{name}") for name in recomputed(model))
            warnings.filterwarnings("ignore", message=rf"The tensor attributes? (({names})(, )?)+ \w+ assigned during")
            yield
        sys.stderr.write(spill.getvalue())
    except Exception:
        logger.debug("%s", spill.getvalue())
        raise
    finally:
        for chatty, was in zip(loggers, silent, strict=True):
            chatty.disabled = was


def _accepts(skeleton: nn.Module, call: Call) -> bool:
    try:
        run_model(skeleton, call)
    except Exception:
        return False
    return True


def run_model(skeleton: nn.Module, call: Call) -> Any:
    """What a copy of the model returns."""
    with torch.no_grad():
        return deep_copy(skeleton)(*separate(call[0]), **separate(call[1]))


def _check_accepts(skeleton: nn.Module, call: Call) -> None:
    try:
        run_model(skeleton, call)
    except Exception as error:
        shapes = ", ".join(_describe(arg) for arg in (*call[0], *call[1].values()))
        raise ExampleInputError(
            f"{type(skeleton).__name__} itself fails on the example inputs ({shapes}): "
            f"{first_line(error)}{where(error)}; pass example_inputs that model(*example_inputs) accepts"
        ) from error


def untraceable(skeleton: nn.Module, error: Exception) -> TraceError:
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
        f"{type(skeleton).__name__} runs but torch.export cannot trace it: {text}{where(error)}; {advice}"
    )


def where(error: BaseException) -> str:
    """` at file:line in function`, the innermost frame that is not torch's own."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((TORCH_HOME, OWN_HOME, "<"))
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f" (at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line})"


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__
