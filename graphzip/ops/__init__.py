"""The table of operators: one row per family, a file per kind.

To teach graphzip an operator, add an `OpSpec` to the file of its kind and a case to the tests; an operator without a
row pins the channels it touches.
"""

from __future__ import annotations

from typing import Any

from graphzip.ops import conv, copies, linear, movement, norm, pointwise, positions, recurrent, views, windows
from graphzip.ops.spec import OpSpec, table_of

__all__ = ["MOVES", "OPS", "OpSpec"]

OPS: dict[Any, OpSpec] = table_of(
    module.SPECS for module in (pointwise, views, movement, copies, windows, conv, linear, recurrent, norm, positions)
)

MOVES: frozenset[Any] = frozenset(
    target
    for spec in (*views.SPECS, *movement.SPECS, *copies.REPEATS, *windows.SHUFFLES, pointwise.IDENTITY)
    for target in spec.targets
)
"""Operators that only rearrange: their result is still a parameter where their operands are."""
