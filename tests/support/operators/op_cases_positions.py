"""Cases of operators that treat channels alike, or that mix or tell apart positions."""

from __future__ import annotations

from typing import Any

import torch
from op_cases import Cases, overload, param

CASES = Cases()

aten = torch.ops.aten

TWO = ("make", "other")
WIDE = {"shape": (2, 5, 6), "dim": 2}

# --- pooling and resampling ----------------------------------------------------------------------------------------


def first(name: str, *args: Any) -> Any:
    return lambda m, x: overload(name)(x, *args)[0]


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
        f"max_pool{rank}d_with_indices": first(f"max_pool{rank}d_with_indices", two),
    },
        shape, dim=1)  # fmt: skip
    CASES.together(f"nearest neighbours over {rank} dimensions",
                   resampling(f"upsample_nearest{rank}d _upsample_nearest_exact{rank}d", three), shape, dim=1)  # fmt: skip
    CASES.each({f"avg_pool{rank}d": (two,)}, name="over channels", shape=(2, *shape[2:], 4), dim=rank + 1,
               why="mixes positions")  # fmt: skip
for kind in ("max", "avg"):
    CASES.each({f"{kind}_pool2d": ([2, 1], [2, 1])}, name="of places, one channel wide", shape=(2, 6, 5), dim=2)
    for window, stride, pads in (([2, 1], [2, 2], [0, 0]), ([2, 2], [2, 1], [0, 0]), ([2, 2], [1, 1], [0, 1])):
        CASES.each({f"{kind}_pool2d": (window, stride, pads)}, name=f"over channels, {window}, {stride}, {pads}",
                   shape=(2, 6, 5), dim=2, why="mixes positions")  # fmt: skip
CASES.together("linear resampling", resampling("upsample_linear1d", [3], False), (2, 3, 6), dim=1)
CASES.together("trilinear resampling", resampling("upsample_trilinear3d", [3, 3, 3], False), (2, 3, 2, 2, 2), dim=1)
CASES.together("bilinear and bicubic resampling", resampling(
    "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa", [3, 3], False
), (2, 3, 4, 4), dim=1)  # fmt: skip

GRID = overload("grid_sampler")
CASES.add(GRID, lambda m, x: GRID(x, m.grid.tanh().expand(x.shape[0], -1, -1, -1), 0, 0, False), (2, 3, 4, 4),
          parts=lambda: {"grid": param(1, 5, 2, 2)})  # fmt: skip
CASES.add(GRID, lambda m, x: GRID(x, m.grid.tanh().expand(x.shape[0], -1, -1, -1, -1), 1, 1, True), (2, 3, 4, 4, 4),
          name="volumes", parts=lambda: {"grid": param(1, 2, 3, 2, 3)})  # fmt: skip
CASES.add(GRID, lambda m, x: GRID(x, x[..., :2].mean(1).tanh().unsqueeze(1).expand(-1, 3, -1, -1), 0, 0, False),
          (2, 3, 4, 4), name="at computed points")  # fmt: skip

# --- sums and their relatives --------------------------------------------------------------------------------------

SUMS: dict[str, tuple[Any, ...]] = {
    "sum.dim_IntList": (), "mean.dim": (), "amax": (), "amin": (), "logsumexp": (), "linalg_vector_norm": (3.0,),
    "norm.ScalarOpt_dim": (2.0,), "var.correction": (), "var.dim": (), "std.correction": (), "std.dim": (),
}  # fmt: skip
TRUTHS = ("any.dim", "all.dim")
MAPS = {"shape": (2, 6, 5), "dim": 1}


def over(*dims: int, gate: bool = False) -> dict[str, Any]:
    """Every sum over these dimensions; as a gate it is multiplied with what it is taken of."""

    def call(name: str, before: tuple[Any, ...]) -> Any:
        take = overload(name)
        if gate:
            return lambda m, x: x * take(x, *before, list(dims), keepdim=True)
        return lambda m, x: take(x, *before, list(dims))

    return {name: call(name, before) for name, before in SUMS.items()}


