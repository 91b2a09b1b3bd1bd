"""Cases in which channels are told apart: they are pinned with a reason, or they form several groups."""

from __future__ import annotations

import torch
from op_cases import Cases, network
from torch import Tensor

CASES = Cases()

aten = torch.ops.aten

# --- halves that are treated differently ---------------------------------------------------------------------------


def half(x: Tensor, changed: Tensor) -> Tensor:
    """`x` with its first three channels replaced."""
    return torch.cat([changed, x[:, 3:]], 1)


CASES.add(aten.flip.default, lambda m, x: half(x, x[:, :3].flip(1)), name="of a half", free={"make": 3, "make#2": 3})
CASES.add(aten.flip.default, lambda m, x: x + half(x, x[:, :3].flip(1)), name="of a half, added", free={"make#3": 3})
CASES.add(aten.roll.default, lambda m, x: half(x, x[:, :3].roll(1, 1)), name="of a half", free={"make": 3, "make#2": 3})
CASES.add(aten.roll.default, lambda m, x: x + half(x, x[:, :3].roll(1, 1)), name="of a half, added", free={"make#2": 3})
CASES.add(aten.roll.default, lambda m, x: x + half(x, x[:, :3].roll(1, 2)), name="of the positions of a half",
          free={"make": 3, "make#2": 3})  # fmt: skip
CASES.add(aten.relu.default, lambda m, x: half(x, x[:, :3].relu()), name="of a half", free={"make": 3, "make#2": 3})
CASES.add(aten.softmax.int, lambda m, x: half(x, x[:, :3].softmax(1)), name="of a half", free={"make": 3, "make#2": 3})
CASES.add(aten.cumsum.default, lambda m, x: half(x, x[:, :3].cumsum(1)), name="of a half", free={"make#2": 3},
          why="depends on the order of the channels")  # fmt: skip
CASES.add(aten.add.Tensor, lambda m, x: x[:, :4] + x[:, 2:], name="of slices that overlap", free={"make": 2})
CASES.add(aten.mul.Tensor, lambda m, x: torch.cat([x[:, :3] * x[:, 3:], x[:, 3:] * x[:, :3].roll(1, 1)], 1),
          name="in two orders", why="no other channel")  # fmt: skip

# --- where a channel stands ----------------------------------------------------------------------------------------

FIXED = "combines it with a tensor whose channels are fixed"
CASES.add(aten.mul.Tensor, lambda m, x: x * torch.arange(6.0).view(6, 1), name="by its place", why=FIXED)
CASES.add(
    aten.where.self, lambda m, x: torch.where(torch.arange(6).view(6, 1) > 2, x, -x), name="by its place", why=FIXED
)
CASES.add(aten.linear.default, lambda m, x: x.mT @ torch.eye(6, 4, dtype=x.dtype), name="with a weight made on the spot",
          out=2, why=FIXED)  # fmt: skip
CASES.add(aten.mul.Tensor, lambda m, x: x * m.scale, name="by a constant of the model", parts=lambda: {
    "scale": torch.arange(6.0).view(6, 1)
})  # fmt: skip
CASES.add(
    aten.mul.Tensor, lambda m, x: x * torch.tensor([[1.0], [1], [3], [4], [5], [6]]), name="by numbers in the code"
)
CASES.add(aten.transpose.int, lambda m, x: x + x.transpose(1, 2), (2, 5, 5), name="onto positions", why=FIXED)

# --- unknown operators ---------------------------------------------------------------------------------------------

UNKNOWN = "is not understood; add an OpSpec for it in graphzip/ops/"
for name, run, shape in (
    ("solve", lambda m, x: torch.linalg.solve(x, x.sin()), (2, 4, 4)),
    ("inverse", lambda m, x: torch.linalg.inv(x), (2, 4, 4)),
):  # fmt: skip
    CASES.put([], name, lambda run=run, shape=shape: network(run, shape), {}, UNKNOWN)
