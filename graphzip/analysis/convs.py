"""The convolutions of a traced model whose kernel is a parameter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    spatial size of its output, `nodes` its calls. `twins` are the names of other layers that have the same kernel.
    `reason` says why its kernel cannot be stored in another form.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    feature: tuple[int, ...]
    nodes: tuple[fx.Node, ...]
    reason: str | None
    twins: tuple[str, ...] = ()

    @property
    def holders(self) -> tuple[str, ...]:
        """The names of all layers that have the kernel."""
        return (self.name, *self.twins)

    def calls_of(self, holder: str) -> list[fx.Node]:
        """The calls of one of `holders`; where it alone has the kernel, all."""
        return [node for node in self.nodes if not self.twins or node.meta.get("owner") == holder]

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
    feature = concrete_shape(nodes[0].meta["val"])[2 - len(shape) :]
    weights = [weight, *(alias for alias, first in traced.aliases.items() if first == weight)]
    name, *twins = map(_owner, weights)
    layer = ConvLayer(name, shape, args["groups"], feature, nodes, None, tuple(twins))
    return replace(layer, reason=_reason(traced, weights, layer))


def _owner(weight: str) -> str:
    return weight.removesuffix("weight").removesuffix(".")


def _reason(traced: Traced, weights: Sequence[str], layer: ConvLayer) -> str | None:
    kinds = {traced.module_types.get(name, "") for name in layer.holders}
    named = [f"{name}.weight".lstrip(".") for name in layer.holders]
    if not kinds <= {"Conv1d", "Conv2d", "Conv3d"} or named != weights:
        return "its kernel is not that of an nn.Conv1d, nn.Conv2d or nn.Conv3d"
    calls = [layer.calls_of(name) for name in layer.holders]
    alike = all(len({(bind(node)["groups"], str(bind(node)["bias"])) for node in own}) <= 1 for own in calls)
    groups = {bind(node)["groups"] for node in layer.nodes}
    readers = len(bind(layer.nodes[0])["weight"].users)
    if not readers == len(layer.nodes) == sum(map(len, calls)) or not alike or len(groups) > 1:
        return "its kernel is read by other operators"
    if get_tensor(traced.module, weights[0]).is_meta:
        return "it has no weights (they are on the meta device)"
    return None
