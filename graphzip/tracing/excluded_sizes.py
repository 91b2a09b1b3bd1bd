"""Sizes that are excluded only by what torch asked for itself while it traced: is the graph right there as well?

`torch.export` keeps one form of a graph for all sizes, and rules out those at which its own reasoning would take
another turn: that a size is one, that two dimensions lie one behind the other. The model itself has asked nothing, and
may well compute the same there. A condition that only a few sizes fail is looked into, therefore, at each of them. The
model is traced there, and the graphs are compared. Sizes that pass are taken, the others refused one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import nn

from graphzip.graph.guards import Term, holds, parse, sizes_of, value_of
from graphzip.tracing.flatten import Flat, FormOf, stated
from graphzip.tracing.retrace import same_at

__all__ = ["admitted"]

_SCANNED = 256
"""Sizes up to which those that fail a condition are looked for."""

_FEW = 8
"""As many sizes, and combinations of them, are tried at most."""


def admitted(skeleton: nn.Module, flat: Flat, form_of: FormOf | None) -> Flat:
    """The graph without those of its conditions that excluded only sizes at which it is the model."""
    taken: list[tuple[Any, int]] = []
    kept = stated(skeleton, flat)
    for symbol, place in flat.sizes.names.items():
        few, sizes = _few(flat, place, kept)
        if not few or len(sizes) * (1 + len(taken)) > _FEW:
            continue
        left = []
        for size in sizes:
            together = [{symbol: size}, *({symbol: size, **others} for others in _combinations(taken))]
            if all(same_at(skeleton, flat, each, form_of) for each in together):
                taken.append((symbol, size))
            else:
                left.append(size)
        if len(left) < len(sizes):
            conditions = [text for text in flat.conditions if text not in few]
            flat = replace(flat, conditions=(*conditions, *(f"{place} != {size}" for size in left)))
    return flat


def _combinations(taken: list[tuple[Any, int]]) -> Iterator[dict[Any, int]]:
    """Sizes of other dimensions that are taken, one or several at a time."""
    by_symbol: dict[Any, list[int]] = {}
    for symbol, size in taken:
        by_symbol.setdefault(symbol, []).append(size)
    for count in range(1, len(by_symbol) + 1):
        for symbols in itertools.combinations(by_symbol, count):
            for sizes in itertools.product(*(by_symbol[symbol] for symbol in symbols)):
                yield dict(zip(symbols, sizes, strict=True))


def _few(flat: Flat, place: str, kept: Collection[str]) -> tuple[set[str], list[int]]:
    """Conditions on one size that few sizes fail, and those of them that no other condition on it excludes.

    Those that are `kept` are among the others.
    """
    mine = [text for text in flat.conditions if _places(parse(text)) == {place}]
    looked_into = (text for text in mine if text not in kept)
    failing = {text: sizes for text in looked_into if (sizes := _failing(text, place)) is not None}
    rest = [text for text in mine if text not in failing]
    sizes = sorted(set().union(*failing.values()))
    return set(failing), [size for size in sizes if all(_holds_at(text, place, size) for text in rest)]


def _places(term: Term) -> set[str]:
    return {f"{name}.shape[{dim}]" if dim is not None else name for name, dim in sizes_of(term)}


def _shape(place: str, size: int) -> dict[str, Any]:
    """An input of which one size is known."""
    name, _, dim = place.removesuffix("]").rpartition(".shape[")
    return {name: SimpleNamespace(shape={int(dim): size})}


def _holds_at(text: str, place: str, size: int) -> bool:
    return holds(text, _shape(place, size))


def _failing(text: str, place: str) -> list[int] | None:
    """The sizes that fail a condition; nothing where they may be without number."""
    term = parse(text)
    if not isinstance(term, tuple) or len(term) != len(("kind", "left", "right")):
        return None
    kind, left, right = term
    if not isinstance(right, int) or not _grows(left) or kind not in ("NotEq", "Gt", "GtE"):
        return None
    if value_of(left, _shape(place, _SCANNED)) <= right:
        return None
    return [size for size in range(_SCANNED) if not _holds_at(text, place, size)]


def _grows(term: Term) -> bool:
    """Whether a number never falls while the size in it grows, and has no bound."""
    if not isinstance(term, tuple):
        return False
    if term[0] == "size":
        return True
    if len(term) != len(("kind", "left", "right")):
        return False
    kind, left, right = term
    if kind in ("Add", "Sub") and isinstance(right, int):
        return _grows(left)
    if kind in ("Mult", "FloorDiv") and isinstance(right, int):
        return right > 0 and _grows(left)
    if kind in ("Add", "Mult") and isinstance(left, int):
        return (kind == "Add" or left > 0) and _grows(right)
    return kind == "Add" and _grows(left) and _grows(right)
