"""Cases of operators that treat channels alike, or that mix or tell apart positions."""

from __future__ import annotations

from typing import Any

import torch
from op_cases import Cases, overload

CASES = Cases()

aten = torch.ops.aten

TWO = ("make", "other")
WIDE = {"shape": (2, 5, 6), "dim": 2}

# --- pooling and resampling ----------------------------------------------------------------------------------------


def first(name: str, *args: Any) -> Any:
    return lambda x: overload(name)(x, *args)[0]


def resampling(names: str, size: list[int], *align_corners: bool) -> dict[str, Any]:
    """Both overloads: by a factor, and to a size."""
    calls: dict[str, Any] = {}
    for name in names.split():
        calls |= {f"{name}.vec": (None, *align_corners, [2.0] * len(size)), name: (size, *align_corners)}
    return calls


for rank, shape in {1: (2, 3, 6), 2: (2, 3, 4, 4), 3: (2, 3, 4, 4, 4)}.items():
    two, three = [2] * rank, [3] * rank
    CASES.together(f"pooling over {rank} dimensions", {
        f"max_pool{rank}d": (two,), f"avg_pool{rank}d": (two,), f"adaptive_avg_pool{rank}d": (three,),
        f"adaptive_max_pool{rank}d": first(f"adaptive_max_pool{rank}d", three),
    } | ({f"max_pool{rank}d_with_indices": first(f"max_pool{rank}d_with_indices", two)} if rank > 1 else {}),
        shape, dim=1)  # fmt: skip
    CASES.together(f"nearest neighbours over {rank} dimensions",
                   resampling(f"upsample_nearest{rank}d _upsample_nearest_exact{rank}d", three), shape, dim=1)  # fmt: skip
    CASES.each({f"avg_pool{rank}d": (two,)}, name="over channels", shape=(2, *shape[2:], 4), dim=rank + 1,
               why="mixes positions")  # fmt: skip
CASES.together("linear", resampling("upsample_linear1d", [3], False), (2, 3, 6), dim=1)
CASES.together("trilinear", resampling("upsample_trilinear3d", [3, 3, 3], False), (2, 3, 2, 2, 2), dim=1)
CASES.together("bilinear and bicubic", resampling(
    "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa", [3, 3], False
), (2, 3, 4, 4), dim=1)  # fmt: skip

# --- sums and their relatives --------------------------------------------------------------------------------------

for name in (
    "sum.dim_IntList mean.dim amax amin logsumexp linalg_vector_norm var.correction var.dim std.correction std.dim "
    "norm.ScalarOpt_dim any.dim all.dim"
).split():
    target = overload(name)
    before: tuple[Any, ...] = {"linalg_vector_norm": (3.0,), "norm.ScalarOpt_dim": (2.0,)}.get(name, ())
    dims: Any = 1 if name in {"any.dim", "all.dim"} else [1]
    over: Any = 2 if name in {"any.dim", "all.dim"} else [2]
    fit = "flag" if name in {"any.dim", "all.dim"} else "any"
    CASES.add(target, lambda m, x, f=target, b=before, d=over: f(x, *b, d), name="over positions", fit=fit)
    CASES.add(target, lambda m, x, f=target, b=before, d=dims: f(x, *b, d).to(m.make.weight.dtype), out=None, fit=fit,
              name="over channels")  # fmt: skip
    CASES.add(target, lambda m, x, f=target, b=before, d=dims: x * f(x, *b, d, keepdim=True), fit=fit,
              name="over channels, as a gate")  # fmt: skip
for name in "sum mean amax amin max min any all".split():
    CASES.add(overload(name), lambda m, x, f=overload(name): f(x).to(m.make.weight.dtype), out=None,
              name="over everything")  # fmt: skip
CASES.add(aten.sum.dim_IntList, lambda m, x: aten.sum.dim_IntList(x.view(-1, 5, 2, 3), [3]), **WIDE, out=2,
          name="over the width of heads", free={"make": 6, "make#2": 2})  # fmt: skip
CASES.add(aten.mean.dim, lambda m, x: aten.mean.dim(x, [1, 2]), out=None, name="over channels and positions")
CASES.add(aten.mean.dim, lambda m, x: aten.mean.dim(x, [0], True), name="over the batch")
CASES.add(aten.var.dim, lambda m, x: aten.var.dim(x, [1, 2], False), out=None, name="over channels and positions")
for order in (0.0, 1.0, 2.5, -2.0, float("inf"), float("-inf")):
    CASES.add(aten.linalg_vector_norm.default, lambda m, x, p=order: aten.linalg_vector_norm.default(x, p, [1]),
              out=None, name=f"of order {order}")  # fmt: skip
