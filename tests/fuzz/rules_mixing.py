"""Rules that mix positions: sums and choices over axes, products of activations, casts, numbers made of sizes."""

from __future__ import annotations

from fuzz.gen import Gen, Skip, Value, rule


@rule(2)
def reduced(g: Gen) -> None:
    """An axis is gone."""
    x = g.take(where=lambda v: v.rank >= 3)
    d = g.rng.randrange(1, x.rank)
    letter = x.layout[d]
    if letter == "C" and g.chance(0.6):
        raise Skip
    at = g.neg(d, x.rank)
    layout = x.layout[:d] + x.layout[d + 1 :]
    if "C" not in layout:
        layout = layout[:-1] + "C"
    texts = [
        f"{x}.mean({at})",
        f"{x}.sum(dim={at})",
        f"{x}.amax({at})",
        f"{x}.max({at}).values",
        f"{x}.amin(dim={at})",
        f"torch.logsumexp({x}, {at})",
        f"{x}.norm(dim={at})",
        f"{x}.var({at}, unbiased=False)",
        f"{x}.median({at}).values",
        f"{x}.mean({at}, keepdim=True).squeeze({at})",
        f"torch.linalg.vector_norm({x}, ord=3, dim={at})",
        f"{x}.select({at}, 0)",
        f"{x}.min({at})[0]",
        f"({x} * 0.3).tanh().prod({at})",
        f"torch.mean({x}, axis={at})",
        f"{x}.select({at}, -1)",
        f"{x}.std({at}, correction=0)",
        f"{x}.unbind({at})[0] + {x}.unbind({at})[-1]",
        f"{x}.sum([{at}])",
    ]
    g.put(g.one(*texts), [x], layout)


@rule(2.4)
def pooled(g: Gen) -> None:
    x = g.take("BCHW", "BCL")
    if g.chance(0.35):
        text = (
            f"F.adaptive_avg_pool2d({x}, 1).flatten(1)"
            if x.layout == "BCHW"
            else f"F.adaptive_avg_pool1d({x}, 1).squeeze(-1)"
        )
        g.put(g.one(text, f"{x}.flatten(2).mean(-1)", f"{x}.flatten(2).amax(2)"), [x], "BC")
        return
    rank = x.rank - 2
    if min(x.shape[2:]) < 2:
        raise Skip
    texts = [f"F.max_pool{rank}d({x}, 2)", f"F.avg_pool{rank}d({x}, 2)", f"F.max_pool{rank}d({x}, 3, 1, 1)"]
    texts += [f"F.adaptive_max_pool{rank}d({x}, 2)", f"F.avg_pool{rank}d({x}, 3, stride=1, padding=1)"]
    texts += [f"F.lp_pool{rank}d({x}.abs() + 0.1, 2, 2)", f"F.adaptive_avg_pool{rank}d({x}, 3)"]
    if rank == 2 and max(x.shape[2:]) <= 6:
        texts += [
            f"F.interpolate({x}, size=(5, 4), mode='{g.one('bilinear', 'bicubic')}', antialias=True)",
            f"F.interpolate({x}, scale_factor=0.5, recompute_scale_factor=True)",
        ]
    if max(x.shape[2:]) <= 5:
        mode = {1: ("linear", "nearest", "nearest-exact"), 2: ("bilinear", "nearest", "bicubic", "nearest-exact")}[rank]
        texts += [f"F.interpolate({x}, scale_factor=2.0, mode='{g.one(*mode)}')"] * 3
        texts += [f"F.interpolate({x}, size={(5,) * rank}, mode='{g.one(*mode)}')"]
    g.put(g.one(*texts), [x], x.layout)


@rule(1.5)
def uneven(g: Gen) -> None:
    """Softmax and its kin over any axis, the result like the source."""
    x = g.take()
    d = g.rng.randrange(1 if g.chance(0.85) else 0, x.rank)
    at = g.neg(d, x.rank)
    g.put(
        g.one(
            f"{x}.softmax({at}) * {x}",
            f"F.log_softmax({x}, dim={at})",
            f"0.3 * {x}.cumsum({at})",
            f"F.softmin({x}, dim={at}) * {x}",
            f"{x} * {x}.sum({at}, keepdim=True).sigmoid()",
            f"{x} - {x}.mean({at}, True)",
            f"{x}.sort({at}).values",
            f"{x} * ({x} > 0.3).sum({at}, keepdim=True)",
            f"{x} + {x}.any({at}, keepdim=True)",
            f"torch.cumprod({x}.tanh(), dim={at})",
            f"{x} * ({x} == {x}.amax({at}, keepdim=True))",
            f"{x} * ({x} > 0).all({at}, keepdim=True).logical_not()",
            f"{x} / (1 + {x}.square().sum({at}, keepdim=True)).sqrt()",
            f"{x}.softmax({at})",
            f"torch.diff({x}, dim={at}, prepend={x}.narrow({at}, 0, 1)) + {x}",
            f"{x} - {x}.argmax({at}, keepdim=True)",
            f"{x} * F.one_hot({x}.argmax({at}), {x}.shape[{at}]).movedim(-1, {at})",
        ),
        [x],
        x.layout,
    )


