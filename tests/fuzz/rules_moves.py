"""Rules of data movement: layouts, views, slices, joins, shuffles, windows."""

from __future__ import annotations

from fuzz.gen import Gen, Skip, Value, rule

_LAYOUTS = {
    "BCHW": ("BHWC", "BLC", "BCL", "BC"),
    "BHWC": ("BCHW", "BLC"),
    "BCL": ("BLC", "BC"),
    "BLC": ("BCL", "BC", "BNLC"),
    "BC": ("BLC", "BCL"),
    "BNLC": ("BLC",),
    "BCDHW": ("BCHW", "BCL"),
}


@rule(3)
def layout(g: Gen) -> None:
    """To another layout: permutations, flattening, heads, tokens."""
    x = g.take(*_LAYOUTS)
    aim = g.one(*_LAYOUTS[x.layout])
    found = _TEXTS[x.layout, aim](g, x)
    g.put(g.one(*found), [x], aim)


def _bchw_to_bc(g: Gen, x: Value) -> list[str]:
    if x.tensor[0].numel() > 200:
        return [f"{x}.mean((2, 3))", f"{x}.flatten(2).max(-1).values", f"{x}[:, :, 0, 0]"]
    flat = [
        f"{x}.flatten(1)",
        f"{x}.reshape({x}.shape[0], -1)",
        f"torch.flatten({x}, start_dim=1)",
        f"{x}.contiguous().view({x}.size(0), -1)",
    ]
    return [
        *flat,
        f"{x}.permute(0, 2, 3, 1).flatten(1)",
        f"{x}.mean((2, 3))",
        f"{x}.mean([-2, -1])",
        f"{x}.flatten(2).sum(-1)",
    ]


def _blc_to_heads(g: Gen, x: Value) -> list[str]:
    n = g.divisor(x.c)
    return [
        f"{x}.view({x}.shape[0], -1, {n}, {x.c // n}).transpose(1, 2)",
        f"{x}.unflatten(-1, ({n}, -1)).transpose(1, 2)",
        f"{x}.reshape(*{x}.shape[:2], {n}, {x.c // n}).permute(0, 2, 1, 3)",
        f"torch.stack({x}.chunk({n}, -1), 1)",
        f"{x}.reshape(*{x}.shape[:2], -1, {n}).permute(0, 3, 1, 2)",
        f"torch.stack({x}.split({x.c // n}, dim=2), dim=1)",
    ]


def _bc_to_blc(g: Gen, x: Value) -> list[str]:
    n = g.divisor(x.c)
    return [
        f"{x}.view({x}.shape[0], {n}, -1)",
        f"{x}.unflatten(1, ({n}, {x.c // n}))",
        f"{x}.reshape(-1, {x.c // n}, {n}).transpose(1, 2)",
        f"{x}[:, None]",
        f"{x}.unsqueeze(1).expand(-1, 3, -1)",
        f"torch.stack({x}.chunk({n}, 1), 1)",
        f"{x}.unsqueeze(1).repeat(1, 2, 1)",
        f"torch.stack([{x}, 2 * {x}], dim=1)",
        f"{x}.view(-1, {n}, {x.c // n})",
    ]


