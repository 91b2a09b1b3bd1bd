"""Which layers are worth storing as factors: those that make the model smaller, in bytes.

A layer's kernel is exchanged for what it alone stores (atoms, codes) and for its part of what it shares with others: a
corner of the coefficients, or a generator. What is shared has the largest dimensions that its layers need, so a set of
layers saves

    saved(S) = sum of (kernel - own) over S - shared(max rows of S, max columns of S),

and the set that saves most is, for one choice of rows and columns, all layers that fit in and gain something alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from graphzip.plan.problems import plan_error
from graphzip.report.outcome import Table
from graphzip.report.tables import file_size

__all__ = ["LeftOut", "SharedBytes", "Stored", "left_out_table", "worth_storing"]

logger = logging.getLogger(__name__)

SharedBytes = Callable[[int, int], int]
"""Bytes of what layers share, by its rows and columns."""


@dataclass(frozen=True)
class Stored:
    """One layer: bytes of its kernel and of the factors that are its `own`, and the corner that it reads of `shared`,
    the key of what it shares with others.
    """

    name: str
    kernel: int
    own: int
    shared: Hashable
    corner: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class LeftOut:
    """A layer that stays as it is: bytes of its kernel, and by how many the factors would be more."""

    name: str
    kernel: int
    factors: int


def worth_storing(layers: Sequence[Stored], shared: Mapping[Hashable, SharedBytes], where: str) -> dict[str, LeftOut]:
    """The layers that are to stay as they are, by name, for the model would be larger without.

    `shared` has the price of each key. Raises `PlanError` where no layer is left.
    """
    out: dict[str, LeftOut] = {}
    for key, price in shared.items():
        mates = [layer for layer in layers if layer.shared == key]
        chosen = _best(mates, price)
        for layer in mates:
            if layer not in chosen:
                more = _stored([*chosen, layer], price) - _stored(chosen, price)
                out[layer.name] = LeftOut(layer.name, layer.kernel, more)
    if len(out) == len(layers):
        kernels = sum(layer.kernel for layer in layers)
        factors = sum(_stored([layer for layer in layers if layer.shared == key], shared[key]) for key in shared)
        text = f"kernels that take {file_size(kernels)} would take {file_size(factors)} as factors"
        raise plan_error([f"{where}: nothing gets smaller: {text}; use smaller factors, or write force: true"])
    for each in out.values():
        logger.warning("%s stays as it is: its kernel takes %d bytes, factors %d", each.name, each.kernel, each.factors)
    return out


def _best(mates: Sequence[Stored], price: SharedBytes) -> list[Stored]:
    """The layers that together save most; of sets that save alike the larger one, and none where all would cost."""
    best: list[Stored] = []
    most = (0, 0)
    for rows in {layer.corner[0] for layer in mates}:
        for columns in {layer.corner[1] for layer in mates}:
            inside = [
                layer
                for layer in mates
                if layer.corner[0] <= rows and layer.corner[1] <= columns and layer.kernel >= layer.own
            ]
            saved = sum(layer.kernel for layer in inside) - _stored(inside, price)
            if (saved, len(inside)) > most:
                best, most = inside, (saved, len(inside))
    return best


def _stored(layers: Sequence[Stored], price: SharedBytes) -> int:
    """Bytes of these layers as factors."""
    if not layers:
        return 0
    corner = tuple(max(layer.corner[dim] for layer in layers) for dim in (0, 1))
    return sum(layer.own for layer in layers) + price(*corner)


def left_out_table(left_out: Mapping[str, LeftOut]) -> tuple[Table, ...]:
    """What stays as it is and why; no table where nothing does."""
    rows = tuple((each.name, file_size(each.kernel), file_size(each.factors)) for each in left_out.values())
    note = "the model would be larger with their kernels as factors; force: true stores them all the same"
    return (Table(("layer that stays as it is", "kernel", "as factors"), rows, note=note),) if rows else ()
