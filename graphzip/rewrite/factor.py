"""Store a convolution's kernel as factors: in the graph, and in the module that is trained.

The module gets the layers of `graphzip.graph.layers.factored`, the graph the operators that these run to build the
kernel, and a mark on every convolution that reads one; both hold the same parameters under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from graphzip.analysis.convs import ConvLayer
from graphzip.graph.builder import Builder
from graphzip.graph.layers.factored import AtomConv, FactoredConv
from graphzip.graph.meta import meta_of
from graphzip.graph.operators import argument_of, set_argument
from graphzip.graph.state import attach, joined
from graphzip.graph.traced import Traced
from graphzip.rewrite.edit import Edit, before, behind

__all__ = ["factor"]


def factor(
    traced: Traced, model: nn.Module, layers: Sequence[ConvLayer], made: Mapping[str, FactoredConv]
) -> tuple[Traced, nn.Module]:
    """Put the factored convolutions `made`, one for each holder of each of `layers`, in place of these.

    Returns a new graph, and `model` with its submodules replaced (`made[""]` itself where the model is a convolution).
    `traced` stays as it is.
    """
    edit = Edit(traced)
    twins = edit.twins
    for layer in layers:
        stored: Any = argument_of(twins[layer.nodes[0]], "weight")
        for holder in layer.holders:
            new = made[holder]
            _hold(edit.module, holder, new)
            edit.traced.module_types[holder] = type(new).__name__
            nodes = [twins[node] for node in layer.calls_of(holder)]
            if nodes:
                kernel = _emit(before(nodes[0]), holder, new)
            for node in nodes:
                _use(node, kernel, holder, new)
        edit.graph.erase_node(stored)
    return edit.done(tied=True, unread=True), _replace(model, layers, made)


def _hold(root: nn.Module, name: str, layer: FactoredConv) -> None:
    """The tensors of the layer in place of those of the convolution."""
    owner = root.get_submodule(name)
    for leaf in ("weight", "bias"):
        if owner._parameters.get(leaf) is not None:
            delattr(owner, leaf)
    for leaf, tensor in (layer._parameters | layer._buffers).items():
        if tensor is not None:
            attach(root, joined(name, leaf), tensor)


def _replace(model: nn.Module, layers: Sequence[ConvLayer], made: Mapping[str, FactoredConv]) -> nn.Module:
    for name in (holder for layer in layers for holder in layer.holders):
        if not name:
            return made[""]
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[name])
    return model


def _emit(build: Builder, name: str, layer: FactoredConv) -> fx.Node:
    """The kernel of a layer of that name in operators: those that the layer itself runs."""
    operands = {build.fetch(joined(name, leaf)): getattr(layer, leaf) for leaf in layer.operands}
    return build.inlined(partial(layer.build, training=False), operands)


def _use(node: fx.Node, kernel: fx.Node, name: str, layer: FactoredConv) -> None:
    """Let a convolution read the computed kernel, and shuffle its output where its filters are grouped."""
    set_argument(node, "weight", kernel)
    set_argument(node, "groups", layer.groups)
    meta_of(node)["factored"] = layer.mark(name)
    if isinstance(layer, AtomConv) and layer.shuffles:
        users = list(node.users)
        output = torch.empty(1, layer.out_channels, *[1] * len(layer.kernel_size))
        shuffled = behind(node).inlined(layer.shuffle, {node: output})
        for user in users:
            user.replace_input_with(node, shuffled)
