"""What the one-shot benchmark compares is comparable, and what it has measured is kept."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_tools import bench_modules

MODULES = ("compare", "compare_methods", "compare_nets", "cifar")


@pytest.fixture(scope="module")
def tools() -> Any:
    yield from bench_modules(*MODULES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with random images of ten classes."""
    from PIL import Image

    random, content = np.random.default_rng(0), {}
    for part, count in (("train", 256), ("test", 40)):
        files = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
            files.append(buffer.getvalue())
        content[f"{part}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        content[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        content[f"{part}_labels"] = np.sort(random.integers(0, 10, count))
    np.savez(tmp_path / "cifar10_jpeg.npz", **content)
    return tmp_path


@pytest.mark.parametrize("method", ["graphzip", "graphzip-normal", "fold", "l1"])
def test_every_method_meets_the_budget(tools: Any, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tools["cifar"].CifarResNet(1).eval()
    images = [torch.randn(16, 3, 32, 32) for _ in range(3)]
    test = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    bench = tools["compare_methods"].Bench(
        name="resnet8",
        model=model,
        images=images,
        groups=tools["compare_nets"].INNER,
        test=test,
        cache=tmp_path / "cache.json",
    )
    _, slim = tools["compare_methods"].METHODS[method](bench, 0.75)
    whole, left = (tools["compare_methods"].counted(each, bench.example) for each in (model, slim))
    assert 0.6 * whole <= left <= 0.75 * whole


def test_cells_are_kept_and_not_measured_again(
    tools: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = folder / "cells.json"
    compare, nets = tools["compare"], tools["compare_nets"]
    tiny = nets.Net(lambda: tools["cifar"].CifarResNet(1), nets.INNER, epochs=1, rate=0.01)
    monkeypatch.setenv("GRAPHZIP_DATA", str(folder))
    monkeypatch.setitem(nets.NETS, "vgg16-half", tiny)
    command = (
        f"compare.py --net vgg16-half --share 0.7 --method l1 --epochs 0 1 --images 40 --threads 1 --cells {cells}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    assert compare.main() == 0
    found = json.loads(cells.read_text())
    wanted = ["vgg16-half dense 1.0 40 0", "vgg16-half l1 0.7 40 0", "vgg16-half l1 0.7 40 1"]
    assert list(found) == wanted
    first = capsys.readouterr().out
    assert "no training" in first
    assert "epochs of training: 1" in first
    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("a cell was measured again"))
    assert compare.main() == 0
    assert capsys.readouterr().out == first


def test_missing_weights_are_said(
    tools: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAPHZIP_DATA", str(folder))
    monkeypatch.setattr(sys, "argv", f"compare.py --net resnet20 --cells {folder / 'cells.json'}".split())
    assert tools["compare"].main() == 0
    assert f"skipped resnet20: {folder / 'resnet20_cifar10.safetensors'} is missing" in capsys.readouterr().err
