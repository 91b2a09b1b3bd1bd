"""Does an ONNX file compute what the module computes? Compared in onnxruntime, on the CPU, at several batch sizes.

How far two correct implementations may differ is measured, not guessed. For output k, over all cases,

    noise_k     = max |f(x) - f64(x)|             f in its own precision, f64 the same module in float64
    scale_k     = max |f(x)|
    tolerance_k = 8 * noise_k + 16 * eps * scale_k

`noise_k` is what rounding does to the module itself: onnxruntime sums in another order and folds batch norms, so it
makes an error of its own of the same kind; 8 leaves room for that (measured: at most 1.7 on torchvision's models).
The second term, about 2e-6 of the output in float32, stands for functions such as tanh or erf that two libraries
approximate differently by some units in the last place; it also serves where the module happens to round nothing.
Outputs of integers and booleans have no second term: they must be equal unless float64 gives other integers too.
A module that does not run in float64 gets its noise from runs whose inputs and weights are off by one unit in the
last place. NaN and infinities must appear at the same positions.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphzip.errors import ExportError, MissingDependencyError, VerificationError

__all__ = ["Case", "Example", "Verification", "make_cases", "require", "tensor_leaves", "verify_onnx"]

NOISE_FACTOR = 8.0
EPS_FACTOR = 16.0
_SEED = 0


@dataclass(frozen=True)
class Example:
    """The inputs to export with: detached copies of what the user gave, with a batch of at least two.

    An input is batched when its first dimension has the size of the first input's; `batched` holds the `id` of each
    such tensor. `batch` is `None` where no input has a dimension.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int | None
    batched: frozenset[int]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
        """Every tensor becomes one of its own: `torch.export` takes a tensor that is given twice for one input."""
        sizes = [leaf.shape[0] for leaf in tensor_leaves((args, kwargs)) if leaf.dim()]
        batched: set[int] = set()

        def own(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            copied = leaf.detach().clone()
            if leaf.dim() and leaf.shape[0] == sizes[0]:
                copied = torch.cat([copied, copied]) if sizes[0] == 1 else copied
                batched.add(id(copied))
            return copied

        new_args, new_kwargs = pytree.tree_map(own, (args, kwargs))
        batch = max(2, int(sizes[0])) if sizes else None
        return cls(new_args, new_kwargs, batch, frozenset(batched))

    def is_batched(self, leaf: Any) -> bool:
        return id(leaf) in self.batched


@dataclass(frozen=True)
class Case:
    """One call of the module: `batch` rows in every batched input, `None` where no input has a batch."""

    batch: int | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Verification:
    """What was compared. `max_abs_diff` and `tolerance` belong to the output that came closest to its tolerance."""

    max_abs_diff: float
    tolerance: float
    output: str
    batches: tuple[int, ...]


@dataclass(frozen=True)
class _Run:
    case: Case
    outputs: list[torch.Tensor]
    exact: list[torch.Tensor] | None


def require(package: str) -> Any:
    """Import a package that only some of graphzip needs; `MissingDependencyError` gives the pip line."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        pip = package.replace("_", "-")
        raise MissingDependencyError(f"{package} is not installed; run: pip install {pip}") from error


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def make_cases(example: Example, *, dynamic: bool) -> list[Case]:
    """The example itself, a variation of it, and variations of one more row and of a single row if `dynamic`.

    Rows of floats are mixtures of the example's rows plus a little noise, inside the range of the example's values;
    rows of integers and booleans are rows of the example. Inputs without a batch stay as they are.
    """
    batch = example.batch
    cases = [Case(batch, example.args, example.kwargs)]
    if batch is None:
        return cases
    generator = torch.Generator().manual_seed(_SEED)
    for size in (batch, batch + 1, 1) if dynamic else (batch, batch):

        def vary(leaf: Any, size: int = size) -> Any:
            return _vary(leaf, size, generator) if example.is_batched(leaf) else leaf

        args, kwargs = pytree.tree_map(vary, (example.args, example.kwargs))
        cases.append(Case(size, args, kwargs))
    return cases


def _vary(leaf: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    first = torch.randint(leaf.shape[0], (size,), generator=generator).to(leaf.device)
    if not leaf.is_floating_point() or leaf.numel() == 0:
        return leaf[first]
    second = torch.randint(leaf.shape[0], (size,), generator=generator).to(leaf.device)
    weight = torch.rand(size, *[1] * (leaf.dim() - 1), generator=generator).to(leaf.device)
    values = leaf.float()
    mixed = values[first] * weight + values[second] * (1 - weight)
    low, high = values.min(), values.max()
    noise = torch.randn(mixed.shape, generator=generator).to(leaf.device)
    if low == high:
        return (mixed + 0.1 * noise * low.abs().clamp(min=1.0)).to(leaf.dtype)
    return (mixed + 0.1 * noise * values.std()).clamp(low, high).to(leaf.dtype)


def verify_onnx(path: Path, module: nn.Module, cases: Sequence[Case]) -> Verification:
    """Compare the file at `path` with `module` (in eval mode) on `cases`, the first of which is the traced one.

    A case of another batch size that the module itself refuses is left out. Raises `VerificationError` where an
    output differs by more than its tolerance, `ExportError` where onnxruntime cannot run the file at all.
    """
    session = _session(path)
    runs = _reference_runs(module, cases)
    names = [output.name for output in session.get_outputs()]
    results = [_run_session(session, run.case) for run in runs]
    noise = _noise(module, runs)
    batches = tuple(sorted({run.case.batch for run in runs if run.case.batch is not None}))
    checked: list[tuple[float, Verification]] = []
    for k, name in enumerate(names):
        scale = max(_scale(run.outputs[k]) for run in runs)
        tolerance = NOISE_FACTOR * noise[k] + EPS_FACTOR * _eps(module, runs[0].outputs[k]) * scale
        for run, result in zip(runs, results, strict=True):
            found = _compare(name, run.case.batch, result[k], run.outputs[k], tolerance)
            checked.append((found / tolerance if tolerance else 0.0, Verification(found, tolerance, name, batches)))
    return max(checked, key=lambda entry: entry[0])[1]


def _session(path: Path) -> Any:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot load the exported model on the CPU, so it cannot be verified: {_short(error, path)}; "
            "convert the module to float32 first, or pass verify=False if the runtime you ship to supports it"
        ) from error


def _run_session(session: Any, case: Case) -> list[torch.Tensor]:
    leaves = tensor_leaves((case.args, case.kwargs))
    for leaf in leaves:
        if leaf.dtype == torch.bfloat16:
            raise ExportError(
                "bfloat16 inputs cannot be fed to onnxruntime on the CPU, so the model cannot be verified; convert the "
                "module to float32 first, or pass verify=False"
            )
    feed = {node.name: leaf.cpu().contiguous().numpy() for node, leaf in zip(session.get_inputs(), leaves, strict=True)}
    try:
        results = session.run(None, feed)
    except Exception as error:
        raise VerificationError(
            f"the exported model fails in onnxruntime at batch {case.batch}: {_short(error)}; nothing was written. "
            "If the model holds a size that depends on the batch, pass dynamic_batch=False"
        ) from error
    return [torch.from_numpy(result) for result in results]


def _short(error: BaseException, path: Path | None = None) -> str:
    text = str(error).replace(f"Load model from {path} failed:", "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _reference_runs(module: nn.Module, cases: Sequence[Case]) -> list[_Run]:
    double = _in_float64(module)
    runs: list[_Run] = []
    for number, case in enumerate(cases):
        try:
            outputs = _call(module, case)
        except Exception as error:
            if number == 0 or case.batch == cases[0].batch:
                raise ExportError(
                    f"{type(module).__name__} fails on inputs like the example: {_short(error)}; pass example inputs "
                    "that the module accepts"
                ) from error
            continue
        runs.append(_Run(case, outputs, _call_in_float64(double, case)))
    wanted, checked = {case.batch for case in cases}, {run.case.batch for run in runs}
    if len(wanted) > 1 and len(checked) == 1:
        raise ExportError(
            f"{type(module).__name__} accepts no batch other than {cases[0].batch}; pass dynamic_batch=False to export "
            "it with that fixed batch"
        )
    return runs


def _call(module: nn.Module, case: Case) -> list[torch.Tensor]:
    with _full_precision():
        result = module(*case.args, **case.kwargs)
    return [leaf.detach().cpu() for leaf in tensor_leaves(result)]


def _call_in_float64(module: nn.Module | None, case: Case) -> list[torch.Tensor] | None:
    if module is None:
        return None
    args, kwargs = pytree.tree_map(_widen, (case.args, case.kwargs))
    try:
        return _call(module, Case(case.batch, args, kwargs))
    except Exception:
        return None


def _widen(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


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


def _in_float64(module: nn.Module) -> nn.Module | None:
    """A copy in float64, where dtypes that a traced graph spells out are float64 too."""
    try:
        double = copy.deepcopy(module).double()
    except Exception:
        return None
    for part in double.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args = fx.node.map_aggregate(node.args, _widen_dtype)
                node.kwargs = fx.node.map_aggregate(node.kwargs, _widen_dtype)
            part.recompile()
    return double


def _widen_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _noise(module: nn.Module, runs: Sequence[_Run]) -> list[float]:
    """Per output, how far rounding alone moves the module."""
    pairs: list[tuple[list[torch.Tensor], list[torch.Tensor]]]
    if all(run.exact is not None for run in runs):
        pairs = [(run.outputs, run.exact) for run in runs if run.exact is not None]
    else:
        pairs = [(runs[0].outputs, outputs) for outputs in _jittered(module, runs[0].case)]
    count = len(runs[0].outputs)
    return [max((_finite_difference(own[k], other[k]) for own, other in pairs), default=0.0) for k in range(count)]


def _jittered(module: nn.Module, case: Case) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(_SEED)

    def jitter(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        sign = torch.randint(2, leaf.shape, generator=generator).to(leaf.device, leaf.dtype) * 2 - 1
        return leaf * (1 + torch.finfo(leaf.dtype).eps * sign)

    results = []
    for _ in range(3):
        other = copy.deepcopy(module)
        with torch.no_grad():
            for tensor in [*other.parameters(), *other.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(jitter(tensor))
        args, kwargs = pytree.tree_map(jitter, (case.args, case.kwargs))
        results.append(_call(other, Case(case.batch, args, kwargs)))
    return results


def _finite_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return 0.0
    left, right = one.double(), other.double()
    finite = left.isfinite() & right.isfinite()
    return float((left - right)[finite].abs().max()) if bool(finite.any()) else 0.0


def _scale(output: torch.Tensor) -> float:
    finite = output.double()[output.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _eps(module: nn.Module, output: torch.Tensor) -> float:
    """The unit roundoff of the coarsest floating-point type at work; 0 for an output of integers."""
    if not output.is_floating_point():
        return 0.0
    dtypes = {
        tensor.dtype for tensor in [output, *module.parameters(), *module.buffers()] if tensor.is_floating_point()
    }
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _compare(name: str, batch: int | None, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> float:
    """The largest absolute difference; raises `VerificationError` above `tolerance`."""
    where = f"output {name!r} of the exported model differs from the module at batch {batch}"
    hint = "nothing was written. Please report it; verify=False writes the file all the same, for inspection"
    if got.shape != want.shape:
        raise VerificationError(f"{where}: shape {list(got.shape)} instead of {list(want.shape)}; {hint}")
    if got.dtype != want.dtype:
        raise VerificationError(f"{where}: {got.dtype} instead of {want.dtype}; {hint}")
    patterns: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (torch.isnan, torch.isposinf, torch.isneginf)
    if want.is_floating_point() and any(not torch.equal(pattern(got), pattern(want)) for pattern in patterns):
        raise VerificationError(f"{where}: NaN or infinity at other positions; {hint}")
    found = _finite_difference(got, want)
    if not found <= tolerance or math.isnan(tolerance):
        raise VerificationError(f"{where}: by {found:.3g}, where rounding explains at most {tolerance:.3g}; {hint}")
    return found
