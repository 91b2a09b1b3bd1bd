"""Rules of in-place writes: into fresh values, into views of them, with another dtype."""

from __future__ import annotations

from fuzz.gen import Gen, Skip, rule


@rule(1.2)
def written(g: Gen) -> None:
    """A fresh value is changed in place."""
    x, y = g.take(), g.name()
    z = g.like(x)
    fresh = g.one(f"{x} + 1", f"{x}.clone()", f"F.relu({x})", f"{x} * 2", f"torch.empty_like({x}).copy_({x})")
    change = g.one(
        "{y} += {z}",
        "{y}.mul_({z})",
        "{y} *= 2",
        "{y}.relu_()",
        "{y}.add_({z}, alpha=2)",
        "{y}.clamp_(-1, 1)",
        "{y} -= {z}.mean()",
        "{y}.masked_fill_({z} > 0, 0.1)",
        "{y}.div_(2)",
        "F.relu({y}, inplace=True)",
        "{y}.sigmoid_()",
        "{y}.sub_({z}).tanh_()",
        "{y} /= {z}.abs() + 1",
        "{y}.copy_({z})",
        "{y}.addcmul_({z}, {z})",
        "F.silu({y}, inplace=True)",
        "{y}.neg_()",
        "{y}.lerp_({z}, 0.5)",
        "torch.add({z}, {z}, out={y})" if g.chance(0.2) else "{y}.abs_()",
        "{y}.zero_().add_({z})",
        "{y} **= 2",
        "{y}.fill_(0.5).add_({z})",
        "{y}.floor_()",
        "F.leaky_relu_({y}, 0.2)",
        "{y}.sqrt_() if False else {y}.exp_().reciprocal_()",
        "{y} //= 0.5",
        "{y} %= 2.0",
        "{y}.index_add_(-1, torch.tensor([0]), {z}[..., :1])",
        "{y}.cumsum_(-1)",
        "{y}.tril_()" if x.rank >= 2 else "{y}.abs_()",
        "{y}.index_fill_(-1, torch.tensor([0]), 0.0)",
    ).format(y=y, z=z)
    g.put_block(f"{y} = {fresh}\n{change}", [x, z], {y: x.layout})


@rule(1.5)
def written_view(g: Gen) -> None:
    """A view of a fresh value is changed; the value is read, the view, or both."""
    x = g.take(where=lambda v: v.rank >= 2 and min(v.shape[1:]) >= 2)
    y, v = g.name(), g.name("v")
    d = g.rng.randrange(1, x.rank)
    lead, size, at = ":, " * d, x.shape[d], g.neg(d, x.rank)
    k = g.rng.randrange(1, size)
    fresh = g.one(f"{x}.clone()", f"{x} + 0.5", f"{x} * 2")
    other = g.rng.randrange(x.rank)
    changes = [
        "{y}[{lead}:{k}] *= 2",
        "{y}[{lead}{k}:] = 0.5",
        "{y}[{lead}::2].add_(1)",
        "{y}[{lead}0] *= 2",
        "{y}[{lead}{j}] = {y}[{lead}0] * 3",
        "{y}[{lead}0].mul_(3)",
        "{y}.narrow({at}, 0, {k}).zero_()",
        "{y}.select({at}, 0).add_(1)",
        "{y}.transpose({o}, {d}).mul_(2)",
        "{y}[..., 0] += 1",
        "{y}[{lead}:{k}] = {x}[{lead}:{k}] * 0.1",
        "{y}.chunk(2, {at})[0].mul_(2)",
        "{y}.unbind({at})[0].zero_()",
        "{y}.unsqueeze(0).mul_(2)",
        "{y}.permute({perm}).add_(1)",
        "{y}[{lead}[0, 1]] = 0.3",
        "{y}[{y} > 0.5] = 0.1",
        "{y}[{lead}torch.tensor([0])] *= 2",
        "{y}.movedim({d}, 0)[0] = 0.0",
        "{y}.flatten({f})[..., 0] = 0.2" if x.rank > 2 else "{y}.T[0] = 0.2",
        "{y}[{lead}{k}:].copy_({x}[{lead}{k}:] ** 2)",
        "{y}.split([{k}, {r}], {at})[1].sub_(1)",
        "{y}.view({x}.shape)[{lead}0] = 0",
        "{y}[0] = 0.1",
        "{y}[:, 0].relu_()",
        "{y}[{lead}:{k}], {y}[{lead}{k}:] = 0.1, 0.2",
        "{y}.index_copy_({at}, torch.tensor([0]), {x}.narrow({at}, 0, 1) * 2)",
        "{y}.diagonal(0, 0, {d}).mul_(2)",
        "{y}[:, :1].expand_as({y}[:, :1]).add_(1)",
        "{y}.squeeze().mul_(2)",
        "{y}[::2] *= 2",
        "{y}[{lead}-1] -= 1",
        "{y}.index_put_((torch.tensor([0]),), torch.tensor(0.5, dtype={y}.dtype))",
        "{y}[torch.arange({y}.shape[0]), 0] = 0.4",
        "{y}.scatter_({at}, {x}.argmax({at}, keepdim=True), 0.0)",
        "{y}.mT.mul_(2)" if x.rank > 2 else "{y}.t().mul_(2)",
        "{y}.unflatten({d}, (1, -1)).mul_(3)",
        "{y}.swapaxes(0, {d}).sub_(0.1)",
    ]
    perm = ", ".join(map(str, reversed(range(x.rank))))
    fill = {
        "y": y,
        "x": x,
        "lead": lead,
        "k": k,
        "at": at,
        "d": d,
        "o": other,
        "r": size - k,
        "j": size - 1,
        "perm": perm,
        "f": x.rank - 2,
    }
    text = f"{y} = {fresh}\n" + g.one(*changes).format(**fill)
    if g.chance(0.35):
        kept = g.one(
            f"{y}.transpose({other}, {d})",
            f"{y}[{lead}0]",
            f"{y}.narrow({at}, 0, {k})",
            f"{y}[{lead}::2]",
            f"{y}.flatten(1)",
            f"{y}.unsqueeze(-1)",
            f"{y}.view({x}.shape)",
            f"{y}.select({at}, {k})",
        )
        text = (
            f"{y} = {fresh}\n{v} = {kept}\n"
            + g.one(
                f"{v}.mul_(2)",
                f"{v} += 1",
                f"{v}.relu_()",
                f"{y}.mul_(2)",
                f"{v}[0] = 0.5",
                f"{y} += 1",
                f"{v}.copy_({v} * 3)",
            )
            + f"\n{y} = {g.one(f'{y} + {v}.mean()', f'{y} * 1', f'{y} - {v}.sum() * 0.01')}"
        )
    g.put_block(text, [x], {y: x.layout})


