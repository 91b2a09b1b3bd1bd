"""What a model costs as a function of the widths of its groups, without building the slimmer model.

A parameter, and an operator that multiplies, costs a number times the fraction of its channels that is left along each
of its dimensions: `cost = sum over terms t of c_t * product over dimensions d of (1 - sum over groups g of s_tdg r_g)`,
where `r_g` channels of group `g` are gone and `s_tdg` is the fraction that one of them has of the dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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

__all__ = ["Point", "Price", "Prices", "prices_of"]

Vector = NDArray[np.float64]

_MATRIX = 2


@dataclass(frozen=True)
class Price:
    """One kind of cost: `base` (terms,) and the fractions `along[d]` (terms, groups) of the dimensions."""

    base: Vector
    along: tuple[NDArray[np.float64], ...]

    @classmethod
    def total(cls, parts: Sequence[tuple[float, Price]]) -> Price:
        """The sum of several prices, each of them times a number."""
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
        return cls(np.concatenate([factor * price.base for factor, price in parts]), along)

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
        left = np.ones_like(self.base)
        for fractions in self.along:
            left = left * (1.0 - fractions @ gone)
        return float(self.base @ left)

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
        now, then = np.ones((terms.size, 1)), np.ones((terms.size, counts.size))
        for left, fractions in zip(self.left, self.price.along, strict=True):
            now *= left[terms, None]
            then *= left[terms, None] - fractions[terms, group, None] * more
        found: Vector = self.cost + self.price.base[terms] @ (then - now)
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


def prices_of(traced: Traced, analysis: Analysis, groups: Sequence[ChannelGroup]) -> Prices:
    """The prices of a model, operations of its eval form; the groups of `gone` are `groups`, in their order."""
    fractions = _param_fractions(traced, groups)
    place = np.full(analysis.fine.solution.count, -1, dtype=np.int64)
    for number, group in enumerate(groups):
        place[group.channels] = number
    macs = []
    counted = None if traced.forms is None else form_nodes(traced.graph, traced.forms, training=False)
    for node in traced.graph.nodes:
        spec = OPS.get(node.target) if node.op == "call_function" and (counted is None or node in counted) else None
        if spec is not None and spec.macs is not None:
            args = arguments_of(node)
            whole = float(spec.macs(Site.of(node, args)))
            kernels = _kernels(args)
            known = [(kernel.meta["val"].numel(), fractions.get(str(kernel.target))) for kernel in kernels]
            if kernels and all(own is not None for _, own in known):
                total = sum(numel for numel, _ in known)
                macs += [(whole * numel / total, own) for numel, own in known if own is not None]
            else:
                macs += [
                    (whole * share, _axis_fractions(operands, analysis, place, groups))
                    for share, operands in _products(node, args)
                ]
    parameters = dict(traced.module.named_parameters())
    tensors = {**parameters, **dict(traced.module.named_buffers())}
    params = [(float(value.numel()), fractions.get(name, {})) for name, value in parameters.items()]
    stored = [(float(value.numel() * value.element_size()), fractions.get(name, {})) for name, value in tensors.items()]
    return Prices(*(_price(terms, len(groups)) for terms in (_scaled(macs, traced), params, stored)))


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


_Dims = dict[Any, Vector]


def _param_fractions(traced: Traced, groups: Sequence[ChannelGroup]) -> dict[str, _Dims]:
    """For every tensor and dimension what fraction one channel of each group has of it."""
    found: dict[str, _Dims] = {}
    for number, group in enumerate(groups):
        for param in group.params:
            name = traced.local(param.param)
            size = get_tensor(traced.module, name).shape[param.dim] * param.groups
            along = found.setdefault(name, {}).setdefault(param.dim, np.zeros(len(groups)))
            along[number] += float((param.indices >= 0).sum()) / group.size / size
    return found


def _axis_fractions(
    operands: Sequence[fx.Node], analysis: Analysis, place: NDArray[np.int64], groups: Sequence[ChannelGroup]
) -> _Dims:
    """The same for the axes of the operands of an operator, each of which counts once."""
    found: _Dims = {}
    for operand in operands:
        axes = analysis.propagation.axes.get(operand, ())
        for axis in axes if isinstance(axes, tuple) else ():
            classes = analysis.fine.classes[axis.ravel()]
            numbers = place[classes]
            fractions = np.bincount(numbers[numbers >= 0], minlength=len(groups)) / numbers.size
            found[tuple(np.unique(classes).tolist())] = fractions / np.array([group.size for group in groups])
    return found


def _scaled(terms: list[tuple[float, _Dims]], traced: Traced) -> list[tuple[float, _Dims]]:
    """Per sample: operators are counted on the whole example batch."""
    total = sum(value for value, _ in terms)
    factor = cost_of(traced).macs / total if total else 1.0
    return [(value * factor, dims) for value, dims in terms]


def _price(terms: Iterable[tuple[float, _Dims]], groups: int) -> Price:
    listed = [(value, [*dims.values()]) for value, dims in terms if value]
    depth = max((len(dims) for _, dims in listed), default=0)
    none = np.zeros(groups)
    along = tuple(
        np.array([dims[level] if level < len(dims) else none for _, dims in listed]).reshape(len(listed), groups)
        for level in range(depth)
    )
    return Price(np.array([value for value, _ in listed], dtype=np.float64), along)
