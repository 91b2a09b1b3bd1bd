"""What all of a process shares stays as it was, and threads may work side by side."""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from process_state import changed, snapshot
from saved_cases import batches, network
from torch import nn

import graphzip as gz

HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])


def small(number: int) -> tuple[nn.Module, torch.Tensor]:
    """Models of three kinds, and an input."""
    if number % 3 == 0:
        torch.manual_seed(number)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(), torch.randn(2, 5, 8)
    return network(number).float().eval(), batches(number)[0].float()


def test_public_functions_leave_the_process_alone(tmp_path: Path) -> None:
    model, x = small(1)
    gz.compile(model, HALF, (x,)).export(tmp_path / "first.onnx")  # what is imported at first use may register things
    saved = tmp_path / "model.gz"
    done: dict[str, Any] = {}
    for name, function in {
        "channel_groups": lambda: gz.channel_groups(model, (x,)),
        "compile": lambda: done.update(compiled=gz.compile(model, HALF, (x,), calibration=[x])),
        "both forms": lambda: gz.compile(model, HALF, (x,), mode="train"),
        "export": lambda: done["compiled"].export(tmp_path / "model.onnx"),
        "verify": lambda: done["compiled"].verify(tmp_path / "model.onnx"),
        "save": lambda: done["compiled"].save(saved),
        "load": lambda: gz.load(saved),
        "plan_for": lambda: gz.plan_for(model, (x,), macs=0.6, calibration=[x]),
        "refused": lambda: refused(model, x[0]),
    }.items():
        before = snapshot()
        function()
        assert not changed(before, snapshot()), name


def refused(model: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(gz.GraphZipError):
        gz.compile(model, HALF, (x,))


@pytest.mark.parametrize("count", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_threads_compile_and_export_side_by_side(count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = [small(number) for number in range(count)]
    gz.compile(*_halved(models[0]))
    before = snapshot()

    def work(number: int) -> tuple[float, bool, Any]:
        model, x = models[number]
        eager = copy.deepcopy(model)
        plan = gz.Plan([gz.FoldBatchNorm()]) if number % 2 else gz.Plan([gz.ClusterMerge(keep=1.0)])
        compiled = gz.compile(model, plan, (x,))
        report = compiled.export(tmp_path / f"{number}.onnx")
        with torch.no_grad():
            moved = (compiled.module(x) - eager(x)).abs().max()
        return float(moved), report.verified, (*compiled.report.notes, *report.notes, *report.unchecked)

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(count)))
    assert snapshot()["threads alive"] == before["threads alive"]
    assert max(moved for moved, _, _ in found) < 1e-5
    assert all(verified for _, verified, _ in found)
    assert not any(notes for _, _, notes in found)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not changed(before, snapshot())


def _halved(made: tuple[nn.Module, torch.Tensor]) -> Any:
    return made[0], HALF, (made[1],)


def test_threads_go_on_while_code_of_the_user_runs() -> None:
    model, x = small(1)
    with ThreadPoolExecutor(1) as pool:

        def train(prepared: gz.Prepared, stage: str) -> None:
            assert pool.submit(gz.cost, model, (x,)).result(timeout=60).params

        gz.compile(model, HALF, (x,), train=train)
