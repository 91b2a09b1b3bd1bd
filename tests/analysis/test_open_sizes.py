"""Sizes that are asked to be open by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphzip as gz

HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu().mean((2, 3)))


@pytest.mark.parametrize("sizes", ["height,width", ["width", "height"], "2, 3", ("batch", 2, 3)])
def test_height_and_width_are_open(sizes: Any, tmp_path: Any) -> None:
    model = Pooled().eval()
    compiled = gz.compile(model, HALF, (torch.randn(2, 3, 8, 9),), dynamic_shapes=sizes)
    assert compiled.module(torch.randn(3, 3, 11, 6)).shape == (3, 5)
    shapes = compiled.export(tmp_path / "slim.onnx").shapes
    assert len({case["x"][2:] for case in shapes}) > 1


def test_a_length_is_open() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    compiled = gz.compile(model, HALF, (torch.randint(10, (2, 6)),), dynamic_shapes="length")
    assert compiled.module(torch.randint(10, (1, 13))).shape == (1, 13, 3)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("heigth", "'heigth' is no size; write batch, length"),
        ("height,", "'' is no size"),
        ("depth", "no input has 'depth'; they are 2x3x8x8"),
        ([4], "no input has 4"),
    ],
)
def test_a_size_that_is_none_is_refused(sizes: Any, said: str) -> None:
    with pytest.raises(gz.ExampleInputError, match=f"dynamic_shapes: {said}"):
        gz.channel_groups(Pooled(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=sizes)
