"""Which channels are another one times a number, wherever they are read.

A channel with a kernel that is another one's times a number holds `r x + d` where the other holds `x`. Every operator
says what becomes of `r` and `d`; where something does not commute with them they have to be 1 and 0.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from graphzip.analysis.layers import Layer, layer_of
from graphzip.graph.interpreter import value_of
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.labels import support
from graphzip.ops import MOVES, OPS, rules
from graphzip_passes.minimize.region import WINDOWS, Region
from graphzip_passes.parts.slices import rows_of

__all__ = ["Alike", "in_proportion"]

aten = torch.ops.aten

Numbers = NDArray[np.float64]

_ROUNDING: Final = 64
"""How many units in the last place kernels in proportion may lie apart: one was rounded after it was multiplied."""

_SKETCH: Final = 16
_SUMS: Final[dict[Any, float]] = {aten.add.Tensor: 1.0, aten.sub.Tensor: -1.0}
_PRODUCTS: Final[dict[Any, int]] = {
    aten.mul.Tensor: 1,
    aten.multiply.Tensor: 1,
    aten.div.Tensor: -1,
    aten.true_divide.Tensor: -1,
}
_POSITIVE: Final = {aten.relu.default, aten.leaky_relu.default, aten.prelu.default, aten.amax.default}
_LINEAR: Final = {aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default, aten.neg.default}
_NORMS: Final = {aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default}


@dataclass(frozen=True)
class Alike:
    """Channels that follow another one, each with how much more strongly each reader has to read that one instead."""

    follows: dict[int, int]
    factors: dict[str, Numbers]


@dataclass(frozen=True)
class _Held:
    """Of every channel `r`, `d` and how large it is about, beside the one it may follow; NaN where it does not."""

    ratio: Numbers
    offset: Numbers
    size: Numbers


def in_proportion(traced: Traced, region: Region, tolerance: float, silent: set[int]) -> Alike:
    """The channels that are in proportion to another one of their block, and not `silent` ones."""
    count = region.group.size
    found = Alike({}, {layer.name: np.ones(count) for layer, _ in region.readers})
    single = all(param.indices.size == count for param in region.group.params if param.role != "consumer")
    if not single or region.deaf or not region.readers:
        return found
    flow = _Flow(traced, region, tolerance)
    left = flow.candidates(silent)
    while left:
        keeper = np.arange(count)
        for members in left:
            keeper[members] = members[0]
        fits, factors = flow.followed(keeper)
        left = [[each for each in members if not fits[each]] for members in left]
        left = [members for members in left if len(members) > 1]
        for channel in np.flatnonzero(fits & (keeper != np.arange(count))).tolist():
            found.follows[channel] = int(keeper[channel])
            for name, values in factors.items():
                found.factors[name][channel] = values[channel]
    return found


class _Flow:
    def __init__(self, traced: Traced, region: Region, tolerance: float) -> None:
        self.traced, self.region = traced, region
        self.params = {traced.local(each.param): each for each in region.group.params if each.role != "consumer"}
        self.makers = [layer for node in region.nodes if (layer := self._made_by(node)) is not None]
        eps = max((torch.finfo(self._tensor(each.name).dtype).eps for each in self.makers), default=0.0)
        self.limit = max(tolerance, _ROUNDING * eps)
        self.keeper = np.arange(region.group.size)
        self.known: dict[fx.Node, _Held] = {}

    def _made_by(self, node: fx.Node) -> Layer | None:
        layer = layer_of(node)
        return layer if layer is not None and layer.weight.op == "get_attr" and layer.name in self.params else None

    def _tensor(self, name: str) -> Tensor:
        return get_tensor(self.traced.module, name)

    def _rows(self, name: str) -> Tensor:
        return rows_of(self.params[name], self.region.group, self._tensor(name))

    @cached_property
    def kernels(self) -> dict[str, tuple[Tensor, Numbers]]:
        """Of every layer the kernels at length one, the largest entry positive, and what they were divided by."""
        found = {}
        for layer in self.makers:
            rows = self._rows(layer.name)
            largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
            strength = rows.norm(dim=1, keepdim=True) * torch.where(largest < 0, -1.0, 1.0)
            found[layer.name] = rows / torch.where(strength == 0, 1.0, strength), strength[:, 0].numpy()
        return found

    def candidates(self, silent: set[int]) -> list[list[int]]:
        """Sets of channels of a block whose kernels are in proportion in every layer."""
        if not self.kernels:
            return []
        unit = torch.cat([rows for rows, _ in self.kernels.values()], 1)
        alive = np.logical_and.reduce([strength != 0 for _, strength in self.kernels.values()])
        alive[list(silent)] = False
        bound = self.limit * np.sqrt(len(self.kernels))
        sketch = _sketch(unit)
        found = []
        for block in self.region.group.blocks:
            left = np.array([channel for channel in block if alive[channel]], dtype=int)
            while left.size > 1:
                near = (sketch[left] - sketch[left[0]]).norm(dim=1) <= bound
                places = left[near.numpy()]
                apart = (unit[places] - unit[places[0]]).norm(dim=1).numpy()
                members = places[apart <= bound]
                if members.size > 1:
                    found.append(members.tolist())
                left = np.setdiff1d(left, members)
        return found

    def followed(self, keeper: NDArray[np.int64]) -> tuple[NDArray[np.bool_], dict[str, Numbers]]:
        """Which channels are their keeper times a number at all readers, and the numbers, by the reader's name."""
        self.keeper, self.known = keeper, {}
        for node in self.region.nodes:
            with np.errstate(all="ignore"):
                self.known[node] = self._at(node)
        fits = np.ones(keeper.size, dtype=bool)
        factors = {}
        for layer, _ in self.region.readers:
            held = self._settled(self.known[layer.input])
            fits &= np.isfinite(held.ratio) & (held.ratio != 0)
            factors[layer.name] = held.ratio
        for node in self.region.counting:
            fits &= self._close(self._settled(self.known[node]).ratio, 1.0)
        return fits, factors

    # ------------------------------------------------------------------------------------------ operators

    def _at(self, node: fx.Node) -> _Held:
        if node.target is operator.getitem:
            return self.known[node.all_input_nodes[0]]
        args = arguments_of(node) if node.op == "call_function" else {}
        maker = self._made_by(node)
        if maker is not None:
            return self._layer(maker)
        if node.op == "call_function" and node.target is aten.batch_norm.default and not args["training"]:
            return self._batch_norm(args)
        if node.target in _NORMS:
            return self._norm(args)
        if node.target in _SUMS or node.target in _PRODUCTS:
            return self._arithmetic(node, args)
        operands = [self.known[each] for each in node.all_input_nodes if each in self.known]
        if not operands:
            return self._unknown()
        if node.target is aten.cat.default:
            return self._beside(node, args)
        if len(operands) == 1 or node.target is aten.prelu.default:
            return self._alone(node, operands[0])
        return self._any(node, operands)

    def _alone(self, node: fx.Node, held: _Held) -> _Held:
        """Of operators of one operand."""
        name = str(node.target)
        others = [each for each in node.all_input_nodes if each not in self.known and _is_floating(each)]
        if not _is_floating(node) or (node.target in MOVES and others):
            return self._any(node, [held])
        if node.target in MOVES and "pad" not in name and len(node.all_input_nodes) == 1:
            return held
        settled = self._settled(held)
        pads = "pad" in name.split(".")[1] if name.startswith("aten.") else False
        linear = node.target in _LINEAR or (pads and arguments_of(node).get("value") in (None, 0))
        linear |= node.target in WINDOWS and any(part in name for part in ("avg_pool", "nearest", "linear"))
        if linear or (node.target in MOVES and not pads):
            return settled
        if node.target is aten.prelu.default:
            slopes = arguments_of(node)["weight"]
            numbers = self._numbers(slopes) if slopes in self.known else self._all(1.0)
            return self._where((settled.ratio > 0) & (numbers == numbers[self.keeper]), settled)
        if node.target in _POSITIVE or (node.target in WINDOWS and "max_pool" in name):
            return self._where(settled.ratio > 0, settled)
        if node.target is aten.abs.default:
            return _Held(np.abs(settled.ratio), settled.offset, settled.size)
        return self._any(node, [held])

    def _any(self, node: fx.Node, operands: list[_Held]) -> _Held:
        """Of operators with which numbers do not commute: all that they read has to be the same."""
        rule = OPS[node.target].propagate if node.target in OPS else None
        if rule not in {rules.same, rules.pointwise} and node.target not in MOVES:
            same = np.logical_and.reduce([(each.ratio == 1.0) & (each.offset == 0.0) for each in operands])
            return self._where(same, operands[0])
        fits = np.logical_and.reduce([self._close(self._settled(each).ratio, 1.0) for each in operands])
        return self._where(fits, _Held(self._all(1.0), self._all(0.0), operands[0].size))

    def _layer(self, layer: Layer) -> _Held:
        _, strength = self.kernels[layer.name]
        ratio, size = self._beside_keeper(strength), np.abs(strength)
        offset = self._all(0.0)
        if layer.depthwise:
            held = self._settled(self.known.get(layer.input, self._unknown()))
            unit = self.kernels[layer.name][0]
            apart = (unit - unit[torch.from_numpy(self.keeper)]).norm(dim=1).numpy()
            held = self._where(apart <= self.limit, held)
            ratio, size = ratio * held.ratio, size * held.size
        elif layer.input in self.known:
            return self._unknown()  # reads itself
        if layer.bias is not None:
            shift = self._numbers(layer.bias)
            offset, size = shift - ratio * shift[self.keeper], size + np.abs(shift)
        return _Held(ratio, offset, size)

    def _batch_norm(self, args: Mapping[str, Any]) -> _Held:
        gain = 1.0 / np.sqrt(self._numbers(args["running_var"]) + args["eps"])
        gain = gain if args["weight"] is None else gain * self._numbers(args["weight"])
        shift = -self._numbers(args["running_mean"]) * gain
        shift = shift if args["bias"] is None else shift + self._numbers(args["bias"])
        return self._scaled(self.known.get(args["input"], self._unknown()), gain, shift)

    def _norm(self, args: Mapping[str, Any]) -> _Held:
        """A norm over channels, of those that are the same."""
        held = self._settled(self.known.get(args["input"], self._unknown()))
        held = self._where(self._close(held.ratio, 1.0), _Held(self._all(1.0), self._all(0.0), self._all(1.0)))
        gain = self._all(1.0) if args["weight"] is None else self._numbers(args["weight"])
        shift = self._all(0.0) if args.get("bias") is None else self._numbers(args["bias"])
        return self._scaled(held, gain, shift)

    def _scaled(self, held: _Held, gain: Numbers, shift: Numbers) -> _Held:
        """`gain x + shift`."""
        ratio = held.ratio * self._beside_keeper(gain)
        offset = gain * held.offset + shift - ratio * shift[self.keeper]
        return _Held(ratio, offset, np.abs(gain) * held.size + np.abs(shift))

    def _arithmetic(self, node: fx.Node, args: Mapping[str, Any]) -> _Held:
        left, right = args["self"], args["other"]
        if node.target in _PRODUCTS:
            return self._product(left, right, _PRODUCTS[node.target])
        a, b = (self._term(each) for each in (left, right))
        if a is None or b is None:  # it adds the same to all
            held = self._settled(a or b or self._unknown())
            return self._where(self._close(held.ratio, 1.0), held)
        sign = _SUMS[node.target] * float(args.get("alpha", 1))
        if self._is_parameter(right):
            return self._scaled(a, self._all(1.0), sign * self._numbers(right))
        if self._is_parameter(left):
            return self._scaled(b, self._all(sign), self._numbers(left))
        found = _Held(a.ratio, a.offset + sign * b.offset, a.size + b.size)
        return self._where(self._close(a.ratio, b.ratio), found)

    def _product(self, left: Any, right: Any, power: int) -> _Held:
        a, b = self._term(left), self._term(right)
        if a is not None and b is not None and power > 0:
            for one, part in ((a, right), (b, left)):
                if self._is_parameter(part):
                    return self._scaled(one, self._numbers(part), self._all(0.0))
        ones = _Held(self._all(1.0), self._all(0.0), self._all(1.0))
        a, b = (ones if each is None else self._settled(each) for each in (a, b))
        ratio = a.ratio * b.ratio if power > 0 else a.ratio / b.ratio
        return _Held(ratio, a.offset + b.offset, a.size * b.size if power > 0 else a.size)

    def _beside(self, node: fx.Node, args: Mapping[str, Any]) -> _Held:
        """What stands beside each other, along the channels or not."""
        parts: list[fx.Node] = list(args["tensors"])
        spots = self.region.nodes[node]
        along = spots is not None and args["dim"] % node.meta["val"].dim() in support(spots)
        held = [(each, self._settled(self.known[each])) for each in parts if each in self.known]
        if not along:
            if len(held) < len(parts):
                return self._any(node, [each for _, each in held])
            fits = np.logical_and.reduce([self._close(each.ratio, held[0][1].ratio) for _, each in held])
            return self._where(fits, held[0][1])
        ratio, size = self._all(np.nan), self._all(1.0)
        for each, found in held:
            spots = self.region.nodes[each]
            here = self._all(1.0) == 1.0 if spots is None else np.isin(np.arange(ratio.size), spots)
            fresh = here & np.isnan(ratio)
            ratio = np.where(fresh, found.ratio, np.where(here & ~self._close(ratio, found.ratio), np.nan, ratio))
            size = np.where(here, found.size, size)
        return _Held(ratio, self._all(0.0), size)

    # ------------------------------------------------------------------------------------------ numbers

    def _term(self, operand: Any) -> _Held | None:
        """What an operand holds; nothing of what is the same for all channels."""
        return self.known.get(operand) if isinstance(operand, fx.Node) else None

    def _is_parameter(self, operand: Any) -> bool:
        """Whether an operand holds one number of a parameter for each channel."""
        if not isinstance(operand, fx.Node) or operand not in self.region.nodes:
            return False
        inputs = operand.all_input_nodes
        return operand.op == "get_attr" or (operand.target in MOVES and all(map(self._is_parameter, inputs)))

    def _numbers(self, node: fx.Node) -> Numbers:
        """Those of a parameter; NaN where a channel has several."""
        count = self.region.group.size
        if node.op == "get_attr" and str(node.target) in self.params:
            rows = self._rows(str(node.target)).numpy()
            found: Numbers = np.where((rows == rows[:, :1]).all(1), rows[:, 0], np.nan)
            return found
        spots = self.region.nodes.get(node)
        if spots is None:
            return np.full(count, np.nan)
        value = self._parameter(node).detach().double()
        places = np.broadcast_to(spots, value.shape)
        low, high = np.full(count, np.inf), np.full(count, -np.inf)
        np.minimum.at(low, places[places >= 0], value.numpy()[places >= 0])
        np.maximum.at(high, places[places >= 0], value.numpy()[places >= 0])
        return np.where(low == high, low, np.nan)

    def _parameter(self, node: fx.Node) -> Tensor:
        operands = {each: self._parameter(each) for each in node.all_input_nodes}
        found: Tensor = value_of(self.traced.module, node, operands)
        return found

    def _beside_keeper(self, values: Numbers) -> Numbers:
        """The quotient with what the keeper has; 1 where both have nothing."""
        kept = values[self.keeper]
        return np.where((values == kept), 1.0, values / kept)

    def _settled(self, held: _Held) -> _Held:
        """Without `d`, which is no more than rounding or there is no proportion."""
        fits = np.abs(held.offset) <= self.limit * np.maximum(held.size, np.abs(held.ratio) * held.size[self.keeper])
        return self._where(fits, _Held(held.ratio, self._all(0.0), held.size))

    def _close(self, left: Numbers, right: Numbers | float) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = np.abs(left - right) <= self.limit * np.abs(left)
        return found

    def _where(self, fits: NDArray[np.bool_], held: _Held) -> _Held:
        return _Held(np.where(fits, held.ratio, np.nan), held.offset, held.size)

    def _all(self, value: float) -> Numbers:
        return np.full(self.region.group.size, value)

    def _unknown(self) -> _Held:
        """Of what is no layer: each channel is in proportion to itself alone."""
        return _Held(np.where(self.keeper == np.arange(self.keeper.size), 1.0, np.nan), self._all(0.0), self._all(1.0))


def _sketch(rows: Tensor) -> Tensor:
    """A few numbers for each row, no further apart than the rows are: sums of parts of it with random signs."""
    width = -(-rows.shape[1] // _SKETCH)
    signs = torch.randint(2, (rows.shape[1],), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    signed = torch.nn.functional.pad(rows * signs, (0, width * _SKETCH - rows.shape[1]))
    found: Tensor = signed.reshape(len(rows), _SKETCH, width).sum(2) / width**0.5
    return found


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, tuple | list) or (isinstance(value, Tensor) and value.is_floating_point())