_TEXTS = {
    ("BCHW", "BHWC"): lambda g, x: [
        f"{x}.permute(0, 2, 3, 1)",
        f"{x}.movedim(1, -1)",
        f"{x}.transpose(1, 2).transpose(2, 3)",
    ],
    ("BCHW", "BLC"): lambda g, x: [
        f"{x}.flatten(2).transpose(1, 2)",
        f"{x}.permute(0, 2, 3, 1).flatten(1, 2)",
        f"{x}.flatten(2).mT",
        f"{x}.reshape({x}.shape[0], {x.c}, -1).permute(0, 2, 1)",
    ],
    ("BCHW", "BCL"): lambda g, x: [
        f"{x}.flatten(2)",
        f"{x}.mean(3)",
        f"{x}.flatten(start_dim=-2)",
        f"{x}.amax(-1)",
        f"{x}[..., 0]",
        f"{x}.view({x}.shape[0], {x.c}, -1)" if x.tensor.is_contiguous() else f"{x}.sum(2)",
    ],
    ("BCHW", "BC"): _bchw_to_bc,
    ("BHWC", "BCHW"): lambda g, x: [
        f"{x}.permute(0, 3, 1, 2)",
        f"torch.movedim({x}, 3, 1)",
        f"{x}.permute(0, -1, 1, 2).contiguous()",
    ],
    ("BHWC", "BLC"): lambda g, x: [f"{x}.flatten(1, 2)", f"{x}.mean(1)", f"{x}.reshape({x}.shape[0], -1, {x.c})"],
    ("BCL", "BLC"): lambda g, x: [
        f"{x}.transpose(1, 2)",
        f"{x}.permute(0, 2, 1)",
        f"{x}.mT",
        f"{x}.swapaxes(-1, -2)",
        f"torch.transpose({x}, 2, 1)",
    ],
    ("BCL", "BC"): lambda g, x: [
        f"{x}.flatten(1)",
        f"{x}.mean(-1)",
        f"{x}.reshape(-1, {x.c * x.size('L')})",
        f"{x}[:, :, -1]",
        f"{x}.mean(dim=2, keepdim=True).squeeze(2)",
        f"{x}.amax(2)",
    ],
    ("BLC", "BCL"): lambda g, x: [
        f"{x}.transpose(1, 2)",
        f"{x}.permute(0, 2, 1)",
        f"{x}.movedim(-1, 1)",
        f"torch.swapdims({x}, 1, 2)",
    ],
    ("BLC", "BC"): lambda g, x: [
        f"{x}.mean(1)",
        f"{x}[:, 0]",
        f"{x}.flatten(1)",
        f"{x}[:, -1]",
        f"{x}.amax(1)",
        f"{x}.sum(-2)",
        f"{x}.select(1, 0)",
        f"{x}.reshape({x}.shape[0], -1)",
        f"{x}.unbind(1)[0]",
        f"{x}.max(dim=1)[0]",
    ],
    ("BLC", "BNLC"): _blc_to_heads,
    ("BC", "BLC"): _bc_to_blc,
    ("BC", "BCL"): lambda g, x: [
        f"{x}.unsqueeze(-1)",
        f"{x}[:, :, None].expand(-1, -1, 3)",
        f"{x}.unflatten(1, ({g.divisor(x.c)}, -1))",
        f"torch.stack([{x}, {x}.tanh()], -1)",
        f"{x}[..., None].repeat(1, 1, 4)",
    ],
    ("BNLC", "BLC"): lambda g, x: [
        f"{x}.transpose(1, 2).flatten(2)",
        f"{x}.mean(1)",
        f"{x}.permute(0, 2, 1, 3).reshape({x}.shape[0], {x.shape[2]}, -1)",
        f"{x}.flatten(1, 2)",
        f"{x}[:, 0]",
        f"torch.cat({x}.unbind(1), -1)",
        f"{x}.sum(dim=1)",
    ],
    ("BCDHW", "BCHW"): lambda g, x: [f"{x}.mean(2)", f"{x}[:, :, 0]", f"{x}.flatten(2, 3)", f"{x}.amax(dim=4)"],
    ("BCDHW", "BCL"): lambda g, x: [f"{x}.flatten(2)", f"{x}.mean((3, 4))"],
}


@rule(2)
def sliced(g: Gen) -> None:
    """A part of an axis, with steps too."""
    x = g.take(where=lambda v: v.rank >= 2)
    d = g.rng.randrange(1, x.rank)
    size = x.shape[d]
    if size < 3:
        raise Skip
    at, lead, k = g.neg(d, x.rank), ":, " * d, g.rng.randrange(1, size)
    last = f"{x}[..., " if d == x.rank - 1 else f"{x}[{lead}"
    g.put(
        g.one(
            f"{x}[{lead}:{k}]",
            f"{x}[{lead}{k}:]",
            f"{x}[{lead}::2]",
            f"{x}[{lead}1::2]",
            f"{x}.narrow({at}, {size - k}, {k})",
            f"{last}:-1]",
            f"{last}1:]",
            f"{x}[{lead}: {x}.shape[{d}] // 2]",
            f"{x}[{lead}{k - 1}:{k}]",
            f"{x}[{lead}::3]",
            f"{last}-{k}:]",
            f"{x}.split([{k}, {size - k}], {at})[0]",
            f"{x}.chunk(2, {at})[1]",
            f"{x}[{lead}1:-1]",
            f"{x}.narrow({at}, 0, {k})",
            f"{x}.tensor_split(2, {at})[0]",
            f"{x}[{lead}{size - 1}].unsqueeze({d})",
            f"torch.select({x}, {at}, {k}).unsqueeze({at})",
            f"{x}.unbind({at})[{k}].unsqueeze({at})",
            f"{x}[{lead}{size // 2}:{size}:2]",
        ),
        [x],
        x.layout,
    )


