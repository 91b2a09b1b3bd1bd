"""Let layers of several models read one weight: channels of a cluster are added up before the layer.

    sum_i W_i * x_i = sum_c G_c * (sum over i in cluster c of x_i)   where W_i = G_c for all i in c,

for convolutions and linear layers, whose weight then has one input channel per cluster. A model that reads some of the
clusters only has a slice of `G`; `G` itself is stored once.

Source: Gao, Deng and Huang, "Cross Domain Model Compression by Structurally Weight Sharing" (2019), section 3.5 and
Fig. 4 (the text says averaged; the sum is what keeps the output).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx, nn

from graphzip.analysis.layers import Layer, calls_of_layers
from graphzip.graph.builder import Builder
from graphzip.graph.operators import set_argument
from graphzip.graph.state import attach
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.rewrite.edit import Edit, before

__all__ = ["SharedWeight", "share_weights"]

aten = torch.ops.aten


@dataclass(frozen=True)
class SharedWeight:
    """A weight `(out, clusters, *kernel)` for several layers.

    `names` are the parameters that it replaces; `columns[t][i]` is the cluster of input channel i of the layer of
    `names[t]`. The clusters that one layer reads are neighbours.
    """

    weight: nn.Parameter
    names: tuple[str, ...]
    columns: tuple[IntArray, ...]


def share_weights(traced: Traced, shared: Sequence[SharedWeight]) -> Traced:
    """A new graph in which the layers read the shared weights; the given graph stays as it is."""
    edit = Edit(traced)
    readers = {layer.name: layer for layer in calls_of_layers(edit.traced)}
    for each in shared:
        for name in each.names:
            attach(edit.module, name, each.weight)
        for name, column in zip(each.names, each.columns, strict=True):
            _read(readers[name], column, each.weight.shape[1])
    return edit.done(tied=True)


def _read(layer: Layer, column: IntArray, clusters: int) -> None:
    """Add up the input channels of each cluster and take the columns of the clusters that are read."""
    start, stop = int(column.min()), int(column.max()) + 1
    build = before(layer.node)
    set_argument(layer.node, "input", _added_up(build, layer, column - start))
    if stop - start < clusters:
        set_argument(layer.node, "weight", build(aten.slice.Tensor, layer.weight, 1, start, stop))


def _added_up(build: Builder, layer: Layer, column: IntArray) -> fx.Node:
    """The sum over the channels of each cluster: the first of each, to which the others are added.

    Indices of a layer lie beside its parameters, in a submodule `inputs`, and are no part of the state dict.
    """
    x, dim, device = layer.input, layer.dim, layer.node.meta["val"].device
    _, first = np.unique(column, return_index=True)
    rest = np.setdiff1d(np.arange(column.size), first)
    if np.array_equal(first, np.arange(column.size)):
        return x

    def index(leaf: str, value: IntArray) -> fx.Node:
        return build.index(f"{layer.module}.inputs.{leaf}", value, device)

    summed = build(aten.index_select.default, x, dim, index("first", first))
    if not rest.size:
        return summed
    others = build(aten.index_select.default, x, dim, index("others", rest))
    return build(aten.index_add.default, summed, dim, index("clusters", column[rest]), others)
