"""Fold a batch norm into the layer before it.

`y = g (W x + b - m) / sqrt(v + eps) + beta` is one layer with `W' = W s` and `b' = (b - m) s + beta`, where
`s = g / sqrt(v + eps)` per output channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from graphzip.graph.operators import CONVOLUTIONS, TRANSPOSED
from graphzip.graph.state import attach, drop_unread, get_tensor, is_persistent
from graphzip.graph.trace import Traced
from graphzip.ops.site import bind
from graphzip.rewrite.refresh import refresh

__all__ = ["fold_batch_norm"]

aten = torch.ops.aten

_LAYERS = {*CONVOLUTIONS, aten.linear.default}
_STATE = ("weight", "bias", "running_mean", "running_var")


def fold_batch_norm(traced: Traced) -> tuple[Traced, list[str]]:
    """A graph in which every batch norm that directly follows a layer of its own is part of that layer.

    Returns it with the names of the layers that took one in. A batch norm that uses the statistics of the batch, or
    whose layer is read elsewhere or shares its weight, stays.
    """
    result = traced.copy(compiled=False)
    folded: list[str] = []
    tied = {*traced.aliases, *traced.aliases.values()}
    for node in list(result.graph.nodes):
        if node.target is aten.batch_norm.default and _can_fold(node, tied):
            folded.append(_fold(result, node))
    if not folded:
        return traced, []
    result.graph.eliminate_dead_code()
    drop_unread(result.module, result.graph)
    refresh(result, rewritten=True)
    result.module.recompile()
    return result, folded


def _can_fold(node: fx.Node, tied: set[str]) -> bool:
    args = bind(node)
    layer = args["input"]
    if layer.target not in _LAYERS.union(TRANSPOSED) or len(layer.users) != 1:
        return False
    if args["running_mean"] is None or args["training"]:
        return False
    given = bind(layer)
    if layer.target in TRANSPOSED and given["groups"] > 1:
        return False
    own = [value for value in (given["weight"], given["bias"]) if value is not None]
    if any(value.op != "get_attr" or len(value.users) != 1 or value.target in tied for value in own):
        return False
    if any(args[name] is not None and args[name].op != "get_attr" for name in _STATE):
        return False
    # with an input that has no batch dimension, or a linear layer on sequences, channels are not dimension 1
    return len(node.meta["val"].shape) == len(given["weight"].meta["val"].shape)


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
    channel = 1 if layer.target in TRANSPOSED else 0
    shape = [-1 if dim == channel else 1 for dim in range(weight.dim())]
    name = str(given["weight"].target)
    _put(traced.module, name, weight.detach().double() * scale.reshape(shape), weight)
    bias_name = str(bias.target) if bias is not None else _free_name(traced.module, name)
    _put(traced.module, bias_name, shift, weight if bias is None else get_tensor(traced.module, bias_name))
    if bias is None:
        with traced.graph.inserting_before(layer):
            fetch = traced.graph.get_attr(bias_name)
        fetch.meta.update(owner=layer.meta["owner"], source="")
        _set_bias(layer, fetch)
    node.replace_all_uses_with(layer)
    traced.graph.erase_node(node)
    return traced.qualified(name.removesuffix(".weight"))


def _free_name(module: nn.Module, weight: str) -> str:
    """`conv.bias` for `conv.weight`, or the next name that is not taken."""
    owner, _, leaf = weight.rpartition(".")
    name = "bias" if leaf == "weight" else f"{leaf}_bias"
    while hasattr(module.get_submodule(owner), name):
        name = f"{name}_"
    return f"{owner}.{name}" if owner else name


def _put(module: nn.Module, name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    """Set a tensor, a parameter if `like` is one."""
    value = value.to(like.dtype)
    is_parameter = isinstance(like, nn.Parameter)
    made = nn.Parameter(value, requires_grad=like.requires_grad) if is_parameter else value
    attach(module, name, made, persistent=is_persistent(module, name))


def _set_bias(layer: fx.Node, bias: Any) -> None:
    layer.args = (*layer.args[:2], bias, *layer.args[3:])
    layer.kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}
