"""Pooling, resizing and padding, which ONNX describes otherwise than PyTorch.

Source: the operators' definitions in the ONNX specification (MaxPool, AveragePool, Resize, LRN).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphzip.formats.onnx_files.operators import Unsupported

__all__ = ["SPATIAL", "SPATIAL_NUMBERS", "padded", "symmetric"]

_MAX_POOL: Final = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: Final[Mapping[int, Callable[..., Tensor]]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def symmetric(pads: Sequence[int]) -> list[int] | None:
    """Padding that is the same on both sides, for each dimension; `None` where it is not."""
    half = len(pads) // 2
    return list(pads[:half]) if list(pads[:half]) == list(pads[half:]) else None


def padded(x: Tensor, pads: Sequence[Any], value: float = 0.0) -> Tensor:
    """`x` with `pads` (all befores, then all afters) around its last dimensions."""
    half = len(pads) // 2
    flat = [size for k in reversed(range(half)) for size in (pads[k], pads[k + half])]
    return x if all(isinstance(size, int) and size == 0 for size in flat) else F.pad(x, flat, "constant", value)


def same(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], auto_pad: str
) -> list[Any]:
    """The pads with which a window of `kernel` gives ceil(size / stride) places: SAME_UPPER or SAME_LOWER."""
    before, after = [], []
    for size, wide, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total: Any = torch.sym_max((-(-size // stride) - 1) * stride + (wide - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if auto_pad == "SAME_UPPER" else large)
        after.append(large if auto_pad == "SAME_UPPER" else small)
    return [*before, *after]


def _pads(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> list[Any]:
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return same(x, kernel, strides, dilations, auto_pad)
    return list(pads) if pads is not None and auto_pad == "NOTSET" else [0] * (2 * len(kernel))


def _evenly(around: Sequence[Any], kernel: Sequence[int]) -> list[int] | None:
    """Pads as PyTorch's pools take them, for each dimension; `None` where they differ or exceed half of the window."""
    even = symmetric(around)
    return even if even is not None and all(2 * pad <= wide for pad, wide in zip(even, kernel, strict=True)) else None


def _max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
) -> Tensor:
    rank = len(kernel_shape)
    steps, apart = list(strides or [1] * rank), list(dilations or [1] * rank)
    around = _pads(x, kernel_shape, steps, apart, pads, auto_pad)
    even = _evenly(around, kernel_shape)
    if even is None:
        x, even = padded(x, around, -math.inf), [0] * rank
    return _MAX_POOL[rank](x, list(kernel_shape), steps, even, apart, bool(ceil_mode))


def _average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Tensor:
    rank = len(kernel_shape)
    if any(each != 1 for each in dilations or ()):
        raise Unsupported("an average over dilated windows")
    steps = list(strides or [1] * rank)
    around = _pads(x, kernel_shape, steps, [1] * rank, pads, auto_pad)
    even = _evenly(around, kernel_shape)
    pool = _AVG_POOL[rank]
    if even is not None:
        return pool(x, list(kernel_shape), steps, even, bool(ceil_mode), bool(count_include_pad))
    total = pool(padded(x, around), list(kernel_shape), steps, 0, bool(ceil_mode))
    if count_include_pad:
        return total
    return total / pool(padded(torch.ones_like(x[:1, :1]), around), list(kernel_shape), steps, 0, bool(ceil_mode))


