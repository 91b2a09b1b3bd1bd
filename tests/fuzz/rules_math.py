"""Rules of arithmetic: element by element, broadcast, expanded."""

from __future__ import annotations

from fuzz.gen import Gen, rule

_SHARED = (
    "F.relu({})",
    "F.gelu({})",
    "{}.tanh()",
    "{}.sigmoid()",
    "F.silu({})",
    "F.softplus({})",
    "F.hardswish({})",
    "F.leaky_relu({}, 0.1)",
    "F.elu({})",
    "{}.abs()",
    "0.5 * {} * {}",
    "{}.clamp(-1, 1)",
    "{} * 2 - 1",
    "-{}",
    "1 / (1 + {}.square())",
    "torch.sqrt({}.abs() + 0.1)",
    "F.hardtanh({})",
    "F.relu6({})",
    "torch.exp(-{}.abs())",
    "F.mish({})",
    "torch.sin({})",
    "{} ** 2",
    "{}.pow(3).tanh()",
    "F.hardsigmoid({})",
    "F.selu({})",
    "torch.erf({})",
    "F.logsigmoid({})",
    "{}.clamp(min=0)",
    "torch.clamp_max({}, 1.0)",
    "F.softsign({})",
    "F.threshold({}, 0.1, 0.0)",
    "torch.nan_to_num({})",
    "{}.reciprocal().clamp(-3, 3)",
    "F.celu({})",
    "torch.log1p({}.abs())",
    "F.tanhshrink({})",
    "torch.square({})",
    "{}.double().sin()",
    "torch.atan({})",
    "F.rrelu({})",
    "torch.cos({}).mul(0.7)",
    "{}.rsub(1.0)",
    "torch.where({} > 0, {}, 0.1 * {})",
    "torch.addcmul({}, {}, {}, value=0.1)",
    "({} > 0) * {}",
    "{}.relu().sqrt()",
)

_BINARY = (
    "{} + {}",
    "{} - 0.5 * {}",
    "{} * torch.tanh({})",
    "torch.maximum({}, {})",
    "{} / (1 + {}.abs())",
    "torch.where({0} > {1}, {0}, {1} * 0.5)",
    "torch.lerp({}, {}, 0.3)",
    "torch.add({}, {}, alpha=2)",
    "torch.minimum({}, {})",
    "torch.addcmul({0}, {0}, {1})",
    "torch.addcdiv({0}, {0}, {1}.abs() + 1)",
    "torch.atan2({}, {} + 3)",
    "({} > {}) * 1.0 + {0}",
    "torch.hypot({}, {})",
    "torch.where(({0} > 0) & ({1} < 1), {0}, {1})",
    "torch.fmax({}, {})",
    "torch.sub({}, {})",
    "{} * ({} > 0.1)",
    "torch.logaddexp({}, {})",
    "{0}.mul({1}).sub({0})",
    "torch.stack([{}, {}]).sum(0)",
    "torch.stack([{}, {}], -1).amax(-1)",
    "torch.mul({}, other={})",
    "torch.rsub({}, {})",
    "torch.copysign({}, {})",
)


def _filled(text: str, *names: object) -> str:
    if "{0}" in text:
        parts = text.replace("{0}", str(names[0])).replace("{1}", str(names[-1]))
        return parts.replace("{}", str(names[-1]))
    holes = text.count("{}")
    given = list(names) if len(names) == holes else [names[0]] * holes
    return text.format(*given)


@rule(3)
def pointwise(g: Gen) -> None:
    x = g.take()
    g.put(_filled(g.one(*_SHARED), x), [x], x.layout)


