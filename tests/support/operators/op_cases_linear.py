"""Cases of convolutions, products, embeddings and attention: sums over channels, and the channels they make."""

from __future__ import annotations

from typing import Any

import torch
from nets import Net
from op_cases import Cases, param
from torch import Tensor, nn

from graphzip.numeric.grouped_mm import grouped_mm

CASES = Cases()

aten = torch.ops.aten

WIDE = {"shape": (2, 5, 6), "dim": 2}
TWO = ("make", "other")
THREE = ("make", "other", "third")


def weights(*shape: int, bias: int = 0) -> Any:
    """Parts: a weight of this shape, and a bias."""
    return lambda: {"w": param(*shape), **({"b": param(bias)} if bias else {})}


# --- convolutions --------------------------------------------------------------------------------------------------

SIZES = {1: (4,), 2: (3, 4), 3: (2, 3, 2)}

for rank, size in SIZES.items():
    shape, kernel = (2, 6, *size), (2,) * rank
    plain: Any = getattr(aten, f"conv{rank}d")
    transposed: Any = getattr(aten, f"conv_transpose{rank}d")
    transposed = transposed.default if rank == 1 else transposed.input
    CASES.add(plain.default, lambda m, x, f=plain.default: f(x, m.w, m.b), shape, parts=weights(4, 6, *kernel, bias=4),
              free={"make": 6, "w": 4})  # fmt: skip
    CASES.add(plain.padding, lambda m, x, f=plain.padding: f(x, m.w, m.b, padding="same"), shape,
              parts=weights(4, 6, *(1,) * rank, bias=4), free={"make": 6, "w": 4})  # fmt: skip
    CASES.add(plain.default, lambda m, x, f=plain.default: f(x, m.w, m.b, groups=6), shape, name="for each channel",
              parts=weights(6, 1, *kernel, bias=6))  # fmt: skip
    CASES.add(transposed, lambda m, x, f=transposed: f(x, m.w, m.b), shape, parts=weights(6, 4, *kernel, bias=4),
              free={"make": 6, "w": 4})  # fmt: skip

