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
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from graphzip.graph.clean import fetch_once
from graphzip.graph.state import attach, find_aliases
from graphzip.graph.torch_private import OpOverload
from graphzip.graph.trace import Traced
from graphzip.labels import IntArray
from graphzip.ops.site import bind
from graphzip.rewrite.factor import Emitter, set_argument
from graphzip.rewrite.refresh import refresh

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
    result = traced.copy(compiled=False)
    readers = {str(bind(node)["weight"].target): node for node in result.graph.nodes if _reads_weight(node)}
    for each in shared:
        for name in each.names:
            attach(result.module, name, each.weight)
        for name, column in zip(each.names, each.columns, strict=True):
            _read(result, readers[name], name, column, each.weight.shape[1])
    result.aliases = find_aliases(result.module)
    fetch_once(result.graph, result.aliases)
    refresh(result, rewritten=True)
    result.module.recompile()
    return result


def _reads_weight(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    weight = bind(node).get("weight")
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _read(result: Traced, node: fx.Node, name: str, column: IntArray, clusters: int) -> None:
    """Add up the input channels of each cluster and take the columns of the clusters that are read."""
    owner = name.removesuffix(".weight")
    start, stop = int(column.min()), int(column.max()) + 1
    emitter = Emitter.before(node, owner)
    args = bind(node)
    weight = args["weight"]
    dim = -1 if node.target is aten.linear.default else 1 - len(weight.meta["val"].shape)
    set_argument(node, "input", _added_up(result, emitter, args["input"], dim, column - start))
    if stop - start < clusters:
        set_argument(node, "weight", emitter(aten.slice.Tensor, weight, 1, start, stop))


def _added_up(result: Traced, emitter: Emitter, x: fx.Node, dim: int, column: IntArray) -> fx.Node:
    """The sum over the channels of each cluster: the first of each, to which the others are added."""
    _, first = np.unique(column, return_index=True)
    rest = np.setdiff1d(np.arange(column.size), first)
    if np.array_equal(first, np.arange(column.size)):
        return x
    summed = emitter(aten.index_select.default, x, dim, _index(result, emitter, "first", first))
    if not rest.size:
        return summed
    others = emitter(aten.index_select.default, x, dim, _index(result, emitter, "others", rest))
    return emitter(aten.index_add.default, summed, dim, _index(result, emitter, "clusters", column[rest]), others)


def _index(result: Traced, emitter: Emitter, leaf: str, value: IntArray) -> fx.Node:
    """Indices of a layer lie beside its parameters, in a submodule `inputs`, and are no part of the state dict."""
    device = emitter.at.meta["val"].device
    index: Any = torch.as_tensor(value.astype(np.int64), device=device)
    attach(result.module, f"{emitter.owner}.inputs.{leaf}", index, persistent=False)
    fetch = emitter.fetch(f"inputs.{leaf}")
    fetch.meta["numbers"] = value.astype(np.int64)
    return fetch
