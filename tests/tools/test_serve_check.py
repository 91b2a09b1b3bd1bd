"""What serves a file: the example of a deployment, and the check that sends random batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphzip as gz
from tools import serve_check

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), (torch.randn(2, 6),))
    compiled.export(tmp_path / "slim.onnx")
    compiled.save(tmp_path / "slim.graphzip")
    with torch.no_grad():
        compiled.module.get_submodule("2").weight.mul_(1.01)  # type: ignore[operator,union-attr]
    compiled.save(tmp_path / "other.graphzip")
    return tmp_path


def test_answers_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(folder / "slim.onnx"), "--seconds", "0.2"]
    assert serve_check.main([str(folder / "slim.graphzip"), *options]) == 0
    assert "batches answered; median" in capsys.readouterr().out
    assert serve_check.main([str(folder / "other.graphzip"), *options]) == 1
    assert "(0.001 allowed)" in capsys.readouterr().out


def test_a_deployment_needs_no_torch(folder: Path) -> None:
    images = np.random.default_rng(0).standard_normal((70, 6)).astype(np.float32)
    np.save(folder / "images.npy", images)
    without = "import runpy, sys; sys.modules['torch'] = None; sys.argv.pop(0)"
    code = f"{without}; runpy.run_path(sys.argv[0], run_name='__main__')"
    example = str(ROOT / "examples" / "deploy" / "classify.py")
    command = [sys.executable, "-c", code, example, str(folder / "slim.onnx"), str(folder / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wanted = gz.load(folder / "slim.graphzip").module(torch.from_numpy(images)).argmax(1).tolist()
    assert [int(line) for line in done.stdout.split()] == wanted
