"""Two small models of one architecture for two domains, and their data."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

import graphzip as gz

CLUSTERS = {"conv2": 5, "fc1": 0.25}


CHANNELS = {"rgb": 3, "depth": 1}


def network(seed: int, channels: int = 1, hidden: int = 12) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 6, 3),
            norm1=nn.BatchNorm2d(6),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(6, 8, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            fc1=nn.Linear(32, hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(hidden, 4),
        )
    ).double()


def models() -> dict[str, nn.Module]:
    """RGB and depth: the first layers differ in their input channels."""
    return {"rgb": network(0, 3), "depth": network(1, 1)}


def batches(count: int = 3, size: int = 8) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    found = [torch.randn(size, 3, 10, 10, dtype=torch.float64, generator=generator) for _ in range(count)]
    return {"rgb": found, "depth": [each.mean(1, keepdim=True) for each in found]}


DATA = batches()
EXAMPLE = {name: (each[0],) for name, each in DATA.items()}


def prepared(**options: Any) -> gz.Prepared:
    plan = gz.Plan([gz.CrossDomainShare(**{"clusters": CLUSTERS, **options})])
    return gz.prepare(models(), plan, EXAMPLE, calibration=DATA)
