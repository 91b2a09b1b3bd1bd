"""The example's loop on real data: merging after it loses nothing, and the deviation falls in a straight line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")

FILE = Path(__file__).resolve().parents[2] / "examples" / "csgd_digits.py"
SPEC = importlib.util.spec_from_file_location("csgd_digits", FILE)
assert SPEC is not None
assert SPEC.loader is not None
example: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)


@pytest.mark.parametrize("net", sorted(example.NETS))
def test_merging_after_training_loses_nothing(net: str) -> None:
    training, test = example.digits()
    loader = DataLoader(training, batch_size=64, shuffle=True, drop_last=True)
    model = example.NETS[net]()
    example.train(model, loader, 4)
    images = test.tensors[0]
    prepared = gz.prepare(model, example.PLAN, (images[:2],))
    example.train(prepared, loader, 5)
    with torch.no_grad():
        expected = prepared(images)
    before = example.accuracy(prepared, test)
    compiled = prepared.convert()
    with torch.no_grad():
        found = compiled.module(images)
    assert float((found - expected).abs().max()) < 1e-5
    assert example.accuracy(compiled.module, test) == before > 0.95
    assert compiled.report.after.params < 0.3 * compiled.report.before.params
    assert_straight(prepared.history)


def assert_straight(history: gz.History) -> None:
    """On a logarithmic axis, down to the rounding of float32: within 1 % of the way of the line through its ends."""
    curve = [(record.step, np.log(record.deviation)) for record in history if record.deviation > 0]
    steps, logs = np.array([(step, log) for step, log in curve if log > curve[0][1] + np.log(1e-10)]).T
    assert len(steps) >= 5
    line = logs[0] + (logs[-1] - logs[0]) * (steps - steps[0]) / (steps[-1] - steps[0])
    assert np.abs(logs - line).max() < 1e-2 * abs(logs[-1] - logs[0])


def test_redundant_training_from_scratch() -> None:
    """Section 4.7: random weights, even clusters."""
    training, test = example.digits()
    loader = DataLoader(training, batch_size=64, shuffle=True, drop_last=True)
    plan = gz.Plan([gz.ClusterMerge(keep=0.5, clustering="even", strength="auto")])
    prepared = gz.prepare(example.NETS["plain"]().eval(), plan, (test.tensors[0][:2],))
    example.train(prepared, loader, 6)
    before = example.accuracy(prepared, test)
    assert example.accuracy(prepared.convert().module, test) == before > 0.9


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["csgd_digits.py", "--net", "plain", "--epochs", "2"])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["trained", "C-SGD", "merged"]
    assert lines[1].split()[1].rstrip(",") == lines[2].split()[1]
