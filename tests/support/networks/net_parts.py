"""What the small networks of the tests are put together from, and the registry `NETS` of their factories.

A factory takes nothing and returns `(module, example inputs)`; it draws its weights from seed 0, images are 8 x 8 and
the batch is 2. `REFUSABLE` names the networks whose writes into views may be refused with a typed error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Tensor, ...]]
NETS: dict[str, Callable[[], Example]] = {}
REFUSABLE: set[str] = set()


def register(registry: dict[str, Callable[[], Example]]) -> Callable[[Callable[[], Example]], Callable[[], Example]]:
    """A decorator that puts a factory, seeded, into a registry under its own name."""

    def add(factory: Callable[[], Example]) -> Callable[[], Example]:
        def build() -> Example:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return factory()

        registry[factory.__name__] = build
        return build

    return add


net = register(NETS)


def image(channels: int = 3, *size: int) -> Tensor:
    """A batch of two random images, 8 x 8 unless sizes are given."""
    return torch.randn(2, channels, *(size or (8, 8)))


class Net(nn.Module):
    """Named parts (modules, parameters, buffers) and a forward function `run(self, *inputs)`."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def conv(inner: int, outer: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the image's size."""
    return nn.Conv2d(inner, outer, kernel, padding=kernel // 2, **options)


def unit(inner: int, outer: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(conv(inner, outer, kernel, bias=False, **options), nn.BatchNorm2d(outer), nn.ReLU())


def head(channels: int, classes: int = 5) -> nn.Sequential:
    """Global average pooling and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def between(middle: Callable[[Tensor], Tensor], *, width: int = 8, after: int | None = None) -> Example:
    """unit(3, width) -> `middle` -> unit(after, 6) -> head: `middle` sees `width` channels and leaves `after`."""

    def run(m: Any, x: Tensor) -> Any:
        return m.head(m.second(middle(m.first(x))))

    return Net(run, first=unit(3, width), second=unit(after or width, 6), head=head(6)), (image(),)