@rule(2)
def split(g: Gen) -> None:
    """Parts of an axis that go different ways."""
    x = g.take(where=lambda v: "C" in v.layout)
    d = x.dim("C") if g.chance(0.8) else g.rng.randrange(1, x.rank)
    size, at = x.shape[d], g.neg(d, x.rank)
    if size < 3:
        raise Skip
    k = g.rng.randrange(1, size)
    if size % 3 == 0 and g.chance(0.4):
        g.put_all(g.one(f"{x}.chunk(3, {at})", f"{x}.split({size // 3}, {at})"), [x], *[x.layout] * 3)
        return
    even = [f"{x}.chunk(2, {at})", f"torch.chunk({x}, 2, dim={at})", f"{x}.tensor_split(2, dim={at})"]
    odd = [
        f"{x}.split([{k}, {size - k}], {at})",
        f"torch.split({x}, ({k}, {size - k}), dim={at})",
        f"{x}.tensor_split(({k},), {at})",
    ]
    lead = ":, " * d
    odd += [
        f"({x}[{lead}:{k}], {x}[{lead}{k}:])",
        f"({x}[{lead}::2], {x}[{lead}1::2])",
        f"torch.split_with_sizes({x}, [{k}, {size - k}], {at})",
    ]
    g.put_all(g.one(*even, *odd), [x], x.layout, x.layout)


@rule(2.5)
def joined(g: Gen) -> None:
    x = g.take(where=lambda v: v.rank >= 2)
    d = x.dim("C") if "C" in x.layout and g.chance(0.7) else g.rng.randrange(1, x.rank)
    at = g.neg(d, x.rank)
    fits = [
        v
        for v in g.values
        if v.layout == x.layout
        and v.tensor.is_floating_point()
        and all(a == b for i, (a, b) in enumerate(zip(v.shape, x.shape, strict=True)) if i != d)
    ]
    z, w = g.one(*fits), g.one(*fits)
    if sum(v.shape[d] for v in (x, z, w)) > 40:
        raise Skip
    ones = ", ".join("1" if e != d else "2" for e in range(x.rank))
    g.put(
        g.one(
            f"torch.cat([{x}, {z}], {at})",
            f"torch.cat(({z}, {x}, {w}), dim={at})",
            f"torch.cat([{x}, {z} * 2, {x}], {at})",
            f"torch.concat([{x}, {z}], dim={at})",
            f"torch.stack([{x}, {x} * 0.5], {d}).flatten({d}, {d + 1})",
            f"torch.stack([{x}, {x}.tanh()], {d + 1}).flatten({d}, {d + 1})",
            f"{x}.repeat({ones})",
            f"{x}.repeat_interleave(2, {at})",
            f"torch.tile({x}, ({ones}))",
            f"torch.cat([{x}, torch.zeros_like({z})], {at})",
            f"torch.cat([{x}, {x}.narrow({at}, 0, 1)], {at})",
        ),
        [x, z, w],
        x.layout,
    )


