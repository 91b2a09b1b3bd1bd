"""Where the channels of a group run: which operators treat each of them by itself, and which layers read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from graphzip.analysis.groups import Analysed, ChannelGroup
from graphzip.analysis.layers import Layer, layers_by_weight, norm_behind
from graphzip.graph.operators import arguments_of
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.ops import MOVES, OPS, norm, reductions, rules
from graphzip_passes.parts.holders import holders

__all__ = ["Region", "regions_of"]

aten = torch.ops.aten

_APART: Final = {rules.same, rules.pointwise, reductions.reduction, norm.batch_norm, norm.prelu}
"""Ways in which labels pass that keep every channel to itself, where the result has all of them."""

_WINDOWS: Final = {target for spec in reductions.WINDOWS for target in spec.targets}

_SCALING: Final = frozenset(
    {
        *MOVES,
        *(
            target
            for target in _WINDOWS
            if "pool" in str(target) or "nearest" in str(target) or "linear" in str(target)
        ),
        *(aten.relu.default, aten.leaky_relu.default, aten.prelu.default, aten.abs.default),
        *(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.amax.default),
    }
)
"""Of these the operators of one operand whose result grows with it by any factor above zero."""


@dataclass(frozen=True)
class Region:
    """A group whose channels run apart from each other from the layers that make them to those that read them.

    - `makers`: the layers that make the channels, and nothing else makes them.
    - `readers`: the layers that read them, each with the columns (n, slots) of its inputs; nothing else reads them.
    - `scaling`: whether all in between grows with them; each has one slice in every parameter then.
    - `steady`: whether what holds one number everywhere holds it at inputs of every size.
    """

    group: ChannelGroup
    makers: tuple[Layer, ...]
    readers: tuple[tuple[Layer, IntArray], ...]
    scaling: bool
    steady: bool


def regions_of(traced: Traced, known: Analysed) -> list[Region]:
    """The regions of all groups that may shrink and that layers read, and nothing else."""
    by_weight = layers_by_weight(traced)
    layers = {layer.node: layer for layer in by_weight.values()}
    shrinkable = [group for group in known.groups if group.mergeable and not group.whole_blocks]
    held = holders(shrinkable, known.analysis)
    found = []
    for group in shrinkable:
        own = {traced.local(each.param) for each in group.params if each.role != "consumer"}
        if _read_apart(traced, own, {*held[group.name], *layers}):
            continue
        region = _region(group, held[group.name], layers, by_weight)
        if region is not None:
            found.append(region)
    return found


def _read_apart(traced: Traced, names: set[str], known: set[fx.Node]) -> bool:
    """Whether anything but layers and what holds the channels reads parameters: their sum, say, has no channels."""
    fetched = (node for node in traced.graph.find_nodes(op="get_attr") if node.target in names)
    return any(user not in known for node in fetched for user in node.users)


def _region(
    group: ChannelGroup, nodes: list[fx.Node], layers: dict[fx.Node, Layer], by_weight: dict[str, Layer]
) -> Region | None:
    held, readers = set(nodes), {}
    columns = {param.param: param for param in group.params if param.role == "consumer"}
    for node in nodes:
        for user in node.users:
            layer = layers.get(user)
            if layer is not None and layer.input is node and not layer.depthwise:
                name = next((name for name in columns if by_weight.get(name) is layer), None)
                if name is None or columns[name].dim != layer.input_dim:
                    return None
                readers[user] = (layer, columns[name].indices.reshape(group.size, -1))
            elif user not in held or not _apart(user, layers):
                return None
    if len(readers) != len(columns):
        return None
    made = {each.param for each in group.params if each.role == "producer"}
    makers = [layer for layer in layers.values() if layer.node in held and not layer.depthwise]
    known = {name for name, layer in by_weight.items() if any(layer is each for each in makers)}
    if made != known or any(_feeds_in(node, held, layers) for node in nodes):
        makers = []
    single = all(param.indices.size == group.size for param in group.params if param.role != "consumer")
    scaling = single and bool(makers) and _grow_with(makers, nodes)
    return Region(group, tuple(makers), tuple(readers.values()), scaling, not any(map(_counts_places, nodes)))


def _apart(node: fx.Node, layers: dict[fx.Node, Layer]) -> bool:
    """Whether an operator that keeps the channels computes each from itself."""
    if node.target in MOVES or node.target in _WINDOWS:
        return True
    if node in layers:
        return layers[node].depthwise
    spec = OPS.get(node.target) if node.op == "call_function" else None
    return spec is not None and spec.propagate in _APART


def _feeds_in(node: fx.Node, held: set[fx.Node], layers: dict[fx.Node, Layer]) -> bool:
    """Whether something else than the layers, parameters and numbers has a part in what the channels hold."""
    if node.target is aten.cat.default or (node in layers and not layers[node].depthwise):
        return False
    return any(each not in held and each.op != "get_attr" for each in node.all_input_nodes)


def _grow_with(makers: list[Layer], nodes: list[fx.Node]) -> bool:
    """Whether all that holds the channels grows with what the layers give, or a batch norm right behind one of them."""
    growing = {layer.node for layer in makers}
    norms = {norm_behind(layer.node) for layer in makers}
    for node in nodes:
        if node in growing:
            continue
        same = node.meta["val"].dtype == makers[0].node.meta["val"].dtype
        operands = _operands(node, nodes)
        grows = node in norms or node.target in (aten.cat.default, aten.add.Tensor)
        grows = grows or (node.target in _SCALING and len(operands) == 1 and _pads_with_zero(node))
        if not (grows and same and operands and all(each in growing for each in operands)):
            return False
        growing.add(node)
    return True


def _operands(node: fx.Node, nodes: list[fx.Node]) -> list[Any]:
    """What has to grow for the result to grow: not the parameters of a batch norm, slopes and indices."""
    if node.target is aten.add.Tensor:
        return list(node.args)  # a number does not grow
    if node.target is aten.cat.default:  # what holds none of the channels holds others
        return [each for each in node.all_input_nodes if each in nodes]
    own = node.target in (aten.prelu.default, aten.batch_norm.default)
    return [
        each
        for each in node.all_input_nodes
        if each.op != "get_attr" or not (own or not each.meta["val"].is_floating_point())
    ]


def _pads_with_zero(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    pads = schema is not None and "pad" in schema.name
    return not pads or arguments_of(node).get("value") in (None, 0)


def _counts_places(node: fx.Node) -> bool:
    """Whether what it makes of a number that is the same everywhere depends on how many places there are."""
    name = str(node.target)
    return name.startswith("aten.sum") or ("avg_pool" in name and any(arguments_of(node).get("padding") or ()))
