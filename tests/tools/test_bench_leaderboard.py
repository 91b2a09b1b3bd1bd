"""The leaderboard of criteria compares results of the same cost, and measures nothing twice."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_tools import bench_modules

MODULES = ("leaderboard", "planning", "compare", "compare_methods", "compare_nets", "cifar")


@pytest.fixture(scope="module")
def tools() -> Any:
    yield from bench_modules(*MODULES)


def ring_of(tools: Any, groups: str | None = None) -> Any:
    torch.manual_seed(0)
    return tools["leaderboard"].Ring(
        name="resnet20",
        model=tools["cifar"].CifarResNet(1).eval(),
        images=[torch.randn(16, 3, 32, 32) for _ in range(3)],
        groups=groups or tools["compare_nets"].INNER,
        score=lambda net: 50.0,
    )


@pytest.mark.parametrize(("criterion", "ranking"), [("l1", "local"), ("activation_norm", "global")])
def test_every_repair_is_of_the_same_channels(tools: Any, criterion: str, ranking: str) -> None:
    ring, board = ring_of(tools), tools["leaderboard"]
    board.Remembered(ring, criterion)
    module = board.slim(ring, board.Entry("graphzip", criterion, ranking), 0.75)
    found = {repair: module(repair) for repair in ("raw", "norms", "compensated")}
    whole, left = (tools["compare_methods"].counted(each, ring.example) for each in (ring.model, found["raw"]))
    assert 0.6 * whole <= left <= 0.75 * whole
    first = {repair: each.get_parameter("conv1.weight") for repair, each in found.items()}
    assert torch.equal(first["raw"], first["norms"])
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in found.values()]
    assert shapes[0] == shapes[1] == shapes[2]
    with torch.no_grad():
        x = ring.images[0]
        wanted = ring.model(x)
        moved = {repair: float((each(x) - wanted).square().mean()) for repair, each in found.items()}
    assert moved["compensated"] < moved["raw"]


@pytest.mark.parametrize("criterion", ["taylor", "hrank"])
def test_a_remembered_criterion_chooses_as_the_criterion_does(tools: Any, criterion: str) -> None:
    ring, board = ring_of(tools), tools["leaderboard"]
    remembered = board.Remembered(ring, criterion)
    given = (ring.answered(), torch.nn.functional.cross_entropy) if criterion == "taylor" else (ring.images,)
    plain = ring.pruned(0.4, *given, criterion=criterion, ranking="global")
    found = ring.pruned(0.4, criterion=f"{criterion}, remembered", ranking="global")
    expected = plain.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.module.state_dict().items())
    assert remembered.scores


def test_cells_are_measured_once(tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = tools["leaderboard"]
    measured: list[str] = []

    def slim(ring: Any, entry: Any, share: float) -> Any:
        return lambda repair: measured.append(f"{entry.criterion} {share} {repair}")

    monkeypatch.setattr(board, "slim", slim)
    monkeypatch.setattr(board, "Remembered", lambda *_: None)
    monkeypatch.setattr(board, "ring_of", lambda *_: ring_of(tools))
    options = argparse.Namespace(
        net=["resnet20"], criterion=["l1", "wanda"], ranking=["local"], share=[0.5], images=4, alone=True
    )
    options.cells, options.picture = tmp_path / "cells.json", tmp_path / "picture.svg"
    cells = board.run(options)
    assert board.run(options) == cells
    assert measured == [f"{name} 0.5 {repair}" for name in ("l1", "wanda") for repair in board.REPAIRS]
    assert board.table(cells, "resnet20", options).row_count == 2
    assert board.markdown(cells, "resnet20", options).splitlines()[2] == "| l1, local | 50.00 | 50.00 | 50.00 | 50.00 |"
    board.draw(cells, options)
    assert "<svg" in options.picture.read_text()


@pytest.mark.parametrize(("net", "rows"), [("resnet20", 6), ("all-minilm-l6-v2", 3)])
def test_torch_pruning_competes_by_what_it_can(tools: Any, net: str, rows: int) -> None:
    board = tools["leaderboard"]
    options = argparse.Namespace(criterion=["l1"], ranking=["local"], alone=False)
    found = list(board.entries(options, net))
    assert len(found) == rows
    assert found[0] == board.Entry("graphzip", "l1", "local")
