"""Distances between rows: `(sum_c |x_c - y_c|^p)^(1/p)` treats all channels of a row alike."""

from __future__ import annotations

import math
from typing import Any

import torch

from graphzip.ops.linear import between
from graphzip.ops.rules import after_sum, mixing
from graphzip.ops.site import Site
from graphzip.ops.spec import OpSpec, Patch, Result

__all__ = ["SPECS"]

aten = torch.ops.aten

_LETTERS = "abcdefghijklmnop"
_COUNTS = "counts channels that differ"


def between_rows(site: Site) -> Result:
    """`cdist`: `x1 (.., P, M), x2 (.., R, M) -> (.., P, R)`."""
    left, right = site.args["x1"], site.args["x2"]
    lead = _LETTERS[: len(site.shape()) - 2]
    operands = []
    for value, rows in ((left, "l"), (right, "s")):
        last, axes = len(site.shape(value)) - 1, site.axes(value)
        if not site.args["p"]:
            axes = mixing(site, axes, [last], _COUNTS)
        operands.append(((axes, site.extent(value)), lead[len(lead) - last + 1 :] + rows + "z"))
    (first, first_names), (second, second_names) = operands
    held = {names[dim] for value, names in ((left, first_names), (right, second_names)) for dim in site.open(value)}
    return between(site, *first, first_names, second, second_names, lead + "ls", held)


def within_rows(site: Site) -> Result:
    """`pdist`: `(N, M) -> (N (N - 1) / 2)`."""
    source = site.args["self"]
    axes = mixing(site, site.axes(source), [0] if site.args["p"] else [0, 1], "compares each with each")
    after_sum(site, axes, [1], site.open(source))
    return ()


def _patched(*names: str) -> Any:
    """What stands for `m` equal ones is as far off as they are: its share of the sum is `m` times as large."""

    def patch(patch: Patch) -> None:
        order = float(patch.args["p"])
        for name in names if order and math.isfinite(order) else ():
            value = patch.args[name]
            counts = patch.multiplicity(value, [len(value.meta["val"].shape) - 1])
            if counts is not None:
                scale = patch.values(counts ** (1 / order), value)
                patch.set_node(name, patch.call(aten.mul.Tensor, patch.operand(name), scale))

    return patch


SPECS = (
    OpSpec((aten.cdist.default,), between_rows, patch=_patched("x1", "x2")),
    OpSpec((aten.pdist.default,), within_rows, patch=_patched("self")),
)
