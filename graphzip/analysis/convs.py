"""The convolutions of a traced model whose kernel is a parameter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from graphzip.analysis.layers import Layer, calls_of_layers
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.state import get_tensor, joined
from graphzip.graph.traced import Traced

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
    calls: dict[str, list[Layer]] = {}
    for call in calls_of_layers(traced, transposed=False):
        if not call.is_linear:
            calls.setdefault(call.name, []).append(call)
    return [_layer(traced, found) for found in calls.values()]


def _layer(traced: Traced, calls: Sequence[Layer]) -> ConvLayer:
    first = calls[0]
    feature = concrete_shape(first.node.meta["val"])[-len(first.kernel) :]
    weights = [first.name, *(alias for alias, kept in traced.aliases.items() if kept == first.name)]
    name, *twins = map(_owner, weights)
    nodes = tuple(call.node for call in calls)
    layer = ConvLayer(name, first.shape, first.groups, feature, nodes, None, tuple(twins))
    return replace(layer, reason=_reason(traced, weights, layer, calls))


def _owner(weight: str) -> str:
    return weight.removesuffix("weight").removesuffix(".")


def _reason(traced: Traced, weights: Sequence[str], layer: ConvLayer, calls: Sequence[Layer]) -> str | None:
    kinds = {traced.module_types.get(name, "") for name in layer.holders}
    named = [joined(name, "weight") for name in layer.holders]
    if not kinds <= {"Conv1d", "Conv2d", "Conv3d"} or named != weights:
        return "its kernel is not that of an nn.Conv1d, nn.Conv2d or nn.Conv3d"
    owned = [set(layer.calls_of(name)) for name in layer.holders]
    alike = all(len({(call.groups, call.bias) for call in calls if call.node in own}) <= 1 for own in owned)
    groups = {call.groups for call in calls}
    readers = len(calls[0].weight.users)
    if not readers == len(calls) == sum(map(len, owned)) or not alike or len(groups) > 1:
        return "its kernel is read by other operators"
    if get_tensor(traced.module, weights[0]).is_meta:
        return "it has no weights (they are on the meta device)"
    return None
