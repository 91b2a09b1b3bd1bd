"""Which channels hold what no input decides, at every operator of a region."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from graphzip.analysis.layers import Layer, layer_of
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray, support
from graphzip_passes.minimize.region import Region
from graphzip_passes.parts.slices import rows_of

__all__ = ["Flags", "still_in", "zeros_in"]

aten = torch.ops.aten

Flags = NDArray[np.bool_]
"""One for each channel of a group, (n,)."""

_PRODUCTS = {aten.mul.Tensor, aten.multiply.Tensor}
_CENTRED = {aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default}


def still_in(traced: Traced, region: Region, zero: Callable[[fx.Node], Flags]) -> dict[fx.Node, Flags]:
    """By operator the channels that hold the same whatever the inputs are.

    A layer that gives a channel no part of what it reads leaves its bias; so does a norm with a scale of zero. What is
    multiplied by zero is zero: `zero` says which channels of an operator are zero on the example, and is asked of those
    that hold still.
    """
    walk = _Walk(traced, region, zero)
    return {node: walk.visit(node) for node in region.nodes}


def zeros_in(value: Tensor, spots: IntArray, count: int) -> Flags:
    """Which channels are zero in a value at all their places."""
    found = np.ones(count, dtype=bool)
    places = torch.from_numpy(spots).expand(value.shape)
    found[np.unique(places[(value != 0) & (places >= 0)].numpy())] = False
    return found


class _Walk:
    def __init__(self, traced: Traced, region: Region, zero: Callable[[fx.Node], Flags]) -> None:
        self.traced, self.region, self.zero = traced, region, zero
        self.known: dict[fx.Node, Flags] = {}
        self.params = {traced.local(each.param): each for each in region.group.params if each.role != "consumer"}

    def visit(self, node: fx.Node) -> Flags:
        self.known[node] = found = self._at(node)
        return found

    def _at(self, node: fx.Node) -> Flags:
        if node.op == "get_attr":
            return self._all(True)
        if node.op != "call_function":
            return self._all(False)
        layer = layer_of(node)
        if layer is not None:
            return self._made(layer)
        if node.target is operator.getitem:
            return self._of(node.all_input_nodes[0], node)
        args = arguments_of(node)
        if node.target is aten.embedding.default:
            return self._alike(args["weight"])
        if node.target in _CENTRED or node.target is aten.rms_norm.default:
            return self._normed(node, args)
        operands = [self._of(each, node) for each in node.all_input_nodes if self._has_part(each, node)]
        found: Flags = np.logical_and.reduce([self._all(True), *operands]) if operands else self._all(False)
        if node.target in _PRODUCTS:
            for each in node.all_input_nodes:
                if each in self.known and self.known[each].any():
                    found = found | (self.known[each] & self.zero(each))
        return found

    def _made(self, layer: Layer) -> Flags:
        """By a layer; what a padded kernel makes of a number ends at the border, wherever that is."""
        found = self._silent(layer.weight)
        if not layer.depthwise:
            return found
        still = self._of(layer.input, layer.node)
        if still.any() and (layer.transposed or any(layer.window.pads)):
            still = still & self.zero(layer.input) if layer.input in self.known else self._all(False)
        return found | still

    def _normed(self, node: fx.Node, args: Mapping[str, Any]) -> Flags:
        source = args["input"]
        found = self._silent(args["weight"]) if args["weight"] is not None else self._all(False)
        if node.target is aten.batch_norm.default:
            return found | self._of(source, node)
        if node.target is aten.rms_norm.default and source in self.known and self.known[source].any():
            return found | (self.known[source] & self.zero(source))
        return found

    def _has_part(self, operand: fx.Node, node: fx.Node) -> bool:
        """Not what other channels lie in, which stand beside these."""
        spots = self.region.nodes[node]
        beside = node.target is aten.cat.default and spots is not None
        if not beside or operand in self.known:
            return True
        args = arguments_of(node)
        return args["dim"] % node.meta["val"].dim() not in support(spots)  # type: ignore[arg-type]

    def _of(self, operand: fx.Node, node: fx.Node) -> Flags:
        """Of an operand of a node; of several that stand beside each other those have no say that lack a channel."""
        if operand not in self.known:
            return self._all(operand.op == "get_attr")
        found, spots = self.known[operand], self.region.nodes[operand]
        if node.target is aten.cat.default and spots is not None:
            return found | ~np.isin(np.arange(self.region.group.size), spots)
        return found

    def _silent(self, weight: fx.Node) -> Flags:
        """Channels whose slices of a parameter are zero."""
        rows = self._rows(weight)
        return self._all(False) if rows is None else ~rows.any(1).numpy()

    def _alike(self, weight: fx.Node) -> Flags:
        """Channels that hold one number in every word of a table."""
        rows = self._rows(weight)
        return self._all(False) if rows is None else (rows == rows[:, :1]).all(1).numpy()

    def _rows(self, weight: fx.Node) -> Tensor | None:
        """The slices of the channels of a parameter that is one of their own."""
        param = self.params.get(str(weight.target)) if weight.op == "get_attr" else None
        if param is None:
            return None
        return rows_of(param, self.region.group, get_tensor(self.traced.module, str(weight.target)))

    def _all(self, flag: bool) -> Flags:
        return np.full(self.region.group.size, flag)
