"""Rules of sequences: attention in its many forms, recurrent layers and cells, loops; modes, masks, branches."""

from __future__ import annotations

from fuzz.gen import Gen, Skip, rule


@rule(3)
def attention(g: Gen) -> None:
    """Self-attention, the heads laid out in many ways."""
    x = g.take("BLC")
    heads, width = g.one(2, 2, 4, 3, 1), g.one(2, 3, 4)
    inner, y, q, k, v = heads * width, g.name(), g.name("q"), g.name("k"), g.name("v")
    bias = g.one("", ", bias=False")
    kind = g.one("packed", "chunk", "three", "three", "inner", "slices", "unbind")
    b, n = f"{x}.shape[0]", f"{x}.shape[1]"
    if kind == "three":
        names = [g.layer(f"nn.Linear({x.c}, {inner}{bias})", shared=False) for _ in range(3)]
        split = g.one(
            f".view({b}, -1, {heads}, {width}).transpose(1, 2)",
            f".unflatten(-1, ({heads}, -1)).transpose(1, 2)",
            f".reshape({b}, {n}, {heads}, {width}).permute(0, 2, 1, 3)",
        )
        text = f"{q}, {k}, {v} = ({', '.join(f'{name}({x}){split}' for name in names)})"
    else:
        w = g.layer(f"nn.Linear({x.c}, {3 * inner}{bias})", shared=False)
        text = {
            "packed": f"{q}, {k}, {v} = {w}({x}).reshape({b}, {n}, 3, {heads}, {width}).permute(2, 0, 3, 1, 4)",
            "unbind": f"{q}, {k}, {v} = {w}({x}).view({b}, -1, 3, {heads}, {width}).transpose(1, 3).unbind(2)",
            "chunk": f"{q}, {k}, {v} = ({v}.unflatten(-1, (-1, {width})).transpose(1, 2) for {v} in {w}({x}).chunk(3, -1))",
            "inner": f"{q}, {k}, {v} = {w}({x}).view({b}, {n}, {heads}, {3 * width}).transpose(1, 2).chunk(3, -1)",
            "slices": f"{q} = {w}({x}).view({b}, {n}, 3, {heads}, {width})\n{q}, {k}, {v} = ({q}[:, :, i].transpose(1, 2) for i in range(3))",
        }[kind]
    text += _touched(g, q, k, width)
    out = g.layer(f"nn.Linear({inner}, {x.c})", shared=False)
    text += f"\n{y} = {_attended(g, q, k, v, n, n)}"
    join = g.one(
        f"{y}.transpose(1, 2).flatten(2)",
        f"{y}.transpose(1, 2).reshape({b}, {n}, {inner})",
        f"{y}.permute(0, 2, 1, 3).reshape({b}, -1, {inner})",
    )
    text += f"\n{y} = {out}({join}){g.one('', f' + {x}')}"
    g.put_block(text, [x], {y: "BLC"})


def _touched(g: Gen, q: str, k: str, width: int) -> str:
    """What happens to queries and keys before they meet."""
    kind = g.one("", "", "norm", "normalize", "rotary", "scale", "half")
    if kind == "norm":
        norm = g.layer(f"nn.{g.one('LayerNorm', 'RMSNorm')}({width})")
        return f"\n{q}, {k} = {norm}({q}), {norm}({k})"
    if kind == "normalize":
        return f"\n{q}, {k} = F.normalize({q}, dim=-1), F.normalize({k}, dim=-1)"
    if kind == "rotary" and width % 2 == 0:
        cos, sin = g.buffer(f"torch.rand(1, 1, 64, {width})"), g.buffer(f"torch.rand(1, 1, 64, {width})")
        turn = "torch.cat((-{0}.chunk(2, -1)[1], {0}.chunk(2, -1)[0]), -1)"
        if g.chance(0.4):
            turn = "torch.stack((-{0}[..., 1::2], {0}[..., ::2]), -1).flatten(-2)"
        ends = (f"{c}[:, :, :{q}.shape[-2]]" for c in (cos, sin))
        c, s = ends
        return "".join(f"\n{t} = {t} * {c} + {turn.format(t)} * {s}" for t in (q, k))
    if kind == "scale":
        return f"\n{q} = {q} * {q}.shape[-1] ** -0.5"
    return f"\n{q} = {q} / 2" if kind == "half" else ""


