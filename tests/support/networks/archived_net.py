"""The network of the archives in `tests/data`: its weights need no random numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import graphzip as gz


class ArchivedNet(nn.Module):
    """Convolution, batch norm, functional dropout of channels, tied layers, a buffer, results by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 8, 1)
        self.first = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.first.weight
        self.register_buffer("shift", torch.linspace(-1, 1, 8), persistent=False)
        for number, tensor in enumerate([*self.parameters(), self.norm.running_mean, self.norm.running_var], 1):
            values = torch.linspace(0.2, 1, tensor.numel()).reshape(tensor.shape)
            tensor.data = values * (-1) ** number if tensor is not self.norm.running_var else values

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """`image` is `(batch, 3, 6, 6)`, `ids` `(batch, 8)`."""
        hidden = F.dropout2d(torch.relu(self.norm(self.stem(image))), 0.1, self.training)
        hidden = self.tied(self.first(self.body(hidden).mean((2, 3)) + self.shift))
        return {"logits": hidden, "masked": hidden.masked_fill(ids > 2, 0.0)}


def archived_inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.sin(torch.arange(batch * 3 * 36, dtype=torch.float32)).reshape(batch, 3, 6, 6)
    return image, torch.arange(batch * 8).reshape(batch, 8) % 5


def compiled_net() -> gz.Compiled:
    """What was saved: half of the channels of the convolution are left."""
    plan = gz.Plan([gz.ClusterMerge(keep={"stem": 3}, clustering="even", compensate="none")])
    return gz.compile(ArchivedNet().eval(), plan, archived_inputs(2), calibration=[archived_inputs(4)])
