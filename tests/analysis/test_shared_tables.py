"""Layers that read one table of cosines and sines shrink alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planting import assert_lossless
from torch import Tensor, nn
from torch.nn import functional as F

import graphzip as gz

HEADS, WIDTH, STREAM = 2, 8, 12


class Attention(nn.Module):
    """Two heads whose queries and keys are turned by angles from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(STREAM, HEADS * WIDTH) for _ in range(3))
        self.out = nn.Linear(HEADS * WIDTH, STREAM)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = (each * cos + torch.cat([-each[..., 4:], each[..., :4]], -1) * sin for each in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Rotary(nn.Module):
    """Layers that share cosines and sines, computed once from a buffer of frequencies."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.entry, self.last = nn.Linear(5, STREAM), nn.Linear(STREAM, 3)
        self.layers = nn.ModuleList(Attention() for _ in range(depth))
        self.register_buffer("frequencies", 10 ** -torch.linspace(0, 1, WIDTH // 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos(), angles.sin()
        x = self.entry(x)
        for layer in self.layers:
            x = x + layer(x, cos, sin)
        return self.last(x)


def _net() -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return Rotary(), (torch.randn(2, 4, 5),)


def _positions(module: nn.Module) -> list[list[int]]:
    return [each.tolist() for each in module.buffers() if each.dtype == torch.int64]


def _compiled(keep: Any) -> tuple[gz.Compiled, tuple[Tensor]]:
    model, inputs = _net()
    return gz.compile(model, gz.Plan([gz.ClusterMerge(keep=keep, clustering="even")]), inputs), inputs


def test_every_layer_has_a_width_of_its_own() -> None:
    model, inputs = _net()
    groups = gz.channel_groups(model, inputs)
    widths = {name: group for name, group in zip(groups.names, groups, strict=True) if name.endswith(".q")}
    assert [(group.size, group.mergeable) for group in widths.values()] == [(WIDTH // 2, True)] * 2
    assert all(group.reason != "is an output of the model" for group in groups if group.name != "last")


def test_planted_duplicates_merge_losslessly() -> None:
    model, inputs = _net()
    assert assert_lossless(model.double(), (inputs[0].double(),)).worst < 1e-9


def test_one_layer_reads_a_part_of_the_table_and_the_other_all_of_it(tmp_path: Path) -> None:
    compiled, inputs = _compiled({"layers.0.q": 2})
    assert _positions(compiled.module) == [[0, 2, 4, 6]] * 2
    assert compiled.module.get_submodule("layers.1.q").out_features == HEADS * WIDTH
    assert compiled.export(tmp_path / "slim.onnx").verified
    compiled.save(tmp_path / "slim.gz")
    loaded = gz.load(tmp_path / "slim.gz")
    assert torch.equal(loaded.module(*inputs), compiled.module(*inputs))


def test_layers_that_read_the_same_share_an_index() -> None:
    compiled, _ = _compiled(0.5)
    assert _positions(compiled.module) == [[0, 2, 4, 6]] * 2


def test_no_index_is_left_where_all_of_the_table_is_read() -> None:
    compiled, _ = _compiled({"layers.*.v": 0.5})
    assert _positions(compiled.module) == []


@pytest.mark.parametrize("first", ["layers.0.q", "layers.1.q"])
def test_what_was_compiled_once_is_compiled_again(first: str) -> None:
    compiled, inputs = _compiled({first: 2})
    groups = gz.channel_groups(compiled.module, inputs)
    sizes = {name: groups[name].size for name in ("layers.0.q", "layers.1.q")}
    assert sizes == {"layers.0.q": 4, "layers.1.q": 4} | {first: 2}
    again = gz.compile(compiled.module, gz.Plan([gz.ClusterMerge(keep=0.5, clustering="even")]), inputs)
    assert sorted(len(each) for each in _positions(again.module)) == [2, 2, 4, 4]
