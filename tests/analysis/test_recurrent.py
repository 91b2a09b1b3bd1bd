"""Recurrent layers end to end: stacked and in two directions, exported, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets import Net
from planting import assert_lossless
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def tagger(cell: nn.Module, width: int) -> nn.Module:
    return Net(
        lambda m, x: m.last(m.cell(m.embed(x).relu())[0]),
        embed=nn.Linear(5, 8),
        cell=cell,
        last=nn.Linear(width, 3),
    )


def words(batch: int = 2) -> Tensor:
    return torch.randn(batch, 7, 5)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_stacks_of_two_directions_shrink_layer_by_layer(kind: type[nn.Module]) -> None:
    model = tagger(kind(8, 6, num_layers=2, bidirectional=True, batch_first=True), 12).eval()
    found = assert_lossless(model, (words(),))
    assert {group.name for group in found.groups if group.mergeable} == {
        "embed",
        "cell.weight_hh_l0",
        "cell.weight_hh_l0_reverse",
        "cell.weight_hh_l1",
        "cell.weight_hh_l1_reverse",
    }


@pytest.mark.filterwarnings("error")
def test_tracing_says_nothing() -> None:
    gz.channel_groups(tagger(nn.LSTM(8, 6, batch_first=True), 6).eval(), (words(),))


def test_layers_may_differ_in_width_and_the_file_is_verified(tmp_path: Path) -> None:
    model = tagger(nn.GRU(8, 6, num_layers=2, batch_first=True), 6).eval()
    plan = gz.Plan([gz.ClusterMerge(keep={"cell.weight_hh_l0": 2, "cell.weight_hh_l1": 4})])
    compiled = gz.compile(model, plan, (words(),))
    shapes = {name: tuple(p.shape) for name, p in compiled.module.named_parameters() if "cell" in name}
    assert shapes["cell.weight_hh_l0"] == (6, 2)
    assert shapes["cell.weight_ih_l1"] == (12, 2)
    assert compiled.module(words(3)).shape == (3, 7, 3)
    compiled.export(tmp_path / "tagger.onnx")
    assert (tmp_path / "tagger.onnx").stat().st_size > 0


def test_multiply_accumulates_are_those_of_every_step() -> None:
    """Seven steps of (I + H) columns and 4 H rows, and the two linear layers."""
    model = tagger(nn.LSTM(8, 6, batch_first=True), 6).eval()
    assert gz.cost(model, (words(),)).macs == 7 * (5 * 8 + 24 * (8 + 6) + 6 * 3)


def test_as_many_units_as_projected_channels() -> None:
    model = tagger(nn.LSTM(8, 6, proj_size=4, batch_first=True), 4).eval()
    plan = gz.Plan([gz.ClusterMerge(keep={"cell.weight_hh_l0": 3, "cell.weight_hr_l0": 3})])
    with pytest.raises(gz.GraphZipError, match=r"lstm .*: 3 hidden units would be left and as many projected channels"):
        gz.compile(model, plan, (words(),))


def test_weights_that_are_computed_stay() -> None:
    cell = nn.GRU(8, 6, batch_first=True)
    model = Net(
        lambda m, x: torch.gru(
            m.embed(x), x.new_zeros(1, x.shape[0], 6), [m.cell.weight_ih_l0, m.cell.weight_hh_l0 * 2.0], False, 1, 0.0,
            False, False, True,
        )[0],
        embed=nn.Linear(5, 8),
        cell=cell,
    ).eval()  # fmt: skip
    groups = gz.channel_groups(model, (words(),))
    cells = [group for group in groups if group.name.startswith("cell")]
    assert cells
    assert all("has weights that are computed" in (group.reason or "") for group in cells)
