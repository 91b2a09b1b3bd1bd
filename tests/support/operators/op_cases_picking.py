"""Cases of picking and writing by tensors of indices and masks: channels pass where all of them are treated alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from op_cases import Cases, overload
from torch import Tensor

aten = torch.ops.aten

CASES = Cases()

VALUES = "depends on the values that the channels have"
FIXED = "combines it with a tensor whose channels are fixed"
TWO: dict[str, Any] = {"makers": ("make", "other")}

Run = Callable[..., Any]


def numbers(*values: int) -> Tensor:
    return torch.tensor(values)


def rows(x: Tensor) -> Tensor:
    """A mask over the rows of a batch."""
    return x.abs().sum((1, 2)) > 1e-3


def places(x: Tensor) -> Tensor:
    """A mask over the rows and their positions."""
    return x.sum(1) > 0.0


def order(x: Tensor) -> Tensor:
    """An index along the positions that is the same for all channels."""
    return x.sum(1, keepdim=True).argsort(2).expand_as(x)


def channels_last(run: Run) -> Run:
    return lambda m, *xs: run(m, *(x.transpose(1, 2) for x in xs))


# --- picking ---------------------------------------------------------------------------------------------------------

PICKED: dict[str, tuple[Run, int]] = {
    "rows by a mask": (lambda m, x: aten.index.Tensor(x, [rows(x)]), 1),
    "positions by a mask": (lambda m, x: aten.index.Tensor(x, [None, None, places(x)[0]]), 1),
    "rows and positions": (lambda m, x: aten.index.Tensor(x.transpose(1, 2), [places(x)]), 1),
    "together": (lambda m, x: aten.index.Tensor(x.transpose(1, 2), [numbers(1, 0, 1), numbers(4, 0, 0)]), 1),
    "apart": (lambda m, x: aten.index.Tensor(x, [numbers(1, 0, 1), None, numbers(4, 0, 0)]), 1),
    "apart, with a mask": (lambda m, x: aten.index.Tensor(x, [numbers(1), None, places(x)[0]]), 1),
    "a table of both": (lambda m, x: aten.index.Tensor(x, [numbers(1, 0)[:, None], None, numbers(4, 0, 2)]), 2),
    "rows by their numbers": (lambda m, x: aten.index.Tensor(x, [torch.where(rows(x))[0]]), 1),
}
for name, (run, out) in PICKED.items():
    CASES.add(aten.index.Tensor, run, name=name, out=out)
CASES.add(aten.index.Tensor, lambda m, x: aten.index.Tensor(x, [None, torch.tensor([True, False, True] * 2)]),
          name="channels by a mask", why="picks positions by an index")  # fmt: skip
CASES.add(aten.index.Tensor, lambda m, x: aten.index.Tensor(x, [x > 0]), name="values", out=None,
          why="uses it as an index")  # fmt: skip

REPEATS = aten.repeat_interleave.self_Tensor
CASES.add(REPEATS, lambda m, x: REPEATS(x, numbers(1, 0, 2, 1, 1), 2), name="positions")
CASES.add(REPEATS, lambda m, x: REPEATS(x, rows(x).long() + 1, 0), name="rows")
UNEVEN = "repeats positions unevenly"
CASES.add(REPEATS, lambda m, x: REPEATS(x, numbers(1, 0, 2, 1, 1, 1), 1), name="channels", why=UNEVEN)
CASES.add(REPEATS, lambda m, x: REPEATS(x, numbers(*[1] * 60)), name="of all", out=None, why=UNEVEN)

# --- writing ---------------------------------------------------------------------------------------------------------

PUT = aten.index_put.default
WRITTEN: dict[str, Run] = {
    "rows by a mask": lambda m, x, y: PUT(x, [rows(y)], y[rows(y)]),
    "positions by a mask": lambda m, x, y: PUT(x, [None, None, places(x)[0]], y[:, :, places(x)[0]]),
    "one row for all": lambda m, x, y: PUT(x, [rows(x)], y[0]),
    "added up": lambda m, x, y: PUT(x, [numbers(1, 1)], y[:2], True),
    "apart": lambda m, x, y: PUT(x, [numbers(1, 0), None, numbers(4, 0)], y[:2, :, 0]),
    "together": lambda m, x, y: PUT(x.transpose(1, 2), [numbers(1, 0), numbers(4, 0)], y[:2, :, 1]).transpose(1, 2),
    "a number by a mask": lambda m, x, y: PUT(x, [y > 0], torch.tensor(0.5, dtype=x.dtype)),
    "a number in rows": lambda m, x, y: PUT(x, [rows(y)], torch.tensor(0.5, dtype=x.dtype)) + y,
}
for name, run in WRITTEN.items():
    CASES.add(PUT, run, name=name, **TWO)
CASES.add(PUT, lambda m, x: PUT(x, [None, numbers(1, 2)], 2 * x[:, 3:5]), name="channels", free=None)
CASES.add(
    PUT, lambda m, x: PUT(x, [rows(x)], torch.arange(6.0, dtype=x.dtype)[:, None]), name="fixed numbers", why=FIXED
)
CASES.add(
    PUT,
    lambda m, x: PUT(x, [places(x)[:, None].expand(-1, 6, -1)], torch.tensor(0.5, dtype=x.dtype)),
    name="whole positions",
)

SOME = numbers(4, 0, 2)
BY_NUMBER: dict[str, Run] = {
    "index_add": lambda op, x, y, dim, index: op(x, dim, index, y, alpha=2),
    "index_copy": lambda op, x, y, dim, index: op(x, dim, index, y),
    "index_reduce": lambda op, x, y, dim, index: op(x, dim, index, y, "amax"),
    "index_fill.int_Scalar": lambda op, x, y, dim, index: op(x, dim, index, 0.5) + y.sum(),
    "index_fill.int_Tensor": lambda op, x, y, dim, index: op(x, dim, index, torch.tensor(0.5, dtype=x.dtype)) + y.sum(),
}
for target, write in BY_NUMBER.items():
    call = overload(target)
    fills = "fill" in target

    def at(dim: int, index: Tensor, call: Any = call, write: Run = write, **cut: Any) -> Run:
        return lambda m, x, *ys: write(call, x, ys[0].narrow(dim, 0, len(index)) if ys else x[:, :0], dim, index)

    other: dict[str, Any] = {} if fills else TWO
    CASES.add(call, at(2, SOME), name="positions", **other)
    CASES.add(call, at(0, numbers(1, 0)), name="rows", **other)
    CASES.add(call, at(1, SOME), name="channels", free=None, why="writes positions by an index", **other)

SCATTERED: dict[str, Run] = {
    "scatter.src": lambda op, x, y, dim, index: op(x, dim, index, y),
    "scatter.reduce": lambda op, x, y, dim, index: op(x, dim, index, y, reduce="multiply"),
    "scatter_add": lambda op, x, y, dim, index: op(x, dim, index, y),
    "scatter_reduce.two": lambda op, x, y, dim, index: op(x, dim, index, y, "amin", include_self=False),
    "scatter.value": lambda op, x, y, dim, index: op(x, dim, index, 0.5) + y,
    "scatter.value_reduce": lambda op, x, y, dim, index: op(x, dim, index, 0.5, reduce="add") + y,
}
for target, write in SCATTERED.items():
    call = overload(target)
    CASES.add(call, lambda m, x, y, c=call, w=write: w(c, x, y, 2, order(y)), name="positions", **TWO)
    CASES.add(call, lambda m, x, y, c=call, w=write: w(c, x, y, 1, y.argsort(1)), name="channels", **TWO,
              why="writes channels by an index that is computed")  # fmt: skip
CASES.add(aten.scatter.value, lambda m, x: aten.scatter.value(x, 2, x[:, :4].argsort(2), 0.5), name="in some channels",
          why="writes some of the positions")  # fmt: skip
CASES.add(aten.scatter.value, lambda m, x: aten.scatter.value(x, 2, torch.arange(30).view(1, 6, 5).expand(x.shape[0], -1, -1) % 5, 0.5),
          name="by a table", why=FIXED)  # fmt: skip

FROM_ROWS = aten.masked_scatter.default
CASES.add(FROM_ROWS, channels_last(lambda m, x, y: FROM_ROWS(x, (x.sum(2, keepdim=True) > 0).expand_as(x), y[x.sum(2) > 0])),
          name="whole positions", out=2, **TWO)  # fmt: skip
CASES.add(
    FROM_ROWS, channels_last(lambda m, x, y: FROM_ROWS(x, x.sum(2, keepdim=True) > 0, y)), name="a column", out=2, **TWO
)
CASES.add(FROM_ROWS, lambda m, x, y: FROM_ROWS(x, x > 0, y), name="values", **TWO,
          why="takes values in a row that channels are part of")  # fmt: skip
CASES.add(FROM_ROWS, lambda m, x, y: FROM_ROWS(x, (x.sum(1, keepdim=True) > 0).expand_as(x), y), name="channels first", **TWO,
          why="takes values in a row that channels are part of")  # fmt: skip

# --- what values decide ----------------------------------------------------------------------------------------------

CASES.add(aten.bucketize.Tensor, lambda m, x: aten.bucketize.Tensor(x, torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype)))
CASES.add(aten.one_hot.default, lambda m, x: aten.one_hot.default((x > 0).long(), 2)[..., 1])

DECIDED: dict[str, Run] = {
    "nonzero": lambda op, x: op(x),
    "nonzero_static": lambda op, x: op(x, size=3),
    "masked_select": lambda op, x: op(x, x > 0),
    "take": lambda op, x: op(x, torch.tensor([3, 1])),
    "_unique2": lambda op, x: op(x)[0],
    "unique_dim": lambda op, x: op(x, 1)[0],
    "unique_consecutive": lambda op, x: op(x)[0],
    "bincount": lambda op, x: op((x > 0).long().flatten()),
    "histc": lambda op, x: op(x, 4),
    "count_nonzero": lambda op, x: op(x),
    "searchsorted.Tensor": lambda op, x: op(x.sort(-1)[0], x),
    "repeat_interleave.Tensor": lambda op, x: op((x > 0).long().flatten()),
}
for target, decide in DECIDED.items():
    call = overload(target)
    CASES.add(call, lambda m, x, c=call, d=decide: d(c, x), out=None, why=VALUES)
