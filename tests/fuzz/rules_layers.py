"""Rules of layers: linear, convolutions, norms, embeddings, whole blocks of them."""

from __future__ import annotations

from fuzz.gen import Gen, Skip, Value, rule

__all__ = ["MAPS", "ROWS"]

ROWS = ("BC", "BLC", "BHWC", "BNLC", "BCC")
"""Layouts whose channels come last."""

MAPS = ("BC", "BCL", "BCHW", "BCDHW")
"""Layouts whose channels come second."""


def _rows(g: Gen) -> Value:
    return g.take("BC", "BLC", "BHWC", "BNLC")


@rule(3)
def linear(g: Gen) -> None:
    x, out = _rows(g), g.width()
    bias = g.one("", "", ", bias=False")
    layer = g.layer(f"nn.Linear({x.c}, {out}{bias})")
    g.put(g.one(f"{layer}({x})", f"F.relu({layer}({x}))", f"{layer}({x}.relu())"), [x], x.layout)


@rule(2)
def linear_functional(g: Gen) -> None:
    x, out = _rows(g), g.width()
    w, b = g.param(out, x.c), g.param(out)
    texts = [
        f"F.linear({x}, {w}, {b})",
        f"F.linear({x}, {w})",
        f"{x} @ {w}.t() + {b}",
        f"torch.matmul({x}, {w}.mT)",
        f"F.linear({x}, {w} / (1 + {w}.abs().sum()), {b})",
        f"F.linear({x}, F.normalize({w}, dim=1))",
        f"F.linear({x}, {w} * {b}[:, None])",
        f"F.linear({x}, {w}.tanh(), {b})",
        f"F.linear({x}, {w} - {w}.mean(1, keepdim=True))",
    ]
    if x.layout == "BC":
        texts += [f"torch.addmm({b}, {x}, {w}.t())", f"torch.mm({x}, {w}.t())", f"F.linear({x}, weight={w}, bias={b})"]
        texts += [f"torch.einsum('bi,oi->bo', {x}, {w})"]
    if x.layout == "BLC":
        texts += [f"torch.einsum('bli,oi->blo', {x}, {w})", f"torch.tensordot({x}, {w}, dims=([2], [1]))"]
    g.put(g.one(*texts), [x], x.layout)


@rule(2)
def linear_joined(g: Gen) -> None:
    """Weights that are joined, cut or stacked before they are used."""
    x = _rows(g)
    one, two = g.one(2, 3, 4, 6), g.one(2, 3, 4, 6)
    if g.chance(0.5):
        u, v = g.param(one, x.c), g.param(two, x.c)
        b, c = g.param(one), g.param(two)
        text = g.one(
            f"F.linear({x}, torch.cat([{u}, {v}]), torch.cat([{b}, {c}]))",
            f"F.linear({x}, torch.cat([{u}, {v}], 0))",
            f"F.linear({x}, torch.cat(({u}, 2 * {v}), dim=-2))",
            f"F.linear({x}, torch.vstack([{u}, {v}]))",
            f"{x} @ torch.cat([{u}.t(), {v}.t()], -1)",
        )
        g.put(text, [x], x.layout)
    elif x.c >= 4 and g.chance(0.5):
        at = g.rng.randrange(1, x.c)
        u, v = g.param(one, at), g.param(one, x.c - at)
        text = g.one(f"torch.cat([{u}, {v}], 1)", f"torch.cat([{u}, {v}], dim=-1)", f"torch.hstack([{u}, {v}])")
        g.put(f"F.linear({x}, {text})", [x], x.layout)
    else:
        u, v = g.param(one, x.c), g.param(one, x.c)
        texts = [
            f"F.linear({x}, torch.stack([{u}, {v}]).sum(0))",
            f"F.linear({x}, torch.stack([{u}, {v}], 1).flatten(0, 1))",
            f"F.linear({x}, torch.stack([{u}, {v}])[1])",
            f"F.linear({x}, {u} + {v})",
            f"F.linear({x}, {u} * {v})",
        ]
        g.put(g.one(*texts), [x], x.layout)


