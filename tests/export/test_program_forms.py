"""Forms that a file needs or runtimes are fast at: sums of channels as convolutions, squeezes that do something."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def shared(conv: Any, dims: int, clusters: int) -> gz.Compiled:
    """Two networks whose second convolution reads clusters of channels, one task seven of them."""
    pool = nn.AdaptiveAvgPool1d(1) if dims == 1 else nn.AdaptiveAvgPool2d(1)
    nets = {
        name: nn.Sequential(
            conv(3, 12, 3), nn.ReLU(), conv(12, 6, 3), nn.ReLU(), conv(6, 5, 1), pool, nn.Flatten(), nn.Linear(5, 2)
        ).eval()
        for name in "ab"
    }
    x = torch.randn(2, 3, *[9] * dims)
    prepared = gz.prepare(
        nets, gz.Plan([gz.CrossDomainShare(clusters={"2": clusters}, regularizer=None)]), dict.fromkeys(nets, (x,))
    )
    for stage in prepared.steps():
        if stage == "regularize":
            columns = torch.arange(12) % 7, 4 + torch.arange(12) % (clusters - 4)
            prepared.clusters.copy_(torch.cat(columns))
    return prepared.convert()


@pytest.mark.parametrize(("conv", "dims"), [(nn.Conv1d, 1), (nn.Conv2d, 2)])
def test_sums_in_front_of_convolutions(conv: Any, dims: int, tmp_path: Path) -> None:
    compiled = shared(conv, dims, 9)
    report = compiled.export(tmp_path / "files", per_task=True)
    assert report.verified
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "files" / "a.onnx")).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert not {"ScatterElements", "ScatterND", "GatherElements"} & set(kinds)
    assert kinds["Conv"] == 4
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.value_info}
    read = [shapes[node.input[1]] for node in graph.node if node.op_type == "Conv" and node.input[1] in shapes]
    assert [shape[:2] for shape in read if 8 in shape[:2]] == [[8, 12], [6, 8]]  # seven sums and a zero


def test_whole_numbers_of_sums_are_not_made_wider(tmp_path: Path) -> None:
    compiled = shared(nn.Conv2d, 2, 12)  # the second task reads eight
    assert compiled.export(tmp_path / "files", per_task=True).verified
    assert "Pad" not in {node.op_type for node in onnx.load(tmp_path / "files" / "b.onnx").graph.node}


def test_sums_in_front_of_other_layers_stay_as_they_are(tmp_path: Path) -> None:
    nets = {
        name: nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)) for name in "ab"
    }
    data = {name: [torch.randn(8, 4)] for name in nets}
    plan = gz.Plan([gz.CrossDomainShare(clusters={"2": 9})])
    compiled = gz.compile(nets, plan, {name: (each[0],) for name, each in data.items()}, calibration=data)
    assert compiled.export(tmp_path / "files", per_task=True).verified
    products = [
        node for node in onnx.load(tmp_path / "files" / "a.onnx").graph.node if node.op_type in ("Gemm", "MatMul")
    ]
    assert len(products) == 3


class Squeezed(nn.Module):
    """Squeezes of a dimension that is none, of two of which one is, and of one whose size is open."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.squeeze(1).squeeze((1, 2)) if x.shape[2] == 1 else x.squeeze(1)
        return x * 2


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 4), (2, 1, 4)])
def test_squeezes_that_do_nothing(shape: tuple[int, ...], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(shape[-1], shape[-1]), Squeezed()).eval()
    x = torch.randn(*shape)
    report = gz.compile(model, gz.Plan([]), (x,)).export(tmp_path / "model.onnx")
    assert report.verified
    file = onnx.load(tmp_path / "model.onnx")
    (shaped,) = [[size.dim_value for size in each.type.tensor_type.shape.dim[1:]] for each in file.graph.output]
    assert shaped == [*model(x).shape[1:]]
