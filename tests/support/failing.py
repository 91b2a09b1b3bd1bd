"""What people hand to a public function by mistake, and what must be the same after it has been refused."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["ANYTHING", "DATA", "EXAMPLES", "MODELS", "Own", "batches", "example", "net", "process", "state_of"]


class Own(Exception):
    """Raised by the user's own code, of which graphzip knows nothing."""


def net(seed: int = 0) -> nn.Module:
    """Two convolutions with a batch norm and a head, in eval mode; the random numbers of the process are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
    return model.eval()


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example() -> tuple[Tensor, ...]:
    return (image(2, 3, 8, 8),)


def batches(count: int = 3) -> list[Tensor]:
    return [image(8, 3, 8, 8, seed=number) for number in range(count)]


class _Empty(nn.Module):
    pass


class _WithoutParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class _Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("a fault of the model")


class _NoTensor(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "no tensor"


def _spoilt(value: float) -> nn.Module:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = value  # type: ignore[index, operator]
    return model


def _meta() -> nn.Module:
    with torch.device("meta"):
        return net().to("meta")


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net(), example())  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a name": lambda: "resnet18",
    "a path": lambda: Path("model.pt"),
    "a number": lambda: 3,
    "a tensor": lambda: torch.zeros(3),
    "a list": lambda: [net()],
    "a mapping": lambda: {"a": net(), "b": net()},
    "a mapping of one": lambda: {"a": net()},
    "an empty mapping": dict,
    "a class": lambda: nn.Linear,
    "a function": lambda: lambda x: x,
    "a state dict": lambda: net().state_dict(),
    "a program": lambda: torch.export.export(net(), example()),
    "TorchScript": _scripted,
    "a module list": lambda: nn.ModuleList([net()]),
    "a module without forward": _Empty,
    "a module without parameters": _WithoutParameters,
    "a module that raises": _Raises,
    "a module that gives no tensor": _NoTensor,
    "an empty sequence": nn.Sequential,
    "lazy layers": lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)),
    "NaN weights": lambda: _spoilt(float("nan")),
    "infinite weights": lambda: _spoilt(float("inf")),
    "weights on the meta device": _meta,
    "another dtype": lambda: net().half(),
}

EXAMPLES: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a tensor": lambda: image(2, 3, 8, 8),
    "a list": lambda: [image(2, 3, 8, 8)],
    "a mapping": lambda: {"x": image(2, 3, 8, 8)},
    "text": lambda: "x",
    "no tensor at all": tuple,
    "no batch": lambda: (image(0, 3, 8, 8),),
    "a number": lambda: (torch.tensor(1.0),),
    "texts": lambda: ("x",),
    "None": lambda: (None,),
    "an array": lambda: (np.zeros((2, 3, 8, 8), dtype=np.float32),),
    "one too many": lambda: (image(2, 3, 8, 8), image(2, 3, 8, 8)),
    "other channels": lambda: (image(2, 4, 8, 8),),
    "another dtype": lambda: (torch.zeros(2, 3, 8, 8, dtype=torch.int64),),
    "another device": lambda: (torch.zeros(2, 3, 8, 8, device="meta"),),
    "a nested tuple": lambda: ((image(2, 3, 8, 8),),),
}


class _Emptied:
    """Gives its batches once, and nothing after that, though it can be gone through again."""

    def __init__(self) -> None:
        self.left = batches()

    def __iter__(self) -> Iterator[Tensor]:
        while self.left:
            yield self.left.pop()


DATA: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: batches()[0],
    "a number": lambda: 3,
    "text": lambda: "data.npz",
    "a mapping": lambda: {"x": batches()},
    "a function": lambda: batches,
    "a module": lambda: nn.ModuleList([net()]),
    "a generator": lambda: (batch for batch in batches()),
    "an iterator": lambda: iter(batches()),
    "nothing in it": list,
    "empty tuples": lambda: [()],
    "None": lambda: [None],
    "texts": lambda: ["x"],
    "arrays": lambda: [np.zeros((2, 3, 8, 8), dtype=np.float32)],
    "mappings": lambda: [{"x": batch} for batch in batches()],
    "other channels": lambda: [image(2, 4, 8, 8)],
    "other channels later": lambda: [*batches(), image(2, 4, 8, 8)],
    "another size later": lambda: [*batches(), image(2, 3, 9, 9)],
    "None later": lambda: [*batches(), None],
    "a mapping later": lambda: [*batches(), {"x": batches()[0]}],
    "no sample": lambda: [image(0, 3, 8, 8)],
    "no sample later": lambda: [*batches(), image(0, 3, 8, 8)],
    "another dtype": lambda: [torch.zeros(2, 3, 8, 8, dtype=torch.int64)],
    "another device": lambda: [torch.zeros(2, 3, 8, 8, device="meta")],
    "NaN": lambda: [torch.full((4, 3, 8, 8), float("nan"))],
    "NaN later": lambda: [*batches(), torch.full((4, 3, 8, 8), float("nan"))],
    "infinite": lambda: [torch.full((4, 3, 8, 8), float("inf"))],
    "too large": lambda: [torch.full((4, 3, 8, 8), 1e38)],
    "emptied": _Emptied,
}

ANYTHING: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 10**30, -0.5, 0.0, 1.5, float("nan"), float("inf"), -float("inf"), 1j),
    *("", "x", b"x", "a\0b", [], (), {}, set(), [None], ["x", "x"], [1, 2], [[0]], [[0, 1], [1]]),
    *({"*": None}, {1: 2}, {"*": float("nan")}, {"*": {}}, {"nowhere": 0.5}, {"0": [[0, 1], [1]]}),
    *(object(), int, len, lambda: 0, torch.tensor(1.0), torch.tensor([0.5, 0.5]), np.float32(0.5), Path("/nowhere")),
)


def process() -> dict[str, Any]:
    """What a call must leave as it was."""
    return {
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "torch seed": torch.get_rng_state().numpy().tobytes(),
        "numpy seed": repr(np.random.get_state()),
        "python seed": random.getstate(),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "warnings": list(warnings.filters),
    }


def state_of(model: Any) -> list[Any]:
    """The values, flags, modes and hooks of a model; nothing of what is none."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return []
    found: list[Any] = []
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        found.append((name, module.training, hooks))
    for name, parameter in model.named_parameters():
        found.append((name, type(parameter).__name__, parameter.requires_grad, parameter.grad is None))
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not nn.parameter.is_lazy(value) and not value.is_meta:
            found.append((name, value.detach().double().numpy().tobytes()))
    return found
