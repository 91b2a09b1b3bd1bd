"""Files of earlier versions, whose convolutions with a built kernel carry no mark: it is told by what they hold.

Such a kernel ends with a reshape, and for slices with cuts of what reaches over its edge. The factors are those of a
module that is known to be a factored layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphzip.graph.layers.factored import FACTORED, kernel_nodes
from graphzip.graph.meta import Factored, meta_of, owner_name
from graphzip.graph.operators import CONVOLUTIONS, argument_of, arguments_of
from graphzip.graph.state import joined, named_state
from graphzip.graph.traced import Traced

__all__ = ["mark_unmarked"]

aten = torch.ops.aten


def mark_unmarked(traced: Traced) -> None:
    """Mark the convolutions of a graph that was read from a file in which no one is marked."""
    nodes = [node for node in traced.graph.nodes if node.target in CONVOLUTIONS]
    if any("factored" in meta_of(node) for node in nodes) or not FACTORED.keys() & set(traced.module_types.values()):
        return
    for node in nodes:
        kernel = argument_of(node, "weight")
        built = kernel_nodes(node) if kernel.op == "call_function" else []
        layer, shape = _layer(traced, node, built), _built_shape(kernel)
        if layer is not None and shape:
            kernel.meta["val"] = torch.empty(shape, device="meta")
            drops: list[Any] = [each.args[1] for each in built if each.target is aten.feature_dropout.default]
            tiles = [sizes for sizes in _reshapes(built) if len(sizes) == 2 * len(shape)]
            size = tuple(tiles[0][len(shape) :]) if tiles else ()
            meta_of(node)["factored"] = Factored(layer, float(drops[0]) if drops else 0.0, size)


def _layer(traced: Traced, node: fx.Node, built: Sequence[fx.Node]) -> str | None:
    """The factored layer whose factors are read: the one that ran the convolution, where several have them."""
    state = dict(named_state(traced.module))
    read = {id(state[str(each.target)]) for each in built if each.op == "get_attr"}
    found = []
    for name, kind in traced.module_types.items():
        leaves = FACTORED[kind].operands if kind in FACTORED else ()
        operands = [state.get(joined(name, leaf)) for leaf in leaves]
        if operands and {id(each) for each in operands} == read:
            found.append(name)
    return owner_name(node) if owner_name(node) in found else next(iter(found), None)


def _reshapes(built: Sequence[fx.Node]) -> list[Any]:
    return [each.args[1] for each in built if each.target is aten.reshape.default]


def _built_shape(kernel: fx.Node) -> list[int]:
    """Read off the reshape and the cuts that end a kernel; empty where it is another operator."""
    if kernel.target is aten.reshape.default:
        return list(kernel.args[1])  # type: ignore[arg-type]
    if kernel.target not in (aten.slice.Tensor, aten.narrow.default):
        return []
    args = arguments_of(kernel)
    shape = _built_shape(args["self"])
    if shape:
        shape[args["dim"]] = args["end"] - args["start"] if "end" in args else args["length"]
    return shape
