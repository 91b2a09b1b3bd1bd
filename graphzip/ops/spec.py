"""One row per operator: how labels pass through it, what it costs, which constants a rewrite must patch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import fx

from graphzip.labels import IntArray

if TYPE_CHECKING:
    from graphzip.ops.site import Site

__all__ = ["Axes", "OpSpec", "Patch", "Result", "table_of"]

Axes = tuple[IntArray, ...]
"""The labelled axes of one tensor: arrays of its rank whose supports are disjoint."""

Result = Axes | list[Axes]
"""Axes of the output, or one per output where an operator returns a list."""


class Patch(Protocol):
    """What a rewrite knows when it patches the constants of one node."""

    node: fx.Node
    args: Mapping[str, Any]

    def size(self, value: Any, dim: int) -> int:
        """Size of dimension `dim` of an operand or of the node after the rewrite."""

    def shrinks(self, value: Any, dim: int) -> bool:
        """Whether dimension `dim` loses positions."""

    def kept(self, value: Any, dim: int) -> IntArray:
        """Old positions along `dim` that survive, in the order in which they stand afterwards."""

    def set(self, name: str, value: Any) -> None:
        """Give argument `name` of the node another value."""

    def replace(self, target: Any, args: tuple[Any, ...]) -> None:
        """Call another operator instead."""

    def constant(self, value: IntArray) -> fx.Node:
        """A new integer constant that can be an argument."""


@dataclass(frozen=True)
class OpSpec:
    """One operator family.

    `propagate` says how labels pass. `macs` counts multiply-accumulates on the traced example. `patch` adapts shape
    constants after channels are gone; an operator without one has none that depend on channels.
    """

    targets: tuple[Any, ...]
    propagate: Callable[[Site], Result]
    macs: Callable[[Site], int] | None = None
    patch: Callable[[Patch], None] | None = None


def table_of(families: Iterable[Iterable[OpSpec]]) -> dict[Any, OpSpec]:
    """The table target -> row; a target may stand in one row only."""
    table: dict[Any, OpSpec] = {}
    for family in families:
        for spec in family:
            for target in spec.targets:
                if target in table:
                    raise ValueError(f"{target} has two rows")
                table[target] = spec
    return table
