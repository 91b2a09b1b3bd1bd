"""Operators that act on each position by itself: activations, arithmetic with broadcasting, casts, copies."""

from __future__ import annotations

from typing import Any

import torch

from graphzip.graph.operators import COPIES
from graphzip.labels import IntArray
from graphzip.ops.rules import meet, moved, pointwise, same, uncut
from graphzip.ops.site import Site
from graphzip.ops.spec import OpSpec, Result

__all__ = ["IDENTITY", "SPECS"]

aten = torch.ops.aten

_IDENTITY = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
    aten.lift_fresh_copy.default,
)

_CASTS = {*COPIES, aten.detach.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default}
_EXACT = {torch.int32, torch.int64, torch.float32, torch.float64}
"""What holds the number of any channel."""

_UNARY = """
abs acos acosh asin asinh atan atanh bitwise_not ceil celu clamp clamp_max clamp_min cos cosh deg2rad elu
erf erfc erfinv exp exp2 expm1 fill floor frac gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan
leaky_relu lgamma log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg positive pow
rad2deg reciprocal relu relu6 round rrelu rsqrt selu sgn sigmoid sign silu sin sinc sinh softplus softshrink sqrt
square tan tanh tanhshrink threshold trunc special_entr special_expit special_log_ndtr special_ndtr
"""

_BINARY = """
add fill atan2 bitwise_and bitwise_or bitwise_xor copy copysign div divide eq floor_divide fmax fmin fmod ge gt hypot le
lerp logaddexp logical_and logical_or logical_xor lt masked_fill maximum minimum mul multiply ne nextafter pow
remainder rsub sub subtract true_divide where xlogy addcmul addcdiv clamp clamp_max clamp_min max min heaviside
"""

_REDUCING = {"dim", "default", "names_dim"}
"""Overloads of `max` and `min` that reduce."""


def _overloads(names: str, *, tensors: int) -> tuple[Any, ...]:
    """Functional overloads of `names` that take at least (or, for one, exactly) `tensors` tensor arguments."""
    found: list[Any] = []
    for name in dict.fromkeys(names.split()):
        packet = getattr(aten, name, None)
        for overload_name in packet.overloads() if packet is not None else ():
            overload = getattr(packet, overload_name)
            schema = overload._schema
            count = sum(str(argument.type) in {"Tensor", "Optional[Tensor]"} for argument in schema.arguments)
            fits = count == 1 if tensors == 1 else count >= 2
            single = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
            writes = schema.is_mutable or any(argument.is_out for argument in schema.arguments)
            reduces = name in {"max", "min"} and overload_name in _REDUCING
            own = overload is aten.eq.Scalar  # see `routing`
            if fits and single and not writes and not reduces and not own:
                found.append(overload)
    return tuple(found)


def glu(site: Site) -> Result:
    """`a * sigmoid(b)` with `a`, `b` the halves of one dimension."""
    source = site.args["self"]
    dim = int(site.args["dim"]) % len(site.shape())
    half = site.shape()[dim]
    axes = uncut(site, site.axes(source), [dim])
    operands = []
    for start in (0, half):
        part = (slice(None),) * dim + (slice(start, start + half),)

        def cut(array: IntArray, part: tuple[slice, ...] = part) -> IntArray:
            return array[part] if array.shape[dim] > 1 else array

        operands.append((moved(site, axes, cut), site.extent()))
    return meet(site, operands)


_unary = _overloads(_UNARY + _BINARY, tensors=1)
_binary = tuple(target for target in _overloads(_BINARY, tensors=2) if target not in set(_unary))


def identity(site: Site) -> Result:
    """The same values; numbers of channels also where they are whole numbers in another dtype."""
    source = site.tensors()[0]
    if site.node.target in _CASTS and site.node.meta["val"].dtype in _EXACT:
        site.carry(source)
    return same(site)


IDENTITY = OpSpec(_IDENTITY, identity)

SPECS = (
    IDENTITY,
    OpSpec(_unary, same),
    OpSpec(_binary, pointwise),
    OpSpec((aten.glu.default,), glu),
)
