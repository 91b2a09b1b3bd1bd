"""Minimal networks on which graphzip once was wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import Net, conv, head, image, unit
from planting import assert_lossless
from torch import Tensor, nn

CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {}


def case(factory: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]) -> Callable[..., object]:
    """Register a network under its own name."""
    CASES[factory.__name__] = factory
    return factory


def _linear_between(
    middle: Callable[[Net, Tensor], Tensor], **parts: nn.Module | Tensor
) -> tuple[nn.Module, tuple[Tensor]]:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.last(middle(m, m.first(x)))

    return Net(run, first=nn.Linear(5, 8), last=nn.Linear(8, 3), **parts), (torch.randn(2, 4, 5),)


@case
def bias_in_chunks() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Parts of a parameter are producers and biases as the whole would be."""

    def middle(m: Net, x: Tensor) -> Tensor:
        one, two = m.bias.chunk(2)
        a, b = m.weight.split([8, 8])
        return F.linear(torch.relu(F.linear(x, a, one)), b, two)

    parts = {"weight": nn.Parameter(torch.randn(16, 8)), "bias": nn.Parameter(torch.randn(16))}
    return _linear_between(middle, **parts)


@case
def slice_of_a_softmax() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An operator that is replaced reads the corrected result of the one before."""
    return _linear_between(lambda m, x: torch.softmax(F.pad(x, (2, 3)), -1)[..., 2:10])


@case
def number_of_true_channels() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Truth values are counted, not multiplied."""
    return _linear_between(lambda m, x: x * (x > 0).sum(-1, keepdim=True))


@case
def number_of_nonzero_channels() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The norm of order 0."""
    return _linear_between(lambda m, x: x * torch.linalg.vector_norm(F.relu(x), 0, -1, keepdim=True))


@case
def mean_of_pairs() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Pairs are merged to one channel each, which then stands for the pair."""
    return _linear_between(lambda m, x: m.wide(x.unflatten(-1, (4, 2)).mean(-1)), wide=nn.Linear(4, 8))


@case
def places_of_one_channel() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Pixel shuffle makes one channel of four maxima, none of which may go."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.first(x).unflatten(1, (2, 4)).amax(1)
        return m.head(m.shuffled(F.pixel_shuffle(x, 2))) + m.other(x).mean((2, 3))

    return Net(run, first=unit(3, 8), shuffled=conv(1, 6), other=conv(4, 5), head=head(6)), (image(3, 4, 4),)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("fraction", [0.5, 0.01])
def test_planted_duplicates_merge_losslessly(name: str, fraction: float) -> None:
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    assert_lossless(model, inputs, fraction=fraction, alive=False)
