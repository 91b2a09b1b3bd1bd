"""Cases of operators that act on each position by itself."""

from __future__ import annotations

from typing import Any

import torch
from op_cases import Cases, param
from torch import nn

CASES = Cases()

aten = torch.ops.aten


def plain(names: str) -> dict[str, Any]:
    """Operators that take nothing but activations."""
    return dict.fromkeys(names.split(), ())


# --- one tensor ----------------------------------------------------------------------------------------------------

CASES.together("rectifiers", plain("relu relu6 leaky_relu elu celu selu hardshrink hardtanh softshrink rrelu") | {
    "threshold": (0.1, 0.2)
})  # fmt: skip
CASES.together("gates", plain("sigmoid special_expit silu mish gelu hardsigmoid hardswish log_sigmoid softplus tanh"))
CASES.together("whole numbers", plain("abs sign sgn ceil floor frac round trunc") | {
    "round.decimals": lambda m, x: aten.round.decimals(x, decimals=1)
})  # fmt: skip
CASES.together("angles", plain("sin cos tan sinc sinh cosh asinh atan deg2rad rad2deg"))
CASES.together("inverses", plain("acos asin atanh erfinv") | {"logit": (0.1,)}, fit="unit")
CASES.together("exponentials", plain("exp exp2 expm1 erf erfc square neg positive") | {"pow.Tensor_Scalar": (3,)})
CASES.together("normal distributions", plain("special_ndtr special_log_ndtr"))
CASES.together("logarithms", plain("log log10 log1p log2 lgamma acosh sqrt rsqrt reciprocal special_entr"), fit="large")
CASES.together("copies", plain("clone contiguous detach _to_copy") | {
    "alias": lambda m, x: aten.sum_to_size.default(x, x.shape),
    "to.dtype": (torch.float64,),
    "to.device": (torch.device("cpu"), torch.float64),
    "to.dtype_layout": lambda m, x: aten.to.dtype_layout(x, dtype=torch.float64),
    "to.other": lambda m, x: aten.to.other(x, x.double().sum(2)),
    "type_as": lambda m, x: aten.type_as.default(x, x.double().sum(2)),
})  # fmt: skip
CASES.together("dropouts", {
    "dropout": lambda m, x: m.drop(x),
    "alpha_dropout": lambda m, x: m.alpha(x),
    "feature_dropout": lambda m, x: m.feature(x),
    "feature_alpha_dropout": lambda m, x: m.both(x),
}, parts=lambda: {
    "drop": nn.Dropout(), "alpha": nn.AlphaDropout(), "feature": nn.Dropout1d(), "both": nn.FeatureAlphaDropout(),
})  # fmt: skip
CASES.together("of the same shape", {
    "fill.Scalar": (2.0,),
    "fill.Tensor": lambda m, x: aten.fill.Tensor(x, torch.full((), 0.7, dtype=x.dtype)),
})  # fmt: skip
CASES.add(aten.fill.Tensor, lambda m, x: aten.fill.Tensor(x, m.number), name="with a parameter",
          parts=lambda: {"number": nn.Parameter(torch.tensor(0.7))})  # fmt: skip
FILLED: dict[str, Any] = {
    "zeros": lambda x, size: aten.zeros.default(size, dtype=x.dtype),
    "ones": lambda x, size: aten.ones.default(size, dtype=x.dtype),
    "full": lambda x, size: aten.full.default(size, 0.5, dtype=x.dtype),
    "empty.memory_format": lambda x, size: aten.fill.Scalar(aten.empty.memory_format(size, dtype=x.dtype), 0.5),
    "new_zeros": aten.new_zeros.default,
    "new_ones": aten.new_ones.default,
    "new_full": lambda x, size: aten.new_full.default(x, size, 0.5),
    "new_empty": lambda x, size: aten.fill.Scalar(aten.new_empty.default(x, size), 0.5),
}
for way, width in {"as wide as the channels": 6, "as wide as nothing": 1}.items():
    CASES.together(f"filled, {way}", {
        name: lambda m, x, make=make, width=width: x + make(x, [x.shape[0], 3, width]) for name, make in FILLED.items()
    })  # fmt: skip
CASES.add(aten.zeros.default, lambda m, x: torch.cat([x, aten.zeros.default([x.shape[0], 4, 5], dtype=x.dtype)], 1),
          name="behind the channels")  # fmt: skip
CASES.add(aten.ones.default, lambda m, x: x @ aten.ones.default([6, 4], dtype=x.dtype), (2, 5, 6), dim=2, out=1,
          name="multiplied with")  # fmt: skip
CASES.add(aten.full.default, lambda m, x: x + aten.full.default([x.shape[0], 6, 5], 0.5, dtype=x.dtype).view(-1, 3, 2, 5).flatten(1, 2),
          name="viewed", free=None)  # fmt: skip
CASES.together("questions", plain("isfinite isinf isnan nan_to_num"))

# --- a tensor and a number -----------------------------------------------------------------------------------------

