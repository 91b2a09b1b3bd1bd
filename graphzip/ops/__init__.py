"""The table of operators: one row per family, a file per kind.

To teach graphzip an operator, add an `OpSpec` to the file of its kind and a case to the tests; an operator without a
row pins the channels it touches.
"""

from __future__ import annotations

from typing import Any

from graphzip.ops import (
    conv,
    copies,
    distances,
    fills,
    linear,
    movement,
    norm,
    picking,
    pixel_and_unfold,
    pointwise,
    recurrent,
    reductions,
    routing,
    spectral,
    views,
)
from graphzip.ops.spec import OpSpec, table_of

__all__ = ["MOVES", "OPS", "OpSpec"]

_FAMILIES = (
    pointwise,
    views,
    movement,
    picking,
    copies,
    fills,
    pixel_and_unfold,
    conv,
    linear,
    distances,
    recurrent,
    norm,
    reductions,
    routing,
    spectral,
)

OPS: dict[Any, OpSpec] = table_of(module.SPECS for module in _FAMILIES)

_MOVING = (
    *views.SPECS,
    *movement.SPECS,
    picking.INDEX,
    *copies.REPEATS,
    *pixel_and_unfold.SHUFFLES,
    pointwise.IDENTITY,
    *spectral.PAIRS,
)

MOVES: frozenset[Any] = frozenset(target for spec in _MOVING for target in spec.targets)
"""Operators that only rearrange: their result is still a parameter where their operands are."""
