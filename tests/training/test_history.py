"""The records of a training, and their plot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graphzip as gz
from graphzip.training.history import EVERY, MOST, History, Record


def ready(**options: object) -> gz.Prepared:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    plan = gz.Plan([gz.ClusterMerge(**{"keep": 0.5, "strength": 2.0, **options})])
    return gz.prepare(model, plan, (torch.randn(2, 3, 8, 8),))


def train(prepared: gz.Prepared, steps: int, *, told: bool = False) -> None:
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.05)
    for _ in range(steps):
        loss = prepared(torch.randn(4, 3, 8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if told:
            prepared.record(loss, accuracy=0.5)


def test_an_optimizer_records_the_deviation_of_every_group() -> None:
    prepared = ready()
    start = prepared.deviation()
    train(prepared, 2 * EVERY + 1)
    assert [record.step for record in prepared.history] == [0, EVERY, 2 * EVERY]
    assert all(list(record.groups) == ["0", "2"] for record in prepared.history)
    assert prepared.history[0].deviation == pytest.approx(start)
    assert prepared.history[1].deviation == pytest.approx(start * 0.9 ** (2 * EVERY), rel=1e-3)
    assert prepared.history[-1].loss is None
    prepared.convert()
    assert [record.step for record in prepared.history] == [0, EVERY, 2 * EVERY, 2 * EVERY + 1]


def test_what_is_told_is_kept() -> None:
    prepared = ready()
    train(prepared, EVERY, told=True)
    assert [record.step for record in prepared.history] == list(range(EVERY + 1))
    assert all(record.loss is not None and record.values == {"accuracy": 0.5} for record in prepared.history[1:])
    found = json.loads(json.dumps(prepared.history.to_dict()))["records"]
    assert found[-1] == {
        "step": EVERY,
        "groups": dict(prepared.history[-1].groups),
        "loss": prepared.history[-1].loss,
        "values": {"accuracy": 0.5},
        "residual": prepared.history[-1].residual,
    }


def test_many_records_are_thinned_out() -> None:
    history = History()
    for step in range(3 * MOST * EVERY):
        if step == 7:
            history.add(Record(step, {"a": 1.0}, loss=1.0))
        elif history.is_due(step):
            history.add(Record(step, {"a": 1.0}))
    assert len(history) <= MOST + 1
    assert [record.step for record in history[:3]] == [0, 7, 4 * EVERY]


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    prepared = ready()
    train(prepared, 12, told=True)
    prepared.history.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    prepared.history.plot(tmp_path / "curves.svg")
    assert "sum of squared kernel deviations" in (tmp_path / "curves.svg").read_text()
    with pytest.raises(gz.GraphZipError, match=r"cannot plot to .*curves\.xyz"):
        prepared.history.plot(tmp_path / "curves.xyz")


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(gz.GraphZipError, match="there is no record to plot; train with"):
        ready().history.plot(tmp_path / "curves.png")


def test_a_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    prepared = ready()
    prepared.record()
    with pytest.raises(gz.MissingDependencyError, match=r'pip install "graphzip\[plot\]"'):
        prepared.history.plot(tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
