"""Budgets of models that compute something else in training: `mode="train"` of `plan_for` and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import graphzip as gz
from graphzip.commands import cli

SOURCE = '''
import torch
from torch import nn


class Helped(nn.Module):
    """A classifier with an auxiliary head in training."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)
        self.mid, self.aux = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        y = self.a(x).relu()
        out = self.head(self.b(y).relu().mean((2, 3)))
        return (out, self.aux(self.mid(y).relu())) if self.training else out


def net():
    torch.manual_seed(0)
    return Helped().eval()
'''


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "helped.py").write_text(SOURCE, encoding="utf-8")
    return f"{tmp_path / 'helped.py'}:net"


def built() -> nn.Module:
    space: dict[str, object] = {"__name__": "helped"}
    exec(SOURCE, space)
    made = space["net"]()  # type: ignore[operator]
    assert isinstance(made, nn.Module)
    return made


def image(count: int) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(count))


def test_a_plan_for_both_forms() -> None:
    data, example = [image(24), image(16)], (image(4),)
    net = built()
    plan = gz.plan_for(net, example, macs=0.5, calibration=data, mode="train")
    assert set(plan.to_dict()["passes"][0]["cluster_merge"]["keep"]) == {"a", "b", "mid"}
    compiled = gz.compile(net, plan, example, calibration=data, mode="train")
    left = compiled.report.after.macs / compiled.report.before.macs
    assert 0.35 < left <= 0.5  # of the eval form, whose file is asked for
    main, extra = compiled.module.train()(image(2))
    assert (main.shape, extra.shape) == ((2, 5), (2, 4, 8, 8))
    assert compiled.module.eval()(image(2)).shape == (2, 5)


def test_a_budget_counts_what_the_eval_form_computes() -> None:
    study = gz.WidthStudy(built(), (image(4),), mode="train")
    assert study.prices.macs.whole == gz.cost(built(), (image(4),)).macs
    with pytest.raises(gz.GraphZipError, match="mode is 'eval'"):
        gz.WidthStudy(built(), (image(4),), mode="both")


def test_the_command_line(model: str, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        result = CliRunner().invoke(cli.app, [*words, "--input", "2x3x10x10"])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    names = {mode: json.loads(run("inspect", model, "--json", "--mode", mode))["groups"] for mode in ("eval", "train")}
    assert {each["name"] for each in names["train"]} - {each["name"] for each in names["eval"]} == {"mid", "aux"}
    (tmp_path / "plan.yaml").write_text("version: 1\npasses: [cluster_merge: {keep: 0.5}]\n", encoding="utf-8")
    files = ("--plan", str(tmp_path / "plan.yaml"), "-o", str(tmp_path / "a.onnx"), "--save", str(tmp_path / "a.gz"))
    run("compile", model, *files, "--mode", "train")
    again = gz.load(tmp_path / "a.gz").module
    assert again.train()(image(2))[1].shape == (2, 4, 8, 8)
    run("plan", model, "--macs", "0.6", "-o", str(tmp_path / "b.yaml"), "--mode", "train", "--effort", "fast")
    assert "mid" in gz.Plan.load(tmp_path / "b.yaml").to_dict()["passes"][0]["cluster_merge"]["keep"]
