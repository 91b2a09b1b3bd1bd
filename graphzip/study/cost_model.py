"""What a model costs as a function of the widths of its groups, without building the slimmer model.

A parameter, and an operator that multiplies, costs a number times the fraction of its channels that is left along each
of its dimensions: `cost = sum over terms t of c_t * product over dimensions d of (1 - sum over groups g of s_tdg r_g)`,
where `r_g` channels of group `g` are gone and `s_tdg` is the fraction that one of them has of the dimension.

What an operator takes in a runtime does not follow from products: it comes in blocks of channels. Such a term has a
table of what was measured (`WidthTable`) in place of the product.

A layer that may be stored as two thin ones, of a rank `q` of at most `Q`, counts as a group of its own, of which
nothing is gone where it is dense and `r = 2 Q - q` where it is not. With factors that are never below zero,

    dense:  c max(1 - r / Q, 0),         thin:  2 a Q max(1 - r / (2 Q), 0) - 2 a Q max(1 - r / Q, 0) = a q,

where each of the thin layers costs `a` for every part of the rank, and has the inputs or the outputs of the dense one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphzip.analysis.channels import Analysis
from graphzip.analysis.cost import cost_of
from graphzip.analysis.groups import ChannelGroup
from graphzip.graph.dual_mode import form_nodes
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.ops import OPS
from graphzip.ops.site import Site

__all__ = [
    "Axes",
    "Dims",
    "Multiplication",
    "Point",
    "Price",
    "Prices",
    "ThinLayers",
    "WidthTable",
    "operations",
    "price_of",
    "prices_of",
]

Vector = NDArray[np.float64]

Dims = dict[Any, Vector]
"""By dimension of an operator, the fractions of it that one channel of every group has."""

_MATRIX = 2


@dataclass(frozen=True)
class WidthTable:
    """What was measured of an operator, as shares of what it takes when it is whole: `values` at some numbers of
    channels along its first two dimensions. `places` have, by the number of channels, where that is in `values`;
    between two of these there are straight lines.
    """

    places: tuple[Vector, Vector]
    values: NDArray[np.float64]

    def at(self, first: Vector, second: Vector) -> Vector:
        """At what is left of the two dimensions, shares of them."""
        (low, next_, rest), (low2, next2, rest2) = map(_between, self.places, (first, second))
        below = self.values[low, low2] * (1.0 - rest2) + self.values[low, next2] * rest2
        above = self.values[next_, low2] * (1.0 - rest2) + self.values[next_, next2] * rest2
        found: Vector = below * (1.0 - rest) + above * rest
        return found


def _between(places: Vector, left: Vector) -> tuple[NDArray[np.int64], NDArray[np.int64], Vector]:
    """Between which two of what was measured that is, and how far from the first to the second."""
    at = places[np.rint(left * (len(places) - 1)).astype(np.int64)]
    low, next_ = np.floor(at).astype(np.int64), np.ceil(at).astype(np.int64)
    return low, next_, at - low


@dataclass(frozen=True)
class Price:
    """One kind of cost: `base` (terms,) and the fractions `along[d]` (terms, groups) of the dimensions. Terms that have
    a table take what it says in place of the product.
    """

    base: Vector
    along: tuple[NDArray[np.float64], ...]
    tables: Mapping[int, WidthTable] = field(default_factory=dict)

    @classmethod
    def total(cls, parts: Sequence[tuple[float, Price]]) -> Price:
        """The sum of several prices, each of them times a number."""
        parts = [part for part in parts if part[1].base.size] or parts[:1]  # one without terms knows no groups
        depth = max(len(price.along) for _, price in parts)
        along = tuple(
            np.concatenate(
                [
                    price.along[level] if level < len(price.along) else np.zeros((price.base.size, price.groups))
                    for _, price in parts
                ]
            )
            for level in range(depth)
        )
        starts = np.cumsum([0, *(price.base.size for _, price in parts)]).tolist()
        tables = {
            start + term: table
            for start, (_, price) in zip(starts, parts, strict=False)
            for term, table in price.tables.items()
        }
        return cls(np.concatenate([factor * price.base for factor, price in parts]), along, tables)

    @property
    def groups(self) -> int:
        """How many there are."""
        return self.along[0].shape[1] if self.along else 0

    @property
    def whole(self) -> float:
        """What the model costs as it is."""
        return float(self.base.sum())

    def at(self, gone: Vector) -> float:
        """The cost with this many channels gone of every group."""
        left = [(1.0 - fractions @ gone)[:, None] for fractions in self.along]
        return float(self.costs(np.arange(self.base.size), left).sum())

    def costs(self, terms: NDArray[np.int64], left: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """What these terms cost, (terms, n), with n shares of every dimension left."""
        left = [np.clip(share, 0.0, 1.0) for share in left]
        found = np.repeat(self.base[terms, None], left[0].shape[1] if left else 1, axis=1)
        for share in left:
            found *= share
        if self.tables:
            for row, term in enumerate(terms.tolist()):
                if term in self.tables:
                    found[row] = self.base[term] * self.tables[term].at(left[0][row], left[1][row])
        return found

    @cached_property
    def terms(self) -> list[NDArray[np.int64]]:
        """For every group the numbers of the terms that it has a part in."""
        part = np.zeros((self.base.size, self.groups), dtype=bool)
        for fractions in self.along:
            part |= fractions != 0.0
        return [np.flatnonzero(column) for column in part.T]

    @cached_property
    def neighbours(self) -> list[NDArray[np.int64]]:
        """For every group the numbers of the others that have a part in its terms."""
        groups_of: dict[int, set[int]] = {}
        for group, terms in enumerate(self.terms):
            for term in terms.tolist():
                groups_of.setdefault(term, set()).add(group)
        found = [set().union(*(groups_of[term] for term in terms.tolist())) for terms in self.terms]
        return [np.array(sorted(each - {group}), dtype=np.int64) for group, each in enumerate(found)]


class Point:
    """Channels that are gone of every group, and what the model costs then; groups move one at a time.

    Only the terms of the group that moves are computed anew.
    """

    def __init__(self, price: Price, gone: Vector) -> None:
        self.price, self.gone = price, gone.astype(np.float64)
        self.left = [1.0 - fractions @ self.gone for fractions in price.along]
        self.cost = price.at(self.gone)

    def varying(self, group: int, counts: Vector) -> Vector:
        """The costs with each of `counts` channels gone of one group, and those of the others as they are."""
        terms = self.price.terms[group]
        more = counts - self.gone[group]
        now = [left[terms, None] for left in self.left]
        then = [
            left - fractions[terms, group, None] * more for left, fractions in zip(now, self.price.along, strict=True)
        ]
        found: Vector = self.cost + (self.price.costs(terms, then) - self.price.costs(terms, now)).sum(0)
        return found

    def move(self, group: int, count: float) -> None:
        """From now on so many channels of a group are gone."""
        self.cost = float(self.varying(group, np.array([count]))[0])
        terms = self.price.terms[group]
        for left, fractions in zip(self.left, self.price.along, strict=True):
            left[terms] -= fractions[terms, group] * (count - self.gone[group])
        self.gone[group] = count


@dataclass(frozen=True)
class Prices:
    """Multiply-accumulates for one sample, parameters, and bytes of parameters and buffers."""

    macs: Price
    params: Price
    bytes: Price


@dataclass(frozen=True)
class ThinLayers:
    """What stands in for a layer whose weight is `weight` (as the graph names it), at a rank of at most `full`.

    `macs` are shares of the layer's operations, `params` numbers, that the first and the second of the two thin layers
    take for every part of the rank.
    """

    weight: str
    full: int
    macs: tuple[float, float]
    params: tuple[int, int]


def prices_of(
    traced: Traced, analysis: Analysis, groups: Sequence[ChannelGroup], layers: Sequence[ThinLayers] = ()
) -> Prices:
    """The prices of a model, operations of its eval form; those of `gone` are `groups`, and then `layers`."""
    columns = len(groups) + len(layers)
    thin = {layer.weight: (len(groups) + number, layer) for number, layer in enumerate(layers)}
    fractions = {weight: Dims() for weight in thin} | _param_fractions(traced, groups, columns)

    def split(value: float, name: str, parts: tuple[float, float] | None) -> list[tuple[float, Dims]]:
        """A term of a parameter; `parts` are what thin layers cost in its place, where they may."""
        own = fractions.get(name, {})
        if name not in thin or parts is None:
            return [(value, own)]
        column, layer = thin[name]
        return _with_rank(value, own, parts, layer.full, np.eye(columns)[column])

    macs = []
    for each in operations(traced, analysis, groups, columns, thin=thin):
        if each.weight is None:
            macs.append((each.macs, each.dims))
        else:
            first, second = thin[each.weight][1].macs if each.weight in thin else (0.0, 0.0)
            macs += split(each.macs, each.weight, (first * each.macs, second * each.macs))
    parameters = dict(traced.module.named_parameters())
    tensors = {**parameters, **dict(traced.module.named_buffers())}
    params, stored = [], []
    for name, value in tensors.items():
        first, second = thin[name][1].params if name in thin else (0, 0)
        size = value.element_size()
        params += split(float(value.numel()), name, (first, second)) if name in parameters else []
        stored += split(float(value.numel() * size), name, (first * size, second * size))
    return Prices(*(price_of(terms, columns) for terms in (_scaled(macs, traced), params, stored)))


@dataclass(frozen=True)
class Multiplication:
    """Multiplications of an operator on the example, and the dimensions that groups narrow; of a parameter `weight`
    those of the parameter.
    """

    node: fx.Node
    macs: float
    weight: str | None
    dims: Dims


def operations(
    traced: Traced,
    analysis: Analysis,
    groups: Sequence[ChannelGroup],
    columns: int | None = None,
    *,
    thin: Iterable[str] = (),
) -> Iterator[Multiplication]:
    """All that is multiplied in the eval form; the weights in `thin` are told too where no group narrows them.

    Vectors of fractions have `columns` places, one for a group at least.
    """
    columns = len(groups) if columns is None else columns
    fractions = {weight: Dims() for weight in thin} | _param_fractions(traced, groups, columns)
    narrowed = Axes(analysis, groups, columns)
    counted = None if traced.forms is None else form_nodes(traced.graph, traced.forms, training=False)
    for node in traced.graph.nodes:
        spec = OPS.get(node.target) if node.op == "call_function" and (counted is None or node in counted) else None
        if spec is None or spec.macs is None:
            continue
        args = arguments_of(node)
        whole = float(spec.macs(Site.of(node, args)))
        kernels = _kernels(args)
        if kernels and all(str(kernel.target) in fractions for kernel in kernels):
            total = sum(kernel.meta["val"].numel() for kernel in kernels)
            for kernel in kernels:
                name = str(kernel.target)
                yield Multiplication(node, whole * kernel.meta["val"].numel() / total, name, fractions[name])
        else:
            for share, operands in _products(node, args):
                yield Multiplication(node, whole * share, None, narrowed.of(operands))


def _with_rank(
    value: float, own: Dims, parts: tuple[float, float], full: int, unit: Vector
) -> list[tuple[float, Dims]]:
    """The terms of a layer that is dense or thin: its inputs (dimension 1) or outputs (0) narrow each thin one."""
    terms = [(value, own | {"dense": unit / full})]
    for part, dim in zip(parts, (1, 0), strict=True):
        held = {dim: own[dim]} if dim in own else {}
        terms.append((2.0 * part * full, held | {"rank": unit / (2 * full)}))
        terms.append((-2.0 * part * full, held | {"rank": unit / full}))
    return terms


def _kernels(args: Mapping[str, Any]) -> list[fx.Node]:
    """The parameters that an operator multiplies by: its weight, or the matrices of a recurrent layer."""
    weight, several = args.get("weight"), args.get("params")
    if isinstance(several, list | tuple):
        return [each for each in several if each.op == "get_attr" and each.meta["val"].dim() == _MATRIX]
    return [weight] if isinstance(weight, fx.Node) and weight.op == "get_attr" else []


def _products(node: fx.Node, args: Mapping[str, Any]) -> list[tuple[float, Sequence[fx.Node]]]:
    """The operands that an operator multiplies, and their share of its operations: attention has two products."""
    if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
        return [(1.0, node.all_input_nodes)]
    query, key, value = (args[name] for name in ("query", "key", "value"))
    scored, read = (float(concrete_shape(each.meta["val"])[-1]) for each in (query, value))
    return [(scored / (scored + read), [query, key]), (read / (scored + read), [value])]


def _param_fractions(traced: Traced, groups: Sequence[ChannelGroup], columns: int) -> dict[str, Dims]:
    """For every tensor and dimension what fraction one channel of each group has of it."""
    found: dict[str, Dims] = {}
    for number, group in enumerate(groups):
        for param in group.params:
            name = traced.local(param.param)
            size = get_tensor(traced.module, name).shape[param.dim] * param.groups
            along = found.setdefault(name, {}).setdefault(param.dim, np.zeros(columns))
            along[number] += float((param.indices >= 0).sum()) / group.size / size
    return found


class Axes:
    """What groups have of the axes of operands. Vectors of fractions have `columns` places."""

    def __init__(self, analysis: Analysis, groups: Sequence[ChannelGroup], columns: int) -> None:
        self.analysis, self.columns = analysis, columns
        self.sizes = np.array([group.size for group in groups])
        self.place = np.full(analysis.fine.solution.count, -1, dtype=np.int64)
        for number, group in enumerate(groups):
            self.place[group.channels] = number

    def of(self, operands: Iterable[fx.Node]) -> Dims:
        """Every axis of the operands counts once."""
        found: Dims = {}
        for operand in operands:
            axes = self.analysis.propagation.axes.get(operand, ())
            for axis in axes if isinstance(axes, tuple) else ():
                classes = self.analysis.fine.classes[axis.ravel()]
                numbers = self.place[classes]
                fractions = np.bincount(numbers[numbers >= 0], minlength=len(self.sizes)) / numbers.size / self.sizes
                found[tuple(np.unique(classes).tolist())] = np.pad(fractions, (0, self.columns - len(self.sizes)))
        return found


def _scaled(terms: list[tuple[float, Dims]], traced: Traced) -> list[tuple[float, Dims]]:
    """Per sample: operators are counted on the whole example batch."""
    total = sum(value for value, _ in terms)
    factor = cost_of(traced).macs / total if total else 1.0
    return [(value * factor, dims) for value, dims in terms]


def price_of(terms: Iterable[tuple[float, Dims]], columns: int) -> Price:
    """The price of terms, each with its dimensions."""
    listed = [(value, [*dims.values()]) for value, dims in terms if value]
    depth = max((len(dims) for _, dims in listed), default=0)
    none = np.zeros(columns)
    along = tuple(
        np.array([dims[level] if level < len(dims) else none for _, dims in listed]).reshape(len(listed), columns)
        for level in range(depth)
    )
    return Price(np.array([value for value, _ in listed], dtype=np.float64), along)