@rule(1)
def picked(g: Gen) -> None:
    """Gather, top-k and their kin."""
    x = g.take(where=lambda v: v.rank >= 2)
    d = g.rng.randrange(1, x.rank)
    if x.shape[d] < 3:
        raise Skip
    at, size = g.neg(d, x.rank), x.shape[d]
    k = g.rng.randrange(2, size)
    order = g.rng.sample(range(size), size)
    picks = [g.rng.randrange(size) for _ in range(g.one(2, 4, size))]
    index = g.buffer(f"torch.tensor({picks})")
    lead = ":, " * d
    v, i = g.name("v"), g.name("i")
    texts = [
        f"{x}.index_select({at}, {index})",
        f"{x}[{lead}{picks}]",
        f"{x}[{lead}{index}]",
        f"{x}.topk({k}, {at}).values",
        f"torch.gather({x}, {at}, {x}.argsort({at}))",
        f"{x}.gather({at}, {x}.topk({k}, dim={at}).indices)",
        f"torch.take_along_dim({x}, {x}.argsort({at}, descending=True), {at})",
        f"{x}[{lead}torch.tensor({order})]",
        f"{x}.sort({at}, descending=True)[0].narrow({at}, 0, {k})",
        f"torch.index_select({x}, dim={at}, index={index})",
        f"{x}.kthvalue({k}, {at}, keepdim=True).values + {x}",
    ]
    if x.layout == "BLC" and d == 1:
        a = g.layer(f"nn.Linear({x.c}, 1)")
        texts += [
            f"{x}.gather(1, {a}({x}).topk({k}, 1).indices.expand(-1, -1, {x.c}))",
            f"{x}.gather(1, {a}({x}).squeeze(-1).topk({k}, 1)[1].unsqueeze(-1).expand(-1, -1, {x}.shape[-1]))",
            f"{x}[torch.arange({x}.shape[0])[:, None], {a}({x}).squeeze(-1).argsort(1)]",
            f"{x}[torch.arange({x}.shape[0]), {a}({x}).squeeze(-1).argmax(1)][:, None]",
        ] * 2
    if g.chance(0.2):
        y = g.name()
        g.put_block(
            f"{v}, {i} = {x}.topk({k}, {at})\n{y} = torch.zeros_like({x}).scatter({at}, {i}, {v})", [x], {y: x.layout}
        )
        return
    g.put(g.one(*texts), [x], x.layout)


@rule(0.9)
def scattered(g: Gen) -> None:
    x = g.take(where=lambda v: v.rank >= 2)
    d = g.rng.randrange(1, x.rank)
    at, size = g.neg(d, x.rank), x.shape[d]
    order = g.rng.sample(range(size), size)
    index = g.buffer(f"torch.tensor({order})")
    some = g.buffer(f"torch.tensor({sorted(g.rng.sample(range(size), max(1, size // 2)))})")
    texts = [
        f"torch.zeros_like({x}).index_add({at}, {index}, {x})",
        f"{x}.index_fill({at}, {some}, 0.5)",
        f"{x}.index_copy({at}, {index}, {x} * 2)",
        f"{x}.scatter({at}, {x}.argmax({at}, keepdim=True), 0.0)",
        f"{x}.scatter_add({at}, {x}.argsort({at}), {x})",
        f"{x}.masked_fill({x} > 0.5, 0.1)",
        f"torch.where({x}.abs() > 0.2, {x}, torch.zeros_like({x}))",
        f"{x}.slice_scatter({x}.narrow({at}, 0, {max(1, size // 2)}) * 2, {d}, 0, {max(1, size // 2)})",
        f"{x}.select_scatter({x}.select({at}, 0) * 3, {d}, {g.rng.randrange(size)})",
        f"torch.masked_fill({x}, {x}.isnan(), 0.0)",
        f"{x}.index_add({at}, {some}, {x}.index_select({at}, {some}))",
        f"{x}.masked_fill(({x} < 0).any({at}, keepdim=True), 0.3)",
    ]
    g.put(g.one(*texts), [x], x.layout)


# --- products of activations ---------------------------------------------------------------------------------------


