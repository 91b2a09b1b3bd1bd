"""The leaderboard of criteria compares results of the same cost, and measures nothing twice."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_tools import bench_modules

MODULES = ("leaderboard", "compare", "compare_methods", "compare_nets", "cifar")


@pytest.fixture(scope="module")
def tools() -> Any:
    yield from bench_modules(*MODULES)


def bench_of(tools: Any, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    model = tools["cifar"].CifarResNet(1).eval()
    images = [torch.randn(16, 3, 32, 32) for _ in range(3)]
    test = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    return tools["compare_methods"].Bench(
        "resnet20", model, images, test, tmp_path / "cache.json", tools["compare_nets"].INNER
    )


@pytest.mark.parametrize(("criterion", "ranking"), [("l1", "local"), ("activation_norm", "global")])
def test_every_repair_is_of_the_same_channels(tools: Any, criterion: str, ranking: str, tmp_path: Path) -> None:
    bench = bench_of(tools, tmp_path)
    module = tools["leaderboard"].slim(bench, tools["leaderboard"].Entry("graphzip", criterion, ranking), 0.75)
    found = {repair: module(repair) for repair in ("raw", "norms", "compensated")}
    counted = tools["compare_methods"].counted
    assert 0.6 * counted(bench.model) <= counted(found["raw"]) <= 0.75 * counted(bench.model)
    first = {repair: each.get_parameter("conv1.weight") for repair, each in found.items()}
    assert torch.equal(first["raw"], first["norms"])
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in found.values()]
    assert shapes[0] == shapes[1] == shapes[2]
    with torch.no_grad():
        x = bench.images[0]
        wanted = bench.model(x)
        moved = {repair: float((each(x) - wanted).square().mean()) for repair, each in found.items()}
    assert moved["compensated"] < moved["raw"]


def test_cells_are_measured_once(tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = tools["leaderboard"]
    measured: list[str] = []

    def slim(bench: Any, entry: Any, share: float) -> Any:
        return lambda repair: measured.append(f"{entry.criterion} {share} {repair}")

    monkeypatch.setattr(board, "slim", slim)
    monkeypatch.setattr(board, "load", lambda *_: bench_of(tools, tmp_path))
    monkeypatch.setattr(board, "accuracy", lambda *_: 50.0)
    options = argparse.Namespace(
        net=["resnet20"], criterion=["l1", "wanda"], ranking=["local"], share=[0.5], images=4, alone=True
    )
    options.cells, options.picture = tmp_path / "cells.json", tmp_path / "picture.svg"
    cells = board.run(options, tmp_path)
    assert board.run(options, tmp_path) == cells
    assert measured == [f"{name} 0.5 {repair}" for name in ("l1", "wanda") for repair in board.REPAIRS]
    assert board.table(cells, "resnet20", options).row_count == 2
    board.draw(cells, options)
    assert "<svg" in options.picture.read_text()
