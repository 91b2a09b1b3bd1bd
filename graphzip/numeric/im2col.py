"""What a convolution reads at the places of its output: the one way to lay it out.

A kernel of `K` positions in `d` dimensions slides over an input `(.., C, *sizes)` in steps, its positions `dilation`
apart. The input is padded first. A transposed convolution is the plain one over its input with zeros between the
places, in steps of one, with the kernel turned round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Window", "per_dimension"]


def per_dimension(value: Any, dims: int) -> tuple[int, ...]:
    """One number for each of the dimensions: an operator may be given one for all."""
    numbers = tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


@dataclass(frozen=True)
class Window:
    """How a kernel slides: its size, steps, dilation and the zeros between the places, by dimension.

    `pads` are those of `functional.pad`, the last dimension first, and `mode` is its mode.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[int, ...]
    mode: str = "constant"
    spacing: tuple[int, ...] = ()

    @classmethod
    def of_module(cls, conv: nn.Module) -> Window:
        """That of an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, with its padding mode."""
        layer: Any = conv
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        pads = tuple(layer._reversed_padding_repeated_twice)
        return cls(layer.kernel_size, layer.stride, layer.dilation, pads, mode)

    @classmethod
    def of_call(cls, args: dict[str, Any], kernel: Sequence[int]) -> Window:
        """That of a convolution's call with these arguments, as `arguments_of` gives them."""
        dims = len(kernel)
        stride, dilation = (per_dimension(args[key], dims) for key in ("stride", "dilation"))
        reaches = [spread * (size - 1) for size, spread in zip(kernel, dilation, strict=True)]
        if args["padding"] == "same":
            sides = [(reach // 2, reach - reach // 2) for reach in reaches]
        elif args["padding"] == "valid":
            sides = [(0, 0)] * dims
        else:
            sides = [(size, size) for size in per_dimension(args["padding"], dims)]
        return cls(tuple(kernel), stride, dilation, _as_pads(sides))

    @classmethod
    def of_transposed(cls, args: dict[str, Any], kernel: Sequence[int]) -> Window:
        """That of a transposed convolution's call: of the plain one that it is."""
        keys = ("stride", "padding", "output_padding", "dilation")
        stride, padding, extra, dilation = (per_dimension(args[key], len(kernel)) for key in keys)
        sides = []
        for reach, cut, more, spread in zip(kernel, padding, extra, dilation, strict=True):
            side = spread * (reach - 1) - cut
            sides.append((side, side + more))
        return cls(tuple(kernel), (1,) * len(kernel), dilation, _as_pads(sides), spacing=stride)

    @property
    def dims(self) -> int:
        return len(self.kernel)

    @property
    def sides(self) -> tuple[int, ...]:
        """The padding in front of each dimension."""
        return self.pads[::2][::-1]

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """What the kernel is laid on, `(.., C, *sizes)`."""
        if self.spacing:
            sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[-self.dims :], self.spacing, strict=True)]
            wide = x.new_zeros(*x.shape[: -self.dims], *sizes)
            places: Any = (..., *(slice(None, None, step) for step in self.spacing))
            wide[places] = x
            x = wide
        return functional.pad(x, self.pads, mode=self.mode)

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """All that the kernel is laid on, `(N, C, K, places)` for an input `(N, C, *sizes)`."""
        view = self.padded(x)
        for dim, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            view = view.unfold(2 + dim, (size - 1) * gap + 1, step)
        gaps: Any = (..., *(slice(None, None, gap) for gap in self.dilation))
        view = view[gaps]
        places, positions = range(2, 2 + self.dims), range(2 + self.dims, 2 + 2 * self.dims)
        count = math.prod(view.shape[2 : 2 + self.dims])
        return view.permute(0, 1, *positions, *places).reshape(*x.shape[:2], math.prod(self.kernel), count)

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """How many places the kernel is laid on by dimension, for an input of these sizes."""
        if self.spacing:
            sizes = [(size - 1) * step + 1 for size, step in zip(sizes, self.spacing, strict=True)]
        around = [low + high for low, high in zip(self.pads[::2], self.pads[1::2], strict=True)][::-1]
        reaches = [(size - 1) * gap + 1 for size, gap in zip(self.kernel, self.dilation, strict=True)]
        rooms = [size + more - reach for size, more, reach in zip(sizes, around, reaches, strict=True)]
        return tuple(room // step + 1 for room, step in zip(rooms, self.stride, strict=True))

    def gathered(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What the kernel is laid on at some places, `(C, K, R)`: `rows` numbers those of all samples, one after the
        other.
        """
        outs, x = self.outputs(x.shape[-self.dims :]), self.padded(x)
        channels, sizes = x.shape[-self.dims - 1], x.shape[-self.dims :]
        offset = torch.zeros(1, 1, dtype=torch.int64)
        for size, out, step, reach, spread in zip(sizes, outs, self.stride, self.kernel, self.dilation, strict=True):
            along = torch.arange(out)[:, None] * step + torch.arange(reach)[None, :] * spread
            offset = (offset[:, None, :, None] * size + along[None, :, None, :]).flatten(0, 1).flatten(1)
        sample, place = rows // math.prod(outs), rows % math.prod(outs)
        flat = x.reshape(-1, channels, math.prod(sizes)).transpose(0, 1).flatten(1)
        where = sample * math.prod(sizes) + offset.to(rows.device).T[:, place]  # K, rows
        return flat.index_select(1, where.flatten()).reshape(channels, *where.shape)


def _as_pads(sides: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """As `functional.pad` takes it, the last dimension first."""
    return tuple(size for side in reversed(sides) for size in side)
