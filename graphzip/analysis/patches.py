"""What a convolution reads at every place of its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["patches"]


def patches(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The patches that an `nn.Conv1d` or `nn.Conv2d` reads, `(batch, channels, L, places)`: L positions each."""
    layer: Any = conv
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    size, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if x.dim() == 3:
        x, size, stride, dilation = x.unsqueeze(2), (1, *size), (1, *stride), (1, *dilation)
    return torch.unflatten(functional.unfold(x, size, dilation=dilation, stride=stride), 1, (x.shape[1], -1))
