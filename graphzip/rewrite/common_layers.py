"""What layers of several models that read one value have in common, and the products that they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphzip.analysis.layers import Layer
from graphzip.graph.state import get_tensor
from graphzip.labels import IntArray

__all__ = ["Numbers", "Product", "Products", "StoredNumbers", "products", "stored"]

aten = torch.ops.aten

_ADDED = 4
"""How many multiply-adds have to be saved for each number of what layers read together and apart, to be added."""

_NORMED = 16
"""The same where a batch norm behind a layer, which runtimes fold into it, has to stand alone."""

_ASSEMBLES = {aten.cat.default, aten.index_select.default, aten.slice.Tensor}


@dataclass(frozen=True)
class Numbers:
    """The weight `(outs, ins, *kernel)` and the bias of a layer, and for every number of them which stored one it is.

    Two numbers of any layers that are one in the file have the same; -1 where there is no bias.
    """

    weight: Tensor
    bias: Tensor | None
    places: IntArray
    bias_places: IntArray


@dataclass(frozen=True)
class Product:
    """A layer on the channels `reads` of a value."""

    reads: IntArray
    weight: Tensor
    bias: Tensor | None

    @property
    def outs(self) -> int:
        return len(self.weight)

    def in_order(self, rows: IntArray) -> Product:
        """Its rows in another order."""
        chosen = torch.from_numpy(rows).to(self.weight.device)
        return replace(self, weight=self.weight[chosen], bias=None if self.bias is None else self.bias[chosen])


@dataclass(frozen=True)
class Products:
    """Layers as the product that is common to them, of which each has some rows, and what each adds, if it does.

    `runs` are the numbers of rows, one after the other, that the same layers have.
    """

    common: Product
    runs: list[int]
    rows: tuple[IntArray, ...]
    own: tuple[Product | None, ...]


class StoredNumbers:
    """Tells the stored numbers apart: each tensor of a module has a range of integers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.starts: dict[int, int] = {}
        self.next = 0

    def of(self, layer: Layer) -> Numbers:
        """What a layer holds, whose weight and bias are put together from stored tensors (`stored`)."""
        weight, bias = (None if node is None else self._values(node) for node in (layer.weight, layer.bias))
        assert weight is not None
        none = np.full(len(weight), -1, dtype=np.int64)
        places = _assembled(layer.weight, self._places).numpy()
        return Numbers(
            weight, bias, places, none if layer.bias is None else _assembled(layer.bias, self._places).numpy()
        )

    def _values(self, node: fx.Node) -> Tensor:
        return _assembled(node, lambda name: get_tensor(self.module, name).detach())

    def _places(self, name: str) -> Tensor:
        tensor = get_tensor(self.module, name)
        if not tensor.is_floating_point():
            return tensor.cpu()  # an order of slices
        if id(tensor) not in self.starts:
            self.starts[id(tensor)] = self.next
            self.next += tensor.numel()
        start = self.starts[id(tensor)]
        return torch.arange(start, start + tensor.numel()).reshape(tensor.shape)


def stored(layer: Layer, module: nn.Module) -> tuple[str, ...]:
    """The stored tensors that the weight of a layer is put together from; none where it, or the bias, is computed."""
    found: list[str] = []
    for node in (layer.weight, layer.bias):
        pending = [] if node is None else [node]
        while pending:
            each = pending.pop()
            if each.op == "get_attr":
                if node is layer.weight and get_tensor(module, str(each.target)).is_floating_point():
                    found.append(str(each.target))
            elif each.target in _ASSEMBLES:
                pending += each.all_input_nodes
            else:
                return ()
    return tuple(dict.fromkeys(found))


def _assembled(node: fx.Node, fetch: Callable[[str], Tensor]) -> Tensor:
    """What a weight is, of the tensors that it is put together from."""
    if node.op == "get_attr":
        return fetch(str(node.target))
    args: Any = fx.node.map_arg(node.args, lambda each: _assembled(each, fetch))
    target: Any = node.target
    result: Tensor = target(*args, **node.kwargs)
    return result


