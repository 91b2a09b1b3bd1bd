"""Fold a batch norm into the layer before it.

`y = g (W x + b - m) / sqrt(v + eps) + beta` is one layer with `W' = W s` and `b' = (b - m) s + beta`, where
`s = g / sqrt(v + eps)` per output channel.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from graphzip.analysis.layers import Layer, has_statistics, layer_of
from graphzip.graph.operators import arguments_of, set_argument
from graphzip.graph.state import attach, get_tensor, joined, like
from graphzip.graph.traced import Traced
from graphzip.rewrite.edit import Edit, before

__all__ = ["fold_batch_norm"]

_STATE = ("weight", "bias", "running_mean", "running_var")


def fold_batch_norm(traced: Traced) -> tuple[Traced, list[str]]:
    """A graph in which every batch norm that directly follows a layer of its own is part of that layer.

    Returns it with the names of the layers that took one in. A batch norm that uses the statistics of the batch, or
    whose layer is read elsewhere or shares its weight, stays.
    """
    edit = Edit(traced)
    folded: list[str] = []
    tied = {*traced.aliases, *traced.aliases.values()}
    for node in list(edit.graph.nodes):
        layer = layer_of(arguments_of(node)["input"]) if has_statistics(node, own=False) else None
        if layer is not None and len(layer.node.users) == 1 and _can_fold(node, layer, tied):
            folded.append(_fold(edit, node, layer))
    return (edit.done(unread=True), folded) if folded else (traced, [])


def _can_fold(norm: fx.Node, layer: Layer, tied: set[str]) -> bool:
    args = arguments_of(norm)
    if layer.transposed and layer.groups > 1:
        return False
    own = [value for value in (layer.weight, layer.bias) if value is not None]
    if any(value.op != "get_attr" or len(value.users) != 1 or value.target in tied for value in own):
        return False
    if any(args[name] is not None and args[name].op != "get_attr" for name in _STATE):
        return False
    # with an input that has no batch dimension, or a linear layer on sequences, channels are not dimension 1
    return len(norm.meta["val"].shape) == len(layer.shape)


def _fold(edit: Edit, norm: fx.Node, layer: Layer) -> str:
    args, module = arguments_of(norm), edit.module
    weight = get_tensor(module, layer.name)

    def value(name: str) -> torch.Tensor | None:
        return None if args[name] is None else get_tensor(module, args[name].target).detach().double()

    mean, var = value("running_mean"), value("running_var")
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + args["eps"])
    gamma, beta = value("weight"), value("bias")
    scale = scale if gamma is None else scale * gamma
    bias = layer.bias
    shift = -mean if bias is None else get_tensor(module, str(bias.target)).detach().double() - mean
    shift = shift * scale if beta is None else shift * scale + beta
    channel = 1 if layer.transposed else 0
    shape = [-1 if dim == channel else 1 for dim in range(weight.dim())]
    edit.put(layer.name, weight.detach().double() * scale.reshape(shape))
    if bias is not None:
        edit.put(str(bias.target), shift)
    else:
        name = _free_name(module, layer.name)
        attach(module, name, like(shift, weight))
        set_argument(layer.node, "bias", before(layer.node).fetch(name))
    norm.replace_all_uses_with(layer.node)
    edit.graph.erase_node(norm)
    return edit.given.qualified(layer.name.removesuffix(".weight"))


def _free_name(module: nn.Module, weight: str) -> str:
    """`conv.bias` for `conv.weight`, or the next name that is not taken."""
    owner, _, leaf = weight.rpartition(".")
    name = "bias" if leaf == "weight" else f"{leaf}_bias"
    while hasattr(module.get_submodule(owner), name):
        name = f"{name}_"
    return joined(owner, name)