@rule(0.7)
def written_later(g: Gen) -> None:
    """A value that is read is changed afterwards, or a view taken before is read after."""
    x = g.take("BC", "BLC", "BCHW")
    a, b, y, v, w = (g.name(letter) for letter in "hhyvw")
    lin = g.layer(f"nn.Linear({x.shape[-1]}, {x.shape[-1]})")
    text = g.one(
        f"{a} = {lin}({x})\n{v} = {a} * 2\n{a} += 1\n{y} = {a} + {v}",
        f"{a} = {lin}({x})\n{v} = {a}.view({x}.shape)\n{a} *= 2\n{y} = {v} + 1",
        f"{a} = {lin}({x})\n{v} = {a}.to({a}.dtype)\n{v} += 1\n{y} = {a} * 2",
        f"{a} = {lin}({x})\n{v} = {a}.contiguous()\n{v}.mul_(2)\n{y} = {a} + 1",
        f"{a} = {lin}({x})\n{v} = F.dropout({a}, 0.5, self.training)\n{v} += 1\n{y} = {a} * 1",
        f"{a} = {lin}({x})\n{v} = {a}.expand({x}.shape)\n{a}.mul_(2)\n{y} = {v}.tanh()",
        f"{a} = {lin}({x})\n{v} = {a}.reshape({x}.shape)\n{v}[0] = 0.0\n{y} = {a} + 1",
        f"{a} = {lin}({x})\n{v} = {a}.flatten(1)\n{v}[:, 0] = 0.5\n{y} = {a} * 2",
        f"{a} = {lin}({x})\n{v} = {a}[..., :1]\n{a} += 1\n{y} = {a} * {v}",
        f"{a} = {lin}({x})\n{v} = {a}.detach()\n{v} *= 2\n{y} = {a} * 1"
        if g.chance(0.3)
        else f"{a} = {lin}({x})\n{v} = {a}.unsqueeze(1)\n{v} -= 1\n{y} = {a} * 2",
        f"{a} = {lin}({x})\n{b} = {a}\n{b} += 1\n{y} = {a} + {b}",
        f"{a} = {lin}({x})\n{v}, {w} = {a}.chunk(2, -1)\n{v} *= 2\n{y} = {a} + 0.1",
        f"{a} = {lin}({x})\n{v} = {a}.T if {a}.dim() == 2 else {a}.mT\n{v} += 1\n{y} = {a} * 1",
        f"{a} = {lin}({x})\n{v} = {a}.type_as({x})\n{v}.add_(1)\n{y} = {a} * 0.5",
        f"{a} = {lin}({x})\n{v} = torch.einsum('b...->...b', {a})\n{v}.mul_(2)\n{y} = {a} * 0.5",
        f"{a} = {lin}({x})\n{v} = {a}.double()\n{v}.mul_(2)\n{y} = {a} + {v}"
        if g.chance(0.2)
        else f"{a} = {lin}({x})\n{v} = {a}.squeeze()\n{v} += 1\n{y} = {a} * 1",
    )
    g.put_block(text, [x], {y: x.layout})


