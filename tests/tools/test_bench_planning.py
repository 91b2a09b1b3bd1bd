"""The benchmark of planning meets its budgets, keeps what it has measured, and says what it lacks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_tools import bench_modules

MODULES = ("planning", "compare_nets", "cifar")


@pytest.fixture(scope="module")
def tools() -> Any:
    yield from bench_modules(*MODULES)


@pytest.fixture
def stacks(tools: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The command line of a run on a stack of one block, whose score is its number of parameters."""

    def make(samples: int, tests: int, kept: Path) -> Any:
        subject = tools["planning"].residual_stack(1, 8, 4)
        subject.score = lambda net: {"accuracy": float(sum(each.numel() for each in net.parameters()))}
        return subject

    subjects = {"stack": tools["planning"].Kind(make, 256)}
    monkeypatch.setattr(tools["planning"], "SUBJECTS", subjects)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return ["planning", "--effort", "uniform", "fast", "--rows", str(tmp_path / "rows.jsonl")]


def test_rows_say_cost_and_quality_and_are_not_measured_again(
    tools: Any, stacks: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", stacks)
    assert tools["planning"].main() == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["effort"] for row in rows] == ["uniform", "fast"]
    for row in rows:
        assert row["macs"] <= 0.5
        assert row["passes"] == pytest.approx(sum(row["seconds"].values()) / row["forward"])
        assert row["accuracy"] > 0
    shown = capsys.readouterr().out
    assert "stack" in shown
    monkeypatch.setattr(tools["planning"], "measure", lambda *_, **__: pytest.fail("measured again"))
    assert tools["planning"].main() == 0
    assert capsys.readouterr().out == shown


def test_what_is_missing_is_said(
    tools: Any, stacks: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(*_: Any) -> Any:
        raise tools["planning"].Missing("pip install it")

    monkeypatch.setitem(tools["planning"].SUBJECTS, "stack", tools["planning"].Kind(make, 256))
    monkeypatch.setattr(sys, "argv", stacks)
    assert tools["planning"].main() == 0
    assert "skipped stack: pip install it" in capsys.readouterr().err


def test_growth_is_drawn(
    tools: Any, stacks: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tools["planning"], "DEPTHS", (1, 2))
    monkeypatch.setattr(sys, "argv", ["planning", "--effort", "fast", "--growth", str(tmp_path / "growth.svg")])
    assert tools["planning"].main() == 0
    assert (tmp_path / "growth.svg").read_text().startswith("<?xml")
    assert "residual blocks" in capsys.readouterr().out


def test_sentences_are_different_and_always_the_same(tools: Any) -> None:
    found = tools["planning"].sentences(50)
    assert len(set(found)) == 50
    assert found == tools["planning"].sentences(50)
    assert all(len(each.split()) >= 6 for each in found)


def test_embeddings_are_compared_with_the_original_ones(tools: Any) -> None:
    wanted = torch.randn(20, 8)
    found = tools["planning"].alike(wanted, lambda: 3.0 * wanted, ())
    assert found == pytest.approx({"cosine": 1.0, "spearman": 1.0})
    assert tools["planning"].alike(wanted, lambda: -wanted, ())["cosine"] == pytest.approx(-1.0)
