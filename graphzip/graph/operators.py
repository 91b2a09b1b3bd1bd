"""Sets of operators that more than one part of the compiler asks for."""

from __future__ import annotations

import torch

__all__ = ["CONVOLUTIONS", "COPIES", "TRANSPOSED"]

aten = torch.ops.aten

CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
COPIES = (aten.contiguous.default, aten.clone.default)
"""What returns its input with the same values and shape."""
