"""Let several models share parts of a parameter, and rearrange its slices.

Every row and column (slice of the first and the second dimension) has a key; rows of equal key are the same in all
models that have it. An entry belongs to the models that have both its row and its column. Entries of the same models
are stored once as a tile, of `fc.weight` as `fc.shared_a_b.weight` for models a and b and as `fc.own.weight` for one
alone, and each model puts its parameter together from its tiles: concatenated along columns, then rows, and reordered
where that takes it. Where all models have everything, the parameter itself is one.

These functions change a graph in place: pass a copy of your own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import fx, nn

from graphzip.graph.state import attach, get_tensor, inside, joined, named_state
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.rewrite.edit import before, put

__all__ = ["Keys", "permute_slices", "share"]

aten = torch.ops.aten

Keys = tuple[IntArray, IntArray | None]
"""Key of every row and of every column; `None` where the parameter is shared row by row."""

Owners = tuple[str, ...]


def permute_slices(traced: Traced, name: str, dim: int, source: IntArray, *, rows: int = 1) -> None:
    """Slice `i` of dimension `dim` becomes what slice `source[i]` was.

    With `rows` runs of rows (first dimension) `source` is `(rows, slices)`, one order for each.
    """
    orders = source.reshape(rows, -1)
    if np.array_equal(orders, np.broadcast_to(np.arange(orders.shape[1]), orders.shape)):
        return
    tensor = get_tensor(traced.module, name).detach()
    parts = tensor.chunk(rows) if rows > 1 else (tensor,)
    moved = [
        part.index_select(dim, torch.from_numpy(np.ascontiguousarray(order)).to(tensor.device))
        for part, order in zip(parts, orders, strict=True)
    ]
    put(traced, name, torch.cat(moved) if rows > 1 else moved[0])


def share(traced: Traced, params: Mapping[str, str], keys: Mapping[str, Keys]) -> tuple[int, int]:
    """Let tasks share what they both have of the parameters `params`, by task; `keys` of each of them.

    Values of shared entries are taken from the first of their owners. Returns how many numbers the parameters had
    together, and how many they have now. Call `tie` after the last parameter.
    """
    tensors = {task: get_tensor(traced.module, name) for task, name in params.items()}
    before = sum(tensor.numel() for tensor in tensors.values())
    first, *others = params
    if all(_same(keys[first], keys[task]) and tensors[task].shape == tensors[first].shape for task in others):
        for task in others:
            attach(traced.module, params[task], tensors[first])
        return before, tensors[first].numel()
    rows = {task: _owners(task, 0, keys) for task in params}
    columns = {task: _owners(task, 1, keys) for task in params}
    if not any(len(set(a) & set(b)) > 1 for task in params for a in set(rows[task]) for b in set(columns[task])):
        return before, before
    stored: dict[tuple[Owners, Owners], _Stored] = {}
    owners = [name.rpartition(".")[0] for name in params.values()]
    taken = {inside(name, owner) for name, _ in named_state(traced.module) for owner in owners}
    for task, name in params.items():
        _Assembly(traced, name, stored, taken).build(_grid(rows[task], columns[task], keys[task]))
    return before, sum(tile.value.numel() for tile in stored.values())


def _same(one: Keys, two: Keys) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in zip(one, two, strict=True)
    )


def _owners(task: str, dim: int, keys: Mapping[str, Keys]) -> list[Owners]:
    """The tasks that have each row (column) of a task's parameter; all of them where there are no columns to tell."""
    own = keys[task][dim]
    if own is None:
        return [tuple(keys)]
    has = {other: np.isin(own, np.asarray(keys[other][dim])) for other in keys}
    return [tuple(other for other in keys if has[other][place]) for place in range(own.size)]


@dataclass(frozen=True)
class _Tile:
    """The columns `places` of some rows, which `owners` share; tiles of equal `kind` are one."""

    kind: tuple[Owners, Owners]
    owners: Owners
    places: IntArray


@dataclass(frozen=True)
class _Stored:
    """A tile that is there: the name that its models know it by, and who has it."""

    title: str
    owners: Owners
    value: nn.Parameter


@dataclass(frozen=True)
class _Part:
    """Rows that the same tasks have, and their columns, tile by tile."""

    rows: IntArray
    tiles: tuple[_Tile, ...]