def _attended(g: Gen, q: str, k: str, v: str, n: str, m: str) -> str:
    causal = f"torch.ones({n}, {m}, dtype=torch.bool).tril()"
    table = f"torch.zeros({n}, {m}, dtype={q}.dtype).masked_fill(~{causal}, -1e4)"
    return g.one(
        f"F.scaled_dot_product_attention({q}, {k}, {v})",
        f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal=True)",
        f"F.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={causal})",
        f"F.scaled_dot_product_attention({q}, {k}, {v}, scale=0.3)",
        f"({q} @ {k}.transpose(-2, -1) / 2).softmax(-1) @ {v}",
        f"torch.softmax(torch.matmul({q}, {k}.mT) * {q}.shape[-1] ** -0.5, dim=-1).matmul({v})",
        f"torch.einsum('bhlm,bhmd->bhld', torch.einsum('bhld,bhmd->bhlm', {q}, {k}).softmax(-1), {v})",
        f"F.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={table})",
        f"{q}.softmax(-1) @ ({k}.softmax(-2).transpose(-1, -2) @ {v})",
        f"torch.where({causal}, {q} @ {k}.mT, torch.full((), -1e4, dtype={q}.dtype)).softmax(-1) @ {v}",
        f"({q} @ {k}.mT).sigmoid() @ {v}",
    )


@rule(1.6)
def grouped_attention(g: Gen) -> None:
    """Fewer heads for keys and values than for queries."""
    x = g.take("BLC")
    heads, few, width = g.one((4, 2, 2), (4, 1, 3), (2, 1, 4), (6, 2, 2))
    q, k, v, y = g.name("q"), g.name("k"), g.name("v"), g.name()
    a = g.layer(f"nn.Linear({x.c}, {heads * width})", shared=False)
    b, c = (g.layer(f"nn.Linear({x.c}, {few * width})", shared=False) for _ in range(2))
    out = g.layer(f"nn.Linear({heads * width}, {x.c})", shared=False)
    cut = f".unflatten(-1, (-1, {width})).transpose(1, 2)"
    text = f"{q}, {k}, {v} = {a}({x}){cut}, {b}({x}){cut}, {c}({x}){cut}" + _touched(g, q, k, width)
    kind = g.one("gqa", "repeat", "expand", "broadcast")
    times = heads // few
    if kind == "gqa":
        text += f"\n{y} = F.scaled_dot_product_attention({q}, {k}, {v}, enable_gqa=True)"
    elif kind == "repeat":
        text += f"\n{k}, {v} = {k}.repeat_interleave({times}, 1), {v}.repeat_interleave({times}, dim=1)"
        text += f"\n{y} = {_attended(g, q, k, v, f'{x}.shape[1]', f'{x}.shape[1]')}"
    elif kind == "expand":
        spread = f"[:, :, None].expand(-1, -1, {times}, -1, -1).reshape({x}.shape[0], {heads}, -1, {width})"
        text += f"\n{y} = F.scaled_dot_product_attention({q}, {k}{spread}, {v}{spread})"
    else:
        text += f"\n{q} = {q}.unflatten(1, ({few}, {times}))"
        text += f"\n{y} = (({q} @ {k}[:, :, None].mT).softmax(-1) @ {v}.unsqueeze(2)).flatten(1, 2)"
    g.put_block(f"{text}\n{y} = {out}({y}.transpose(1, 2).flatten(2))", [x], {y: "BLC"})


@rule(1.6)
def cross_attention(g: Gen) -> None:
    x, z = g.take("BLC"), g.take("BLC")
    heads, width = g.one(2, 4), g.one(2, 3, 4)
    q, k, v, y = g.name("q"), g.name("k"), g.name("v"), g.name()
    a = g.layer(f"nn.Linear({x.c}, {heads * width})", shared=False)
    b, c = (g.layer(f"nn.Linear({z.c}, {heads * width})", shared=False) for _ in range(2))
    out = g.layer(f"nn.Linear({heads * width}, {x.c})", shared=False)
    cut = f".unflatten(-1, ({heads}, {width})).transpose(1, 2)"
    text = f"{q}, {k}, {v} = {a}({x}){cut}, {b}({z}){cut}, {c}({z}){cut}"
    text += f"\n{y} = {_attended(g, q, k, v, f'{x}.shape[1]', f'{z}.shape[1]')}"
    g.put_block(f"{text}\n{y} = {out}({y}.transpose(1, 2).flatten(2)) + {x}", [x, z], {y: "BLC"})


