"""Slices that are fitted to what layers give, against the equations written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphzip as gz
from graphzip_passes.factorize.slice_generate import cut
from graphzip_passes.factorize.slice_weights import SliceWeights

pytestmark = pytest.mark.usefixtures("seeded")


def moments(channels: int, length: int) -> torch.Tensor:
    rows = torch.randn(channels, 50, length, dtype=torch.float64) * torch.rand(channels, 1, 1, dtype=torch.float64)
    return rows.transpose(1, 2) @ rows / 50


@pytest.mark.parametrize("size", [(4, 3, 3, 3), (4, 4, 2, 3), (3, 5, 3, 2)])
def test_codes_lose_least_of_what_the_layer_gives(size: tuple[int, ...]) -> None:
    """Any other codes lose more, by the moments that the code never sees as such."""
    kernel, moment = torch.randn(7, 8, 3, 3, dtype=torch.float64), moments(8, 9)
    generator = torch.randn(torch.Size(size).numel(), 6, dtype=torch.float64)
    slices, used = cut(kernel, size)
    plain = torch.einsum("oik,ikl,oil->", kernel.flatten(2), moment, kernel.flatten(2))
    scaled = 0.7 * moment * (kernel.square().sum() / plain) + 0.3 * torch.eye(9, dtype=torch.float64)

    def lost(codes: torch.Tensor, number: int) -> float:
        """Of one slice: its difference, put into a kernel of zeros, seen by the layer."""
        rest = torch.zeros(slices.shape, dtype=torch.float64)
        rest[number] = (slices[number] - generator @ codes) * used[number]
        grid = [-(-whole // step) for whole, step in zip(kernel.shape, size, strict=True)]
        order = [dim for pair in zip(range(4), range(4, 8), strict=True) for dim in pair]
        wide = rest.reshape(*grid, *size).permute(order).reshape([a * b for a, b in zip(grid, size, strict=True)])
        found = wide[:7, :8, :3, :3].flatten(2)
        return float(torch.einsum("oik,ikl,oil->", found, scaled, found))

    codes = SliceWeights.of(kernel, size, moment).codes(slices, used, generator)
    for number in (0, len(slices) // 2, len(slices) - 1):
        own = codes[number].clone().requires_grad_()
        rest = [lost(codes[number] + 1e-4 * sign * step, number) for step in torch.eye(6).double() for sign in (1, -1)]
        assert min(rest) >= lost(own.detach(), number) - 1e-9


def test_without_moments_codes_are_those_of_the_plain_fit() -> None:
    kernel, generator = torch.randn(5, 6, 3, 3, dtype=torch.float64), torch.randn(144, 7, dtype=torch.float64)
    slices, used = cut(kernel, (4, 4, 3, 3))
    found = SliceWeights.of(kernel, (4, 4, 3, 3), None).codes(slices, used, generator)
    for number, (row, inside) in enumerate(zip(slices, used, strict=True)):
        expected = torch.linalg.lstsq(generator[inside], row[inside, None]).solution[:, 0]
        torch.testing.assert_close(found[number], expected, rtol=1e-8, atol=1e-10)


def test_a_weighted_fit_spends_its_codes_on_channels_that_are_loud() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[::2] *= 20  # type: ignore[operator]
        model[2].weight[4:, ::2] = model[2].weight[:4, ::2]  # type: ignore[index]  # two codes are enough for these
    data = [torch.randn(16, 4, 9, 9) for _ in range(4)]
    errors = []
    for weighted in (False, True):
        options = gz.SliceGenerate(
            slice=(4, 4, 3, 3), code=2, include=["2"], weighted=weighted, compensate="none", force=True
        )
        slim = gz.compile(model, gz.Plan([options]), (data[0][:2],), calibration=data).module
        with torch.no_grad():
            errors.append(sum(float((slim(x) - model(x)).square().mean()) for x in data))
    assert errors[1] < 0.3 * errors[0]
