"""Linear layers and convolutions in a row with nothing in between, as one."""

from __future__ import annotations

import math

import torch
from torch import fx

from graphzip.analysis.layers import Layer, only_reader, own_layers
from graphzip.graph.operators import arguments_of, set_argument
from graphzip.graph.state import attach, get_tensor, joined, like
from graphzip.graph.traced import Traced
from graphzip.rewrite.edit import Edit, before

__all__ = ["joined_chains"]


def joined_chains(traced: Traced) -> tuple[Traced, list[tuple[str, str]]]:
    """A graph in which a layer that alone reads another one has taken it in, where that is no larger.

    `W_2 (W_1 x + b_1) + b_2` is one layer with `W_2 W_1` and `W_2 b_1 + b_2`. Of two convolutions one has a kernel of a
    single position. With the names of both, in order.
    """
    edit, found = Edit(traced), list[tuple[str, str]]()
    layers = own_layers(edit.traced)
    for node in list(edit.graph.nodes):
        second = layers.get(node)
        first = None if second is None else layers.get(second.input)
        if first is not None and second is not None and _fits(first, second):
            found.append((traced.qualified(first.module), traced.qualified(second.module)))
            layers[node] = _join(edit, first, second)
    return (edit.done(unread=True), found) if found else (traced, [])


def _fits(first: Layer, second: Layer) -> bool:
    if only_reader(first.node) is not second.node or first.node.target is not second.node.target:
        return False
    if not second.is_linear and not (_joinable(first, second) and first.groups == second.groups == 1):
        return False
    joined = second.shape[0] * first.shape[1] * math.prod(first.kernel) * math.prod(second.kernel)
    return joined <= math.prod(first.shape) + math.prod(second.shape)


def _joinable(first: Layer, second: Layer) -> bool:
    """Whether one of two convolutions looks at single positions, and no border stands between them."""
    if first.transposed:
        return False
    borders = first.bias is not None and any(second.window.pads)
    return _is_single(second) or (_is_single(first) and not borders)


def _is_single(layer: Layer) -> bool:
    return math.prod(layer.kernel) == 1 and set(layer.window.stride) == {1} and not any(layer.window.pads)


def _join(edit: Edit, first: Layer, second: Layer) -> Layer:
    def value(node: fx.Node) -> torch.Tensor:
        return get_tensor(edit.module, str(node.target)).detach().double()

    outer, inner = value(second.weight), value(first.weight)
    if first.bias is not None:
        _add_to_bias(edit, second, outer.reshape(*outer.shape[:2], -1).sum(2) @ value(first.bias))
    if second.is_linear or _is_single(second):
        edit.put(second.name, torch.tensordot(outer.flatten(1), inner, 1))
        for name in ("stride", "padding", "dilation") if not second.is_linear else ():
            set_argument(second.node, name, arguments_of(first.node)[name])
    else:
        edit.put(second.name, torch.tensordot(outer, inner.flatten(1), ([1], [0])).movedim(-1, 1))
    set_argument(second.node, "input", first.input)
    return Layer(second.node, second.weight, arguments_of(second.node)["bias"], first.input, 1)


def _add_to_bias(edit: Edit, layer: Layer, shift: torch.Tensor) -> None:
    """Add to the bias of a layer, which may have none yet."""
    if layer.bias is not None:
        name = str(layer.bias.target)
        edit.put(name, get_tensor(edit.module, name).detach().double() + shift)
        return
    name = joined(layer.name.rpartition(".")[0], f"{layer.name.rpartition('.')[2].removesuffix('weight')}bias")
    attach(edit.module, name, like(shift, get_tensor(edit.module, layer.name)))
    set_argument(layer.node, "bias", before(layer.node).fetch(name))
