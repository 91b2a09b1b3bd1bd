"""Linear layers in a row with nothing in between, as one."""

from __future__ import annotations

import torch
from torch import fx

from graphzip.analysis.layers import Layer, only_reader, own_layers
from graphzip.graph.operators import set_argument
from graphzip.graph.state import attach, get_tensor, joined, like
from graphzip.graph.traced import Traced
from graphzip.rewrite.edit import Edit, before

__all__ = ["joined_chains"]


def joined_chains(traced: Traced) -> tuple[Traced, list[tuple[str, str]]]:
    """A graph in which a linear layer that alone reads another one has taken it in, where that is no larger.

    `W_2 (W_1 x + b_1) + b_2` is one layer with `W_2 W_1` and `W_2 b_1 + b_2`. With the names of both, in order.
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
    if not (first.is_linear and second.is_linear) or only_reader(first.node) is not second.node:
        return False
    (middle, ins), outs = first.shape, second.shape[0]
    return outs * ins <= middle * (outs + ins)


def _join(edit: Edit, first: Layer, second: Layer) -> Layer:
    module = edit.module

    def value(node: fx.Node) -> torch.Tensor:
        return get_tensor(module, str(node.target)).detach().double()

    weight = value(second.weight)
    shift = None if first.bias is None else weight @ value(first.bias)
    edit.put(second.name, weight @ value(first.weight))
    bias = second.bias
    if shift is not None and bias is not None:
        edit.put(str(bias.target), value(bias) + shift)
    elif shift is not None:
        name = joined(second.name.rpartition(".")[0], f"{second.name.rpartition('.')[2].removesuffix('weight')}bias")
        attach(module, name, like(shift, get_tensor(module, second.name)))
        bias = before(second.node).fetch(name)
        set_argument(second.node, "bias", bias)
    set_argument(second.node, "input", first.input)
    return Layer(second.node, second.weight, bias, first.input, 1)