@rule(1)
def products(g: Gen) -> None:
    x = g.take("BC", "BLC", "BNLC")
    z = g.like(x)
    if x.layout == "BC":
        g.put(
            g.one(
                f"torch.einsum('bi,bj->bij', {x}, {z}).sum(-1)",
                f"({x} * {z}).sum(-1, keepdim=True) * {x}",
                f"torch.einsum('bi,bi->b', {x}, {z})[:, None] + {x}",
                f"{x} @ {z}.t() @ {x} * 0.1",
                f"torch.einsum('bi,ci->bc', {x}, {z}) @ {x} * 0.1",
                f"torch.cdist({x}, {z}) @ {x} * 0.1",
                f"F.cosine_similarity({x}, {z}, dim=1)[:, None] * {x}",
                f"torch.bmm({x}.unsqueeze(2), {z}.unsqueeze(1)).mean(2)",
                f"torch.outer({x}[0], {z}[0]).mean(1) + {x}",
                f"torch.mm({x}.t(), {z}).mean(0) + {x}",
                f"F.cosine_similarity({x}[:, None], {z}[None], dim=-1) @ {x}",
                f"F.pairwise_distance({x}, {z} + 1, keepdim=True) * {x}",
                f"torch.einsum('bi,bi->bi', {x}, {z})",
                f"(({x} - {z}) ** 2).mean(1, keepdim=True) + {x}",
                f"torch.inner({x}, {z}).mean(1, keepdim=True) * {x}",
            ),
            [x, z],
            "BC",
        )
        return
    n = "n" if x.layout == "BNLC" else ""
    texts = [
        f"({x} @ {z}.transpose(-2, -1)).softmax(-1) @ {x}",
        f"torch.einsum('b{n}lc,b{n}mc->b{n}lm', {x}, {z}).tanh() @ {x}",
        f"torch.einsum('b{n}lc,b{n}ld->b{n}cd', {x}, {z}).mean(-1).unsqueeze(-2) + {x}",
        f"torch.einsum('b{n}lc,b{n}lc->b{n}l', {x}, {z})[..., None] * {x}",
        f"{x} * torch.einsum('...c,...c->...', {x}, {z}).unsqueeze(-1)",
        f"torch.matmul({x}.mT, {z}).softmax(-1).mean(-2, keepdim=True) + {x}",
    ]
    if not n:
        texts += [
            f"torch.bmm(torch.bmm({x}, {z}.permute(0, 2, 1)).sigmoid(), {x})",
            f"torch.baddbmm({x}, {x} @ {z}.mT, {z}) * 0.1",
            f"torch.einsum('blc,kld->bd', {x}, {z}).unsqueeze(1) * 0.1 + {x}",
            f"torch.einsum('bii->bi', {x} @ {z}.mT)[..., None] + {x}",
            f"F.cosine_similarity({x}, {z}, dim=-1).unsqueeze(-1) + {x}",
            f"torch.cdist({x}, {z}).softmax(-1) @ {x}",
            f"torch.diagonal({x} @ {z}.mT, dim1=1, dim2=2).unsqueeze(-1) * {x}",
            f"({x} @ {z}.mT).tril().softmax(-1) @ {x}",
        ]
    g.put(g.one(*texts), [x, z], x.layout)


@rule(0.9)
def einsum_weights(g: Gen) -> None:
    """Weights of several axes, repeated letters, mixtures of experts."""
    x = g.take("BC", "BLC")
    n, out = g.one(2, 3, 4), g.one(4, 6, 8)
    w = g.param(n, x.c, out)
    if x.layout == "BC":
        g.put(
            g.one(
                f"torch.einsum('bi,nio->bno', {x}, {w}).flatten(1)",
                f"torch.einsum('bi,nio->bo', {x}, {w})",
                f"torch.einsum('bi,nio->bn', {x}, {w})",
                f"torch.einsum('bi,bj,nij->bn', {x}, {x}, {g.param(n, x.c, x.c)})",
                f"torch.einsum('bi,ij,bj->b', {x}, {g.param(x.c, x.c)}, {x})[:, None] + {x}",
                f"torch.einsum('bi,ii->bi', {x}, {g.param(x.c, x.c)})",
                f"torch.einsum('bn,bi,nio->bo', torch.softmax({x}[:, :{min(n, x.c)}], -1), {x}, {w}[:{min(n, x.c)}])",
                f"torch.matmul({x}, {w}).permute(1, 0, 2).flatten(1)",
                f"torch.tensordot({x}, {w}, dims=([1], [1])).flatten(1)",
                f"({x}.unsqueeze(1).unsqueeze(1) @ {w}).flatten(1)",
                f"torch.bmm({x}.expand({n}, -1, -1), {w}).sum(0)",
            ),
            [x],
            "BC",
        )
    else:
        g.put(
            g.one(
                f"torch.einsum('bli,nio->blno', {x}, {w}).flatten(2)",
                f"torch.einsum('bli,nio->blo', {x}, {w})",
                f"torch.einsum('bli,nio->bnlo', {x}, {w}).sum(1)",
                f"torch.einsum('bli,l->bli', {x}, {g.param(x.size('L'))})",
                f"torch.einsum('bli,lm->bmi', {x}, {g.param(x.size('L'), x.size('L'))})",
                f"torch.einsum('bli,lio->blo', {x}, {g.param(x.size('L'), x.c, out)})",
                f"({g.param(x.size('L'), x.size('L'))} @ {x})",
                f"torch.einsum('bli,bmi,io->blo', {x}, {x}, {g.param(x.c, out)})",
            ),
            [x],
            "BLC",
        )