def products(layers: Sequence[Numbers], reads: Sequence[IntArray], *, apart: bool, block: int = 1) -> Products | None:
    """The products of layers that read channels `reads` of one value; nothing where taking them together does not pay.

    It pays where some row is the same in two of them, on the channels that all read. Where layers read others besides,
    or what they give is scaled for each of them (`apart`), more has to be saved than one pass over it takes. Of layers
    whose rows are whole blocks, whole blocks of rows are common; what is left over each computes for itself.
    """
    common = reduce(np.intersect1d, reads)
    at = [np.argsort(read)[np.searchsorted(np.sort(read), common)] for read in reads]
    rest = [np.setdiff1d(np.arange(read.size), own) for read, own in zip(reads, at, strict=True)]
    whole = not any(own.size for own in rest)
    if not common.size or not (whole or all(own.size for own in rest)):
        return None
    keys = [_keys(each, own, whole=whole) for each, own in zip(layers, at, strict=True)]
    if block > 1 and all(len(own) % block == 0 for own in keys):
        keys = _in_blocks(keys, block)
    rows, runs = _unlike(keys)
    total = sum(map(len, keys))
    saved = (total - len(rows)) * common.size * math.prod(layers[0].weight.shape[2:])
    needed = (0 if whole else _ADDED) + (_NORMED if apart and len(runs) > 1 else 0)
    if saved <= needed * total:
        return None
    chosen = [layers[number].weight[row][_index(at[number], layers[number])] for number, row in rows.values()]
    bias = _stacked_bias([(layers[number].bias, row) for number, row in rows.values()], chosen[0]) if whole else None
    place = {key: number for number, key in enumerate(rows)}
    return Products(
        Product(common, torch.stack(chosen), bias),
        runs,
        tuple(np.array([place[key] for key in own]) for own in keys),
        tuple(None if whole else _own(each, read, own) for each, read, own in zip(layers, reads, rest, strict=True)),
    )


def _keys(layer: Numbers, columns: IntArray, *, whole: bool) -> list[Any]:
    """What tells the rows of a layer apart, on some of its columns; with the bias where these are all."""
    places = layer.places[:, columns]
    return [(row.tobytes(), bias if whole else -1) for row, bias in zip(places, layer.bias_places, strict=True)]


def _in_blocks(keys: Sequence[Sequence[Any]], block: int) -> list[list[Any]]:
    """The same where the rows that the same layers have are whole blocks; more are each layer's own."""
    owners = _owners(keys)
    alone: set[Any] = set()
    for own in set(owners.values()):
        held = [key for key, each in owners.items() if each == own]
        if len(own) > 1 and len(held) >= block:
            alone.update(held[len(held) // block * block :])
    return [[(key, number) if key in alone else key for key in own] for number, own in enumerate(keys)]


def _owners(keys: Sequence[Sequence[Any]]) -> dict[Any, tuple[int, ...]]:
    """Which layers have each row."""
    found: dict[Any, tuple[int, ...]] = {}
    for number, own in enumerate(keys):
        found.update({key: (*found.get(key, ()), number) for key in dict.fromkeys(own)})
    return found


def _unlike(keys: Sequence[Sequence[Any]]) -> tuple[dict[Any, tuple[int, int]], list[int]]:
    """The rows of all layers, each once, with a layer and a place in it that has it; and how many the same layers have.

    In the order of the layers that have them, so that the rows of each of two layers are neighbours.
    """
    owners = _owners(keys)
    found: dict[Any, tuple[int, int]] = {}
    for number, own in enumerate(keys):
        for row, key in enumerate(own):
            found.setdefault(key, (number, row))
    order = sorted(found, key=lambda key: (owners[key][0], owners[key][-1], owners[key]))
    return {key: found[key] for key in order}, [len(list(run)) for _, run in groupby(order, owners.__getitem__)]


def _stacked_bias(rows: Sequence[tuple[Tensor | None, int]], like: Tensor) -> Tensor | None:
    if all(bias is None for bias, _ in rows):
        return None
    return torch.stack([like.new_zeros(()) if bias is None else bias[row] for bias, row in rows])


def _own(layer: Numbers, read: IntArray, columns: IntArray) -> Product:
    """What a layer makes of channels that not all read; it has the bias."""
    columns = columns[np.argsort(read[columns], kind="stable")]
    return Product(read[columns], layer.weight[:, _index(columns, layer)], layer.bias)


def _index(places: IntArray, layer: Numbers) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(places)).to(layer.weight.device)