CASES.together("arithmetic with a number", {
    "add.Scalar": (1.5,), "sub.Scalar": (1.5,), "subtract.Scalar": (1.5,), "rsub.Scalar": (1.5,), "mul.Scalar": (3.0,),
    "multiply.Scalar": (3.0,), "div.Scalar": (3.0,), "divide.Scalar": (3.0,), "true_divide.Scalar": (3.0,),
    "floor_divide.Scalar": (0.3,), "fmod.Scalar": (0.3,), "remainder.Scalar": (0.3,), "copysign.Scalar": (-1.0,),
    "div.Scalar_mode": lambda m, x: aten.div.Scalar_mode(x, 0.3, rounding_mode="floor"),
    "divide.Scalar_mode": lambda m, x: aten.divide.Scalar_mode(x, 0.3, rounding_mode="trunc"),
})  # fmt: skip
CASES.together("comparisons with a number", {
    "eq.Scalar": (0.0,), "ne.Scalar": (0.0,), "ge.Scalar": (0.1,), "gt.Scalar": (0.1,), "le.Scalar": (0.1,),
    "lt.Scalar": (0.1,), "clamp": (-0.5, 0.5), "clamp_max": (0.5,), "clamp_min": (-0.5,),
    "where.Scalar": lambda m, x: aten.where.Scalar(x > 0, 1.0, -2.0),
})  # fmt: skip
CASES.together("a number to begin with", {
    "pow.Scalar": lambda m, x: aten.pow.Scalar(2.0, x),
    "remainder.Scalar_Tensor": lambda m, x: aten.remainder.Scalar_Tensor(2.0, x),
    "xlogy.Scalar_Self": lambda m, x: aten.xlogy.Scalar_Self(2.0, x),
    "xlogy.Scalar_Other": (2.0,),
}, fit="positive")  # fmt: skip
CASES.together("bits", plain("bitwise_not") | {
    "bitwise_and.Scalar": (3,),
    "bitwise_or.Scalar": (3,),
    "bitwise_xor.Scalar": (3,),
    "bitwise_and.Scalar_Tensor": lambda m, x: aten.bitwise_and.Scalar_Tensor(3, x),
    "bitwise_or.Scalar_Tensor": lambda m, x: aten.bitwise_or.Scalar_Tensor(3, x),
    "bitwise_xor.Scalar_Tensor": lambda m, x: aten.bitwise_xor.Scalar_Tensor(3, x),
}, fit="whole")  # fmt: skip
CASES.together("negation", plain("logical_not"), fit="flag")

# --- two tensors and more ------------------------------------------------------------------------------------------

TWO = ("make", "other")
THREE = ("make", "other", "third")

CASES.together("arithmetic", plain(
    "add.Tensor sub.Tensor subtract.Tensor rsub.Tensor mul.Tensor multiply.Tensor div.Tensor divide.Tensor "
    "true_divide.Tensor floor_divide fmod.Tensor remainder.Tensor copy copysign.Tensor"
) | {
    "div.Tensor_mode": lambda m, x, y: aten.div.Tensor_mode(x, y, rounding_mode="floor"),
    "divide.Tensor_mode": lambda m, x, y: aten.divide.Tensor_mode(x, y, rounding_mode="trunc"),
}, makers=TWO)  # fmt: skip
CASES.together("functions of two", plain("atan2 hypot logaddexp nextafter heaviside") | {"lerp.Scalar": (0.3,)},
               makers=TWO)  # fmt: skip
CASES.together("powers", plain("pow.Tensor_Tensor xlogy.Tensor"), makers=TWO, fit="positive")
CASES.together("comparisons", plain(
    "fmax fmin maximum minimum max.other min.other clamp_max.Tensor clamp_min.Tensor ge.Tensor gt.Tensor le.Tensor "
    "lt.Tensor"
), makers=TWO)  # fmt: skip
CASES.together("bits of two", plain("bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor eq.Tensor ne.Tensor"),
               makers=TWO, fit="whole")  # fmt: skip
CASES.together("logic", plain("logical_and logical_or logical_xor"), makers=TWO, fit="flag")
CASES.together("choices", {
    "masked_fill.Scalar": lambda m, x, y: aten.masked_fill.Scalar(x, y > 0, -1.0),
    "masked_fill.Tensor": lambda m, x, y: aten.masked_fill.Tensor(x, y > 0, torch.full((), 0.7, dtype=x.dtype)),
    "where.self": lambda m, x, y: aten.where.self(x > y, x, -y),
    "where.ScalarOther": lambda m, x, y: aten.where.ScalarOther(x > 0, y, 0.5),
    "where.ScalarSelf": lambda m, x, y: aten.where.ScalarSelf(x > 0, 0.5, y),
}, makers=TWO)  # fmt: skip
CASES.together("functions of three", plain("lerp.Tensor addcmul addcdiv clamp.Tensor"), makers=THREE, fit="positive")

# --- halves --------------------------------------------------------------------------------------------------------

CASES.each({"glu": (1,)}, free={"make": 3})
CASES.each({"glu": (2,)}, name="over positions", shape=(2, 6, 4))
CASES.each({"glu": (-1,)}, name="over the last dimension", shape=(2, 5, 6), dim=2, free={"make": 3})

# --- broadcasting --------------------------------------------------------------------------------------------------


def against(name: str, *shape: int, **options: Any) -> None:
    """The activation times a parameter of this shape."""
    CASES.add(
        aten.mul.Tensor,
        lambda m, x: aten.mul.Tensor(x, m.scale),
        name=name,
        parts=lambda: {"scale": param(*shape)},
        **options,
    )


against("by a scale per channel", 6, 1)
against("by a scale per channel, aligned", 1, 6, 1)
against("by a scale per position", 5)
against("by a scale per channel and position", 6, 5)
against("by one scale", 1)
against("by a number")