_UNARY = (
    "acos({} * 0.9)",
    "acosh({}.square() + 1)",
    "asin({} * 0.9)",
    "asinh({})",
    "atanh({} * 0.9)",
    "ceil({} * 2)",
    "cosh({})",
    "deg2rad({} * 50)",
    "erfc({})",
    "erfinv({} * 0.9)",
    "exp({})",
    "exp2({})",
    "expm1({})",
    "frac({} * 3)",
    "hardshrink({})",
    "lgamma({}.square() + 0.5)",
    "log({}.square() + 0.5)",
    "log10({}.square() + 0.5)",
    "log2({}.square() + 0.5)",
    "logit({} * 0.4 + 0.5)",
    "positive({})",
    "rad2deg({} * 0.1)",
    "round({} * 3)",
    "rsqrt({}.square() + 0.5)",
    "sgn({})",
    "sign({})",
    "sinc({})",
    "sinh({})",
    "nn.functional.softshrink({})",
    "special.expit({})",
    "tan({})",
    "trunc({} * 3)",
    "log1p({}.square())",
    "digamma({}.square() + 1)",
    "round({}, decimals=1)",
    "i0({})",
    "nn.functional.alpha_dropout({}, 0.5, False)",
    "special.log_ndtr({})",
    "isfinite({}) * 0.5",
    "clamp({}, torch.tensor(-0.5), torch.tensor(0.5))",
    "bitwise_not({} > 0) * 0.5",
)

_PAIRS = (
    "fmod({}, {}.abs() + 1)",
    "remainder({}, {}.abs() + 1)",
    "fmin({}, {})",
    "floor_divide({}, {}.abs() + 1)",
    "eq({}, {}) * 0.5",
    "ne({}, {}) * 0.5",
    "ge({}, {}) * 0.5",
    "le({}, {}) * 0.5",
    "lt({}, {}) * 0.5",
    "div({}, {}.abs() + 1, rounding_mode='floor')",
    "logical_and({} > 0, {} > 0) * 0.5",
    "logical_or({} > 0, {} > 0) * 0.5",
    "logical_xor({} > 0, {} > 0) * 0.5",
    "xlogy({}, {}.square() + 0.5)",
    "heaviside({}, {})",
    "true_divide({}, {}.abs() + 1)",
    "pow({}.abs() + 0.5, {})",
    "multiply({}, {})",
    "subtract({}, {})",
    "bitwise_and({} > 0, {} > 0) * 0.5",
    "bitwise_xor({} > 0, {} > 0) * 0.5",
    "where({} > 0, {}, 0.5)",
    "max({}, {})",
    "min({}, {})",
    "lerp({}, {}, torch.tensor(0.3, dtype={0}.dtype))",
    "ldexp({}, {}.round())",
    "float_power({}.abs() + 0.5, {})",
)


@rule(1.2)
def more_pointwise(g: Gen) -> None:
    """The rarer functions of one or two values, on numbers that they take."""
    x = g.take()
    z = g.like(x, itself=0.15)
    if g.chance(0.6):
        g.put("torch." + g.one(*_UNARY).format(f"{x}.tanh()"), [x], x.layout)
    elif g.chance(0.5):
        text = g.one(
            f"{x} % 2.0",
            f"{x} // 0.5",
            f"2 ** {x}.tanh()",
            f"{x} == 0.0",
            f"{x} >= 0.3",
            f"{x} <= 0.3",
            f"{x} != 0.5",
            f"torch.fmod({x}, 1.5)",
            f"torch.xlogy(2.0, {x}.square() + 1)",
            f"torch.xlogy({x}, 2.0)",
            f"{x}.add(1)",
            f"{x}.sub(0.5)",
            f"{x}.div(2)",
            f"torch.remainder(2, {x}.abs() + 1)",
        )
        g.put(f"({text}) * 0.5", [x], x.layout)
    else:
        text = g.one(*_PAIRS)
        first, *rest = text.split("{}", 1)
        g.put(
            "torch." + first.replace("{0}", str(x)) + str(x) + rest[0].replace("{0}", str(x)).replace("{}", str(z)),
            [x, z],
            x.layout,
        )