@rule(1.5)
def moved(g: Gen) -> None:
    """The same positions in another order, or padded."""
    x = g.take(where=lambda v: v.rank >= 2)
    d = x.dim("C") if "C" in x.layout and g.chance(0.5) else g.rng.randrange(1, x.rank)
    at, size = g.neg(d, x.rank), x.shape[d]
    order, k = g.rng.sample(range(size), size), g.rng.randrange(size)
    pad = "0, 0, " * (x.rank - 1 - d)
    texts = [
        f"{x}.flip({at})",
        f"{x}.roll({k}, {at})",
        f"torch.roll({x}, shifts=-{k}, dims={at})",
        f"{x}[{':, ' * d}{order}]",
        f"F.pad({x}, ({pad}1, 0))",
        f"F.pad({x}, ({pad}0, 2), value=0.5)",
        f"{x} + {x}.roll(1, {at})",
        f"{x} + 2 * {x}.flip({at})",
        f"F.pad({x}, ({pad}1, -1))",
        f"torch.cat([{x}.narrow({at}, {k}, {size - k}), {x}.narrow({at}, 0, {k})], {at})" if k else f"{x}.flip([{at}])",
        f"{x}.unsqueeze({d}).squeeze({d}) * 2",
        f"{x}.clone()",
        f"{x}.contiguous().view({x}.shape)",
        f"{x}.reshape({x}.shape)",
        f"{x}.view_as({x})" if x.tensor.is_contiguous() else f"{x}.detach()",
        f"{x}.transpose(0, {d}).transpose({d}, 0)",
        f"{x}.unsqueeze(0)[0]",
        f"{x}.expand({x}.shape)",
        f"{x}.movedim({d}, 0).movedim(0, {d})",
    ]
    if "H" in x.layout and "W" in x.layout:
        texts += [f"{x}.rot90(1, ({x.dim('H')}, {x.dim('W')}))", f"{x}.transpose({x.dim('H')}, {x.dim('W')})"]
    if x.layout == "BCHW":
        mode = g.one("reflect", "replicate", "circular")
        texts += [
            f"F.pad({x}, (1, 1, 1, 1), mode='{mode}')",
            f"F.pad({x}, (0, 1), mode='constant')",
            f"F.pad({x}, (-1, 0, 1, 0))",
        ]
    g.put(g.one(*texts), [x], x.layout)


@rule(1.2)
def shuffled(g: Gen) -> None:
    """Channels split in two and joined another way."""
    x = g.take("BCHW", "BCL", "BC")
    n = g.divisor(x.c)
    rest = "".join(f", {x}.shape[{i}]" for i in range(2, x.rank))
    ones = ", " + ", ".join(map(str, range(3, x.rank + 1))) if x.rank > 2 else ""
    texts = [
        f"{x}.view({x}.shape[0], {n}, {x.c // n}{rest}).transpose(1, 2).reshape({x}.shape[0], {x.c}{rest})"
        if x.tensor.is_contiguous()
        else f"{x}.flip(1)",
        f"{x}.unflatten(1, ({n}, -1)).transpose(1, 2).flatten(1, 2)",
        f"{x}.reshape(-1, {n}, {x.c // n}{rest}).permute(0, 2, 1{ones}).flatten(1, 2)",
        f"{x}.unflatten(1, ({n}, {x.c // n})).sum(1)",
        f"{x}.unflatten(1, (-1, {n})).amax(2)",
        f"{x}.unflatten(1, ({n}, -1)).mean(2)",
        f"{x}.unflatten(1, ({n}, -1))[:, 0]",
        f"{x}.unflatten(1, ({n}, -1)).flip(1).flatten(1, 2)",
        f"{x}.unflatten(1, ({n}, -1)).softmax(1).flatten(1, 2)",
        f"torch.cat({x}.unflatten(1, ({n}, -1)).unbind(1), 1)",
        f"({x}.unflatten(1, ({n}, -1)) * {g.param(n, 1, *[1] * (x.rank - 2))}).flatten(1, 2)",
        f"torch.stack({x}.chunk({n}, 1), 2).flatten(1, 2)",
    ]
    if x.layout == "BCHW":
        texts += [f"F.channel_shuffle({x}, {n})"] * 2
    g.put(g.one(*texts), [x], x.layout)