def _global_average(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


def _global_max(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


def _local_response(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    if size % 2 == 0:
        raise Unsupported("a response over an even number of channels")
    return F.local_response_norm(x, size, alpha, beta, bias)


# ------------------------------------------------------------------------------------------------- resizing


def _resize(
    x: Tensor,
    *given: Any,
    mode: str = "nearest",
    coordinate_transformation_mode: str | None = None,
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    axes: Sequence[int] | None = None,
    antialias: int = 0,
    keep_aspect_ratio_policy: str = "stretch",
    opset: int,
) -> Tensor:
    """It reads scales in opset 10, later a region (which no mode here has), and then scales and sizes."""
    scales, sizes = (given[0], None) if opset < 11 else (*given[1:], None, None)[:2]
    way = coordinate_transformation_mode or ("half_pixel" if opset >= 11 else "asymmetric")
    nearest = nearest_mode if opset >= 11 else "floor"
    if antialias or exclude_outside or keep_aspect_ratio_policy != "stretch":
        raise Unsupported("resizing with antialias, exclude_outside or kept ratios")
    rank = x.dim() - 2
    wanted, factors = _spatial(x, scales, axes, 1.0), _spatial(x, sizes, axes, None)
    if mode == "nearest":
        return _nearest(x, wanted, factors, way, nearest)
    kinds = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}
    if (mode, rank) not in kinds or way not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise Unsupported(f"resizing {mode!r} with coordinates {way!r} over {rank} dimensions")
    if mode == "cubic" and not math.isclose(cubic_coeff_a, -0.75):
        raise Unsupported(f"cubic resizing with the coefficient {cubic_coeff_a}")
    corners = way == "align_corners"
    if factors is not None:
        return F.interpolate(x, size=factors, mode=kinds[mode, rank], align_corners=corners)
    return F.interpolate(x, scale_factor=wanted, mode=kinds[mode, rank], align_corners=corners)


def _spatial(x: Tensor, given: Sequence[Any] | None, axes: Sequence[int] | None, same: Any) -> list[Any] | None:
    """What is given for the dimensions behind the channels. Raises `Unsupported` where others change as well."""
    if given is None or not len(given):
        return None
    dims = [axis % x.dim() for axis in axes] if axes is not None else list(range(x.dim()))
    named = dict(zip(dims, given, strict=True))
    for dim in (0, 1):
        unchanged = same if same is not None else x.shape[dim]
        if dim in named and not (named[dim] is unchanged or bool(named[dim] == unchanged)):
            raise Unsupported("resizing along the batch or the channels")
    return [named.get(dim, same if same is not None else x.shape[dim]) for dim in range(2, x.dim())]


def _nearest(x: Tensor, scales: list[Any] | None, sizes: list[Any] | None, way: str, rounding: str) -> Tensor:
    if way == "asymmetric" and rounding == "floor":
        if sizes is not None:
            return F.interpolate(x, size=sizes, mode="nearest")
        return F.interpolate(x, scale_factor=scales, mode="nearest")
    for k, size in enumerate(x.shape[2:]):
        if not isinstance(size, int):
            raise Unsupported(f"nearest neighbours with coordinates {way!r} and rounding {rounding!r} of free sizes")
        scale = scales[k] if scales is not None else sizes[k] / size  # type: ignore[index]
        count = sizes[k] if sizes is not None else math.floor(size * scale)
        places = [_source(i, size, count, scale, way) for i in range(count)]
        rounded = [min(max(_ROUND[rounding](place), 0), size - 1) for place in places]
        if rounded != list(range(size)):
            x = torch.index_select(x, k + 2, torch.tensor(rounded, device=x.device))
    return x


_ROUND: Final[Mapping[str, Callable[[float], int]]] = {
    "round_prefer_floor": lambda x: math.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: math.floor(x + 0.5),
    "floor": math.floor,
    "ceil": math.ceil,
}


def _source(i: int, size: int, count: int, scale: float, way: str) -> float:
    """The place in the input of place `i` of the output."""
    if way == "half_pixel":
        return (i + 0.5) / scale - 0.5
    if way == "pytorch_half_pixel":
        return (i + 0.5) / scale - 0.5 if count > 1 else 0.0
    if way == "align_corners":
        return i * (size - 1) / (count - 1) if count > 1 else 0.0
    if way == "asymmetric":
        return i / scale
    raise Unsupported(f"resizing with coordinates {way!r}")


def _upsample(x: Tensor, scales: Sequence[float], *, mode: str = "nearest", opset: int) -> Tensor:
    if mode != "nearest":
        raise Unsupported("upsampling that is linear: its coordinates are not those of PyTorch")
    return _resize(x, scales, opset=10)


SPATIAL: Final[Mapping[str, Callable[..., Any]]] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "LRN": _local_response,
    "MaxPool": _max_pool,
    "Resize": _resize,
    "Upsample": _upsample,
}
"""What computes an operator, by its name."""

SPATIAL_NUMBERS: Final[Mapping[str, Mapping[int, str]]] = {
    "Resize": {1: "roi", 2: "scales", 3: "sizes"},  # of opset 10, scales come first; all are lists
    "Upsample": {1: "scales"},
}
"""As `NUMBERS` of the other operators."""