@rule(0.5)
def written_fresh(g: Gen) -> None:
    """Fresh tensors of several outputs; tensors that start empty and are filled part by part."""
    x = g.take("BC", "BLC", where=lambda v: v.c >= 4)
    y, v, i = g.name(), g.name("v"), g.name("i")
    k = g.rng.randrange(2, x.c)
    text = g.one(
        f"{v}, {i} = {x}.topk({k}, -1)\n{v} /= {v}.abs().sum(-1, keepdim=True) + 1\n{y} = {v} * 2",
        f"{v}, {i} = {x}.sort(-1)\n{v}[..., 0] = 0.0\n{y} = {v} + 1",
        f"{v}, {i} = {x}.max(-1, keepdim=True)\n{v} += 1\n{y} = {x} * {v}",
        f"{y} = torch.zeros_like({x})\n{y}[..., :{k}] = {x}[..., :{k}]\n{y}[..., {k}:] += 0.5",
        f"{y} = torch.empty_like({x})\n{y}[..., ::2] = {x}[..., 1::2].sum(-1, keepdim=True)\n{y}[..., 1::2] = {x}[..., ::2].mean(-1, keepdim=True)",
        f"{y} = {x}.new_zeros({x}.shape)\nfor t in range({min(3, x.c)}):\n    {y}[..., t] = {x}[..., t] * t + 0.1",
        f"{v} = list({x}.chunk(2, -1))\n{v}[0] += 1\n{y} = torch.cat({v}, -1)",
        f"{y} = torch.zeros({', '.join(g.sizes(x))}, dtype={x}.dtype)\n{y} += {x}",
        f"{v} = {x} > 0\n{v} |= {x} < -0.5\n{y} = {x} * {v}",
        f"{v} = ({x} * 3).long()\n{v} += 1\n{v}.clamp_(0, 5)\n{y} = {x} * {v}",
        f"{v} = ({x} > 0).float()\n{v} += {x}\n{y} = {v}.to({x}.dtype)",
        f"{v} = {x}.float()\n{v} += {x}\n{y} = {v}.to({x}.dtype) * 2",
        f"{v} = torch.ones({x.c}, dtype={x}.dtype)\n{v}[:{k}] = 0.5\n{y} = {x} * {v}",
        f"{v} = torch.zeros({x}.shape[-1], {x}.shape[-1], dtype={x}.dtype)\n{v}.fill_diagonal_(2.0)\n{y} = {x} @ {v}"
        if g.chance(0.4)
        else f"{v} = torch.eye({x.c}, dtype={x}.dtype)\n{v}[0, 1] = 0.5\n{y} = {x} @ {v}",
    )
    g.put_block(text, [x], {y: x.layout})


@rule(0.2)
def counters(g: Gen) -> None:
    """A buffer that the forward reads, or a plain number."""
    x = g.take("BC", "BLC", "BCHW")
    if g.chance(0.5):
        t = g.buffer("torch.tensor([0.5, 2.0])")
        g.put(
            g.one(
                f"{x} * {t}[1]",
                f"{x} * {t}[0].item()" if g.chance(0.2) else f"{x} * {t}.sum()",
                f"{x} + {t}.mean()",
                f"{x} * {t}[:1]",
            ),
            [x],
            x.layout,
        )
        return
    if x.layout == "BC":
        raise Skip
    t = g.layer("nn.Parameter(torch.tensor(0.7))", "p")
    g.put(
        g.one(
            f"{x} * {t}",
            f"{x} + {t}.exp()",
            f"torch.lerp({x}, {x}.relu(), {t}.sigmoid())",
            f"{x} * {t} + (1 - {t}) * {x}.tanh()",
        ),
        [x],
        x.layout,
    )
