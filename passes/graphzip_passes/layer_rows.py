"""Convolutions and linear layers as matrix products: what they read as rows, what they give as rows.

With `G` groups of a convolution (one for a linear layer), `I` inputs and `O` outputs per group and `K` positions of the
kernel, a layer multiplies rows `(G, R, I * K)` by its weight and gives rows `(G, R, O)`: a row is one place of one
sample's output. A transposed convolution is the plain one, with the kernel turned round, over its input with zeros
between the places.
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
_LAYERS = {*CONVOLUTIONS, *TRANSPOSED, _LINEAR}
_OTHERS = {aten.convolution.default, aten.addmm.default, aten.mm.default, aten.matmul.default}


@dataclass(frozen=True)
class Layer:
    """One call of a convolution or linear layer whose weight is a parameter that nothing else reads.

    `shape` is that of the weight as `plain` gives it, `(G * O, I, *kernel)`.
    """

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

    @property
    def transposed(self) -> bool:
        return self.node.target in TRANSPOSED

    @property
    def input_dim(self) -> int:
        """The dimension of the weight that the channels it reads lie along."""
        return 0 if self.transposed else 1

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
        return rows.reshape(len(rows), self.groups, -1).transpose(0, 1)

    def read(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """What stands under the weight for those rows of the outputs, one batch after the other: (G, R, I * K).

        It lies in memory as (G, I * K, R): rows are gathered and multiplied faster that way.
        """
        sizes = [len(chosen) for chosen in rows]
        unknowns = math.prod(self.shape[1:])
        found = inputs[0].new_empty(self.groups, unknowns, sum(sizes))
        for x, output, chosen, part in zip(inputs, outputs, rows, torch.split(found, sizes, 2), strict=True):
            part.copy_(self._under(x, output, chosen).view(self.groups, unknowns, -1))
        return found.transpose(1, 2)

    def _under(self, x: torch.Tensor, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What stands under the weight for rows of one batch: (G * I, K, R), or (I, R) for a linear layer."""
        if self.node.target is _LINEAR:
            return x.reshape(-1, x.shape[-1])[rows].T.contiguous()
        kernel = self.shape[2:]
        dims = len(kernel)
        if self.transposed:
            x, stride, dilation = _spaced(self.node, x, kernel)
        else:
            pads, stride, dilation = sliding(self.node, kernel)
            x = functional.pad(x, pads)
        channels, sizes, outs = x.shape[-dims - 1], x.shape[-dims:], output.shape[-dims:]
        offset = torch.zeros(1, 1, dtype=torch.int64)
        for size, out, step, reach, spread in zip(sizes, outs, stride, kernel, dilation, strict=True):
            along = torch.arange(out)[:, None] * step + torch.arange(reach)[None, :] * spread
            offset = (offset[:, None, :, None] * size + along[None, :, None, :]).flatten(0, 1).flatten(1)
        sample, place = rows // math.prod(outs), rows % math.prod(outs)
        flat = x.reshape(-1, channels, math.prod(sizes)).transpose(0, 1).flatten(1)
        where = sample * math.prod(sizes) + offset.to(rows.device).T[:, place]  # K, rows
        return flat.index_select(1, where.flatten())


def layers_of(traced: Traced) -> dict[fx.Node, Layer]:
    """Every layer that can be seen as a matrix product with a parameter of its own, in the order in which they run."""
    reads = Counter(node.target for node in traced.graph.nodes if node.op == "get_attr" for _ in node.users)
    tied = {*traced.aliases, *traced.aliases.values()}
    found = {}
    for node in traced.graph.nodes:
        if node.target not in _LAYERS:
            continue
        args = bind(node)
        parts = [args["weight"], *([args["bias"]] if args["bias"] is not None else [])]
        if all(part.op == "get_attr" and reads[part.target] == 1 and part.target not in tied for part in parts):
            shape, groups = [int(size) for size in args["weight"].meta["val"].shape], args.get("groups", 1)
            if node.target in TRANSPOSED:
                shape[:2] = shape[1] * groups, shape[0] // groups
            found[node] = Layer(node, args["weight"], args["bias"], args["input"], tuple(shape), groups)
    return found


def left_alone(traced: Traced) -> dict[str, str]:
    """Weights that are multiplied and are no `Layer`, with the reason, by name."""
    known = {layer.weight for layer in layers_of(traced).values()}
    found = {}
    for node in traced.graph.nodes:
        if node.target in _LAYERS | _OTHERS:
            for operand in node.all_input_nodes:
                if operand.op == "get_attr" and operand not in known and operand.meta["val"].dim() > 1:
                    found[str(operand.target)] = (
                        "is read in more than one place" if node.target in _LAYERS else f"is read by {node.target}"
                    )
    return found


def sliding(call: fx.Node, kernel: Sequence[int]) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
    """How a convolution slides a kernel of that size: padding as `functional.pad` takes it, stride and dilation."""
    args, dims = bind(call), len(kernel)
    stride, dilation = (_spread(args[key], dims) for key in ("stride", "dilation"))
    return _padding(args["padding"], kernel, dilation), stride, dilation


def _spaced(
    call: fx.Node, x: torch.Tensor, kernel: Sequence[int]
) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """What a transposed convolution's kernel slides over in steps of one, with these steps and its dilation."""
    args, dims = bind(call), len(kernel)
    keys = ("stride", "padding", "output_padding", "dilation")
    stride, padding, extra, dilation = (_spread(args[key], dims) for key in keys)
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[-dims:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:-dims], *sizes)
    places: Any = (..., *(slice(None, None, step) for step in stride))
    wide[places] = x
    sides = []
    for reach, cut, more, spread in zip(kernel, padding, extra, dilation, strict=True):
        side = spread * (reach - 1) - cut
        sides.append((side, side + more))
    return functional.pad(wide, [size for side in reversed(sides) for size in side]), (1,) * dims, dilation


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
