"""One row per operator: how labels pass through it, what it costs, which constants a rewrite must patch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphzip.labels import IntArray

if TYPE_CHECKING:
    from graphzip.ops.site import Site

__all__ = ["Axes", "FloatArray", "OpSpec", "Patch", "Result", "table_of"]

Axes = tuple[IntArray, ...]
"""The labelled axes of one tensor: arrays of its rank whose supports are disjoint."""

FloatArray = NDArray[np.float64]

Result = Axes | list[Axes]
"""Axes of the output, or one per output where an operator returns a list."""


class Patch(Protocol):
    """What a rewrite knows when it patches the constants of one node."""

    node: fx.Node
    args: Mapping[str, Any]

    def size(self, value: Any, dim: int) -> int:
        """Size of dimension `dim` of an operand or of the node after the rewrite, which the inputs may not decide."""

    def before(self, value: Any, dim: int) -> int:
        """Its size before the rewrite."""

    def fraction(self, value: Any, dims: Sequence[int]) -> Fraction:
        """The fraction of the positions along `dims` that is left; the inputs may decide how many there are."""

    def count(self, value: Any, dims: Sequence[int]) -> Any:
        """How many positions there were along `dims`: a number, or a node where the inputs decide it."""

    def shrinks(self, value: Any, dim: int) -> bool:
        """Whether dimension `dim` loses positions."""

    def kept(self, value: Any, dim: int) -> IntArray:
        """The old position of every position along `dim` after the rewrite, in ascending order."""

    def kept_numbers(self, value: Any) -> IntArray | None:
        """The old places that stay of the channels that an operand has numbers of; `None` where none goes."""

    def vanish(self, value: fx.Node) -> None:
        """A node of the rewritten graph is zero everywhere; what is computed of it in vain is left out."""

    def set(self, name: str, value: Any) -> None:
        """Give argument `name` of the node another value."""

    def replace(self, target: Any, args: tuple[Any, ...]) -> None:
        """Call another operator instead."""

    def multiplicity(self, value: Any, dims: Sequence[int], blocks: int = 1) -> FloatArray | None:
        """How many channels each one left stands for along `dims`, broadcasting to the operand.

        `None` where every channel stands for itself alone. `blocks` splits the channels into that many equal parts that
        are counted on their own.
        """

    def lost(self, value: Any, dims: Sequence[int]) -> float:
        """The share of the positions along `dims` that are gone and that count as zeros; 0 where what goes counts."""

    def may_stay_plain(self) -> bool:
        """Whether a norm may count every channel once although that moves the outputs; where it may, it is reported."""

    def consumes(self, value: Any, dim: int) -> bool:
        """Whether `value` is a weight whose slices along `dim` have been added up."""

    def is_raw(self, value: Any) -> bool:
        """Whether `value` is a parameter, at most rearranged."""

    def operand(self, name: str) -> Any:
        """The argument `name` of the node as it stands in the rewritten graph."""

    def copied(self, value: Any) -> fx.Node:
        """The node of the rewritten graph that stands for `value`."""

    def set_node(self, name: str, value: Any) -> None:
        """Give argument `name` a node (or nodes) of the rewritten graph."""

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new operator call right before the node, on operands of the rewritten graph."""

    def then(self, target: Any, *args: Any) -> fx.Node:
        """A new operator call right after the node; every reader of the node reads it instead."""

    def become(self, value: fx.Node) -> None:
        """Let every reader of the node read `value` instead."""

    def values(self, value: FloatArray, like: Any, kind: Any = None) -> fx.Node:
        """New numbers for the positions of an operand, in its dtype (in that of `kind`, where it is given)."""

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