@rule(1)
def linear_cut(g: Gen) -> None:
    """Parts of one parameter in several places."""
    x = g.take("BC", "BLC")
    one, two = g.one(2, 4, 6), g.one(2, 4, 6)
    w, b = g.param(one + two, x.c), g.param(one + two)
    text = g.one(f"{w}.split([{one}, {two}])", f"({w}[:{one}], {w}[{one}:])", f"torch.tensor_split({w}, ({one},))")
    names = g.name("u"), g.name("v"), g.name(), g.name()
    g.put_block(
        f"{names[0]}, {names[1]} = {text}\n{names[2]}, {names[3]} = "
        f"F.linear({x}, {names[0]}, {b}[:{one}]), F.linear({x}, {names[1]})",
        [x],
        {names[2]: x.layout, names[3]: x.layout},
    )


@rule(1)
def tied(g: Gen) -> None:
    """One weight, there and back, or in two places."""
    x, inner = _rows(g), g.width()
    w = g.param(inner, x.c)
    text = g.one(
        f"F.linear(F.linear({x}, {w}).relu(), {w}.t())",
        f"torch.relu({x} @ {w}.T) @ {w}",
        f"F.linear(F.linear({x}, {w}).tanh() * F.linear({x}, {w}), {w}.mT)",
    )
    g.put(text, [x], x.layout)


@rule(0.7)
def reparametrised(g: Gen) -> None:
    x, out = _rows(g), g.width()
    made = g.one("weight_norm", "weight_norm", "orthogonal", "spectral_norm")
    if made == "orthogonal" and g.chance(0.7):
        made = "weight_norm"
    layer = g.layer(f"nn.utils.parametrizations.{made}(nn.Linear({x.c}, {out}))", shared=False)
    g.put(f"{layer}({x})", [x], x.layout)


@rule(0.7)
def bilinear(g: Gen) -> None:
    x = g.take("BC", "BLC")
    z = g.like(x)
    layer = g.layer(f"nn.Bilinear({x.c}, {z.c}, {g.width()})", shared=False)
    g.put(f"{layer}({x}, {z})", [x, z], x.layout)


# --- convolutions ------------------------------------------------------------------------------------------------

_SPACES = {"BCL": 1, "BCHW": 2, "BCDHW": 3}


def _smallest(x: Value) -> int:
    return min(x.shape[2:])


@rule(7)
def conv(g: Gen) -> None:
    x = g.take(*_SPACES)
    rank, out = _SPACES[x.layout], g.width()
    groups = g.divisor(x.c, out) if g.chance(0.3) else 1
    kernel = g.one(1, 3, 3) if _smallest(x) >= 3 else 1
    options = [f", groups={groups}"] if groups > 1 else []
    if kernel == 3:
        dilation = 2 if g.chance(0.15) and _smallest(x) >= 5 else 1
        options.append(g.one(f", padding={dilation}", f", padding={dilation}", ", padding='same'", ""))
        options += [f", dilation={dilation}"] if dilation > 1 else []
        if _smallest(x) >= 4 and g.chance(0.2) and "same" not in options[-1 - (dilation > 1)]:
            options.append(", stride=2")
        elif "padding=" in "".join(options) and g.chance(0.15):
            options.append(f", padding_mode='{g.one('reflect', 'replicate', 'circular')}'")
    options += g.one([], [], [", bias=False"])
    layer = g.layer(f"nn.Conv{rank}d({x.c}, {out}, {kernel}{''.join(options)})")
    g.put(g.one(f"{layer}({x})", f"F.relu({layer}({x}))", f"F.gelu({layer}({x}))"), [x], x.layout)


@rule(3)
def depthwise(g: Gen) -> None:
    x = g.take(*_SPACES, where=lambda v: _smallest(v) >= 3)
    rank, times = _SPACES[x.layout], g.one(1, 1, 2)
    kind = g.one("Conv", "Conv", "ConvTranspose")
    layer = g.layer(f"nn.{kind}{rank}d({x.c}, {x.c * times}, 3, padding=1, groups={x.c})")
    g.put(f"{layer}({x})", [x], x.layout)


