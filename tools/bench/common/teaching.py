"""A network learns from the answers of another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["taught"]

HEAT = 2.0
"""The temperature of the answers."""


def taught(logits: Tensor, teacher: nn.Module, x: Tensor) -> Tensor:
    """The cross entropy with the softened answers that `teacher` gives (Hinton et al. 2015, section 2)."""
    with torch.no_grad():
        wanted = F.softmax(teacher(x) / HEAT, 1)
    return HEAT**2 * F.cross_entropy(logits / HEAT, wanted)
