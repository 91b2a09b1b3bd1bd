"""The convolutions of a traced model whose kernel is a parameter of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphzip.graph.inputs import concrete_shape
from graphzip.graph.operators import CONVOLUTIONS
from graphzip.graph.state import get_tensor
from graphzip.graph.trace import Traced
from graphzip.ops.site import bind

__all__ = ["ConvLayer", "conv_layers"]

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvLayer:
    """One `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, in execution order.

    `name` is its name in the traced model, `shape` that of its kernel, `(out, in / groups, *size)`, `feature` the
    spatial size of its output, `nodes` its calls. `reason` says why its kernel cannot be stored in another form.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    feature: tuple[int, ...]
    nodes: tuple[fx.Node, ...]
    reason: str | None

    @property
    def pointwise(self) -> bool:
        return all(size == 1 for size in self.shape[2:])

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.shape[1] == 1


def conv_layers(traced: Traced) -> list[ConvLayer]:
    """Every convolution with a kernel that is a parameter, in the order in which they run."""
    calls: dict[str, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.target in CONVOLUTIONS and bind(node)["weight"].op == "get_attr":
            calls.setdefault(str(bind(node)["weight"].target), []).append(node)
    return [_layer(traced, weight, tuple(nodes)) for weight, nodes in calls.items()]


def _layer(traced: Traced, weight: str, nodes: tuple[fx.Node, ...]) -> ConvLayer:
    args = bind(nodes[0])
    shape = concrete_shape(args["weight"].meta["val"])
    name = weight.removesuffix("weight").removesuffix(".")
    feature = concrete_shape(nodes[0].meta["val"])[2 - len(shape) :]
    return ConvLayer(name, shape, args["groups"], feature, nodes, _reason(traced, weight, name, nodes))


def _reason(traced: Traced, weight: str, name: str, nodes: tuple[fx.Node, ...]) -> str | None:
    fetch = bind(nodes[0])["weight"]
    tied = {*traced.aliases, *traced.aliases.values()}
    kind = traced.module_types.get(name, "")
    if kind not in {"Conv1d", "Conv2d", "Conv3d"} or weight not in {"weight", f"{name}.weight"}:
        return "its kernel is not that of an nn.Conv1d, nn.Conv2d or nn.Conv3d"
    if weight in tied:
        return "its kernel is shared with another layer"
    if len(fetch.users) != len(nodes) or len({(bind(node)["groups"], str(bind(node)["bias"])) for node in nodes}) > 1:
        return "its kernel is read by other operators"
    if get_tensor(traced.module, weight).is_meta:
        return "it has no weights (they are on the meta device)"
    return None