@rule(0.6)
def over_the_batch(g: Gen) -> None:
    x = g.take(where=lambda v: v.layout[0] == "B")
    ones = ", 1" * (x.rank - 1)
    g.put(
        g.one(
            f"{x} - {x}.mean(0)",
            f"{x}.flip(0) + {x}",
            f"{x}.roll(1, 0) * {x}",
            f"{x} + {x}[:1].expand_as({x})",
            f"{x}.softmax(0) * {x}",
            f"torch.cat([{x}, {x}.flip(0)]).chunk(2)[0]",
            f"torch.cat([{x}, 2 * {x}])[: {x}.shape[0]]",
            f"{x} - {x}[0]",
            f"{x}.cumsum(0) / {x}.shape[0]",
            f"{x} / ({x}.std(0, keepdim=True, unbiased=False) + 0.5)",
            f"{x} * {x}.mean() + {x}",
            f"torch.stack([{x}, -{x}]).view(-1, *{x}.shape[1:])[{x}.shape[0]:]",
            f"{x}.repeat(2{ones})[: len({x})]",
            f"torch.cat(({x}, {x}.neg()), 0).view(2, -1, *{x}.shape[1:]).sum(0) + {x}",
            f"{x} - {x}.amax(dim=(0, 1), keepdim=True)",
            f"{x}.repeat_interleave(2, 0)[::2]",
            f"{x} + {x}.sum(0, keepdim=True).repeat({x}.shape[0]{ones}) * 0.1",
            f"({x} + torch.ones_like({x}[:1])).mean(0, keepdim=True) + {x}",
        ),
        [x],
        x.layout,
    )


@rule(0.4)
def cast(g: Gen) -> None:
    x = g.take()
    g.put(
        g.one(
            f"{x}.to({x}.dtype) * 2",
            f"({x} > 0).to({x}.dtype) + {x}",
            f"{x}.type_as({x}) + ({x} > 0).float()",
            f"({x} * 4).long() * 0.25 + {x}",
            f"{x} + ({x} > 0.1)",
            f"({x} * 3).round().int().to({x}.dtype) + {x}",
            f"{x}.float().to({x}.dtype)",
            f"({x} > 0).int().cumsum(-1) + {x}",
            f"{x} * ({x} * 2).to(torch.int64).remainder(3)",
            f"torch.floor({x}) + {x}",
            f"{x} * (~({x} > 0))",
            f"{x} + ({x}.abs() * 4).to(torch.uint8)",
            f"{x} + torch.tensor(0.5)",
            f"{x}.to(torch.float64, copy=True).to({x}.dtype)",
        ),
        [x],
        x.layout,
    )


def _of(g: Gen, x: Value, letter: str) -> int:
    return g.neg(x.dim(letter), x.rank)


@rule(0.6)
def of_sizes(g: Gen) -> None:
    """Numbers that are read off shapes."""
    x = g.take(where=lambda v: "C" in v.layout)
    d = _of(g, x, "C")
    g.put(
        g.one(
            f"{x} / {x}.shape[{d}]",
            f"{x} * {x}.size({d}) ** -0.5",
            f"{x}.sum({d}, keepdim=True) / {x}.shape[{d}] + {x}",
            f"{x} + {x}.numel() / 100",
            f"{x} / len({x})",
            f"{x} * torch.arange({x}.shape[-1], device={x}.device).to({x}.dtype)",
            f"{x} + torch.linspace(0, 1, {x}.shape[-1])",
            f"{x} * torch.ones({x}.shape[-1])",
            f"{x} + torch.zeros({x}.shape[0], *[1] * {x.rank - 1})",
            f"{x} * torch.full(({x}.shape[-1],), 2.0, dtype={x}.dtype)",
            f"{x} + {x}.new_ones({x}.shape[1:])",
            f"{x} + {x}.new_full(({x}.shape[-1],), 0.5)",
            f"torch.where(torch.arange({x}.shape[-1]) < 2, {x}, {x} * 0.5)",
            f"{x} + torch.eye({x}.shape[-1])[0]",
            f"{x} * torch.tril(torch.ones({x}.shape[-1], {x}.shape[-1])).mean(0)",
            f"{x}.sum({d}, keepdim=True).expand_as({x}) / {x}.shape[0] + {x}",
        ),
        [x],
        x.layout,
    )
