"""Fold a batch norm into the layer before it.

`y = g (W x + b - m) / sqrt(v + eps) + beta` is one layer with `W' = W s` and `b' = (b - m) s + beta`, where
`s = g / sqrt(v + eps)` per output channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from graphzip.graph.state import attach, get_tensor
from graphzip.graph.trace import Traced
from graphzip.ops.site import bind
from graphzip.rewrite.shrink import refresh

__all__ = ["fold_batch_norm"]

aten = torch.ops.aten

_LAYERS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.linear.default,
}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}


def fold_batch_norm(traced: Traced) -> tuple[Traced, list[str]]:
    """A graph in which every batch norm that directly follows a layer of its own is part of that layer.

    Returns it with the names of the layers that took one in. A batch norm without running statistics, or whose layer is
    read elsewhere or shares its weight, stays.
    """
    result = traced.copy()
    folded: list[str] = []
    for node in list(result.graph.nodes):
        if node.target is aten.batch_norm.default and _can_fold(node):
            folded.append(_fold(result, node))
    if not folded:
        return traced, []
    result.graph.eliminate_dead_code()
    _drop_unused(result, traced)
    refresh(result)
    result.module.recompile()
    return result, folded


def _can_fold(node: fx.Node) -> bool:
    args = bind(node)
    layer = args["input"]
    if layer.target not in _LAYERS | _TRANSPOSED or len(layer.users) != 1 or args["running_mean"] is None:
        return False
    given = bind(layer)
    if layer.target in _TRANSPOSED and given["groups"] > 1:
        return False
    if layer.target is aten.linear.default and len(node.meta["val"].shape) != 2:
        return False
    own = [value for value in (given["weight"], given["bias"]) if value is not None]
    return all(value.op == "get_attr" and len(value.users) == 1 for value in own)


def _fold(traced: Traced, node: fx.Node) -> str:
    args, layer = bind(node), bind(node)["input"]
    given = bind(layer)
    weight = get_tensor(traced.module, given["weight"].target)

    def value(name: str) -> torch.Tensor | None:
        return None if args[name] is None else get_tensor(traced.module, args[name].target).detach().double()

    mean, var = value("running_mean"), value("running_var")
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + args["eps"])
    gamma, beta = value("weight"), value("bias")
    scale = scale if gamma is None else scale * gamma
    bias = given["bias"]
    shift = -mean if bias is None else get_tensor(traced.module, bias.target).detach().double() - mean
    shift = shift * scale if beta is None else shift * scale + beta
    channel = 1 if layer.target in _TRANSPOSED else 0
    shape = [-1 if dim == channel else 1 for dim in range(weight.dim())]
    name = str(given["weight"].target)
    owner = name.rpartition(".")[0]
    attach(traced.module, name, _parameter(weight.detach().double() * scale.reshape(shape), weight))
    bias_name = str(bias.target) if bias is not None else f"{owner}.bias" if owner else f"{name}_bias"
    attach(traced.module, bias_name, _parameter(shift, weight))
    if bias is None:
        with traced.graph.inserting_before(layer):
            fetch = traced.graph.get_attr(bias_name)
        fetch.meta.update(owner=owner, source="")
        _set_bias(layer, fetch)
    node.replace_all_uses_with(layer)
    traced.graph.erase_node(node)
    return traced.qualified(owner or name)


def _set_bias(layer: fx.Node, bias: Any) -> None:
    layer.args = (*layer.args[:2], bias, *layer.args[3:])
    layer.kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}


def _parameter(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad)


def _drop_unused(result: Traced, before: Traced) -> None:
    """Remove the state of the batch norms that are gone."""
    still = {str(node.target) for node in result.graph.nodes if node.op == "get_attr"}
    gone = {str(node.target) for node in before.graph.nodes if node.op == "get_attr"} - still
    for owner in {name.rpartition(".")[0] for name in gone}:
        module = result.module.get_submodule(owner)
        for leaf in list(module._parameters):
            if f"{owner}.{leaf}" in gone:
                del module._parameters[leaf]
        for leaf in list(module._buffers):
            if f"{owner}.{leaf}" in gone or leaf == "num_batches_tracked":
                del module._buffers[leaf]