@rule(1.4)
def attention_module(g: Gen) -> None:
    x = g.take("BLC")
    heads, n = g.divisor(x.c), f"{x}.shape[1]"
    z = g.like(x, itself=0.6)
    if g.chance(0.25):
        layer = g.layer(
            f"nn.TransformerEncoderLayer({x.c}, {heads}, {g.one(6, 8)}, 0.0, batch_first=True, norm_first={g.chance(0.5)})"
        )
        g.put(f"{layer}({x})", [x], "BLC")
        return
    layer = g.layer(
        f"nn.MultiheadAttention({x.c}, {heads}, batch_first=True{g.one('', '', ', bias=False', ', add_bias_kv=True')})"
    )
    mask = g.one(
        "",
        "",
        f", attn_mask=torch.ones({n}, {n}, dtype=torch.bool).triu(1)",
        ", need_weights=False",
        ", average_attn_weights=False",
    )
    key = next(
        (
            v
            for v in g.values
            if v.layout == "BL"
            and v.tensor.dtype.is_floating_point is False
            and v.tensor.dtype.itemsize == 1
            and v.shape[1] == x.shape[1]
        ),
        None,
    )
    if key is not None and not mask and g.chance(0.7):
        mask = f", key_padding_mask=~{key}"
    g.put(f"{layer}({x}, {z}, {z}{mask})[0]", [x, z, *([key] if key is not None and "key" in mask else [])], "BLC")


@rule(2)
def recurrent(g: Gen) -> None:
    x, hidden = g.take("BLC"), g.one(3, 4, 6, 8)
    kind = g.one("LSTM", "GRU", "RNN")
    more = g.one(
        "",
        "",
        "",
        ", bidirectional=True",
        ", num_layers=2",
        ", bias=False",
        ", proj_size=2" if kind == "LSTM" else ", nonlinearity='relu'" if kind == "RNN" else "",
    )
    layer = g.layer(f"nn.{kind}({x.c}, {hidden}, batch_first=True{more})", "r", shared=False)
    plain = not more or "bias" in more or "nonlin" in more
    state = f"torch.zeros(1, {x}.shape[0], {hidden}, dtype={x}.dtype)"
    made = f"{x}.new_zeros(1, {x}.shape[0], {hidden})"
    texts, aim = [f"{layer}({x})[0]"] * 3, "BLC"
    if plain and g.chance(0.3):
        start = g.one(state, made, f"{g.param(1, 1, hidden)}.expand(-1, {x}.shape[0], -1).contiguous()")
        texts = [f"{layer}({x}, ({start}, {start}))[0]" if kind == "LSTM" else f"{layer}({x}, {start})[0]"]
    elif plain and g.chance(0.4):
        end = f"{layer}({x})[1][0]" if kind == "LSTM" else f"{layer}({x})[1]"
        texts, aim = [f"{end}[-1]", f"{end}.squeeze(0)", f"{end}[0]"], "BC"
    elif g.chance(0.2):
        layer = g.layer(f"nn.{kind}({x.c}, {hidden}{more})", "r", shared=False)
        texts = [f"{layer}({x}.transpose(0, 1))[0].transpose(0, 1)"]
    g.put(g.one(*texts), [x], aim)