@rule(0.6)
def activation_layer(g: Gen) -> None:
    x = g.take(where=lambda v: "C" in v.layout and v.layout.index("C") == 1)
    act = g.layer(
        g.one(f"nn.PReLU({x.c})", "nn.PReLU()", "nn.ReLU()", "nn.Softplus()", "nn.GELU('tanh')", "nn.Hardswish()")
    )
    g.put(f"{act}({x})", [x], x.layout)


@rule(3)
def binary(g: Gen) -> None:
    x = g.take()
    z = g.like(x, itself=0.15)
    text = g.one(*_BINARY)
    names = (x, z)
    if "{0}" in text:
        made = text.replace("{0}", str(x)).replace("{1}", str(z)).replace("{}", str(z))
    else:
        made = text.format(*names)
    g.put(made, [x, z], x.layout)


@rule(1)
def broadcast(g: Gen) -> None:
    """With a scalar, a value for every channel, a size-1 axis, or a table of one axis."""
    x = g.take()
    d = g.rng.randrange(x.rank)
    if x.layout[d] == "B":
        d = x.rank - 1
    sizes = [1] * x.rank
    sizes[d] = x.shape[d]
    text = g.one(
        f"{x} * {g.table(*sizes)}",
        f"{x} + {g.table(*sizes[d:])}",
        f"{x} * {g.table(1)} + {g.param(1)}",
        f"torch.mul({g.table(*sizes[d:])}, {x})",
        f"{x} * {g.param(*sizes)}.expand_as({x})",
        f"{x} / {x}.shape[{d}]",
        f"{x} * {x}.shape[{d}] ** -0.5",
        f"{x} * torch.full((1,), 0.5)",
        f"{x} + torch.arange({x}.shape[{d}], dtype={x}.dtype).view({', '.join(map(str, sizes))}) * 0.1",
    )
    g.put(text, [x], x.layout)


@rule(1)
def expanded(g: Gen) -> None:
    """A narrower value spread over a wider one, and copies of what was spread."""
    x = g.take(where=lambda v: "C" in v.layout)
    d = g.rng.randrange(1, x.rank)
    one = f"{x}.{g.one('mean', 'amax', 'sum')}({g.neg(d, x.rank)}, keepdim=True)"
    made = g.one(
        f"{x} - {one}.expand_as({x})",
        f"{x} + {one}.expand({', '.join(g.sizes(x))})",
        f"{x} * {one}.expand_as({x}).sigmoid()",
        f"{one}.expand_as({x}) + {x} * 0",
        f"torch.zeros_like({x}).copy_({one}) + {x}",
        f"{x} - torch.broadcast_to({one}, {x}.shape)",
        f"{x} * torch.ones_like({x}) / {x}.numel()",
        f"{x} + torch.empty_like({x}).copy_({one}).sigmoid()",
        f"{x} + {one}.repeat({', '.join('1' if e != d else str(s) for e, s in enumerate(x.shape))})",
        f"torch.cat([{x}, {one}.expand_as({x})], {d})[{':, ' * d}:{x}.shape[{d}]]",
    )
    g.put(made, [x], x.layout)


@rule(0.7)
def expanded_sum(g: Gen) -> None:
    """The width of what is summed comes from another value."""
    x = g.take("BC", "BLC")
    a = g.layer(f"nn.Linear({x.c}, 1)")
    text = g.one(
        f"{a}({x}).expand_as({x}).sum(-1, keepdim=True)",
        f"{a}({x}).expand_as({x}).mean(-1, keepdim=True)",
        f"torch.zeros_like({x}).copy_({a}({x})).sum(-1, keepdim=True)",
        f"({a}({x}).expand(*{x}.shape) ** 2).sum(dim=-1, keepdim=True)",
        f"torch.ones_like({x}).sum(-1, keepdim=True) * {a}({x})",
        f"{a}({x}) * {x}.shape[-1]",
        f"{a}({x}).expand_as({x}).softmax(-1)[..., :1]",
        f"{a}({x}).expand_as({x}).norm(dim=-1, keepdim=True)",
    )
    g.put(text, [x], x.layout)


# --- over an axis --------------------------------------------------------------------------------------------------
