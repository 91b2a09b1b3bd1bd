"""The tool that runs lists of models: results, refusals, and going on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from graphzip.commands.models import parse_shape
from tools.wild import MODELS

ROOT = Path(__file__).resolve().parents[2]

NETS = """
from torch import nn

def plain():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

class Undecided(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x
"""


def zoo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "zoo.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_results_and_refusals(tmp_path: Path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(NETS, encoding="utf-8")
    specs = [f"{file}:{name}@2x3" for name in ("plain", "Undecided")]
    out = ("--out", str(tmp_path / "rows.jsonl"))
    done = zoo(*specs, "--json", *out)
    assert done.returncode == 1, done.stderr
    plain, refused = map(json.loads, done.stdout.splitlines())
    assert (plain["model"], plain["channels"], plain["mergeable"]) == (specs[0], 10, 1.0)
    assert plain["worst"] <= 1e-12
    assert 0.3 < plain["params"] < 0.6
    assert refused["error"] == "TraceError"
    assert "nets.py:9" in refused["reason"]
    again = zoo(*specs, *out)
    assert "..." not in again.stderr, "a model was run again"
    assert "refused because" in again.stdout
    assert "TraceError" in again.stdout
    lines = zoo(*specs, *out, "--markdown").stdout.splitlines()
    assert lines[0].startswith("| model | channels | mergeable |")
    assert lines[2].startswith("| nets.py:plain@2x3 | 10 | 100.0% |")
    assert lines[3].endswith("| TraceError |")


def test_the_wild_models_are_many_and_of_many_kinds() -> None:
    assert len(MODELS) >= 80
    for name, model in MODELS.items():
        assert [parse_shape(text) for text in model.inputs.split(",")], name


@pytest.mark.slow
def test_a_wild_model_goes_all_the_way(tmp_path: Path) -> None:
    done = zoo("wild:expert_list", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["exported"] is True
    assert row["worst"] <= 1e-12
    assert not row["refused"]
