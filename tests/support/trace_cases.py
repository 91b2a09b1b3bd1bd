"""Models and comparisons of the tests of tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nets import Net
from planting import tensors
from torch import Tensor, nn

import graphzip as gz

NOTHING = gz.Plan([])
HALF = gz.Plan([gz.ClusterMerge(keep=0.5, clustering="even")])


def net(run: Callable[..., Any], **parts: Any) -> nn.Module:
    """A model with two linear layers, 4 -> 6 -> 3, in eval mode."""
    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 3), **parts).eval()


def plain(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.b(m.a(x).relu())
    return out


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    )


def compiled(model: nn.Module, *inputs: Any, **options: Any) -> nn.Module:
    module: nn.Module = gz.compile(model, NOTHING, inputs, **options).module
    return module


def same(model: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Both give the same structure with the same bits."""
    expected, found = model(*args, **kwargs), module(*args, **kwargs)
    assert type(expected) is type(found)
    left, right = tensors(expected), tensors(found)
    return len(left) == len(right) and all(map(torch.equal, left, right))