@rule(2)
def between_channels_and_space(g: Gen) -> None:
    x = g.take("BCHW")
    h, w = x.size("H"), x.size("W")
    texts = []
    if x.c % 4 == 0 and h <= 6:
        texts += [
            f"F.pixel_shuffle({x}, 2)",
            f"{x}.view({x}.shape[0], -1, 2, 2, {h}, {w}).permute(0, 1, 4, 2, 5, 3).reshape({x}.shape[0], -1, {2 * h}, {2 * w})",
        ]
    if h % 2 == 0 and w % 2 == 0 and x.c <= 8:
        texts += [
            f"F.pixel_unshuffle({x}, 2)",
            f"torch.cat([{x}[..., ::2, ::2], {x}[..., 1::2, ::2], {x}[..., ::2, 1::2], {x}[..., 1::2, 1::2]], 1)",
            f"{x}.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).mean(-1)",
            f"F.unfold({x}, 2, stride=2).unflatten(-1, ({h // 2}, -1))",
            f"{x}.reshape({x}.shape[0], {x.c}, {h // 2}, 2, {w // 2}, 2).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)",
            f"{x}.unflatten(2, (-1, 2)).mean(3)",
        ]
    if h >= 3 and x.c <= 4:
        texts += [
            f"F.unfold({x}, 3, padding=1).view({x}.shape[0], -1, {h}, {w})",
            f"F.fold(F.unfold({x}, 3, padding=1), ({h}, {w}), 3, padding=1)",
        ]
    if not texts:
        raise Skip
    g.put(g.one(*texts), [x], "BCHW")


_OTHERWISE = (
    "torch.roll({}, 1, -1)",
    "{}.flip(2)",
    "{}.transpose(2, 3)",
    "F.max_pool2d({}, 3, 1, 1)",
    "F.pad({}, (0, 0, 1, 0))[:, :, :-1]",
    "2 * {}",
    "{} * {}",
    "{}.flip(1)",
    "{}.roll(1, 1)",
    "{}.tanh()",
    "{}.flip(0)",
)


@rule(1)
def two_orders(g: Gen) -> None:
    """Parts of the channels go another way, or in another order, than the rest."""
    x = g.take("BCHW", where=lambda v: 4 <= v.c <= 12)
    at, order = g.rng.randrange(1, x.c), g.rng.sample(range(x.c), x.c)
    text = g.one(*_OTHERWISE)
    if "transpose" in text and x.size("H") != x.size("W"):
        raise Skip
    part, whole = text.replace("{}", f"{x}[:, {at}:]"), text.replace("{}", f"{x}")
    g.put(
        g.one(
            f"torch.cat([{x}[:, :{at}], {part}], 1)",
            f"torch.cat([{x}[:, :{at}], ({whole})[:, {at}:], ({whole})[:, :{at}], {x}[:, {at}:]], 1)",
            f"{x} + 2 * {x}[:, {order}]",
            f"{x} * ({whole})[:, {order}]",
            f"torch.cat([{part}, {x}], 1)",
            f"{x} * {x}[:, : ({x}.shape[1] + 1) // 2].mean(1, keepdim=True)",
            f"{x} * ({x} * ({whole})).sum(1, keepdim=True)",
            f"torch.einsum('bchw,bcij->bhwij', {x}, {x}).sum((3, 4)).tanh().unsqueeze(1) * {x}",
            f"{x}[:, {order[:at]}]",
            f"{x} * torch.sigmoid({x}[:, {at}].unsqueeze(1))",
            f"torch.cat([{x}, {x}[:, {order}]], 1)",
            f"({whole}) - {x}[:, {order}]",
        ),
        [x],
        "BCHW",
    )


@rule(0.8)
def windows_of_rows(g: Gen) -> None:
    """Attention windows: positions cut into windows that join the batch, and back."""
    x = g.take("BHWC", "BCHW", where=lambda v: v.size("H") % 2 == 0 and v.size("W") % 2 == 0)
    x = x if x.layout == "BHWC" else g.put(f"{x}.permute(0, 2, 3, 1)", [x], "BHWC")
    h, w, c = x.shape[1:]
    a, u, y = g.layer(f"nn.Linear({c}, {c})"), g.name("u"), g.name()
    g.put_block(
        f"{u} = {x}.view({x}.shape[0], {h // 2}, 2, {w // 2}, 2, {c}).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, {c})\n"
        f"{u} = {a}({u}) * {u}.mean(1, keepdim=True)\n"
        f"{y} = {u}.view(-1, {h // 2}, {w // 2}, 2, 2, {c}).permute(0, 1, 3, 2, 4, 5).reshape({x}.shape[0], {h}, {w}, {c})",
        [x],
        {y: "BHWC"},
    )