@rule(2)
def conv_transposed(g: Gen) -> None:
    x = g.take(*_SPACES, where=lambda v: max(v.shape[2:]) <= 8)
    rank, out = _SPACES[x.layout], g.width()
    groups = g.divisor(x.c, out) if g.chance(0.4) else 1
    more = g.one(
        "2, stride=2", "3, padding=1", "3, stride=2, padding=1, output_padding=1", "1", "3, dilation=2, padding=2"
    )
    layer = g.layer(f"nn.ConvTranspose{rank}d({x.c}, {out}, {more}, groups={groups})")
    g.put(f"{layer}({x})", [x], x.layout)


@rule(4)
def conv_functional(g: Gen) -> None:
    """Kernels that are parameters, joined ones, or computed."""
    x, out = g.take("BCL", "BCHW", where=lambda v: _smallest(v) >= 3), g.width()
    rank = _SPACES[x.layout]
    k = (3,) * rank
    call, ones = f"F.conv{rank}d", ", 1" * rank
    w, b = g.param(out, x.c, *k, scale=0.3), g.param(out)
    spread = f"{b}.view(-1, 1{ones})"
    texts = [
        f"{call}({x}, {w}, {b}, padding=1)",
        f"{call}({x}, {w}, padding=1)",
        f"{call}({x}, {w}.flip(-1), {b})",
        f"{call}({x}, {w} * {spread}, padding=1)",
        f"{call}({x}, weight={w}, bias=None, padding=1)",
        f"{call}({x}, ({w} - {w}.mean({tuple(range(1, rank + 2))}, keepdim=True)) / ({w}.std() + 1), {b}, padding=1)",
        f"{call}({x}, {w} / ({w}.norm() + 1), {b}, 1, 1)",
        f"{call}({x}, torch.tanh({w}), {b}, padding=1)",
    ]
    if g.chance(0.4):
        u = g.param(out, x.c, *k, scale=0.3)
        texts = [f"{call}({x}, torch.cat([{w}, {u}]), padding=1)", f"{call}({x}, {w} + {u}, {b}, padding=1)"]
        if x.c >= 4:
            at = g.rng.randrange(1, x.c)
            u, v = g.param(out, at, *k, scale=0.3), g.param(out, x.c - at, *k, scale=0.3)
            texts += [f"{call}({x}, torch.cat([{u}, {v}], 1), padding=1)"] * 2
    g.put(g.one(*texts), [x], x.layout)