@rule(1.4)
def cells(g: Gen) -> None:
    """A loop over the length, with a cell or with gates by hand."""
    x, hidden = g.take("BLC", where=lambda v: v.size("L") <= 5), g.one(3, 4, 6)
    h, c, y = g.name("h"), g.name("c"), g.name()
    zeros = g.one(
        f"{x}.new_zeros({x}.shape[0], {hidden})",
        f"torch.zeros({x}.shape[0], {hidden}, dtype={x}.dtype)",
        f"torch.zeros(len({x}), {hidden}).to({x}.dtype)",
    )
    loop = g.one(f"for t in range({x}.shape[1]):", f"for t in range({x.shape[1]}):")
    kind = g.one("GRUCell", "LSTMCell", "RNNCell", "hand", "sum")
    tail = f"\n    {y}.append({h})\n{y} = torch.stack({y}, 1)"
    if kind in ("GRUCell", "RNNCell"):
        cell = g.layer(f"nn.{kind}({x.c}, {hidden})", "r")
        body = f"{h} = {zeros}\n{y} = []\n{loop}\n    {h} = {cell}({x}[:, t], {h})"
    elif kind == "LSTMCell":
        cell = g.layer(f"nn.LSTMCell({x.c}, {hidden})", "r")
        body = f"{h}, {c} = {zeros}, {zeros}\n{y} = []\n{loop}\n    {h}, {c} = {cell}({x}[:, t], ({h}, {c}))"
    elif kind == "hand":
        a, b = (
            g.layer(f"nn.Linear({x.c}, {hidden})", shared=False),
            g.layer(f"nn.Linear({x.c}, {hidden})", shared=False),
        )
        body = f"{h} = {zeros}\n{y} = []\n{loop}\n    {h} = torch.sigmoid({a}({x}[:, t])) * {h} + {b}({x}[:, t])"
    else:
        a = g.layer(f"nn.Linear({x.c}, {hidden})")
        body = f"{h} = 0\n{y} = []\n{loop}\n    {h} = {h} + {a}({x}[:, t]) / (t + 1)"
    g.put_block(body + tail, [x], {y: "BLC"})


@rule(1)
def masked(g: Gen) -> None:
    """Masks that are an input, and masks made of the data."""
    x = g.take("BLC")
    given = [
        v for v in g.values if v.layout == "BL" and str(v.tensor.dtype) == "torch.bool" and v.shape[1] == x.shape[1]
    ]
    m = str(given[0]) if given and g.chance(0.7) else f"({x}.mean(-1) > 0)"
    g.put(
        g.one(
            f"{x} * {m}.unsqueeze(-1)",
            f"{x}.masked_fill(~{m}[:, :, None], 0.0)",
            f"torch.where({m}[..., None], {x}, {x} * 0.1)",
            f"{x} * {m}.to({x}.dtype)[..., None]",
            f"({x} * {m}[..., None]).sum(1, keepdim=True) / {m}.sum(1).clamp(min=1)[:, None, None] + {x}",
            f"{x}.masked_fill({m}.logical_not().unsqueeze(2), -1.0)",
            f"{x} + {m}.cumsum(1).unsqueeze(-1)",
            f"{x}.softmax(1).masked_fill(~{m}.unsqueeze(-1), 0)",
        ),
        [x, *given[:1]],
        "BLC",
    )


@rule(0.1)
def sized_by_data(g: Gen) -> None:
    """What is left depends on the values."""
    x = g.take("BC")
    g.put(
        g.one(
            f"{x}[{x}[:, 0] > -100]",
            f"{x} + {x}[{x}.abs().sum(1) > 0.001].mean(0)",
            f"{x}.masked_select({x} > -100).view(-1, {x.c})",
            f"{x}.index_select(0, ({x}[:, 0] > -100).nonzero().squeeze(1))",
            f"torch.zeros_like({x}).index_add_(0, ({x}[:, 0] > -100).nonzero().flatten(), {x}[({x}[:, 0] > -100)])",
        ),
        [x],
        "BC",
    )


@rule(0.6)
def dropped(g: Gen) -> None:
    x = g.take()
    p = g.one(0.0, 0.1, 0.5)
    texts = [
        g.layer(f"nn.Dropout({p})") + f"({x})",
        f"F.dropout({x}, {p}, self.training)",
        f"F.dropout({x}, p={p}, training=self.training)",
    ]
    if x.layout == "BCHW":
        texts.append(g.layer(f"nn.Dropout2d({p})") + f"({x})")
    text = g.one(*texts)
    if "F.dropout" in text and p:
        g.random = True
    g.put(text, [x], x.layout)


@rule(0.12)
def training_branch(g: Gen) -> None:
    """Another computation in training."""
    x, y = g.take(), g.name()
    g.put_block(
        g.one(
            f"{y} = {x} * 2 if self.training else {x}",
            f"{y} = {x}\nif self.training:\n    {y} = {y}.tanh()",
            f"{y} = {x} if self.training else {x}.sigmoid()",
        ),
        [x],
        {y: x.layout},
    )


