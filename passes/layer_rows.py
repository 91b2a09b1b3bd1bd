"""Convolutions and linear layers as matrix products: what they read as rows, what they give as rows.

With `G` groups of a convolution (one for a linear layer), `I` inputs and `O` outputs per group and `K` positions of the
kernel, a layer multiplies rows `(G, R, I * K)` by its weight and gives rows `(G, R, O)`: a row is one place of one
sample's output.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from graphzip.graph.operators import CONVOLUTIONS, TRANSPOSED
from graphzip.graph.trace import Traced
from graphzip.ops.site import bind

__all__ = ["Layer", "layers_of", "left_alone", "sliding"]

aten = torch.ops.aten

_LINEAR = aten.linear.default
_OTHERS = {*TRANSPOSED, aten.convolution.default, aten.addmm.default, aten.mm.default, aten.matmul.default}


@dataclass(frozen=True)
class Layer:
    """One call of a convolution or linear layer whose weight is a parameter that nothing else reads."""

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    input: fx.Node
    shape: tuple[int, ...]
    groups: int

    @property
    def name(self) -> str:
        return str(self.weight.target)

    @property
    def dim(self) -> int:
        """The dimension of the output that its channels lie along."""
        return -1 if self.node.target is _LINEAR else 1 - len(self.shape)

    def places(self, output: torch.Tensor) -> int:
        """How many rows an output has."""
        return output.numel() // self.shape[0]

    def given(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows of an output, (G, R, O); `rows` numbers those that are wanted."""
        last = output.movedim(self.dim, -1).reshape(-1, self.groups, self.shape[0] // self.groups)
        return last[rows].transpose(0, 1)

    def read(self, x: torch.Tensor, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What stands under the weight for those rows of the output, (G, R, I * K)."""
        if self.node.target is _LINEAR:
            return x.reshape(-1, x.shape[-1])[rows].unsqueeze(0)
        kernel = self.shape[2:]
        dims = len(kernel)
        pads, stride, dilation = sliding(self.node, kernel)
        x = functional.pad(x, pads)
        channels, sizes, outs = x.shape[-dims - 1], x.shape[-dims:], output.shape[-dims:]
        offset = torch.zeros(1, 1, dtype=torch.int64)
        for size, out, step, reach, spread in zip(sizes, outs, stride, kernel, dilation, strict=True):
            along = torch.arange(out)[:, None] * step + torch.arange(reach)[None, :] * spread
            offset = (offset[:, None, :, None] * size + along[None, :, None, :]).flatten(0, 1).flatten(1)
        sample, place = rows // math.prod(outs), rows % math.prod(outs)
        flat = x.reshape(-1, channels, math.prod(sizes)).transpose(1, 2)
        found = flat[sample[:, None], offset.to(rows.device)[place]]  # rows, K, channels
        return found.transpose(1, 2).reshape(len(rows), self.groups, -1).transpose(0, 1)


def layers_of(traced: Traced) -> dict[fx.Node, Layer]:
    """Every layer that can be seen as a matrix product with a parameter of its own, in the order in which they run."""
    reads = Counter(node.target for node in traced.graph.nodes if node.op == "get_attr" for _ in node.users)
    tied = {*traced.aliases, *traced.aliases.values()}
    found = {}
    for node in traced.graph.nodes:
        if node.target not in CONVOLUTIONS and node.target is not _LINEAR:
            continue
        args = bind(node)
        parts = [args["weight"], *([args["bias"]] if args["bias"] is not None else [])]
        if all(part.op == "get_attr" and reads[part.target] == 1 and part.target not in tied for part in parts):
            shape = tuple(int(size) for size in args["weight"].meta["val"].shape)
            found[node] = Layer(node, args["weight"], args["bias"], args["input"], shape, args.get("groups", 1))
    return found


def left_alone(traced: Traced) -> dict[str, str]:
    """Weights that are multiplied and are no `Layer`, with the reason, by name."""
    known = {layer.weight for layer in layers_of(traced).values()}
    found = {}
    for node in traced.graph.nodes:
        if node.target in {*CONVOLUTIONS, *_OTHERS, _LINEAR}:
            for operand in node.all_input_nodes:
                if operand.op == "get_attr" and operand not in known and operand.meta["val"].dim() > 1:
                    shared = node.target in CONVOLUTIONS or node.target is _LINEAR
                    found[str(operand.target)] = (
                        "is read in more than one place" if shared else f"is read by {node.target}"
                    )
    return found


def sliding(call: fx.Node, kernel: Sequence[int]) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
    """How a convolution slides a kernel of that size: padding as `functional.pad` takes it, stride and dilation."""
    args, dims = bind(call), len(kernel)
    stride, dilation = (_spread(args[key], dims) for key in ("stride", "dilation"))
    return _padding(args["padding"], kernel, dilation), stride, dilation


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    numbers = tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _padding(padding: Any, kernel: Sequence[int], dilation: tuple[int, ...]) -> list[int]:
    """As `functional.pad` takes it, the last dimension first."""
    sides = []
    for number, (reach, spread) in enumerate(zip(kernel, dilation, strict=True)):
        total = spread * (reach - 1)
        if padding == "same":
            side = (total // 2, total - total // 2)
        else:
            side = (0, 0) if padding == "valid" else (_spread(padding, len(kernel))[number],) * 2
        sides.append(side)
    return [size for side in reversed(sides) for size in side]
