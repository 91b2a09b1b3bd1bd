"""Arithmetic on sizes: what ONNX computes with integer tensors, on plain numbers that may be symbols.

A file asks for the shape of a tensor, picks a size, multiplies it, and reshapes by what comes out. As tensors these
numbers would be data, on which no shape may depend when the model is traced; as numbers they stay sizes. A value here
is a number, or a list of them, or of such lists. In between they are arrays of numpy that hold objects: those keep
symbols as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["SIZES", "Value", "shape", "size", "tensor_of"]

Value: TypeAlias = "Any"
"""A number, or a list of values; a number is an int, a float, a bool, or a symbol of torch for one of these."""

_INTEGERS: Final = (2, 3, 4, 5, 6, 7, 12, 13)  # numbers of onnx.TensorProto.DataType
_BOOL: Final = 9


def shape(x: Any, *, start: int = 0, end: int | None = None) -> list[Any]:
    """The sizes of a tensor, or some of them; of sizes, how many they are."""
    return list(x.shape if isinstance(x, Tensor) else _array(x).shape)[start:end]


def size(x: Tensor) -> Any:
    """How many numbers `x` has."""
    return x.numel()


def tensor_of(value: Value) -> Tensor:
    """Numbers as a tensor; integers are of 64 bits."""
    if isinstance(value, list | tuple):
        return torch.stack([tensor_of(each) for each in value]) if value else torch.empty(0, dtype=torch.int64)
    if isinstance(value, bool | torch.SymBool):
        return torch.scalar_tensor(value, dtype=torch.bool)
    if isinstance(value, float | torch.SymFloat):
        return torch.scalar_tensor(value, dtype=torch.float32)
    return torch.scalar_tensor(value, dtype=torch.int64)


def _array(value: Value) -> Any:
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple):
        return np.stack([_array(each) for each in value])
    found = np.empty(len(value) if isinstance(value, list | tuple) else (), dtype=object)
    for k, each in enumerate(value if isinstance(value, list | tuple) else ()):
        found[k] = each
    if not found.shape:
        found[()] = value
    return found


def _plain(array: Any) -> Value:
    return array.tolist() if isinstance(array, np.ndarray) else array


def _pointwise(function: Callable[..., Any], count: int = 2) -> Callable[..., Value]:
    """`function` of so many numbers, for values that broadcast."""
    applied = np.frompyfunc(function, count, 1)

    def broadcast(*values: Value) -> Value:
        return _plain(applied(*map(_array, values)))

    return broadcast


def _several(function: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    """A function of two numbers, for any number of values that broadcast."""
    applied = np.frompyfunc(function, 2, 1)

    def broadcast(*values: Value) -> Value:
        found = _array(values[0])
        for each in values[1:]:
            found = applied(found, _array(each))
        return _plain(found)

    return broadcast


def _divide(a: Any, b: Any) -> Any:
    """Integers are divided towards zero. Sizes are not negative, so that is rounding down."""
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    if isinstance(a, int) and isinstance(b, int):
        return int(math.copysign(abs(a) // abs(b), a * b)) if a * b else 0
    return a // b


def _modulo(a: Value, b: Value, *, fmod: int = 0) -> Value:
    return _pointwise(lambda one, other: one % other)(a, b)


def _cast(x: Value, *, to: int, saturate: int = 1, round_mode: str = "up") -> Value:
    if to in _INTEGERS:
        return _pointwise(lambda n: int(n) if isinstance(n, float | bool | int) else torch.sym_int(n), 1)(x)
    return _pointwise((lambda n: n != 0) if to == _BOOL else torch.sym_float, 1)(x)


def _gather(x: Value, indices: Value, *, axis: int = 0) -> Value:
    return _plain(np.take(_array(x), np.array(indices, dtype=np.int64), axis=axis))


def _slice(x: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None) -> Value:
    found = _array(x)
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = (axes[k] if axes else k), (steps[k] if steps else 1)
        if step < 0 and end < -found.shape[axis]:
            end = None
        found = found[(slice(None),) * (axis % found.ndim) + (slice(start, end, step),)]
    return _plain(found)


def _concat(*parts: Value, axis: int = 0) -> Value:
    return _plain(np.concatenate([_array(part) for part in parts], axis))


def _unsqueeze(x: Value, axes: Value = None) -> Value:
    return _plain(np.expand_dims(_array(x), tuple(axes)))


def _squeeze(x: Value, axes: Value = None) -> Value:
    return _plain(np.squeeze(_array(x), tuple(axes) if axes else None))


def _reshape(x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    return _plain(_array(x).reshape(shape))


def _transpose(x: Value, *, perm: Any = None) -> Value:
    return _plain(_array(x).transpose(perm))


def _product(x: Value, axes: Value = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
    found = math.prod(_array(x).ravel().tolist())
    return [found] if keepdims else found


def _expand(x: Value, shape: Value) -> Value:
    return _plain(np.broadcast_to(_array(x), tuple(shape)))


def _filled(shape: Value, *, value: Any = 0.0, dtype: int = 1) -> Value:
    return _plain(np.full(tuple(shape), value, dtype=object))


def _least(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, int | float) and isinstance(b, int | float) else torch.sym_min(a, b)


def _largest(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, int | float) and isinstance(b, int | float) else torch.sym_max(a, b)


def _identity(x: Value) -> Value:
    return x


SIZES: Final[Mapping[str, Callable[..., Value]]] = {
    "Abs": _pointwise(abs, 1),
    "Add": _pointwise(lambda a, b: a + b),
    "And": _pointwise(lambda a, b: a and b),
    "Cast": _cast,
    "Ceil": _pointwise(lambda a: float(math.ceil(a)) if isinstance(a, float) else torch.sym_float(-((-a) // 1)), 1),
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Div": _pointwise(_divide),
    "Equal": _pointwise(lambda a, b: a == b),
    "Expand": _expand,
    "Floor": _pointwise(lambda a: float(math.floor(a)) if isinstance(a, float) else a // 1, 1),
    "Gather": _gather,
    "Greater": _pointwise(lambda a, b: a > b),
    "GreaterOrEqual": _pointwise(lambda a, b: a >= b),
    "Identity": _identity,
    "Less": _pointwise(lambda a, b: a < b),
    "LessOrEqual": _pointwise(lambda a, b: a <= b),
    "Max": _several(_largest),
    "Min": _several(_least),
    "Mod": _modulo,
    "Mul": _pointwise(lambda a, b: a * b),
    "Neg": _pointwise(lambda a: -a, 1),
    "Not": _pointwise(lambda a: not a, 1),
    "Or": _pointwise(lambda a, b: a or b),
    "ReduceProd": _product,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _pointwise(lambda a, b: a - b),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _pointwise(lambda chosen, a, b: a if chosen else b, 3),
}
"""What operators do where all that they read are sizes."""
