"""Make up for channels that are dropped without data, from weights and the statistics of batch norms alone.

Behind a batch norm with scale `g` and shift `b` a channel is taken to be normal, with mean `b` and variance `g^2`; an
activation gives it the mean and variance that the integral over that density has, and a residual sum those of its
terms. A layer `y_o = sum_c W_oc x_c` that loses the channels `G` loses `sum_{c in G} W_oc E[x_c]` on average, which
goes into its bias, or the running mean of the batch norm behind it. Of the variance `sum_c ||W_oc||^2 Var[x_c]` of
channels that are not correlated the part of those that stay is left, by which the running variance is multiplied.

Sources: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), section
4.2.1, for the mean behind a clipped normal; the variance is that of `cluster_merge.variance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx

from graphzip.analysis.layers import Layer, has_statistics, norm_behind, own_layers
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.rewrite.edit import put
from graphzip.rewrite.layout import Layout

__all__ = ["compensate_free", "moments_of"]

aten = torch.ops.aten

Moments = tuple[Tensor, Tensor]
"""Mean and variance of every channel, each (n,), float64."""

_POINTS: Final = 64

_ACTIVATIONS: Final = {
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.gelu.default,
    aten.silu.default,
    aten.mish.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.softplus.default,
}

_SAME: Final = {
    aten.dropout.default,
    aten.clone.default,
    aten.alias.default,
    aten.mean.dim,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.dims,
}
"""Operators behind which channels, still along dimension 1 and as many, have the mean that they had. What averaging
takes of their variances is taken to be the same share of all.
"""


@torch.no_grad()
def compensate_free(given: Traced, slim: Traced, layout: Layout) -> list[str]:
    """Correct what `slim`, which has lost channels as `layout` says, gives on average; the names of these layers."""
    known = moments_of(given)
    found = []
    for layer in own_layers(given).values():
        if layer.groups == 1 and not layer.transposed and layer.input in known:
            found += [layer.name] if _correct(layer, known[layer.input], given, slim, layout) else []
    return found


def _correct(layer: Layer, moments: Moments, given: Traced, slim: Traced, layout: Layout) -> bool:
    mean, variance = moments
    kept = torch.from_numpy(layout.kept(layer.input, 1))
    outs = torch.from_numpy(layout.kept(layer.node, layer.dim % len(layer.node.meta["val"].shape)))
    norm = norm_behind(layer.node)
    if len(kept) == len(mean) or len(mean) != layer.shape[1] or (norm is None and layer.bias is None):
        return False
    gone = torch.ones(len(mean), dtype=torch.bool)
    gone[kept] = False
    weight = get_tensor(given.module, layer.name).detach().double().cpu()[outs].reshape(len(outs), len(mean), -1)
    shift = weight.sum(2)[:, gone] @ mean[gone]
    parts = weight.square().sum(2) * variance
    whole = parts.sum(1)
    ratio = torch.where(whole > 0, parts[:, kept].sum(1) / whole, 1.0)
    args: dict[str, Any] = {} if norm is None else dict(arguments_of(norm))
    if layer.bias is not None:
        _add(slim, layer.bias, shift)
    else:
        _add(slim, args["running_mean"], -shift)
    if norm is not None:
        name = str(args["running_var"].target)
        old = get_tensor(slim.module, name)
        put(slim, name, old.double() * torch.where(ratio > 0, ratio, 1.0).to(old.device))
    return True


def _add(slim: Traced, place: fx.Node, value: Tensor) -> None:
    old = get_tensor(slim.module, str(place.target))
    put(slim, str(place.target), old.double() + value.to(old.device))


def moments_of(traced: Traced) -> dict[fx.Node, Moments]:
    """Mean and variance of the channels along dimension 1, of every value of which batch norms tell them."""
    found: dict[fx.Node, Moments] = {}
    for node in traced.graph.nodes:
        known = _moments(node, traced, found)
        value = node.meta.get("val")
        if (
            known is not None
            and isinstance(value, torch.Tensor)
            and value.dim() > 1
            and value.shape[1] == len(known[0])
        ):
            found[node] = known
    return found


def _moments(node: fx.Node, traced: Traced, found: dict[fx.Node, Moments]) -> Moments | None:
    if has_statistics(node, own=False):
        return _of_norm(node, traced)
    sources = [each for each in node.all_input_nodes if each.op != "get_attr"]
    known = [found[each] for each in sources if each in found]
    if not sources or len(known) < len(sources) or node.op != "call_function":
        return None
    if node.target in _SAME and len(known) == 1:
        return known[0]
    if node.target in _ACTIVATIONS and len(known) == 1:
        return _through(known[0], _applied(node, sources[0]))
    if node.target is aten.add.Tensor and len(known) == 2 and arguments_of(node)["alpha"] == 1:
        (mean, variance), (other_mean, other_variance) = known
        return (mean + other_mean, variance + other_variance) if len(mean) == len(other_mean) else None
    if node.target is aten.cat.default and arguments_of(node)["dim"] == 1:
        parts = [found[each] for each in arguments_of(node)["tensors"]]
        return torch.cat([each[0] for each in parts]), torch.cat([each[1] for each in parts])
    return None


def _of_norm(node: fx.Node, traced: Traced) -> Moments:
    args = arguments_of(node)
    count = get_tensor(traced.module, str(args["running_mean"].target)).numel()

    def held(name: str, otherwise: float) -> Tensor:
        if not isinstance(args[name], fx.Node) or args[name].op != "get_attr":
            return torch.full((count,), otherwise, dtype=torch.float64)
        return get_tensor(traced.module, str(args[name].target)).detach().double().cpu()

    return held("bias", 0.0), held("weight", 1.0).square()


def _applied(node: fx.Node, source: fx.Node) -> Callable[[Tensor], Tensor]:
    def run(values: Tensor) -> Tensor:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: values if each is source else each)
        target: Any = node.target
        result: Tensor = target(*args, **kwargs)
        return result

    return run


def _through(moments: Moments, activation: Callable[[Tensor], Tensor]) -> Moments:
    """Gauss-Hermite quadrature of the density."""
    mean, variance = moments
    points, weights = (torch.from_numpy(each) for each in np.polynomial.hermite.hermgauss(_POINTS))
    values = activation(mean[:, None] + (2.0 * variance).sqrt()[:, None] * points)
    share = weights / math.sqrt(math.pi)
    first = values @ share
    return first, (values - first[:, None]).square() @ share
