"""Cases of normalisations: channels count alike, each by how often it occurs."""

from __future__ import annotations

from typing import Any

import torch
from op_cases import Cases, param

CASES = Cases()

aten = torch.ops.aten

WIDE = {"shape": (2, 5, 6), "dim": 2}
TWO = ("make", "other")


def affine(*shape: int) -> Any:
    return lambda: {"w": param(*shape), "b": param(*shape)}


def statistics(channels: int) -> Any:
    return lambda: {
        "w": param(channels),
        "b": param(channels),
        "mean": torch.randn(channels),
        "var": torch.rand(channels) + 0.5,
    }


batch_norm: Any = aten.batch_norm.default
instance_norm: Any = aten.instance_norm.default
group_norm: Any = aten.group_norm.default
layer_norm: Any = aten.layer_norm.default
rms_norm: Any = aten.rms_norm.default

# --- each channel on its own ---------------------------------------------------------------------------------------

CASES.add(batch_norm, lambda m, x: batch_norm(x, m.w, m.b, m.mean, m.var, False, 0.1, 1e-5, False),
          parts=statistics(6))  # fmt: skip
CASES.add(batch_norm, lambda m, x: batch_norm(x, None, None, m.mean, m.var, False, 0.1, 1e-5, False), (2, 6),
          name="without a scale", parts=statistics(6))  # fmt: skip
CASES.add(batch_norm, lambda m, x: batch_norm(x, m.w, m.b, m.mean, m.var, False, 0.1, 1e-5, False), (2, 5, 4), dim=2,
          name="over positions", parts=statistics(5), why="normalises over it")  # fmt: skip
CASES.add(instance_norm, lambda m, x: instance_norm(x, m.w, m.b, None, None, True, 0.1, 1e-5, False),
          parts=affine(6))  # fmt: skip
CASES.add(instance_norm, lambda m, x: instance_norm(x, m.w, m.b, None, None, True, 0.1, 1e-5, False), (2, 5, 6), dim=2,
          name="over channels", parts=affine(5), why="normalises over it")  # fmt: skip
CASES.add(aten.prelu.default, lambda m, x: aten.prelu.default(x, m.w), parts=affine(6))
CASES.add(aten.prelu.default, lambda m, x: aten.prelu.default(x, m.w), parts=affine(1), name="with one slope")

# --- over channels -------------------------------------------------------------------------------------------------

CASES.add(group_norm, lambda m, x: group_norm(x, 1, m.w, m.b), parts=affine(6), name="in one group")
CASES.add(group_norm, lambda m, x: group_norm(x, 1), name="in one group, without a scale")
CASES.add(group_norm, lambda m, x: group_norm(x, 2, m.w, m.b, 0.1), (2, 6, 2, 2), parts=affine(6),
          name="in two groups")  # fmt: skip
CASES.add(group_norm, lambda m, x: group_norm(x, 6, m.w, m.b), parts=affine(6), name="in as many groups as channels")
CASES.add(group_norm, lambda m, x: group_norm(x, 5), (2, 5, 6), dim=2, name="over positions",
          why="normalises over it")  # fmt: skip
CASES.add(layer_norm, lambda m, x: layer_norm(x, [6], m.w, m.b), **WIDE, parts=affine(6))
CASES.add(layer_norm, lambda m, x: layer_norm(x, [6], None, None, 0.1), **WIDE, name="without a scale")
CASES.add(layer_norm, lambda m, x: layer_norm(x, [5], m.w, m.b), parts=affine(5), name="over positions")
CASES.add(layer_norm, lambda m, x: layer_norm(x, [6, 5]), name="over channels and positions")
CASES.add(layer_norm, lambda m, x: layer_norm(x, [6, 5], m.w, m.b), parts=affine(6, 5),
          name="over channels and positions, with a scale")  # fmt: skip
CASES.add(layer_norm, lambda m, x: layer_norm(x.view(-1, 5, 2, 3), [3], m.w, m.b).flatten(2), **WIDE,
          parts=affine(3), name="in every head", free={"make": 3, "make#2": 2})  # fmt: skip
CASES.add(layer_norm, lambda m, x: layer_norm(x.view(-1, 5, 2, 3), [3]).flatten(2), **WIDE,
          name="in every head, without a scale", free={"make": 6, "make#2": 2})  # fmt: skip
CASES.add(layer_norm, lambda m, x: layer_norm(x.view(-1, 5, 2, 3).mT, [2]).mT.flatten(2), **WIDE, name="over heads",
          free=None)  # fmt: skip
CASES.add(rms_norm, lambda m, x: rms_norm(x, [6], m.w, 1e-3), **WIDE, parts=affine(6))
CASES.add(rms_norm, lambda m, x: rms_norm(x, [6]), **WIDE, name="without a scale")
CASES.add(rms_norm, lambda m, x: rms_norm(x, [6, 5]), name="over channels and positions")
CASES.add(rms_norm, lambda m, x: rms_norm(x, [5], m.w), parts=affine(5), name="over positions")
