"""Run a module, and an ONNX file in onnxruntime on the CPU, on the same calls.

onnxruntime has no bfloat16 on the CPU, but every number of bfloat16 is one of float32. So a file and a module in
bfloat16 may be compared in float32, which shows more than bfloat16 could: its rounding is not in the way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from graphzip.errors import ExportError, VerificationError
from graphzip.export.capture import Captured
from graphzip.export.example import Case, Wish, make_case, tensor_leaves, wishes
from graphzip.export.onnx_equality import rest
from graphzip.export.optional_packages import require
from graphzip.export.outputs import CHANGE, Reference
from graphzip.graph.torch_private import pytree

__all__ = [
    "Refusal",
    "Run",
    "Runs",
    "has_bfloat16",
    "in_dtype",
    "references",
    "run_all",
    "run_session",
    "session_of",
    "short",
    "with_float32_example",
    "with_float32_model",
]

aten = torch.ops.aten

_SEED = 0
_WITH_TAILS = {
    *(aten.sigmoid.default, aten.silu.default, aten.gelu.default, aten.mish.default, aten.softplus.default),
    *(aten.glu.default, aten.elu.default, aten.selu.default, aten.celu.default, aten.log_sigmoid.default),
    *(aten.softmax.int, aten.erf.default, aten.tanh.default, aten.exp.default),
    *(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.scaled_dot_product_attention.default),
}
"""What comes ever closer to zero or to a bound, and is computed to so many digits behind the point."""

_LARGE: Final = 1 << 20
"""Bytes of a weight from which on a twin does not hold one of its own."""

_Tensor: Any = torch.Tensor
_SHAPES: Final = frozenset(
    {
        *(each.__get__ for each in (_Tensor.shape, _Tensor.device, _Tensor.requires_grad)),
        *(_Tensor.size, _Tensor.dim, _Tensor.numel, _Tensor.is_floating_point),
    }
)
"""What is asked of a tensor without reading its numbers."""


@dataclass(frozen=True)
class Run:
    """A call of the module, why it was made, and what came out."""

    kind: str
    case: Case
    outputs: list[torch.Tensor]


@dataclass(frozen=True)
class Refusal:
    """A call that was wanted and that the module does not take, what it said, and the inputs, if there are any."""

    kind: str
    reason: str
    case: Case | None = None


@dataclass(frozen=True)
class Runs:
    """What a module gives for the example first, and then for all other calls that were wanted and that it takes."""

    made: tuple[Run, ...]
    refused: tuple[Refusal, ...]


def run_all(module: nn.Module, captured: Captured) -> Runs:
    """Raises `ExportError` where the module does not take the example."""
    made: list[Run] = []
    refused: list[Refusal] = []
    for wish in wishes(captured.sizes):
        run = _fulfilled(module, captured, wish)
        if isinstance(run, Run):
            made.append(run)
        elif wish.kind == "example":
            raise ExportError(
                f"{type(module).__name__} fails on the example inputs: {run.reason}; pass inputs it accepts"
            )
        else:
            refused.append(run)
    return Runs(tuple(made), tuple(refused))


def _fulfilled(module: nn.Module, captured: Captured, wish: Wish) -> Run | Refusal:
    reason, tried = "these sizes do not fit together", None
    for chosen in wish.choices:
        case = make_case(captured.example, captured.sizes, chosen, varied=wish.kind != "example")
        if case is None:
            continue
        try:
            return Run(wish.kind, case, _call(module, case))
        except Exception as error:
            reason, tried = short(error), case
    return Refusal(wish.kind, reason, tried)


def _call(module: nn.Module, case: Case) -> list[torch.Tensor]:
    with _full_precision():
        result = module(*case.args, **case.kwargs)
    return [leaf.detach().cpu() for leaf in tensor_leaves(result)]


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without TensorFloat-32 and its like: they would lift the noise, and with it the tolerance, a thousandfold."""
    matmul = torch.get_float32_matmul_precision()
    convolution = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def references(module: nn.Module, captured: Captured, runs: Sequence[Run]) -> list[Reference]:
    """What every output should be, and what is needed to judge how far it may be off."""
    count = len(runs[0].outputs)
    exact = _exactly(module, runs)
    noisy = [] if exact else [_jittered(module, runs[0].case, _rounding, seed) for seed in range(3)]
    changed = _changed(module, runs[0])
    dependent = _given(captured)
    calls = [_described(run, captured) for run in runs]
    tails = any(node.target in _WITH_TAILS for node in captured.program.graph.nodes)
    return [
        Reference(
            name=captured.outputs[k],
            wanted=[run.outputs[k] for run in runs],
            exact=[outputs[k] for outputs in exact] if exact else None,
            noisy=[outputs[k] for outputs in noisy],
            changed=changed[k],
            eps=_eps(module, runs[0].outputs[k]),
            given=dependent[k],
            calls=calls,
            tails=tails,
        )
        for k in range(count)
    ]


