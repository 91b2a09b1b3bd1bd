"""Cases of data movement: what only rearranges positions carries channels with it, wherever they end up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from op_cases import Cases, param
from torch import Tensor

CASES = Cases()

aten = torch.ops.aten

WIDE = {"shape": (2, 5, 6), "dim": 2}
"""Channels along the last dimension."""
MAP = {"shape": (2, 4, 2, 3)}
"""Images of 2 x 3 with four channels."""
TWO = ("make", "other")

# --- along positions -----------------------------------------------------------------------------------------------

CASES.together("views of positions", {
    "view": lambda m, x: aten.view.default(x.contiguous(), [x.shape[0], 6, 2, 2]),
    "reshape": lambda m, x: aten.reshape.default(x, [x.shape[0], 6, 1, 4]),
    "_unsafe_view": lambda m, x: aten._unsafe_view.default(x.contiguous(), [-1, 6, 4]),
    "unflatten.int": (-1, [2, -1]), "flatten.using_ints": (2, -1), "unsqueeze": (-1,), "squeeze": (),
    "squeeze.dim": (2,), "squeeze.dims": ([2],),
    "expand": lambda m, x: aten.expand.default(x.unsqueeze(-1), [-1, -1, -1, 3]),
}, (2, 6, 4), dim=1)  # fmt: skip
CASES.together("parts of positions", {
    "select.int": (2, -1), "slice.Tensor": (2, 1, 3), "narrow": (2, -3, 2), "index_select": (2, torch.tensor([3, 1])),
    "split.Tensor": lambda m, x: aten.split.Tensor(x, 3, 2)[1],
    "split.sizes": lambda m, x: aten.split.sizes(x, [3, 1], 2)[0],
    "split_with_sizes": lambda m, x: aten.split_with_sizes.default(x, [1, 3], 2)[1],
    "chunk": lambda m, x: torch.mul(*aten.chunk.default(x, 2, 2)),
    "tensor_split.sections": lambda m, x: aten.tensor_split.sections(x, 3, 2)[0],
    "tensor_split.indices": lambda m, x: aten.tensor_split.indices(x, [1, 3], 2)[1],
}, (2, 6, 4), dim=1)  # fmt: skip
CASES.together("positions moved", {
    "flip": ([2],), "roll": ([1], [2]), "repeat": ([1, 1, 3],), "tile": ([3],), "repeat_interleave.self_int": (2, 2),
    "pad": ([1, 1], "reflect"), "constant_pad_nd": ([1, 2], 0.5),
    "cat": lambda m, x: aten.cat.default([x, x.sin()], 2), "stack": lambda m, x: aten.stack.default([x, x.sin()], -1),
}, (2, 6, 4), dim=1)  # fmt: skip
CASES.together("channels moved last", {
    "permute": ([2, 0, 1],), "transpose.int": (1, -1), "mT": (), "movedim.int": (1, 2), "moveaxis.int": (-2, -1),
    "movedim.intlist": ([1, 2], [-1, -2]), "moveaxis.intlist": ([1], [2]), "swapaxes": (1, 2), "swapdims": (-1, 1),
}, (2, 6, 4), dim=1, out=-1)  # fmt: skip
CASES.together("channels moved first", {"t": (), "numpy_T": ()}, (2, 6), dim=1, out=0)

# --- views ---------------------------------------------------------------------------------------------------------

CASES.add(aten.view.default, lambda m, x: aten.view.default(x, [x.shape[0], 5, 2, 3]), **WIDE, out=3,
          name="into heads, read by width", free={"make": 3})  # fmt: skip
CASES.add(aten.view.default, lambda m, x: aten.view.default(x, [x.shape[0], 5, 2, 3]), **WIDE, out=2,
          name="into heads, read by head", free={"make": 2})  # fmt: skip
CASES.add(aten.reshape.default, lambda m, x: aten.view.default(x, [-1, 5, 2, 3]).relu().reshape(-1, 5, 6), **WIDE,
          name="into heads and back")  # fmt: skip
CASES.add(aten.view.default, lambda m, x: aten.view.default(x.contiguous(), [x.shape[0], 30]),
          name="of channels and positions")  # fmt: skip
CASES.add(aten.view.default, lambda m, x: aten.view.default(x, [-1, 6]), **WIDE, name="of the batch and positions",
          out=1)  # fmt: skip
CASES.add(aten.reshape.default, lambda m, x: aten.reshape.default(x, [x.shape[0], 4, 6]), (2, 6, 4), name="across channels",
          free={"make": 2})  # fmt: skip
CASES.add(aten.reshape.default, lambda m, x: aten.reshape.default(x * m.row, [x.shape[0], 30]),
          (2, 6, 1), parts=lambda: {"row": param(1, 5)}, name="of two labelled dimensions")  # fmt: skip
CASES.add(aten.flatten.using_ints, lambda m, x: aten.flatten.using_ints(aten.linear.default(x, m.w), 1), (2, 4, 5),
          parts=lambda: {"w": param(7, 5)}, name="of channels and what a layer makes of positions", free="all")  # fmt: skip
CASES.add(aten.flatten.using_ints, lambda m, x: aten.flatten.using_ints(x, 1), MAP["shape"], name="with positions")
CASES.add(aten.unflatten.int, lambda m, x: aten.unflatten.int(x, 1, [3, 2]), name="read by the outer part", out=1,
          free={"make": 3})  # fmt: skip
CASES.add(aten.unflatten.int, lambda m, x: aten.unflatten.int(x, -1, [3, -1]).sum(2), **WIDE, out=2,
          name="with an open size", free={"make#2": 2})  # fmt: skip

# --- dimensions exchanged, added, dropped, spread ------------------------------------------------------------------

CASES.add(aten.t.default, lambda m, x: x @ aten.t.default(m.table), **WIDE, name="of a weight",
          parts=lambda: {"table": param(4, 6)}, free={"make": 6, "table": 4})  # fmt: skip
CASES.add(aten.unsqueeze.default, lambda m, x: aten.unsqueeze.default(x, 1), out=2)
CASES.add(aten.squeeze.default, lambda m, x: aten.squeeze.default(x), (2, 1, 6, 1, 5), dim=2, out=1)
CASES.add(aten.squeeze.dims, lambda m, x: aten.squeeze.dims(x, [1, 3]), (2, 1, 6, 1), dim=2, out=1)
CASES.add(aten.expand.default, lambda m, x: aten.expand.default(x, [4, x.shape[0], 6, 5]), out=2,
          name="with a new dimension")  # fmt: skip
CASES.add(aten.expand.default, lambda m, x: x + aten.expand.default(m.table, [x.shape[0], 6, 5]), name="of a parameter",
          parts=lambda: {"table": param(1, 6, 1)})  # fmt: skip
CASES.add(aten.expand_as.default, lambda m, x, y: aten.expand_as.default(x.sum(2, keepdim=True), y), makers=TWO)

# --- parts ---------------------------------------------------------------------------------------------------------

CASES.add(aten.select.int, lambda m, x: aten.select.int(x, 1, 2), out=None, name="of channels",
          why="picks single channels")  # fmt: skip
CASES.add(aten.select.int, lambda m, x: aten.select.int(x.view(-1, 5, 2, 3), 2, 1), **WIDE, name="of heads", out=2,
          free={"make": 3, "make#2": 3})  # fmt: skip
CASES.add(aten.select.int, lambda m, x: torch.mul(*x.view(-1, 5, 2, 3).unbind(2)), **WIDE, name="by unbind", out=2,
          free={"make": 3})  # fmt: skip
CASES.add(aten.slice.Tensor, lambda m, x: aten.slice.Tensor(x, 1, 1, 4), name="of channels",
          free={"make": 3, "make#2": 3})  # fmt: skip
CASES.add(aten.slice.Tensor, lambda m, x: aten.slice.Tensor(x, 1, 1, 6, 2), name="of every second channel",
          free={"make": 3, "make#2": 3})  # fmt: skip
CASES.add(aten.slice.Tensor, lambda m, x: aten.slice.Tensor(x, 1, -4, None), name="from behind",
          free={"make": 2, "make#2": 4})  # fmt: skip
CASES.add(aten.slice.Tensor, lambda m, x: aten.slice.Tensor(x, 1, 3, 4), name="of one channel",
          why="picks single channels")  # fmt: skip
CASES.add(aten.slice.Tensor, lambda m, x: x + aten.slice.Tensor(m.table, 0, 1, 7).unsqueeze(-1), name="of a parameter",
          parts=lambda: {"table": param(8)})  # fmt: skip
CASES.add(aten.narrow.default, lambda m, x: aten.narrow.default(x, 1, -4, 2), name="of channels",
          free={"make": 4, "make#2": 2})  # fmt: skip
CASES.add(aten.split.Tensor, lambda m, x: three(*aten.split.Tensor(x, 2, 1)), free={"make": 2})
CASES.add(aten.split.Tensor, lambda m, x: torch.cat(aten.split.Tensor(x, 4, 1)[::-1], 1), name="into uneven parts",
          free={"make": 4, "make#2": 2})  # fmt: skip
CASES.add(aten.split.Tensor, lambda m, x: torch.cat(aten.split.Tensor(x, 5, 1)[::-1], 1), name="with one channel left",
          free={"make": 5})  # fmt: skip
CASES.add(aten.split.sizes, lambda m, x: torch.cat(aten.split.sizes(x, [2, 4], 1)[::-1], 1),
          free={"make": 2, "make#2": 4})  # fmt: skip
CASES.add(aten.split_with_sizes.default, lambda m, x: three(*aten.split_with_sizes.default(x, [2, 2, 2], 1)),
          free={"make": 2})  # fmt: skip
CASES.add(aten.chunk.default, lambda m, x: torch.mul(*aten.chunk.default(x, 2, 1)), free={"make": 3})
CASES.add(aten.tensor_split.sections, lambda m, x: three(*aten.tensor_split.sections(x, 3, 1)), free={"make": 2})
CASES.add(aten.tensor_split.sections, lambda m, x: torch.cat(aten.tensor_split.sections(x, 4, 1)[::-1], 1),
          name="into uneven parts", free={"make": 2, "make#2": 2})  # fmt: skip
CASES.add(aten.tensor_split.indices, lambda m, x: torch.cat(aten.tensor_split.indices(x, [2], 1)[::-1], 1),
          free={"make": 2, "make#2": 4})  # fmt: skip
CASES.add(aten.tensor_split.indices, lambda m, x: torch.cat(aten.tensor_split.indices(x, [1], 1)[::-1], 1),
          name="of the first channel", free={"make#2": 5}, why="picks single channels")  # fmt: skip


def three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a * b + c.sin()


# --- writing parts -------------------------------------------------------------------------------------------------

CASES.add(aten.slice_scatter.default, lambda m, x, y: aten.slice_scatter.default(x, y[:, :, 1:3], 2, 0, 2), makers=TWO,
          name="over positions")  # fmt: skip
CASES.add(aten.slice_scatter.default, lambda m, x, y: aten.slice_scatter.default(x, y, 0), makers=TWO,
          name="over everything")  # fmt: skip
CASES.add(aten.slice_scatter.default, lambda m, x, y: aten.slice_scatter.default(x, y[:, 2:4], 1, 0, 2), makers=TWO,
          name="over channels", free={"make": 2, "make#2": 4, "other": 4})  # fmt: skip
CASES.add(aten.select_scatter.default, lambda m, x, y: aten.select_scatter.default(x, y[:, 2], 1, 0), makers=TWO,
          name="over channels", why="writes into some of the channels")  # fmt: skip
CASES.add(
    aten.select_scatter.default,
    lambda m, x, y: aten.select_scatter.default(x, y[:, :, 2], 2, -1),
    makers=TWO,
    name="one position",
    free={"make": 6},
)
CASES.add(
    aten.select_scatter.default,
    lambda m, x, y: aten.select_scatter.default(x, y[:, 1].relu(), 1, 2),
    (2, 4, 6, 3),
    dim=2,
    makers=TWO,
    name="one token",
    free=None,
)
CASES.add(aten.diagonal.default, lambda m, x: aten.diagonal.default(x, 1, -1, 2), (2, 6, 4, 4), name="of an image")
CASES.add(
    aten.diagonal.default,
    lambda m, x: aten.diagonal.default(x, 0, 1, 2),
    (2, 4, 4, 5),
    out=None,
    name="of channels",
    why="takes a diagonal",
)
CASES.add(
    aten.diagonal_scatter.default,
    lambda m, x, y: aten.diagonal_scatter.default(x, y[:, :, 0], 0, 2, -1),
    (2, 6, 4, 4),
    makers=TWO,
    name="of an image",
    free={"make": 6},
)
CASES.add(aten.diagonal_scatter.default, lambda m, x, y: aten.diagonal_scatter.default(x, y[:, 0], 0, 1, 2),
          (2, 4, 4, 4), makers=TWO, out=None, name="of channels", why="diagonal")  # fmt: skip

# --- joining -------------------------------------------------------------------------------------------------------

for join in (aten.cat.default, aten.concat.default, aten.concatenate.default):
    CASES.add(join, lambda m, x, y, join=join: join([x, y.sin()], 1), makers=TWO, free={"make": 6, "other": 6})
CASES.add(aten.cat.default, lambda m, x, y: aten.cat.default([x, y], 2), makers=TWO, name="of positions")
CASES.add(aten.cat.default, lambda m, x: aten.cat.default([x, x], 1), name="with itself")
CASES.add(aten.cat.default, lambda m, x: aten.cat.default([x, x.flip(1).sin()], 1), name="with itself, turned around")
CASES.add(aten.cat.default, lambda m, x: aten.cat.default([x, torch.ones_like(x[:, :2]).detach() * 0.5], 1),
          name="with constants of its shape", free={"make": 2, "make#2": 4})  # fmt: skip
CASES.add(aten.cat.default, lambda m, x: aten.cat.default([m.token.expand(x.shape[0], -1, -1), x], 1), **WIDE,
          name="of a token", parts=lambda: {"token": param(1, 1, 6)})  # fmt: skip
CASES.add(aten.cat.default, lambda m, x: aten.cat.default([x, m.table.expand(x.shape[0], -1)], 1), (2, 6),
          name="of a table", parts=lambda: {"table": param(1, 3)}, free={"make": 6, "table": 3})  # fmt: skip
CASES.add(aten.cat.default, lambda m, x, y: aten.cat.default([x, y.sum(1, keepdim=True)], 1), makers=TWO, name="of a sum",
          free={"make": 6, "other": 6})  # fmt: skip
CASES.add(aten.stack.default, lambda m, x, y: aten.stack.default([x, y], 1), makers=TWO, out=2)
CASES.add(aten.stack.default, lambda m, x, y: aten.stack.default([x, y], -1).flatten(1, 2), makers=TWO, out=1,
          name="and flattened")  # fmt: skip
CASES.add(aten.stack.default, lambda m, x, y: aten.stack.default([x, y], 1).flatten(1, 2), makers=TWO, out=1,
          name="as a concatenation")  # fmt: skip

# --- padding -------------------------------------------------------------------------------------------------------

CASES.each({"pad": ([0, 0, 1, 2],), "constant_pad_nd": ([0, 0, 1, 2], 0.5)}, name="of channels")
CASES.each({"pad": ([1, 1], "circular")}, name="of channels by turning around", shape=(2, 5, 6), dim=2,
           why="pads it with values of other positions")  # fmt: skip
CASES.each({"constant_pad_nd": ([0, 0, -1, 0],)}, name="of channels, cutting",
           why="pads it with values of other positions")  # fmt: skip

# --- orders --------------------------------------------------------------------------------------------------------


def chosen(name: str, index: list[int], **options: Any) -> None:
    CASES.add(aten.index_select.default, lambda m, x: aten.index_select.default(x, 1, m.index), name=name,
              parts=lambda: {"index": torch.tensor(index)}, **options)  # fmt: skip


chosen("in another order", [5, 2, 0, 1, 4, 3])
chosen("of some channels", [5, 0, 1], free={"make": 3, "make#2": 3})
chosen("of some channels twice", [5, 0, 0, 5, 2], free={"make": 2, "make#2": 3})
CASES.add(aten.index_select.default, lambda m, x: aten.index_select.default(x, 1, x[0, :, 0].argsort()),
          name="by the data", why="argsort")  # fmt: skip
CASES.add(aten.index_select.default, lambda m, x, y: aten.index_select.default(x, 2, y[0].sum(0).argsort()),
          name="of positions by the data", makers=TWO, free={"make": 6, "other": 6})  # fmt: skip
CASES.add(aten.index.Tensor, lambda m, x: aten.index.Tensor(x, [None, None, x[0, 0].argsort()]), free=None,
          name="of positions by the data")  # fmt: skip
CASES.add(aten.index.Tensor, lambda m, x: aten.index.Tensor(x, [None, x[0, :, 0].argsort()]), name="by the data",
          why="argsort")  # fmt: skip
CASES.add(aten.index_select.default, lambda m, x: aten.index.Tensor(m.table, [m.index]) + x, **WIDE, name="of a table",
          parts=lambda: {"table": param(4, 6), "index": torch.tensor([[3, 0, 1, 1, 2]])})  # fmt: skip
CASES.add(aten.index_select.default, lambda m, x: aten.index.Tensor(x, [None, m.index]).sum(2), name="of channels by a matrix",
          parts=lambda: {"index": torch.tensor([[5, 0], [1, 2], [3, 4]])}, free=None, out=1)  # fmt: skip
CASES.each({"repeat_interleave.self_int": (2, 1)})
CASES.each({"flip": ([1],)})
CASES.add(aten.flip.default, lambda m, x: aten.flip.default(x, [1]) * x.sin(), name="against itself", free={"make": 3})
CASES.each({"roll": ([2], [1])})
CASES.each({"roll": ([1, 1], [1, 2])}, name="of both")
CASES.each({"roll": ([2],)}, name="over everything", why="rolls over all positions")
CASES.add(aten.roll.default, lambda m, x: x * aten.roll.default(x, [3], [1]), name="against itself", free={"make": 3})
CASES.each({"repeat": ([1, 2, 1],), "tile": ([1, 2, 1],)})
CASES.each({"repeat": ([3, 1, 1, 1],)}, name="with a new dimension", out=2)

# --- inside heads --------------------------------------------------------------------------------------------------


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.unflatten(2, (count, -1))


for name, target, run in (
    ("rolled", aten.roll.default, lambda m, x: heads(x).roll(1, 3)),
    ("in another order", aten.index_select.default, lambda m, x: heads(x)[..., [1, 0, 3, 2]]),
    ("turned around", aten.flip.default, lambda m, x: heads(x).flip(3)),
    ("cut", aten.slice.Tensor, lambda m, x: heads(x)[..., 1:3]),
    ("cut in every second place", aten.slice.Tensor, lambda m, x: heads(x)[..., ::2]),
    ("padded", aten.pad.default, lambda m, x: F.pad(heads(x), (1, 2))),
    ("halves exchanged", aten.chunk.default, lambda m, x: torch.cat(heads(x).chunk(2, 3)[::-1], 3)),
    ("halves turned", aten.cat.default,
     lambda m, x: torch.cat([-heads(x)[..., 2:], heads(x)[..., :2]], 3) + heads(x)),
    ("pairs turned", aten.stack.default,
     lambda m, x: torch.stack([-heads(x)[..., 1::2], heads(x)[..., ::2]], 4).flatten(3) + heads(x)),
    ("repeated", aten.repeat.default, lambda m, x: heads(x).repeat(1, 1, 1, 2)),
    ("as other heads", aten.unflatten.int, lambda m, x: heads(heads(x).relu().flatten(2), 4)),
    ("as heads of heads", aten.index_select.default, lambda m, x: x.unflatten(2, (2, 2, 2)).transpose(2, 3)),
    ("the heads rolled", aten.roll.default, lambda m, x: heads(x, 4).roll(1, 2)),
    ("the heads repeated", aten.repeat.default, lambda m, x: heads(x).repeat(1, 1, 2, 1)),
):  # fmt: skip
    CASES.add(target, lambda m, x, run=run: run(m, x).flatten(2), (2, 3, 8), dim=2, name=f"in heads: {name}", free=None)

# --- between channels and positions --------------------------------------------------------------------------------

CASES.each({"pixel_shuffle": (2,)}, shape=(2, 12, 2, 3), free={"make": 3})
CASES.each({"pixel_unshuffle": (2,)}, shape=(2, 3, 4, 2))
CASES.add(aten.pixel_unshuffle.default, lambda m, x: aten.pixel_unshuffle.default(F.pixel_shuffle(x, 2).relu(), 2),
          (2, 12, 2, 3), name="of a shuffle", free={"make": 3})  # fmt: skip
CASES.add(aten.im2col.default, lambda m, x: F.unfold(x, 2, padding=1), (2, 6, 3, 4))
CASES.add(aten.im2col.default, lambda m, x: F.unfold(x, (2, 1), stride=(2, 1)).unflatten(1, (6, 2)).amax(2), (2, 6, 4, 3),
          name="and the largest of each window")  # fmt: skip
CASES.add(aten.col2im.default, lambda m, x: F.fold(x, (3, 3), 2), (2, 12, 4), free={"make": 3})
CASES.add(aten.col2im.default, lambda m, x: F.fold(F.unfold(x, 2, stride=2).relu(), (4, 4), 2, stride=2), (2, 6, 4, 4),
          name="of columns")  # fmt: skip
CASES.add(aten.col2im.default, lambda m, x: F.fold(x.mT, (3, 3), 2), (2, 4, 12), name="along positions", free=None)
CASES.add(aten.unfold.default, lambda m, x: aten.unfold.default(x, 2, 2, 1).mean(-1), (2, 6, 5))
CASES.add(aten.unfold.default, lambda m, x: aten.unfold.default(x, 1, 3, 3).mean(-1), (2, 6, 5), name="over channels",
          why="lays overlapping windows")  # fmt: skip
CASES.add(
    aten.repeat.default,
    lambda m, x: x * x.mean(2, keepdim=True).repeat(1, 1, 5),
    (2, 6, 5),
    dim=2,
    name="as wide as channels",
)