CASES.together("sums over positions", over(2), **MAPS)
CASES.together("sums over channels", over(1), **MAPS, out=None)
CASES.together("sums over channels, as gates", over(1, gate=True), **MAPS)
CASES.together("sums over channels and positions, as gates", over(1, 2, gate=True), **MAPS)
CASES.together("truths over positions", dict.fromkeys(TRUTHS, (2,)), fit="flag", **MAPS)
CASES.together("truths over channels", dict.fromkeys(TRUTHS, (1,)), fit="flag", **MAPS, out=None)
CASES.together(
    "sums over everything",
    dict.fromkeys(["sum", "mean", "amax", "amin", "max", "min", "any", "all"], ()),
    **MAPS,
    out=None,
)
CASES.together("norms over channels", {
    "linalg_vector_norm": lambda m, x: torch.stack(
        [aten.linalg_vector_norm.default(x, p, [1]) for p in (1.0, 2.5, -2.0, float("inf"), float("-inf"))]
    ),
    "norm.ScalarOpt_dim": lambda m, x: aten.norm.ScalarOpt_dim(x, 0.5, [1]),
}, **MAPS, out=None)  # fmt: skip
CASES.add(aten.linalg_vector_norm.default, lambda m, x: aten.linalg_vector_norm.default(x, 0.0, [1]), out=None,
          name="that counts channels", why="tells positions or counts of channels apart")  # fmt: skip
CASES.add(aten.linalg_vector_norm.default, lambda m, x: x / aten.linalg_vector_norm.default(x, 2, [-1], True), **WIDE,
          name="to length one")  # fmt: skip
CASES.add(aten.sum.dim_IntList, lambda m, x: aten.sum.dim_IntList(x.view(-1, 5, 2, 3), [3]), **WIDE, out=2,
          name="over the width of heads", free={"make": 6, "make#2": 2})  # fmt: skip
CASES.add(aten.mean.dim, lambda m, x: aten.mean.dim(x, [0], True), name="over the batch")
CASES.add(aten.var.dim, lambda m, x: aten.var.dim(x, [1, 2], False), out=None, name="without a correction")

# --- which tell channels apart -------------------------------------------------------------------------------------

APART = "tells positions or counts of channels apart"
ORDER = "depends on the order of the channels"


def places(name: str, dim: int) -> Any:
    """The second result: where the values stood."""
    return lambda m, x: overload(name)(x, dim)[1]


CASES.together("choices over positions", {"argmax": (2,), "argmin": (2,), "prod.dim_int": (2,)} | {
    name: first(name, 2) for name in ("max.dim", "min.dim", "median.dim")
}, **MAPS)  # fmt: skip
CASES.together("places over positions", {
    "argmax": (2, True), "argmin": (2, True),
    **{name: places(name, 2) for name in ("max.dim", "min.dim", "median.dim", "sort")},
}, **MAPS)  # fmt: skip
CASES.together("orders over positions", {
    "cumsum": (2,), "cumprod": (2,), "argsort": (2,), "sort": first("sort", 2), "topk": first("topk", 3, 2),
    "sort.stable": lambda m, x: aten.sort.stable(x, stable=True, dim=2)[0],
}, **MAPS)  # fmt: skip
CASES.each({"argmax": (1,), "argmin": (1,)}, name="over channels", out=None, why="is an output of the model")
CASES.add(aten.prod.dim_int, lambda m, x: aten.prod.dim_int(x, 1), name="over channels", out=None, why=APART)
CASES.each({"cumsum": (1,), "cumprod": (1,), "argsort": (1,)}, name="over channels", why=ORDER)
CASES.add(aten.median.dim, first("median.dim", 1), name="over channels", out=None, why=APART)
for name in ("max.dim", "min.dim"):
    CASES.add(overload(name), first(name, 1), name="over channels", out=None)
    CASES.add(overload(name), places(name, 1), name="places over channels", out=None,
              why="is an output of the model")  # fmt: skip
CASES.add(aten.sort.default, first("sort", 1), name="over channels", why=ORDER)
CASES.add(aten.topk.default, first("topk", 3, 1), name="over channels", why=ORDER)
CASES.add(aten.sort.stable, lambda m, x: aten.sort.stable(x, stable=True, dim=1)[1], name="over channels", why=ORDER)

# --- softmax -------------------------------------------------------------------------------------------------------

CASES.each({"softmax.int": (2,), "log_softmax.int": (2,)}, name="over positions")
CASES.each({"softmax.int": (1,), "log_softmax.int": (1,)}, name="over channels")
CASES.add(aten.softmax.int, lambda m, x: aten.softmax.int(x.view(-1, 5, 2, 3), 3).flatten(2), **WIDE,
          name="over the width of heads", free={"make": 6, "make#2": 2})  # fmt: skip
CASES.add(aten.softmax.int, lambda m, x: aten.softmax.int(x.view(-1, 5, 2, 3), 2).flatten(2), **WIDE,
          name="over heads", free=None)  # fmt: skip
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