@rule(2.2)
def conv_grouped_functional(g: Gen) -> None:
    x = g.take("BCL", "BCHW", where=lambda v: _smallest(v) >= 3)
    rank, out = _SPACES[x.layout], g.width()
    groups = g.divisor(x.c, out)
    w, b = g.param(out, x.c // groups, *(3,) * rank, scale=0.3), g.param(out)
    v = g.param(x.c, out // groups, *(3,) * rank, scale=0.3)
    text = g.one(
        f"F.conv{rank}d({x}, {w}, {b}, padding=1, groups={groups})",
        f"F.conv_transpose{rank}d({x}, {v}, {b}, padding=1, groups={groups})",
    )
    g.put(text, [x], x.layout)


@rule(0.8)
def conv_of_data(g: Gen) -> None:
    """Kernels that depend on the input: one for every sample, or mixed from experts."""
    x = g.take("BCHW", where=lambda v: _smallest(v) >= 3)
    out, y = g.one(4, 6, 8), g.name()
    if g.chance(0.5):
        w, m = g.param(out, x.c, 3, 3, scale=0.3), g.layer(f"nn.Linear({x.c}, {x.c})")
        k, b = g.name("k"), g.name("b")
        g.put_block(
            f"{b} = {x}.shape[0]\n"
            f"{k} = ({w}[None] * {m}({x}.mean((2, 3))).view({b}, 1, {x.c}, 1, 1)).reshape(-1, {x.c}, 3, 3)\n"
            f"{y} = F.conv2d({x}.reshape(1, -1, *{x}.shape[2:]), {k}, padding=1, groups={b})"
            f".view({b}, -1, *{x}.shape[2:])",
            [x],
            {y: "BCHW"},
        )
    else:
        w, m = g.param(3, out, x.c, 1, 1), g.layer(f"nn.Linear({x.c}, 3)")
        k = g.name("k")
        g.put_block(
            f"{k} = torch.softmax({m}({x}.mean((2, 3))).mean(0), 0)\n"
            f"{y} = F.conv2d({x}, ({k}.view(-1, 1, 1, 1, 1) * {w}).sum(0))",
            [x],
            {y: "BCHW"},
        )


# --- norms -------------------------------------------------------------------------------------------------------


@rule(2)
def batch_norm(g: Gen) -> None:
    x = g.take(*MAPS)
    rank = {"BC": 1, "BCL": 1, "BCHW": 2, "BCDHW": 3}[x.layout]
    more = g.one("", "", "", ", affine=False", ", eps=0.1", ", track_running_stats=False", ", momentum=None")
    if more == ", track_running_stats=False" and x.layout == "BC":
        more = ""
    layer = g.layer(f"nn.BatchNorm{rank}d({x.c}{more})")
    g.put(g.one(f"{layer}({x})", f"F.relu({layer}({x}))"), [x], x.layout)


@rule(3.5)
def norm_of_maps(g: Gen) -> None:
    x = g.take(*MAPS[1:])
    rank = x.rank - 2
    kind = g.one("group", "group", "instance", "local", "functional")
    if kind == "group":
        text = g.layer(f"nn.GroupNorm({g.divisor(x.c)}, {x.c}{g.one('', '', ', affine=False')})") + f"({x})"
    elif kind == "instance":
        text = g.layer(f"nn.InstanceNorm{rank}d({x.c}, affine={g.chance(0.5)})") + f"({x})"
    elif kind == "local":
        text = f"F.local_response_norm({x}, 3)"
    else:
        text = f"F.group_norm({x}, {g.divisor(x.c)}, {g.param(x.c)}, {g.param(x.c)})"
    g.put(text, [x], x.layout)


@rule(2)
def norm_of_rows(g: Gen) -> None:
    x = g.take(*ROWS)
    kind = g.one("layer", "layer", "rms", "functional", "odd", "group")
    if kind == "layer":
        text = g.layer(f"nn.LayerNorm({x.c}{g.one('', '', ', bias=False', ', elementwise_affine=False')})") + f"({x})"
    elif kind == "rms":
        text = g.layer(f"nn.RMSNorm({x.c})") + f"({x})"
    elif kind == "functional":
        w, b = g.param(x.c), g.param(x.c)
        text = g.one(
            f"F.layer_norm({x}, ({x.c},), {w}, {b})",
            f"F.layer_norm({x}, {x}.shape[-1:], {w})",
            f"F.rms_norm({x}, [{x.c}], {w})",
            f"F.layer_norm({x}, ({x}.shape[-1],))",
        )
    elif kind == "group" and x.layout == "BC":
        text = g.layer(f"nn.GroupNorm({g.divisor(x.c)}, {x.c})") + f"({x})"
    elif x.layout in ("BLC", "BHWC"):
        sizes = ", ".join(map(str, x.shape[1:]))
        text = g.layer(f"nn.LayerNorm(({sizes}))") + f"({x})"
    else:
        raise Skip
    g.put(text, [x], x.layout)


@rule(1)
def norm_over_odd_axes(g: Gen) -> None:
    """Norms over positions, over the batch, over channels of maps, over several axes."""
    x = g.take()
    dims = sorted(g.rng.sample(range(x.rank), g.rng.randrange(1, min(3, x.rank) + 1)))
    if dims == [0] and g.chance(0.5):
        raise Skip
    over = str(dims[0] - (x.rank if g.chance(0.3) else 0)) if len(dims) == 1 else str(tuple(dims))
    mean = f"{x}.mean({over}, keepdim=True)"
    texts = [
        f"({x} - {mean}) / ({x}.std({over}, keepdim=True, unbiased=False) + 0.1)",
        f"({x} - {mean}) * torch.rsqrt({x}.var({over}, keepdim=True, correction=0) + 0.1)",
        f"{x} * torch.rsqrt({x}.pow(2).mean({over}, keepdim=True) + 0.1)",
        f"{x} / ({x}.norm(dim={over}, keepdim=True) + 0.5)",
        f"{x} / (0.5 + torch.linalg.vector_norm({x}, dim={over}, keepdim=True))",
        f"{x} / ({x}.abs().amax({over}, keepdim=True) + 0.5)",
        f"{x} / ({x}.abs().sum({over}, keepdim=True) + 0.5)",
        f"{x} - torch.logsumexp({x}, {over}, keepdim=True)",
    ]
    if 0 not in dims or len(dims) > 1:
        texts += [
            f"{x} / ({x}.std({over}, keepdim=True) + 0.5)",
            f"{x} - torch.var_mean({x}, {over}, keepdim=True)[1]",
            f"{x} / (torch.std_mean({x}, dim={over}, keepdim=True)[0] + 0.5)",
        ]
    if len(dims) == 1:
        texts += [f"F.normalize({x}, dim={over})", f"F.normalize({x}, p=1.0, dim={over})"]
    if len(dims) == x.rank:
        texts += [f"{x} / ({x}.std() + 1)", f"{x} / (1 + {x}.norm())", f"({x} - {x}.mean()) / ({x}.var() + 1)"]
    g.put(g.one(*texts), [x], x.layout)


@rule(1.6)
def weight_standardised(g: Gen) -> None:
    x, out = g.take("BCHW", where=lambda v: _smallest(v) >= 3), g.width()
    conv = g.layer(f"nn.Conv2d({x.c}, {out}, 3, padding=1)", shared=False)
    text = g.one(
        f"F.batch_norm({conv}.weight.reshape(1, {out}, -1), None, None, training=True, momentum=0.0)"
        f".reshape({conv}.weight.shape)",
        f"({conv}.weight - {conv}.weight.mean((1, 2, 3), True)) / ({conv}.weight.std((1, 2, 3), keepdim=True) + 0.1)",
    )
    g.put(f"F.conv2d({x}, {text}, {conv}.bias, 1, 1)", [x], "BCHW")


# --- blocks ------------------------------------------------------------------------------------------------------


@rule(1.8)
def gate(g: Gen) -> None:
    """Squeeze and excite."""
    x = g.take("BCHW", "BCL")
    rank = x.rank - 2
    if g.chance(0.5):
        a, b = g.layer(f"nn.Conv{rank}d({x.c}, 4, 1)"), g.layer(f"nn.Conv{rank}d(4, {x.c}, 1)")
        g.put(f"{x} * torch.sigmoid({b}(F.relu({a}(F.adaptive_avg_pool{rank}d({x}, 1)))))", [x], x.layout)
    else:
        a, b = g.layer(f"nn.Linear({x.c}, 4)"), g.layer(f"nn.Linear(4, {x.c})")
        s, ones = g.name("s"), "None, " * (rank - 1) + "None"
        how = g.one(f"{s}[:, :, {ones}]", f"{s}[:, :, {ones}].expand_as({x})", f"{s}.view(-1, {x.c}{', 1' * rank})")
        y = g.name()
        g.put_block(f"{s} = {b}({a}({x}.flatten(2).mean(2)).relu()).sigmoid()\n{y} = {x} * {how}", [x], {y: x.layout})


@rule(1)
def residual(g: Gen) -> None:
    x = g.take("BCHW", "BCL", "BC", "BLC")
    inner = g.width()
    if x.layout in ("BCHW", "BCL"):
        rank = x.rank - 2
        parts = [f"nn.Conv{rank}d({x.c}, {inner}, 1)", f"nn.BatchNorm{rank}d({inner})", g.one("nn.ReLU()", "nn.SiLU()")]
        parts.append(f"nn.Conv{rank}d({inner}, {x.c}, 1)")
    else:
        parts = [f"nn.Linear({x.c}, {inner})", g.one("nn.GELU()", "nn.Tanh()", "nn.Dropout(0.5)")]
        parts.append(f"nn.Linear({inner}, {x.c})")
    block = g.layer(f"nn.Sequential({', '.join(parts)})", "s")
    g.put(
        g.one(f"{x} + {block}({x})", f"{x} + {block}[:2]({x}).sum() * 0 + {block}({x})", f"{x} - 0.5 * {block}({x})"),
        [x],
        x.layout,
    )


@rule(0.8)
def gated(g: Gen) -> None:
    x = _rows(g)
    inner = g.one(4, 6, 8)
    down = g.layer(f"nn.Linear({inner}, {x.c})")
    kind = g.one("glu", "chunk", "two", "interleaved")
    if kind == "two":
        a, b = g.layer(f"nn.Linear({x.c}, {inner})"), g.layer(f"nn.Linear({x.c}, {inner})")
        g.put(f"{down}(F.silu({a}({x})) * {b}({x}))", [x], x.layout)
        return
    up, y = g.layer(f"nn.Linear({x.c}, {2 * inner})"), g.name()
    if kind == "glu":
        g.put_block(f"{y} = {down}(F.glu({up}({x}), dim=-1))", [x], {y: x.layout})
        return
    h = g.name("h")
    a, b = (
        (f"{h}.chunk(2, -1)[0]", f"{h}.chunk(2, dim=-1)[1]")
        if kind == "chunk"
        else (f"{h}[..., ::2]", f"{h}[..., 1::2]")
    )
    g.put_block(f"{h} = {up}({x})\n{y} = {down}(F.gelu({a}) * {b})", [x], {y: x.layout})


@rule(2)
def embedding(g: Gen) -> None:
    x = g.take("BL", "B", ints=True)
    width = g.width()
    table = g.layer(f"nn.Embedding(10, {width})")
    if x.layout == "B":
        g.put(f"{table}({x})", [x], "BC")
    elif g.chance(0.75):
        positions = g.param(x.shape[1], width)
        g.put(g.one(f"{table}({x})", f"{table}({x}) + {positions}", f"F.embedding({x}, {table}.weight)"), [x], "BLC")
    else:
        bag = g.layer(f"nn.EmbeddingBag(10, {width}, mode='{g.one('sum', 'mean')}')")
        g.put(f"{bag}({x})", [x], "BC")


@rule(1.6)
def positions(g: Gen) -> None:
    """A table of positions, tokens in front, a scale for every channel."""
    x = g.take("BLC")
    length = x.size("L")
    kind = g.one("add", "cat", "cut", "scale", "arange", "repeat")
    if kind == "add":
        g.put(f"{x} + {g.table(1, length, x.c)}", [x], "BLC")
    elif kind == "cat":
        token = g.param(1, 1, x.c)
        spread = g.one(
            f"{token}.expand({x}.shape[0], -1, -1)",
            f"{token}.expand(len({x}), 1, {x.c})",
            f"{token}.repeat({x}.shape[0], 1, 1)",
        )
        g.put(f"torch.cat([{spread}, {x}], 1)", [x], "BLC")
    elif kind == "cut":
        g.put(f"{x} + {g.param(length + 3, x.c)}[{g.one('', 'None, ')}:{x}.shape[1]]", [x], "BLC")
    elif kind == "scale":
        g.put(f"{x} * {g.table(x.c)} + {g.table(1, 1, x.c)}", [x], "BLC")
    elif kind == "arange":
        table = g.layer(f"nn.Embedding({length + 2}, {x.c})")
        g.put(f"{x} + {table}(torch.arange({x}.shape[1]))", [x], "BLC")
    else:
        cls, rest = g.param(1, 1, x.c), g.param(1, length - 1, x.c) if length > 1 else g.param(1, length, x.c)
        joined = f"torch.cat([{cls}, {rest}], 1)" if length > 1 else rest
        g.put(f"{x} + {joined}", [x], "BLC")