MAP = (2, 6, 3, 3)
conv: Any = aten.conv2d.default
turned: Any = aten.conv_transpose2d.input
CASES.add(aten.convolution.default,
          lambda m, x: aten.convolution.default(x, m.w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
          MAP, parts=weights(4, 6, 2, 2), free={"make": 6, "w": 4})  # fmt: skip
CASES.add(aten.convolution.default,
          lambda m, x: aten.convolution.default(x, m.w, m.b, [2, 2], [0, 0], [1, 1], True, [1, 1], 1),
          MAP, name="transposed", parts=weights(6, 4, 2, 2, bias=4), free={"make": 6, "w": 4})  # fmt: skip
CASES.add(conv, lambda m, x: conv(x, m.w, m.b, groups=2), MAP, name="in two groups", parts=weights(4, 3, 2, 2, bias=4),
          free={"make": 6, "w": 4})  # fmt: skip
CASES.add(conv, lambda m, x: conv(x, m.w, m.b, groups=6), MAP, name="two for each channel",
          parts=weights(12, 1, 2, 2, bias=12))  # fmt: skip
CASES.add(conv, lambda m, x: conv(x, m.w, m.b, groups=2), MAP, name="in groups with one output each",
          parts=weights(2, 3, 2, 2, bias=2), free={"make": 6})  # fmt: skip
CASES.add(turned, lambda m, x: turned(x, m.w, m.b, groups=2), MAP, name="in two groups",
          parts=weights(6, 2, 2, 2, bias=4), free={"make": 6, "w": 2})  # fmt: skip
CASES.add(turned, lambda m, x: turned(x, m.w, m.b, groups=6), MAP, name="for each channel",
          parts=weights(6, 1, 2, 2, bias=6))  # fmt: skip
CASES.add(conv, lambda m, x: conv(x, m.w, m.b) + conv(x, m.w.flip(0), m.b.flip(0)), MAP, name="with a turned weight",
          parts=weights(4, 6, 2, 2, bias=4), free={"make": 6, "w": 2})  # fmt: skip
CASES.add(conv, lambda m, x: conv(x, m.w * 0.5, m.b), MAP, name="with a computed weight",
          parts=weights(4, 6, 2, 2, bias=4), free={"make": 6, "w": 4})  # fmt: skip
CASES.add(conv, lambda m, x: conv(x, m.w.expand(4, 6, 2, 2), m.b), MAP, name="with one weight for all channels",
          parts=weights(4, 1, 2, 2, bias=4), free=None)  # fmt: skip
CASES.add(conv, lambda m, x: conv(x, m.w / torch.linalg.vector_norm(m.w, dim=(1, 2, 3), keepdim=True), m.b, groups=2), MAP, free=None,
          name="in groups with a computed weight", parts=weights(4, 3, 2, 2, bias=4))  # fmt: skip
CASES.add(conv, lambda m, x: conv(x.unsqueeze(1), m.w, m.b), (2, 6, 5), name="sliding over channels", out=1,
          parts=weights(4, 1, 3, 3, bias=4), free={"w": 4}, why="mixes positions")  # fmt: skip

# --- products with a weight ----------------------------------------------------------------------------------------

CASES.add(aten.linear.default, lambda m, x: aten.linear.default(x, m.w, m.b), **WIDE, parts=weights(4, 6, bias=4),
          free={"make": 6, "w": 4})  # fmt: skip
CASES.add(aten.linear.default, lambda m, x: aten.linear.default(x, m.w), **WIDE, name="with one output", out=None,
          parts=weights(6), free={"make": 6})  # fmt: skip
CASES.add(aten.linear.default, lambda m, x: aten.linear.default(x, m.w.softmax(0)), **WIDE,
          name="with a computed weight", parts=weights(4, 6), free={"make": 6, "w": 4})  # fmt: skip
CASES.add(aten.linear.default, lambda m, x, y: aten.linear.default(x[:, 0], y[0]), **WIDE, name="of two activations",
          makers=TWO, out=1, free={"make": 6})  # fmt: skip
CASES.add(aten.linear.default, lambda m, x: aten.linear.default(x, m.w.expand(4, 6)), **WIDE, parts=weights(4, 1),
          name="with one weight for all channels", free=None)  # fmt: skip
CASES.add(aten.addmm.default, lambda m, x: aten.addmm.default(m.b, x, m.w), (2, 6), parts=weights(6, 4, bias=4),
          free={"make": 6, "w": 4})  # fmt: skip
CASES.add(aten.mm.default, lambda m, x: aten.mm.default(x, m.w), (2, 6), parts=weights(6, 4), free={"make": 6, "w": 4})
CASES.add(aten.mm.default, lambda m, x: aten.mm.default(m.w, x.t()), (2, 6), name="from the left", out=0,
          parts=weights(4, 6), free={"make": 6, "w": 4})  # fmt: skip
CASES.add(aten.mv.default, lambda m, x: aten.mv.default(x, m.w), (2, 6), parts=weights(6), out=None)
CASES.add(aten.dot.default, lambda m, x: aten.dot.default(x.sum(0), m.w), (2, 6), parts=weights(6), out=None)
CASES.add(aten.vdot.default, lambda m, x: aten.vdot.default(x.sum(0), m.w), (2, 6), parts=weights(6), out=None)
CASES.add(aten.matmul.default, lambda m, x: aten.matmul.default(x, m.w), **WIDE, parts=weights(6, 4),
          free={"make": 6, "w": 4})  # fmt: skip
CASES.add(aten.matmul.default, lambda m, x: aten.matmul.default(m.w, x), name="from the left", parts=weights(4, 6),
          free={"make": 6, "w": 4})  # fmt: skip
CASES.add(aten.matmul.default, lambda m, x: aten.matmul.default(x, m.w), **WIDE, name="with a vector", parts=weights(6),
          out=None)  # fmt: skip
CASES.add(aten.matmul.default, lambda m, x: aten.matmul.default(m.w, x), name="with a vector from the left",
          parts=weights(6), out=None)  # fmt: skip
CASES.add(aten.matmul.default, lambda m, x: aten.matmul.default(x.view(-1, 5, 2, 3).transpose(1, 2), m.w), **WIDE,
          name="with a weight per head", out=3, parts=weights(2, 3, 4),
          free={"make": 3, "w#2": 4})  # fmt: skip
CASES.add(aten.bmm.default, lambda m, x: aten.bmm.default(x, m.w.expand(x.shape[0], -1, -1)), **WIDE,
          parts=weights(1, 6, 4), free={"make": 6, "w": 4})  # fmt: skip
CASES.add(aten.baddbmm.default, lambda m, x: aten.baddbmm.default(m.b, x, m.w.expand(x.shape[0], -1, -1)), **WIDE,
          parts=weights(1, 6, 4, bias=4), free={"make": 6, "w": 4})  # fmt: skip
CASES.add(aten.einsum.default, lambda m, x: aten.einsum.default("bti,io->bto", [x, m.w]), **WIDE, parts=weights(6, 4),
          free={"make": 6, "w": 4})  # fmt: skip
CASES.add(aten.einsum.default, lambda m, x: aten.einsum.default("...i,oi", [x, m.w]), **WIDE, name="with dots", out=2,
          parts=weights(4, 6), free={"make": 6, "w": 4})  # fmt: skip

# --- products of two activations -----------------------------------------------------------------------------------

BOTH = {"make": 6, "other": 6}
CASES.add(aten.matmul.default, lambda m, x, y: aten.matmul.default(x, y.mT), **WIDE, name="over channels", makers=TWO,
          out=None)  # fmt: skip
CASES.add(aten.matmul.default, lambda m, x, y: aten.matmul.default(x.mT, y).relu().sum(1), **WIDE, free=BOTH, out=1,
          name="over positions", makers=TWO)  # fmt: skip
CASES.add(aten.matmul.default, lambda m, x, y: aten.matmul.default(heads(x), heads(y).mT).sin().sum(1), **WIDE,
          name="over the width of heads", makers=TWO, out=None, free={"make": 6, "make#2": 2})  # fmt: skip
CASES.add(aten.bmm.default, lambda m, x, y: aten.bmm.default(x, y.mT), **WIDE, name="over channels", makers=TWO,
          out=None)  # fmt: skip
CASES.add(aten.mm.default, lambda m, x, y: aten.mm.default(x, y.t()), (2, 6), name="of two activations", makers=TWO,
          out=None)  # fmt: skip
CASES.add(aten.mv.default, lambda m, x, y: aten.mv.default(x, y[0]), (2, 6), name="of two activations", makers=TWO,
          out=None)  # fmt: skip
CASES.add(aten.dot.default, lambda m, x, y: aten.dot.default(x[0], y[1]), (2, 6), name="of two activations", makers=TWO,
          out=None)  # fmt: skip
CASES.add(aten.addmm.default, lambda m, x, y: aten.addmm.default(m.b, x, y.t()), (2, 6), name="of two activations",
          makers=TWO, parts=weights(1, bias=1), out=None)  # fmt: skip
CASES.add(aten.baddbmm.default, lambda m, x, y: aten.baddbmm.default(m.b, x.mT, y).relu().sum(2), **WIDE,
          name="of two activations", makers=TWO, parts=weights(1, bias=6), out=1, free=BOTH)  # fmt: skip
CASES.add(aten.einsum.default, lambda m, x, y: aten.einsum.default("bti,bsi->bts", [x, y]), **WIDE, makers=TWO,
          name="over channels", out=None)  # fmt: skip
CASES.add(aten.einsum.default, lambda m, x, y: aten.einsum.default("bti,btj->bij", [x, y]).sin().sum(1), **WIDE,
          makers=TWO, name="over positions", out=1, free=BOTH)  # fmt: skip
CASES.add(aten.einsum.default, lambda m, x: aten.einsum.default("bti->bi", [x]), **WIDE, name="of one operand", out=1)
CASES.add(aten.einsum.default, lambda m, x: aten.einsum.default("bti->bt", [x]), **WIDE, name="summing channels",
          out=None)  # fmt: skip
CASES.add(aten.einsum.default, lambda m, x, y, z: aten.einsum.default("bti,bsi,bui->btsu", [x, y, z]), **WIDE,
          makers=THREE, name="of three", out=None)  # fmt: skip
CASES.add(aten.einsum.default, lambda m, x, y: aten.einsum.default("bti,bti,ij->btj", [x, y, m.w]), **WIDE, makers=TWO,
          name="of three with a weight", parts=weights(6, 4), free={"make": 6, "w": 4})  # fmt: skip
CASES.add(aten.einsum.default, lambda m, x, y: aten.einsum.default("bti,btj,ij,jk->bi", [x, y, m.w, m.v]), **WIDE,
          makers=TWO, name="of four", out=1, parts=lambda: {"w": param(6, 6), "v": param(6, 3)}, free=None)  # fmt: skip
CASES.add(aten.einsum.default, lambda m, x: aten.einsum.default("bii->bi", [x]), (2, 6, 6), name="of a diagonal", out=1,
          why="takes a diagonal")  # fmt: skip


# --- attention -----------------------------------------------------------------------------------------------------


def heads(x: Tensor, count: int = 2) -> Tensor:
    """(batch, positions, channels) -> (batch, heads, positions, width)."""
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


attend: Any = aten.scaled_dot_product_attention.default
CASES.add(attend, lambda m, q, k, v: attend(q, k, v), **WIDE, makers=THREE, name="with one head",
          free={"make": 6, "third": 6})  # fmt: skip
CASES.add(attend, lambda m, q, k, v: joined(attend(heads(q), heads(k), heads(v))), **WIDE, makers=THREE,
          name="with two heads", free={"make": 6, "make#2": 2, "third": 6})  # fmt: skip
CASES.add(attend, lambda m, q, k, v: joined(attend(heads(q), heads(k), heads(v), m.mask, scale=0.3)), **WIDE,
          makers=THREE, name="with a mask for each head", parts=lambda: {"mask": param(2, 1, 5)},
          free={"make": 6, "make#2": 2, "third": 6})  # fmt: skip
CASES.add(attend, lambda m, q, k, v: joined(attend(heads(q), heads(k), heads(v), None, 0.0, True)), **WIDE,
          makers=THREE, name="that is causal", free={"make": 6, "make#2": 2, "third": 6})  # fmt: skip
CASES.add(attend, lambda m, q, k, v: joined(attend(heads(q), heads(k[..., :3], 1), heads(v[..., 3:], 1))), **WIDE,
          makers=THREE, name="with one head for keys", free={"make": 3, "other": 3, "third": 3, "third#2": 3})  # fmt: skip
CASES.add(attend, lambda m, q, k, v: joined(attend(heads(q, 4), heads(k[..., :6]), heads(v[..., 6:]), enable_gqa=True)),
          shape=(2, 5, 12), dim=2, makers=THREE, name="with grouped keys",
          free={"make": 6, "make#2": 2, "other": 6, "third": 6, "third#2": 6})  # fmt: skip
CASES.add(attend, lambda m, x: attend(x, x, x), **WIDE, name="of itself")
CASES.add(attend, lambda m, q, k, v: attend(q, k.mT, v.mT), (2, 5, 5), dim=2, makers=THREE, name="along channels",
          why="channels are fixed")  # fmt: skip

# --- embeddings ----------------------------------------------------------------------------------------------------


def looked_up() -> Any:
    def run(m: Any, index: Tensor) -> Any:
        return m.use(aten.embedding.default(m.table, index))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(run, table=param(7, 6), use=nn.Linear(6, 2)).double().eval()
        return model, (torch.randint(0, 7, (2, 5)),)


CASES.put([aten.embedding.default], "embedding", looked_up, {"table": 6})


def bagged(mode: str, *, weighted: bool = False, **options: Any) -> Any:
    def make() -> Any:
        def run(m: Any, index: Tensor) -> Any:
            return m.use(m.bag(index, per_sample_weights=m.scale.expand(index.shape) if weighted else None))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            bag = nn.EmbeddingBag(7, 6, mode=mode, **options)
            model = Net(run, bag=bag, scale=param(5), use=nn.Linear(6, 2)).double().eval()
            return model, (torch.randint(0, 7, (2, 5)),)

    return make


for mode in ("sum", "mean", "max"):
    CASES.put([aten.embedding_bag.padding_idx], f"bag, {mode}", bagged(mode), {"bag": 6})
CASES.put([aten.embedding_bag.padding_idx], "bag, padded", bagged("sum", padding_idx=2), {"bag": 6})
CASES.put([aten.embedding_bag.padding_idx], "bag, weighted", bagged("sum", weighted=True), {"bag": 6})
CASES.add(aten.embedding.default, lambda m, x: (x + aten.embedding.default(m.table, m.index)) @ m.table.t(), **WIDE,
          name="tied with the head", parts=lambda: {"table": param(7, 6), "index": torch.tensor([3, 1, 1, 0, 6])},
          out=None)  # fmt: skip
CASES.add(aten.embedding.default, lambda m, x: aten.embedding.default(x[0], m.index), **WIDE, out=1,
          name="of computed rows", parts=lambda: {"index": torch.tensor([3, 1, 1])})  # fmt: skip
CASES.add(aten.embedding.default, lambda m, x: aten.embedding.default(m.table, x[:, 0].argmax(1)), **WIDE, out=1,
          name="by channels", parts=lambda: {"table": param(6, 4)}, free={"table": 4},
          why="reads the places of channels as numbers")  # fmt: skip


# --- rows sorted by the matrix they are multiplied with --------------------------------------------------------------


def _ends(x: Tensor, count: int = 3) -> Tensor:
    """A third of the rows for each of three matrices."""
    return torch.arange(1, count + 1, device=x.device) * x.shape[0] // count


CASES.add(
    grouped_mm, lambda m, x: grouped_mm(x, m.w, _ends(x)), (2, 6), parts=weights(3, 6, 4), free={"make": 6, "w#2": 4}
)
CASES.add(
    grouped_mm,
    lambda m, x: grouped_mm(x, m.w.transpose(1, 2), _ends(x)),
    (2, 6),
    name="of transposed matrices",
    parts=weights(3, 4, 6),
    free={"make": 6, "w#2": 4},
)
CASES.add(
    grouped_mm,
    lambda m, x: grouped_mm(x, m.w[:, :, 1:5], _ends(x)),
    (2, 6),
    name="of a part",
    parts=weights(3, 6, 6),
    free=None,
)