CASES.add(aten.linalg_vector_norm.default, lambda m, x: x / aten.linalg_vector_norm.default(x, 2, [-1], True), **WIDE,
          name="to length one")  # fmt: skip

# --- which tell channels apart -------------------------------------------------------------------------------------

APART = "tells positions or counts of channels apart"
for name in "argmax argmin prod.dim_int".split():
    target = overload(name)
    CASES.add(target, lambda m, x, f=target: f(x, 1).to(x.dtype), out=None, name="over channels", why=APART)
    CASES.add(target, lambda m, x, f=target: f(x, 2).to(x.dtype), name="over positions")
    CASES.add(target, lambda m, x, f=target: f(x, 2, True).to(x.dtype), name="over positions, kept")
for name in "max.dim min.dim median.dim".split():
    target = overload(name)
    CASES.add(target, lambda m, x, f=target: f(x, 1)[0], out=None, name="over channels", why=APART)
    CASES.add(target, lambda m, x, f=target: f(x, 2)[0], name="over positions")
    CASES.add(target, lambda m, x, f=target: f(x, 2)[1].to(x.dtype), name="over positions, their places")
ORDER = "depends on the order of the channels"
for name, args in {"cumsum": (), "cumprod": (), "argsort": ()}.items():
    target = overload(name)
    CASES.add(target, lambda m, x, f=target: f(x, 1).to(x.dtype), name="over channels", why=ORDER)
    CASES.add(target, lambda m, x, f=target: f(x, 2).to(x.dtype), name="over positions")
CASES.add(aten.sort.default, lambda m, x: aten.sort.default(x, 1)[0], name="over channels", why=ORDER)
CASES.add(aten.sort.default, lambda m, x: aten.sort.default(x, 2)[0], name="over positions")
CASES.add(aten.sort.stable, lambda m, x: aten.sort.stable(x, stable=True, dim=1)[1].to(x.dtype), name="over channels",
          why=ORDER)  # fmt: skip
CASES.add(aten.sort.stable, lambda m, x: aten.sort.stable(x, stable=True, dim=2)[1].to(x.dtype), name="over positions")
CASES.add(aten.topk.default, lambda m, x: aten.topk.default(x, 3, 1)[0], name="over channels", why=ORDER)
CASES.add(aten.topk.default, lambda m, x: aten.topk.default(x, 3, 2)[0], name="over positions")

# --- softmax -------------------------------------------------------------------------------------------------------

CASES.each({"softmax.int": (2,), "log_softmax.int": (2,)}, name="over positions")
CASES.each({"softmax.int": (1,), "log_softmax.int": (1,)}, name="over channels")
CASES.add(aten.softmax.int, lambda m, x: aten.softmax.int(x.view(-1, 5, 2, 3), 3).flatten(2), **WIDE,
          name="over the width of heads")  # fmt: skip
CASES.add(aten.softmax.int, lambda m, x: aten.softmax.int(x.view(-1, 5, 2, 3), 2).flatten(2), **WIDE,
          name="over heads", free={"make": 3})  # fmt: skip
CASES.add(aten.softmax.int, lambda m, x: aten.softmax.int(x, 0), name="over the batch")

# --- positions picked by the data ----------------------------------------------------------------------------------

CASES.add(aten.gather.default, lambda m, x: aten.gather.default(x, 2, x.argsort(2)), name="over positions")
CASES.add(aten.gather.default, lambda m, x: aten.gather.default(x, 2, x.sum(1, keepdim=True).argsort(2).expand_as(x)),
          name="over positions, alike for all channels")  # fmt: skip
CASES.add(aten.gather.default, lambda m, x: aten.gather.default(x, 1, x.argsort(1)), name="over channels", why=ORDER)
CASES.add(aten.gather.default, lambda m, x: aten.gather.default(x, 1, m.index.expand(x.shape[0], -1, 5)),
          name="of some channels", parts=lambda: {"index": torch.tensor([[[1], [3]]])},
          why="picks channels by an index that is computed")  # fmt: skip
CASES.add(aten.gather.default, lambda m, x: aten.gather.default(x, 2, x[:, :4].argsort(2)), name="over fewer rows",
          why="picks some of the positions")  # fmt: skip