@rule(1)
def batch_and_positions(g: Gen) -> None:
    """Positions join the batch, and leave it."""
    x = g.take("BLC", "BHWC")
    a, y, s = g.layer(f"nn.Linear({x.c}, {x.c})"), g.name(), ", ".join(f"{x}.shape[{i}]" for i in range(x.rank - 1))
    norm = g.one("", g.layer(f"nn.BatchNorm1d({x.c})"))
    g.put_block(
        f"{y} = {norm}({a}({x}.reshape(-1, {x.c}))).view({s}, -1)"
        if norm
        else f"{y} = {a}({x}.flatten(0, {x.rank - 2})).relu().reshape({s}, {x.c})",
        [x],
        {y: x.layout},
    )


@rule(0.7)
def two_in_the_batch(g: Gen) -> None:
    """Two halves that are laid along the batch and taken apart again, or packed in the channels."""
    x = g.take("BC", "BLC", where=lambda v: v.c % 2 == 0)
    half, u, v, y = x.c // 2, g.name("u"), g.name("v"), g.name()
    made = g.one(
        f"{x}.chunk(2, -1)",
        f"{x}.unflatten(-1, (2, -1)).unbind(-2)",
        f"{x}.view(*{x}.shape[:-1], 2, {half}).movedim(-2, 0)" if x.tensor.is_contiguous() else f"{x}.chunk(2, -1)",
        f"{x}.reshape(*{x}.shape[:-1], {half}, 2).unbind(-1)",
        f"torch.stack({x}.chunk(2, -1)).unbind(0)",
        f"torch.stack({x}.chunk(2, -1))",
        f"{x}.unflatten(-1, ({half}, 2)).movedim(-1, 0).unbind(0)",
        f"torch.cat({x}.split({half}, -1), 0).chunk(2)",
        f"torch.cat({x}.split({half}, -1)).split({x}.shape[0])",
        f"torch.cat({x}.chunk(2, -1), 0).view(2, -1, *{x}.shape[1:-1], {half}).unbind(0)",
    )
    out = g.one(f"{u} * {v}", f"{u} + {v}.tanh()", f"torch.cat([{v}, {u}], -1)", f"{u} * {v}.sigmoid()")
    g.put_block(f"{u}, {v} = {made}\n{y} = {out}", [x], {y: x.layout})


@rule(0.4)
def odd_views(g: Gen) -> None:
    """The batch is not first, is split by hand, or is a number."""
    x = g.take("BC", "BLC", where=lambda v: v.c % 2 == 0)
    c, last = x.c, "" if x.layout == "BC" else ".mean(1)"
    a = g.layer(f"nn.Linear({c}, {c})")
    m = f"{a}({x}){last}"
    g.put(
        g.one(
            f"({m}.view(2, -1, {c // 2})[0].repeat(2, 2))[:{x}.shape[0]]",
            f"{m}.t().contiguous().t() * 2",
            f"{m}.reshape(-1)[: {x}.shape[0] * {c}].view(-1, {c})",
            f"{m}.T.unflatten(0, (2, -1)).flatten(0, 1).T",
            f"{m}.reshape(-1, 2).flip(1).reshape(-1, {c})",
            f"{m}.view({x}.shape[0], -1)",
            f"{m}.unsqueeze(0).transpose(0, 1).squeeze(1)",
            f"{m}.reshape(-1, {c // 2}).repeat(1, 2)[::2]",
            f"{m}.repeat(1, 2).view(-1, {c})[: {x}.shape[0]]",
            f"torch.stack(list({m})).tanh()" if g.chance(0.2) else f"{m}.flatten().unflatten(0, (-1, {c}))",
        ),
        [x],
        "BC",
    )
