"""Files that earlier versions wrote still load, and say the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from archived_net import ArchivedNet, archived_inputs, compiled_net
from torch import nn

import graphzip as gz

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("version", [1, 2])
def test_an_archive_of_each_format_loads(version: int, tmp_path: Path) -> None:
    loaded, made = gz.load(DATA / f"format_{version}.graphzip"), compiled_net()
    assert list(loaded.module.state_dict()) == list(made.module.state_dict())
    assert replace(loaded.report.after, bytes=made.report.after.bytes) == made.report.after  # older ones have no bytes
    assert loaded.report.groups == made.report.groups
    assert isinstance(loaded.module.get_submodule("stem"), nn.Conv2d)
    for mode in (False, True):
        torch.manual_seed(0)
        expected = made.module.train(mode)(*archived_inputs(5))
        torch.manual_seed(0)
        found = loaded.module.train(mode)(*archived_inputs(5))
        for name in ("logits", "masked"):
            assert torch.equal(found[name], expected[name])
    image, ids = loaded.example_inputs
    assert image.shape == (2, 3, 6, 6)
    assert image.unique().numel() > 100
    assert torch.equal(ids, archived_inputs(2)[1])
    loaded.save(tmp_path / "again")
    again = gz.load(tmp_path / "again").module(*archived_inputs(3))
    assert torch.equal(again["logits"], loaded.module.eval()(*archived_inputs(3))["logits"])
    assert gz.load(tmp_path / "again").export(tmp_path / "net.onnx").batches


def test_the_archived_network_is_the_one_that_was_compiled() -> None:
    net, image = ArchivedNet().eval(), archived_inputs(3)
    moved = (compiled_net().module(*image)["logits"] - net(*image)["logits"]).abs().max()
    assert 0 < float(moved) < 2
