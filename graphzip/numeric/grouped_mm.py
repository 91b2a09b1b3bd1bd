"""An operator for rows that are sorted by the matrix each is multiplied with: how mixtures of experts are computed.

`out[r] = input[r] @ weight[e]` for `offs[e - 1] <= r < offs[e]`, and 0 for the rows behind the last of `offs`.

PyTorch's own (`aten._grouped_mm`) takes no float64 and only widths whose rows begin at multiples of 16 bytes, which
widths that were cut seldom do; that of transformers needs transformers to be installed where a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["grouped_mm"]


def _parts(offs: Tensor) -> Iterator[tuple[int, slice]]:
    """The rows of each matrix that has any."""
    start = 0
    for number, end in enumerate(offs.tolist()):
        if end > start:
            yield number, slice(start, end)
            start = end


@torch.library.custom_op(
    "graphzip::grouped_mm", mutates_args=(), schema="(Tensor input, Tensor weight, Tensor offs) -> Tensor"
)
def _forward(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """`input (S, I), weight (E, I, O), offs (E,) -> (S, O)`."""
    out = input.new_zeros(input.shape[0], weight.shape[2])
    for number, rows in _parts(offs):
        out[rows] = input[rows] @ weight[number]
    return out


@_forward.register_fake
def _(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[2])


@torch.library.custom_op(
    "graphzip::grouped_mm_backward",
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor offs, Tensor gradient) -> (Tensor, Tensor)",
)
def _backward(input: Tensor, weight: Tensor, offs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `input` and of `weight`."""
    for_input, for_weight = torch.zeros_like(input), torch.zeros_like(weight)
    for number, rows in _parts(offs):
        for_input[rows] = gradient[rows] @ weight[number].T
        for_weight[number] = input[rows].T @ gradient[rows]
    return for_input, for_weight


@_backward.register_fake
def _(input: Tensor, weight: Tensor, offs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*torch.ops.graphzip.grouped_mm_backward(*context.saved_tensors, gradient), None)


_forward.register_autograd(_gradients, setup_context=_keep)

grouped_mm = torch.ops.graphzip.grouped_mm.default