def _described(run: Run, captured: Captured) -> str:
    if run.kind != "sizes":
        return "on the example" if run.case.batch is None else f"at batch {run.case.batch}"
    sizes = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(captured.inputs, run.case.shapes, strict=True))
    return f"for {sizes}"


def _exactly(module: nn.Module, runs: Sequence[Run]) -> list[list[torch.Tensor]] | None:
    """All calls in float64; `None` where the module does not run in it, or computes in it anyway."""
    if any(tensor.dtype == torch.float64 for tensor in [*module.parameters(), *module.buffers(), *runs[0].outputs]):
        return None
    try:
        with _twin(module, lambda leaf, number: leaf.double(), torch.float64) as double:
            return _widened(double, runs)
    except Exception:
        return None


def _widened(double: nn.Module, runs: Sequence[Run]) -> list[list[torch.Tensor]] | None:
    """What a module in float64 gives; `None` where that has other shapes."""
    found = []
    for run in runs:
        args, kwargs = pytree.tree_map(_widen, (run.case.args, run.case.kwargs))
        found.append(_call(double, Case(args, kwargs)))
        if [each.shape for each in found[-1]] != [each.shape for each in run.outputs]:
            return None
    return found


def _widen(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another floating dtype, also where a traced graph spells out the one that it had."""
    return _copied(module, lambda leaf, number: leaf.to(dtype, copy=True), dtype)


Change: TypeAlias = "Callable[[torch.Tensor, int], torch.Tensor]"
"""Makes another tensor of a weight, with its number among those of the module."""


@contextmanager
def _twin(module: nn.Module, change: Change, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    """A copy of which every floating weight is what `change` makes of it, with the `dtype` that it gives them.

    Large ones are the module's own, and changed when an operator reads them: a twin takes no memory to speak of.
    """
    numbers = {id(each): number for number, each in enumerate(_floating(module))}
    large = {id(each): each for each in _floating(module) if isinstance(each, nn.Parameter) and each.nbytes >= _LARGE}

    def changed(leaf: torch.Tensor) -> torch.Tensor:
        return change(leaf, numbers[id(leaf)])

    with _Changing(large, changed, dtype):
        yield _copied(module, change, dtype, shared=large)


def _floating(module: nn.Module) -> list[torch.Tensor]:
    return [each for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()]


def _copied(
    module: nn.Module, change: Change, dtype: torch.dtype | None, shared: Mapping[int, torch.Tensor] | None = None
) -> nn.Module:
    """A copy with changed weights, also where a traced graph spells out their dtype; it has those that are `shared`."""
    memo: dict[int, Any] = dict(shared or {})  # so that nothing is copied before it is changed
    for number, each in enumerate(_floating(module)):
        if id(each) not in memo:
            made = change(each.detach(), number)
            memo[id(each)] = nn.Parameter(made, each.requires_grad) if isinstance(each, nn.Parameter) else made
    twin = copy.deepcopy(module, memo)
    if dtype is None:
        return twin
    if not shared:
        twin = twin.to(dtype)  # what a module holds besides

    def changed(value: Any) -> Any:
        return dtype if isinstance(value, torch.dtype) and value.is_floating_point else value

    for part in twin.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args = fx.node.map_aggregate(node.args, changed)
                node.kwargs = fx.node.map_aggregate(node.kwargs, changed)
            part.recompile()
    return twin


class _Changing(TorchFunctionMode):
    """Inside, some tensors, by their `id`, are what `change` makes of them wherever an operator reads them."""

    def __init__(
        self, tensors: Mapping[int, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor], dtype: Any
    ) -> None:
        super().__init__()
        self.tensors, self.change, self.dtype = tensors, change, dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _Tensor.dtype.__get__ and id(args[0]) in self.tensors:
            return self.dtype or args[0].dtype
        if func in _SHAPES:
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _read(self, leaf: torch.Tensor) -> torch.Tensor:
        return self.change(leaf) if id(leaf) in self.tensors else leaf


def _rounding(tensor: torch.Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _jittered(module: nn.Module, case: Case, by: Any, seed: int) -> list[torch.Tensor]:
    """A call in which every weight and every input is off by a share of itself, up or down."""

    def jitter(leaf: torch.Tensor, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(_SEED + seed + 16 * number)
        made = torch.randint(2, leaf.shape, generator=generator, dtype=torch.int8).to(leaf.device, leaf.dtype)
        return made.mul_(2 * by(leaf)).add_(1 - by(leaf)).mul_(leaf)

    leaves, spec = pytree.tree_flatten((case.args, case.kwargs))
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            leaves[place] = jitter(leaf, -1 - place)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    with _twin(module, jitter) as other:
        return _call(other, Case(args, kwargs))


def _changed(module: nn.Module, run: Run) -> list[torch.Tensor]:
    """The outputs with all weights and inputs off by a thousandth: a change that a check has to find."""

    def share(tensor: torch.Tensor) -> float:
        return max(CHANGE, 128 * torch.finfo(tensor.dtype).eps)

    try:
        return _jittered(module, run.case, share, 0)
    except Exception:
        return run.outputs


def _given(captured: Captured) -> list[bool]:
    """For every output, whether it depends on values of the inputs, and not only on their sizes."""
    user = set(captured.program.graph_signature.user_inputs)
    known: dict[fx.Node, bool] = {}
    for node in captured.program.graph.nodes:
        if node.op == "placeholder":
            known[node] = node.name in user
        elif node.op != "output":
            sized = "sym_size" in str(node.target)
            known[node] = not sized and any(known[each] for each in node.all_input_nodes)
    by_name = {node.name: value for node, value in known.items()}
    return [by_name.get(str(name), True) for name in captured.program.graph_signature.user_outputs]


def _eps(module: nn.Module, output: torch.Tensor) -> float:
    """The unit roundoff of the coarsest floating-point type at work; 0 for an output of integers."""
    if not output.is_floating_point():
        return 0.0
    dtypes = {
        tensor.dtype for tensor in [output, *module.parameters(), *module.buffers()] if tensor.is_floating_point()
    }
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def session_of(source: Path | bytes, *, slim: bool = False) -> Any:
    """A `slim` one reads weights from the file alone, and arranges none in an order that is faster.

    Raises onnxruntime's own error where it cannot load the model.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if slim:
        options.add_session_config_entry("session.disable_prepacking", "1")
    model = source if isinstance(source, bytes) else str(source)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_session(session: Any, run: Run, call: str) -> list[torch.Tensor]:
    """Raises `VerificationError` where the file does not take the inputs that the module takes."""
    leaves = run.case.leaves
    inputs = session.get_inputs()
    feed = {node.name: leaf.cpu().contiguous().numpy() for node, leaf in zip(inputs, leaves, strict=True)}
    try:
        results = session.run(None, feed)
    except Exception as error:
        raise VerificationError(f"the file fails in onnxruntime {call}: {short(error)}") from error
    return [torch.from_numpy(result) for result in results]


def short(error: BaseException, path: Path | None = None) -> str:
    """The first line of what an error says."""
    text = str(error).replace(f"Load model from {path} failed:", "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------- bfloat16


def has_bfloat16(model: Any) -> bool:
    """Whether an ONNX model computes in bfloat16."""
    wanted = require("onnx_ir").DataType.BFLOAT16
    return any(
        value.dtype == wanted
        for graph in model.graphs()
        for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs))
    )


def with_float32_model(model: Any) -> None:
    """Let an ONNX model compute in float32 what it computes in bfloat16, in place."""
    ir = require("onnx_ir")
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)):
            if value.dtype == narrow:
                value.dtype = wide
            if value.const_value is not None and value.const_value.dtype == narrow:
                value.const_value = _wide(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == narrow:
                    node.attributes[name] = ir.AttrTensor(name, _wide(attribute.value))
                elif name in ("to", "dtype") and attribute.value == int(narrow):
                    node.attributes[name] = ir.AttrInt64(name, int(wide))


def _wide(tensor: Any) -> Any:
    """The constant in float32, which is made whenever it is read."""
    ir = require("onnx_ir")

    def made() -> Any:
        found = ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)
        rest(tensor)
        return found

    return ir.LazyTensor(made, dtype=ir.DataType.FLOAT, shape=tensor.shape, name=tensor.name)


def with_float32_example(captured: Captured) -> Captured:
    """The same program with an example in float32, for a module of that dtype."""
    example = captured.example

    def wide(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bfloat16 else leaf

    args, kwargs = pytree.tree_map(wide, (example.args, example.kwargs))
    return replace(captured, example=replace(example, args=args, kwargs=kwargs))
