"""What the operators of ONNX are in PyTorch, a row for each.

A function takes what the operator reads, in that order, and its attributes by name; what is a shape, axes or the like
are plain numbers (`NUMBERS`), which may have been attributes in older versions of the operator. `opset` is the version
of the file's operators, where an operator changed. What differs from ONNX is refused by `Unsupported`.

Source: the operators' definitions in the ONNX specification (onnx/docs/Operators.md, Changelog.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DTYPES", "NUMBERS", "OPERATORS", "Unsupported"]


class Unsupported(Exception):
    """An operator does what no function here does; the text says what."""


DTYPES: Final = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""Numbers of onnx.TensorProto.DataType, and what they are in torch."""


def _dtype(number: int) -> torch.dtype:
    if number not in DTYPES:
        raise Unsupported(f"numbers of type {number} have no type in torch")
    return DTYPES[number]


# ------------------------------------------------------------------------------------------------- position by position


def _cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(_dtype(to))


def _clip(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    return x if min is None and max is None else torch.clamp(x, min, max)


def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * (F.relu(x) + torch.clamp(alpha * torch.expm1(x), max=0.0))


def _celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


def _elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def _leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def _swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def _thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.threshold(x, alpha, 0.0)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _divide(a: Any, b: Any) -> Any:
    whole = not (_floating(a) or _floating(b))
    return torch.div(a, b, rounding_mode="trunc") if whole else a / b


def _floating(x: Any) -> bool:
    return x.is_floating_point() if isinstance(x, Tensor) else isinstance(x, float)


def _modulo(a: Any, b: Any, *, fmod: int = 0) -> Any:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _power(a: Any, b: Any) -> Any:
    return torch.pow(a, b).to(a.dtype) if isinstance(a, Tensor) else torch.pow(a, b)


def _each(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def applied(*values: Any) -> Any:
        found = values[0]
        for each in values[1:]:
            found = function(found, each)
        return found

    return applied


def _as_tensors(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """`function` where one of the two may be a number."""

    def applied(a: Any, b: Any) -> Any:
        like = a if isinstance(a, Tensor) else b
        return function(*(x if isinstance(x, Tensor) else torch.full_like(like, x) for x in (a, b)))

    return applied


_sum: Final = _each(lambda a, b: a + b)


def _mean_of(*values: Any) -> Any:
    return _sum(*values) / len(values)


def _where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(condition, a, b)


def _is_infinite(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    negative, positive = torch.isneginf(x), torch.isposinf(x)
    return (negative if detect_negative else negative & False) | (positive if detect_positive else positive & False)


def _dropout(x: Tensor, ratio: Any = 0.5, training: Any = None, *, seed: int = 0, is_test: int = 1) -> Tensor:
    return x


def _first(x: Any, *unused: Any) -> Any:
    return x


# ------------------------------------------------------------------------------------------------- over dimensions


def _axes_of(x: Tensor, axes: Sequence[int] | None, noop: int) -> list[int]:
    if axes is None or not len(axes):
        return [] if noop else list(range(x.dim()))
    return [int(axis) for axis in axes]


def _reduction(function: Callable[[Tensor, list[int], bool], Any]) -> Callable[..., Any]:
    def reduced(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        dims = _axes_of(x, axes, noop_with_empty_axes)
        return function(x, dims, bool(keepdims)) if dims else x

    return reduced


def _product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted((dim % x.dim() for dim in dims), reverse=True):
        x = x.prod(dim, keepdim=keep)
    return x


def _extremum(function: Callable[..., Any]) -> Callable[..., Any]:
    def found(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Any:
        if select_last_index:
            raise Unsupported("the last of several largest is asked for")
        return function(x, axis, bool(keepdims))

    return found


def _softmax(x: Tensor, *, axis: int | None = None, opset: int, function: Any = torch.softmax) -> Any:
    if opset >= 13:
        return function(x, -1 if axis is None else axis)
    first = (1 if axis is None else axis) % x.dim()
    if first == x.dim() - 1:
        return function(x, -1)
    return function(x.flatten(first), -1).reshape(x.shape)


def _log_softmax(x: Tensor, *, axis: int | None = None, opset: int) -> Any:
    return _softmax(x, axis=axis, opset=opset, function=torch.log_softmax)


def _cumulative(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    if reverse:
        raise Unsupported("a sum from the end")
    total = torch.cumsum(x, axis)
    return total - x if exclusive else total


def _top(x: Tensor, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(x, k[0] if isinstance(k, list | tuple) else k, axis, bool(largest), bool(sorted))
    return values, indices


def _normalized(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    found: Tensor = x / torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return found


def _mean_variance(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    dims = list(axes)
    centered = x - x.mean(dims, keepdim=True)
    return centered / (centered.square().mean(dims, keepdim=True).sqrt() + 1e-9)


# ------------------------------------------------------------------------------------------------- where things stand


def _reshape(x: Tensor, shape: Sequence[Any], *, allowzero: int = 0) -> Tensor:
    return x.reshape([x.shape[k] if _is_zero(s) and not allowzero else s for k, s in enumerate(shape)])


def _is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis % x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(*(perm if perm is not None else reversed(range(x.dim()))))


def _squeeze(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(int(axis) for axis in axes))


def _unsqueeze(x: Tensor, axes: Sequence[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(int(axis) % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _concat(*parts: Tensor, axis: int = 1) -> Tensor:
    return torch.cat(parts, axis)


def _split(
    x: Tensor, split: Sequence[Any] | None = None, *, axis: int = 0, num_outputs: int = 0, results: int
) -> list[Tensor]:
    if split is None:
        count, total = num_outputs or results, x.shape[axis]
        each = -(-total // count)
        split = [each] * (count - 1) + [total - each * (count - 1)]
    return list(torch.split(x, list(split), axis))


def _slice(
    x: Tensor, starts: Sequence[Any], ends: Sequence[Any], axes: Sequence[int] | None = None, steps: Any = None
) -> Tensor:
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = int(axes[k]) if axes is not None else k
        step = steps[k] if steps is not None else 1
        if step < 0:
            if start not in (-1,) and start < x.shape[axis] - 1:
                raise Unsupported("a slice that goes backwards from within")
            if end >= -x.shape[axis]:
                raise Unsupported("a slice that goes backwards to a place within")
            x = x.flip(axis)
            start, end, step = 0, x.shape[axis], -step
        whole = isinstance(start, int) and start == 0 and isinstance(end, int) and end >= 2**31 - 1 and step == 1
        x = x if whole else x[(slice(None),) * (axis % x.dim()) + (slice(start, end, step),)]
    return x


def _gather(x: Tensor, indices: Any, *, axis: int = 0) -> Tensor:
    if isinstance(indices, list | tuple):
        return torch.index_select(x, axis, torch.tensor(indices, device=x.device) % x.shape[axis])
    if not isinstance(indices, Tensor):
        return x.select(axis, indices)
    if indices.dim() == 1:
        return torch.index_select(x, axis, indices)
    return x[(slice(None),) * (axis % x.dim()) + (indices,)]


def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, indices)


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    if batch_dims:
        raise Unsupported("batch_dims")
    return x[tuple(indices.unbind(-1))]


def _scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    known = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    if reduction == "none":
        return torch.scatter(x, axis, indices, updates)
    return torch.scatter_reduce(x, axis, indices, updates, known[reduction])


def _scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    if reduction not in ("none", "add"):
        raise Unsupported(f"reduction {reduction!r}")
    return torch.index_put(x, tuple(indices.unbind(-1)), updates, accumulate=reduction == "add")


def _expand(x: Tensor, shape: Sequence[Any]) -> Tensor:
    missing = len(shape) - x.dim()
    sizes = [1] * -missing + list(shape) if missing < 0 else list(shape)
    own = [1] * missing + list(x.shape)
    kept = [have if isinstance(want, int) and want == 1 else want for want, have in zip(sizes, own, strict=True)]
    return x.expand(kept)


def _tile(x: Tensor, repeats: Sequence[Any]) -> Tensor:
    return x.repeat(*repeats)


def _filled(shape: Sequence[Any], *, value: Any = 0.0, dtype: int = 1) -> Tensor:
    return torch.full(tuple(shape), value, dtype=_dtype(dtype))


def _range(start: Any, limit: Any, delta: Any) -> Tensor:
    return torch.arange(start, limit, delta)


def _pad(
    x: Tensor, pads: Sequence[Any], value: Any = 0.0, axes: Sequence[int] | None = None, *, mode: str = "constant"
) -> Tensor:
    rank, count = x.dim(), len(pads) // 2
    before, after = [0] * rank, [0] * rank
    for k, axis in enumerate(axes if axes is not None else range(count)):
        before[int(axis)], after[int(axis)] = pads[k], pads[k + count]
    flat = [size for k in reversed(range(rank)) for size in (before[k], after[k])]
    while len(flat) > 2 and all(isinstance(size, int) and size == 0 for size in flat[-2:]):
        flat = flat[:-2]
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in modes:
        raise Unsupported(f"padding of mode {mode!r}")
    if mode == "constant":
        return F.pad(x, flat, "constant", 0.0 if value is None else value)
    return F.pad(x, flat, modes[mode])


def _one_hot(indices: Tensor, depth: Any, values: Tensor, *, axis: int = -1) -> Tensor:
    count = depth[0] if isinstance(depth, list | tuple) else depth
    hot = F.one_hot(indices.long() % count, count)
    off, on = values[0], values[1]
    return torch.where(hot.movedim(-1, axis) == 1, on, off)


def _triangle(x: Tensor, k: Any = 0, *, upper: int = 1) -> Tensor:
    return torch.triu(x, k or 0) if upper else torch.tril(x, k or 0)


def _depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    n, c, h, w = x.shape
    x = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


def _space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


def _einsum(*parts: Tensor, equation: str) -> Any:
    return torch.einsum(equation, *parts)


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Any = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Tensor:
    found = torch.matmul(a.t() if transA else a, b.t() if transB else b)
    found = found if alpha == 1.0 else alpha * found
    return found if c is None else found + (c if beta == 1.0 else beta * c)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Asin": torch.asin, "Atan": torch.atan, "Ceil": torch.ceil,
    "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor,
    "HardSwish": F.hardswish, "IsNaN": torch.isnan, "Log": torch.log, "Mish": F.mish, "Neg": torch.neg,
    "Not": torch.logical_not, "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round,
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus,
    "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "Cast": _cast, "Celu": _celu, "Clip": _clip, "Dropout": _dropout, "Elu": _elu, "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid, "Identity": _first, "IsInf": _is_infinite, "LeakyRelu": _leaky_relu,
    "Selu": _selu, "Swish": _swish, "ThresholdedRelu": _thresholded_relu,
}  # fmt: skip

_PAIRS: Mapping[str, Callable[..., Any]] = {
    "Add": _sum, "And": torch.logical_and, "Div": _divide, "Equal": lambda a, b: a == b,
    "Greater": lambda a, b: a > b, "GreaterOrEqual": lambda a, b: a >= b, "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
    "Max": _each(_as_tensors(torch.maximum)), "Mean": _mean_of, "Min": _each(_as_tensors(torch.minimum)),
    "Mod": _modulo, "Mul": _each(lambda a, b: a * b), "Or": torch.logical_or, "PRelu": _prelu, "Pow": _power,
    "Sub": _each(lambda a, b: a - b), "Sum": _sum, "Where": _where, "Xor": torch.logical_xor,
}  # fmt: skip

_OVER: Mapping[str, Callable[..., Any]] = {
    "ArgMax": _extremum(torch.argmax), "ArgMin": _extremum(torch.argmin), "CumSum": _cumulative,
    "LogSoftmax": _log_softmax, "LpNormalization": _normalized, "MeanVarianceNormalization": _mean_variance,
    "ReduceL1": _reduction(lambda x, dims, keep: x.abs().sum(dims, keepdim=keep)),
    "ReduceL2": _reduction(lambda x, dims, keep: torch.linalg.vector_norm(x, 2, dims, keepdim=keep)),
    "ReduceLogSum": _reduction(lambda x, dims, keep: x.sum(dims, keepdim=keep).log()),
    "ReduceLogSumExp": _reduction(lambda x, dims, keep: torch.logsumexp(x, dims, keepdim=keep)),
    "ReduceMax": _reduction(lambda x, dims, keep: torch.amax(x, dims, keepdim=keep)),
    "ReduceMean": _reduction(lambda x, dims, keep: x.mean(dims, keepdim=keep)),
    "ReduceMin": _reduction(lambda x, dims, keep: torch.amin(x, dims, keepdim=keep)),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(lambda x, dims, keep: x.sum(dims, keepdim=keep)),
    "ReduceSumSquare": _reduction(lambda x, dims, keep: x.square().sum(dims, keepdim=keep)),
    "Softmax": _softmax, "TopK": _top,
}  # fmt: skip

_PLACES: Mapping[str, Callable[..., Any]] = {
    "Concat": _concat, "ConstantOfShape": _filled, "DepthToSpace": _depth_to_space, "Einsum": _einsum,
    "Expand": _expand, "Flatten": _flatten, "Gather": _gather, "GatherElements": _gather_elements,
    "GatherND": _gather_nd, "Gemm": _gemm, "MatMul": torch.matmul, "OneHot": _one_hot, "Pad": _pad, "Range": _range,
    "Reshape": _reshape, "ScatterElements": _scatter_elements, "ScatterND": _scatter_nd, "Slice": _slice,
    "SpaceToDepth": _space_to_depth, "Split": _split, "Squeeze": _squeeze, "Tile": _tile, "Transpose": _transpose,
    "Trilu": _triangle, "Unsqueeze": _unsqueeze,
}  # fmt: skip

OPERATORS: Final[Mapping[str, Callable[..., Any]]] = {**_FUNCTIONS, **_PAIRS, **_OVER, **_PLACES}
"""What computes an operator, by its name."""

_AXES: Final = {1: "axes"}
NUMBERS: Final[Mapping[str, Mapping[int, str]]] = {
    **{name: _AXES for name in OPERATORS if name.startswith("Reduce")},
    "Clip": {1: "min", 2: "max"},
    "ConstantOfShape": {0: "shape"},
    "CumSum": {1: "axis"},
    "Dropout": {1: "ratio", 2: "training"},
    "Expand": {1: "shape"},
    "OneHot": {1: "depth"},
    "Pad": {1: "pads", 2: "value", 3: "axes"},
    "Range": {0: "start", 1: "limit", 2: "delta"},
    "Reshape": {1: "shape"},
    "Slice": {1: "starts", 2: "ends", 3: "axes", 4: "steps"},
    "Split": {1: "split"},
    "Squeeze": _AXES,
    "Tile": {1: "repeats"},
    "TopK": {1: "k"},
    "Trilu": {1: "k"},
    "Unsqueeze": _AXES,
}
"""Which inputs of an operator are plain numbers, and the names of their parameters, which attributes may have, too."""