def _grid(rows: Sequence[Owners], columns: Sequence[Owners], keys: Keys) -> list[_Part]:
    """The tiles of a task's parameter, those of most owners first; shared rows and columns in the order of keys."""
    parts = []
    for row in sorted(set(rows), key=lambda owners: (-len(owners), owners)):
        found: dict[tuple[Owners, Owners], tuple[Owners, list[int]]] = {}
        for place, column in enumerate(columns):
            both = tuple(owner for owner in row if owner in column)
            kind = (row, column) if len(both) > 1 else (row if len(row) == 1 else (*row, ""), both)
            found.setdefault(kind, (both, []))[1].append(place)
        tiles = [_Tile(kind, both, _sorted(places, both, keys[1])) for kind, (both, places) in found.items()]
        tiles.sort(key=lambda tile: (-len(tile.owners), tile.kind))
        chosen = [place for place, owners in enumerate(rows) if owners == row]
        parts.append(_Part(_sorted(chosen, row, keys[0]), tuple(tiles)))
    return parts


def _sorted(places: Sequence[int], owners: Owners, keys: IntArray | None) -> IntArray:
    found = np.array(places, dtype=np.int64)
    return found if keys is None or len(owners) == 1 else found[np.argsort(keys[found], kind="stable")]


class _Assembly:
    """Builds one task's parameter from tiles, which are made when they are first asked for."""

    def __init__(
        self, traced: Traced, name: str, stored: dict[tuple[Owners, Owners], _Stored], taken: Set[str]
    ) -> None:
        self.traced, self.name, self.stored, self.taken = traced, name, stored, taken
        self.owner, _, self.leaf = name.rpartition(".")
        self.tensor = get_tensor(traced.module, name)
        fetched = traced.aliases.get(name, name)
        self.node = next(each for each in traced.graph.nodes if each.op == "get_attr" and each.target == fetched)
        self.emit = before(self.node)

    def build(self, grid: Sequence[_Part]) -> None:
        lines = [self._line(part, number) for number, part in enumerate(grid)]
        whole = lines[0] if len(lines) == 1 else self.emit(aten.cat.default, lines, 0)
        whole = self._ordered(whole, 0, np.concatenate([part.rows for part in grid]), "rows")
        self.node.replace_all_uses_with(whole)
        self.traced.graph.erase_node(self.node)
        delattr(self.traced.module.get_submodule(self.owner), self.leaf)

    def _line(self, part: _Part, number: int) -> fx.Node:
        fetched = [self._fetch(part.rows, tile) for tile in part.tiles]
        if self.tensor.dim() == 1:
            return fetched[0]
        line = fetched[0] if len(fetched) == 1 else self.emit(aten.cat.default, fetched, 1)
        places = np.concatenate([tile.places for tile in part.tiles])
        return self._ordered(line, 1, places, f"columns_{number}" if number else "columns")

    def _fetch(self, rows: IntArray, tile: _Tile) -> fx.Node:
        if tile.kind not in self.stored:
            value = self.tensor.detach().index_select(0, self._index(rows))
            if value.dim() > 1:
                value = value.index_select(1, self._index(tile.places))
            made = nn.Parameter(value, requires_grad=self.tensor.requires_grad)
            self.stored[tile.kind] = _Stored(self._title(tile), tile.owners, made)
        held = self.stored[tile.kind]
        full = joined(self.owner, f"{held.title}.{self.leaf}")
        attach(self.traced.module, full, held.value)
        return self.emit.fetch(full)

    def _title(self, tile: _Tile) -> str:
        base = f"shared_{'_'.join(tile.owners)}" if len(tile.owners) > 1 else "own"
        titles = (f"{base}_{number}" if number > 1 else base for number in count(1))
        used = {held.title for held in self.stored.values() if held.owners == tile.owners}
        return next(title for title in titles if title not in used and f"{title}.{self.leaf}" not in self.taken)

    def _ordered(self, value: fx.Node, dim: int, places: IntArray, what: str) -> fx.Node:
        """Slices that stand in the order `places`, in their own order again."""
        order = np.argsort(places, kind="stable")
        if np.array_equal(order, np.arange(order.size)):
            return value
        fetched = self.emit.index(f"{self.owner}.{self.leaf}_{what}", order, self.tensor.device)
        return self.emit(aten.index_select.default, value, dim, fetched)

    def _index(self, places: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(places)).to(self.tensor.device)
