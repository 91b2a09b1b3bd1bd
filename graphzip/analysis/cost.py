"""What a model costs: parameters, and multiply-accumulates for one sample."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from graphzip.graph.dual_mode import form_nodes
from graphzip.graph.inputs import hint
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import bytes_of
from graphzip.graph.traced import Traced
from graphzip.ops import OPS
from graphzip.ops.site import Site

__all__ = ["Cost", "batch_of", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """`params`: number of trainable and frozen parameters, tied ones once. `macs`: multiply-accumulates of
    convolutions, linear layers, matrix products and attention, for one sample (batch norm, activations and pooling are
    not counted, as in the papers). `bytes`: of parameters and buffers as they are stored; 0 where that is not known.
    """

    params: int
    macs: int
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def cost_of(traced: Traced) -> Cost:
    """Count a traced model on the shapes it was traced with.

    Operators that see parameters only, such as those that build a kernel, run once and not for every sample: they are
    not counted. Of a graph with two forms it is the operations of the eval form.
    """
    total = 0
    fed: set[fx.Node] = set()
    counted = None if traced.forms is None else form_nodes(traced.graph, traced.forms, training=False)
    for node in traced.graph.nodes:
        if node.op == "placeholder" or not fed.isdisjoint(node.all_input_nodes):
            fed.add(node)
        spec = OPS.get(node.target) if node.op == "call_function" else None
        if spec is not None and spec.macs is not None and node in fed and (counted is None or node in counted):
            total += spec.macs(Site.of(node, arguments_of(node)))
    params = sum(parameter.numel() for parameter in traced.module.parameters())
    return Cost(params, total // batch_of(traced), bytes_of(traced.module))


def batch_of(traced: Traced) -> int:
    """Samples in the example batch: the first dimension of the first tensor input."""
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dim():
            return hint(value.shape[0])
    return 1
