"""What a convolution reads, times its kernel, is what it gives: of every kind, with every padding mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graphzip.numeric.im2col import Window


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2),
    nn.Conv2d(4, 6, (3, 1), padding="same"),
    nn.Conv2d(4, 6, 4, padding="same"),
    nn.Conv2d(4, 6, (2, 3), stride=(2, 1), dilation=(1, 2)),
    nn.Conv3d(4, 6, 2, padding=(1, 0, 1), stride=(1, 2, 1)),
    *(nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode=mode) for mode in ("reflect", "replicate", "circular")),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=repr)
def test_patches_and_rows_of_modules(conv: Any) -> None:
    conv, x = conv.double(), torch.randn(3, 4, *[9, 8, 7][: conv.weight.dim() - 2], dtype=torch.float64)
    window, y = Window.of_module(conv), conv(x)
    patches = window.patches(x)
    made = torch.einsum("oik,nikp->nop", conv.weight.flatten(2), patches) + conv.bias[:, None]
    torch.testing.assert_close(made, y.flatten(2))
    assert window.outputs(x.shape[2:]) == tuple(y.shape[2:])
    rows = torch.randperm(3 * patches.shape[3])[:11]
    expected = patches.permute(1, 2, 0, 3).flatten(2)[:, :, rows]
    assert torch.equal(window.gathered(x, rows), expected)


def test_a_transposed_convolution_is_a_plain_one_over_its_spread_input() -> None:
    conv = nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), dilation=(1, 2))
    x = torch.randn(2, 4, 5, 6)
    args = {"stride": [2, 1], "padding": [1, 0], "output_padding": [1, 0], "dilation": [1, 2]}
    window = Window.of_transposed(args, (3, 2))
    kernel, y = conv.weight.flip((2, 3)).transpose(0, 1), conv(x)
    assert window.outputs(x.shape[2:]) == tuple(y.shape[2:])
    made = torch.einsum("oik,nikp->nop", kernel.flatten(2), window.patches(x)) + conv.bias[:, None]  # type: ignore[index]
    torch.testing.assert_close(made, y.flatten(2))
