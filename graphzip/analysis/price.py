"""What a model costs as a function of the widths of its groups, without building the slimmer model.

A parameter, and an operator that multiplies, costs a number times the share of its channels that is left along each of
its dimensions: `cost = sum over terms t of c_t * product over dimensions d of (1 - sum over groups g of s_tdg r_g)`,
where `r_g` channels of group `g` are gone and `s_tdg` is the share that one of them has of the dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphzip.analysis.channels import Analysis
from graphzip.analysis.cost import cost_of
from graphzip.analysis.groups import ChannelGroup
from graphzip.graph.state import get_tensor
from graphzip.graph.trace import Traced
from graphzip.graph.two_forms import form_nodes
from graphzip.ops import OPS
from graphzip.ops.site import Site, bind

__all__ = ["Price", "Prices", "prices_of"]

Vector = NDArray[np.float64]

_MATRIX = 2


@dataclass(frozen=True)
class Price:
    """One kind of cost: `base` (terms,) and the shares `along[d]` (terms, groups) of the dimensions."""

    base: Vector
    along: tuple[NDArray[np.float64], ...]

    @property
    def whole(self) -> float:
        """What the model costs as it is."""
        return float(self.base.sum())

    def at(self, gone: Vector) -> float:
        """The cost with this many channels gone of every group."""
        left = np.ones_like(self.base)
        for shares in self.along:
            left = left * (1.0 - shares @ gone)
        return float(self.base @ left)

    def varying(self, gone: Vector, group: int, counts: Vector) -> Vector:
        """The costs with each of `counts` channels gone of one group and `gone` of the others."""
        left = np.ones((self.base.size, counts.size))
        for shares in self.along:
            rest = 1.0 - shares @ gone + shares[:, group] * gone[group]
            left *= rest[:, None] - shares[:, group : group + 1] * counts[None, :]
        result: Vector = self.base @ left
        return result


@dataclass(frozen=True)
class Prices:
    """Multiply-accumulates for one sample, parameters, and bytes of parameters and buffers."""

    macs: Price
    params: Price
    bytes: Price


def prices_of(traced: Traced, analysis: Analysis, groups: Sequence[ChannelGroup]) -> Prices:
    """The prices of a model, operations of its eval form; the groups of `gone` are `groups`, in their order."""
    shares = _param_shares(traced, groups)
    place = np.full(analysis.fine.solution.count, -1, dtype=np.int64)
    for number, group in enumerate(groups):
        place[group.channels] = number
    macs = []
    counted = None if traced.forms is None else form_nodes(traced.graph, traced.forms, training=False)
    for node in traced.graph.nodes:
        spec = OPS.get(node.target) if node.op == "call_function" and (counted is None or node in counted) else None
        if spec is not None and spec.macs is not None:
            args = bind(node)
            whole = float(spec.macs(Site.of(node, args)))
            kernels = _kernels(args)
            known = [(kernel.meta["val"].numel(), shares.get(str(kernel.target))) for kernel in kernels]
            if kernels and all(own is not None for _, own in known):
                total = sum(numel for numel, _ in known)
                macs += [(whole * numel / total, own) for numel, own in known if own is not None]
            else:
                macs.append((whole, _axis_shares(node, analysis, place, groups)))
    parameters = dict(traced.module.named_parameters())
    tensors = {**parameters, **dict(traced.module.named_buffers())}
    params = [(float(value.numel()), shares.get(name, {})) for name, value in parameters.items()]
    stored = [(float(value.numel() * value.element_size()), shares.get(name, {})) for name, value in tensors.items()]
    return Prices(*(_price(terms, len(groups)) for terms in (_scaled(macs, traced), params, stored)))


def _kernels(args: Mapping[str, Any]) -> list[fx.Node]:
    """The parameters that an operator multiplies by: its weight, or the matrices of a recurrent layer."""
    weight, several = args.get("weight"), args.get("params")
    if isinstance(several, list | tuple):
        return [each for each in several if each.op == "get_attr" and each.meta["val"].dim() == _MATRIX]
    return [weight] if isinstance(weight, fx.Node) and weight.op == "get_attr" else []


_Dims = dict[Any, Vector]


def _param_shares(traced: Traced, groups: Sequence[ChannelGroup]) -> dict[str, _Dims]:
    """For every tensor and dimension what share one channel of each group has of it."""
    found: dict[str, _Dims] = {}
    prefix = f"{traced.scope}." if traced.scope else ""
    for number, group in enumerate(groups):
        for param in group.params:
            name = param.param.removeprefix(prefix)
            size = get_tensor(traced.module, name).shape[param.dim] * param.groups
            along = found.setdefault(name, {}).setdefault(param.dim, np.zeros(len(groups)))
            along[number] += float((param.indices >= 0).sum()) / group.size / size
    return found


def _axis_shares(node: fx.Node, analysis: Analysis, place: NDArray[np.int64], groups: Sequence[ChannelGroup]) -> _Dims:
    """The same for the axes of the operands of an operator, each of which counts once."""
    found: _Dims = {}
    for operand in node.all_input_nodes:
        axes = analysis.propagation.axes.get(operand, ())
        for axis in axes if isinstance(axes, tuple) else ():
            classes = analysis.fine.classes[axis.ravel()]
            numbers = place[classes]
            shares = np.bincount(numbers[numbers >= 0], minlength=len(groups)) / numbers.size
            found[tuple(np.unique(classes).tolist())] = shares / np.array([group.size for group in groups])
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
