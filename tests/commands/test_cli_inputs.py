"""Options of the command line on what goes into a model and what comes out of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner, Result

from graphzip.commands import cli

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.app, [str(argument) for argument in arguments])


MANY = """
import torch
from torch import nn


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        hidden = self.body(x)
        return {"logits": self.head(hidden.mean((2, 3))), "hidden": hidden}


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Many()

    def forward(self, x):
        return self.inner(x)["logits"].softmax(1)
"""


def test_outputs_scope_and_dynamic_sizes_are_options(tmp_path: Path, run: Run) -> None:
    (tmp_path / "many.py").write_text(MANY)
    model, slim, plan = f"{tmp_path}/many.py:Around", tmp_path / "slim.onnx", tmp_path / "plan.yaml"
    view = ["--input", "2x3x8x8", "--scope", "inner", "--outputs", "logits"]
    shown = json.loads(run("inspect", model, *view, "--json").stdout)
    assert {group["name"]: group["mergeable"] for group in shown["groups"]} == {
        "inner.body.0": True,
        "inner.head": False,
    }
    dynamic = ["--dynamic", "height,width"]
    assert run("plan", model, *view, *dynamic, "--params", "0.6", "-o", str(plan)).exit_code == 0
    assert "inner.body.0" in plan.read_text()
    assert run("compile", model, *view, *dynamic, "--plan", str(plan), "-o", str(slim)).exit_code == 0
    assert run("compile", model, *view, "--params", "0.6", "-o", str(slim)).exit_code == 0
    free = f"{tmp_path}/many.py:Many"
    options = ["--input", "2x3x8x8", "--outputs", "logits", *dynamic, "--params", "0.6", "-o", str(slim)]
    assert run("compile", free, *options).exit_code == 0
    (given,) = onnx.load(slim).graph.input
    assert [size.dim_param for size in given.type.tensor_type.shape.dim] == ["batch", "", "x_2", "x_3"]
    assert [each.name for each in onnx.load(slim).graph.output] == ["logits"]


NAMED = """
import torch
from torch import nn


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(5, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids, kinds=None, mask=None):
        return self.head(self.inner(self.embed(ids)).relu() * mask[..., None])
"""


def test_inputs_are_given_by_name(tmp_path: Path, run: Run) -> None:
    (tmp_path / "named.py").write_text(NAMED)
    np.savez(tmp_path / "data.npz", mask=np.ones((8, 4), np.float32), ids=np.arange(32).reshape(8, 4) % 5)
    slim, data = tmp_path / "slim.onnx", str(tmp_path / "data.npz")
    named = ["--input", "mask=2x4", "--input", "ids=2x4:int64", "--calibration", data]
    result = run("compile", f"{tmp_path}/named.py:Named", *named, "--params", "0.7", "-o", str(slim))
    assert result.exit_code == 0, result.stderr
    assert [each.name for each in onnx.load(slim).graph.input] == ["ids", "mask"]
    mixed = run("inspect", f"{tmp_path}/named.py:Named", "--input", "mask=2x4", "--input", "2x4:int64")
    assert mixed.exit_code == 2
    assert "--input: give a name to every input" in mixed.stderr