@rule(0.25)
def batch_branch(g: Gen) -> None:
    """Another path at one sample, or at many."""
    x, y = g.take(where=lambda v: v.layout[0] == "B"), g.name()
    g.put_block(
        g.one(
            f"{y} = {x}\nif {x}.shape[0] > 1:\n    {y} = {y} * 2",
            f"{y} = {x} * 2 if {x}.shape[0] != 1 else {x}",
            f"{y} = {x}.tanh() if {x}.size(0) == 1 else {x}",
            f"{y} = {x}\nif len({x}) < 100:\n    {y} = {y} + 1",
            f"assert {x}.shape[0] > 0\n{y} = {x}.abs()",
            f"{y} = {x} / max({x}.shape[0], 2)",
            f"{y} = {x} * (2 if {x}.shape[0] >= 2 else 3)",
            f"{y} = {x}.squeeze(0) if {x}.shape[0] == 1 and False else {x} * 0.5",
            f"{y} = {x} * min(len({x}), 3)",
        ),
        [x],
        {y: x.layout},
    )


@rule(0.08)
def random_forward(g: Gen) -> None:
    """Random whatever the mode is."""
    x = g.take()
    g.random = True
    g.put(
        g.one(
            f"F.dropout({x}, 0.5)",
            f"{x} + torch.randn_like({x}) * 0.1",
            f"{x} * torch.rand({x}.shape)",
            f"{x} + torch.bernoulli(torch.full_like({x}, 0.5))",
        ),
        [x],
        x.layout,
    )


@rule(0.6)
def python_loops(g: Gen) -> None:
    """Modules in lists, a module twice, inner functions."""
    x = g.take("BC", "BLC")
    y = g.name()
    a = g.layer(f"nn.ModuleList([nn.Linear({x.c}, {x.c}) for _ in range({g.one(2, 3)})])", "m", shared=False)
    b = g.layer(f"nn.Sequential(nn.Linear({x.c}, {x.c}), nn.ReLU(), nn.Linear({x.c}, {x.c}), nn.ReLU())", "m")
    g.put_block(
        g.one(
            f"{y} = {x}\nfor layer in {a}:\n    {y} = {y} + layer({y}).relu()",
            f"{y} = sum(layer({x}) for layer in {a})",
            f"{y} = torch.cat([layer({x}) for layer in {a}], -1)",
            f"{y} = {b}[2:]({b}[:2]({x}))",
            f"{y} = {b}({b}({x}))",
            f"{y} = {b}[0]({x}) * {b}[2]({x})",
            f"{y} = torch.stack([layer({x}) for layer in {a}]).mean(0)",
            f"{y} = {a}[0]({x})\nfor _ in range(2):\n    {y} = {a}[1]({y}).tanh() + {y}",
            f"{y} = torch.stack([layer({x}) for layer in {a}], 1).amax(1)",
            f"{y} = torch.einsum('e...c,e->...c', torch.stack([layer({x}) for layer in {a}]), torch.softmax({g.param(3)}[:len({a})], 0))",
        ),
        [x],
        {y: x.layout},
    )


@rule(0.6)
def experts(g: Gen) -> None:
    """A mixture: weights from a softmax, all experts computed."""
    x, n = g.take("BC", "BLC"), g.one(2, 3)
    r = g.layer(f"nn.Linear({x.c}, {n})", shared=False)
    e = g.layer(f"nn.ModuleList([nn.Linear({x.c}, {x.c}) for _ in range({n})])", "m", shared=False)
    p, y, v, i = g.name("p"), g.name(), g.name("v"), g.name("i")
    if g.chance(0.5) or n < 3:
        g.put_block(
            f"{p} = {r}({x}).softmax(-1)\n{y} = sum({p}[..., i : i + 1] * {e}[i]({x}) for i in range({n}))",
            [x],
            {y: x.layout},
        )
        return
    if x.layout != "BC":
        raise Skip
    g.put_block(
        f"{p} = {r}({x}).softmax(-1)\n{v}, {i} = {p}.topk(2)\n{v} {g.one('/', '/')}= {v}.sum(-1, keepdim=True)\n"
        f"{p} = torch.zeros_like({p}).scatter({x.rank - 1}, {i}, {v})\n{y} = torch.einsum('bn,nbc->bc', {p}, torch.stack([each({x}) for each in {e}]))",
        [x],
        {y: x.layout},
    )
