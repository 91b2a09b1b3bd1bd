"""Convolutions and linear layers: the one view of their calls, as matrix products of what they read as rows.

With `G` groups of a convolution (one for a linear layer), `I` inputs and `O` outputs per group and `K` positions of the
kernel, a layer multiplies rows `(G, R, I * K)` by its weight and gives rows `(G, R, O)`: a row is one place of one
sample's output. A transposed convolution is the plain one, with the kernel turned round, over its input with zeros
between the places.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from graphzip.graph.inputs import concrete_shape
from graphzip.graph.operators import CONVOLUTIONS, TRANSPOSED, arguments_of
from graphzip.graph.traced import Traced
from graphzip.numeric.im2col import Window

__all__ = [
    "Layer",
    "calls_of_layers",
    "has_statistics",
    "layer_of",
    "layers_by_weight",
    "left_alone",
    "norm_behind",
    "only_reader",
    "own_layers",
]

aten = torch.ops.aten

_LINEAR = aten.linear.default
_LAYERS = frozenset({*CONVOLUTIONS, *TRANSPOSED, _LINEAR})
_OTHERS = {aten.convolution.default, aten.addmm.default, aten.mm.default, aten.matmul.default}


@dataclass(frozen=True)
class Layer:
    """One call of a convolution, a transposed convolution or a linear layer.

    `weight` and `bias` are the nodes that it reads: of parameters, or of what computes them.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    input: fx.Node
    groups: int

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """That of the weight as `plain` gives it, `(G * O, I, *kernel)`."""
        first, second, *kernel = concrete_shape(self.weight.meta["val"])
        if self.transposed:
            first, second = second * self.groups, first // self.groups
        return first, second, *kernel

    @property
    def name(self) -> str:
        """The name of the weight, where it is a parameter."""
        return str(self.weight.target)

    @property
    def module(self) -> str:
        """The name of the layer in the model, after that of its weight; empty where the model itself is the layer."""
        return self.name.removesuffix("weight").removesuffix(".")

    @property
    def is_linear(self) -> bool:
        return self.node.target is _LINEAR

    @property
    def transposed(self) -> bool:
        return self.node.target in TRANSPOSED

    @property
    def depthwise(self) -> bool:
        """Whether every channel has kernels of its own, which read nothing else."""
        return self.groups > 1 and self.shape[1] == 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of the kernel; empty for a linear layer."""
        return self.shape[2:]

    @property
    def dim(self) -> int:
        """The dimension of the output that its channels lie along."""
        return -1 if self.is_linear else 1 - len(self.shape)

    @property
    def input_dim(self) -> int:
        """The dimension of the weight that the channels it reads lie along."""
        return 0 if self.transposed else 1

    @property
    def window(self) -> Window:
        """How the kernel of a convolution slides over its input."""
        window = Window.of_transposed if self.transposed else Window.of_call
        return window(arguments_of(self.node), self.kernel)

    def plain(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as a plain convolution has it: outputs, inputs of a group, kernel. It is its own way back."""
        if not self.transposed:
            return weight
        parted = torch.unflatten(weight, 0, (self.groups, -1)).transpose(1, 2)
        return parted.flip(tuple(range(3, parted.dim()))).flatten(0, 1)

    def places(self, output: torch.Tensor) -> int:
        """How many rows an output has."""
        return output.numel() // self.shape[0]

    def picked(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows of an output, or of anything of its shape but for its channels, (R, G * O); `rows` numbers them."""
        channels, places = output.shape[self.dim], math.prod(output.shape[self.dim :][1:])
        return output.reshape(-1, channels, places).transpose(1, 2)[rows // places, rows % places]

    def parted(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (R, G * O) by the groups of the layer, (G, R, O)."""
        return rows.reshape(len(rows), self.groups, rows.shape[1] // self.groups).transpose(0, 1)

    def read(self, inputs: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """What stands under the weight for those rows of the outputs, one batch after the other: (G, R, I * K).

        It lies in memory as (G, I * K, R): rows are gathered and multiplied faster that way.
        """
        sizes = [len(chosen) for chosen in rows]
        unknowns = math.prod(self.shape[1:])
        found = inputs[0].new_empty(self.groups, unknowns, sum(sizes))
        for x, chosen, part in zip(inputs, rows, torch.split(found, sizes, 2), strict=True):
            under = x.reshape(-1, x.shape[-1])[chosen].T if self.is_linear else self.window.gathered(x, chosen)
            part.copy_(under.reshape(self.groups, unknowns, len(chosen)))
        return found.transpose(1, 2)


def layer_of(node: fx.Node) -> Layer | None:
    """The layer whose call a node is, whatever its weight is; nothing where it is none."""
    if node.target not in _LAYERS:
        return None
    args = arguments_of(node)
    return Layer(node, args["weight"], args["bias"], args["input"], args.get("groups", 1))


def calls_of_layers(traced: Traced, *, transposed: bool = True) -> Iterator[Layer]:
    """Every call of a layer whose weight is a parameter, in the order in which they run."""
    for node in traced.graph.nodes:
        layer = layer_of(node)
        if layer is not None and layer.weight.op == "get_attr" and (transposed or not layer.transposed):
            yield layer


def own_layers(traced: Traced) -> dict[fx.Node, Layer]:
    """Those whose weight and bias are parameters that nothing else reads, by their calls."""
    reads = Counter(node.target for node in traced.graph.nodes if node.op == "get_attr" for _ in node.users)
    tied = {*traced.aliases, *traced.aliases.values()}

    def is_own(part: fx.Node | None) -> bool:
        return part is None or (part.op == "get_attr" and reads[part.target] == 1 and part.target not in tied)

    return {layer.node: layer for layer in calls_of_layers(traced) if is_own(layer.weight) and is_own(layer.bias)}


def layers_by_weight(traced: Traced) -> dict[str, Layer]:
    """The same, by the name of the weight in the user's model."""
    return {traced.qualified(layer.name): layer for layer in own_layers(traced).values()}


def left_alone(traced: Traced) -> dict[str, str]:
    """Weights that are multiplied and are no layer's own, with the reason, by name."""
    known = {layer.weight for layer in own_layers(traced).values()}
    found = {}
    for node in traced.graph.nodes:
        if node.target in _LAYERS | _OTHERS:
            for operand in node.all_input_nodes:
                if operand.op == "get_attr" and operand not in known and operand.meta["val"].dim() > 1:
                    found[str(operand.target)] = (
                        "is read in more than one place" if node.target in _LAYERS else f"is read by {node.target}"
                    )
    return found


def only_reader(node: fx.Node) -> fx.Node | None:
    """The operator that alone reads what a node gives."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def norm_behind(node: fx.Node) -> fx.Node | None:
    """The batch norm with running statistics of its own that alone reads what a node gives."""
    following = only_reader(node)
    if following is None or not has_statistics(following):
        return None
    return following if arguments_of(following)["input"] is node else None


def has_statistics(node: fx.Node, *, own: bool = True) -> bool:
    """Whether a node is a batch norm that uses running statistics; with `own` those that no other operator reads."""
    if node.target is not aten.batch_norm.default:
        return False
    args = arguments_of(node)
    state: list[Any] = [args["running_mean"], args["running_var"]]
    return not args["training"] and all(
        each is not None and each.op == "get_attr" and (not own or len(each.users) == 1) for each in state
    )
