"""`progress=`: what is told while something takes long, and how a bar shows it, on a terminal and elsewhere."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import graphzip as gz
from graphzip.progress import Bar, counted, step, told, unwatched, watched

DATA = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
FIT = gz.Plan([gz.ClusterMerge(keep=0.5, compensate="data")])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def test_everything_that_takes_long_tells(tmp_path: Path) -> None:
    said: list[tuple[int, int, str]] = []

    def progress(*what: Any) -> None:
        said.append(what)

    model = net()
    gz.plan_for(model, (DATA[0],), macs=0.5, calibration=DATA, progress=progress)
    compiled = gz.compile(model, FIT, (DATA[0],), calibration=DATA, evaluate=lambda _: 1.0, tune=2, progress=progress)
    compiled.export(tmp_path / "slim.onnx", progress=progress)
    gz.distill(compiled.module, model, DATA, progress=progress)
    texts = " | ".join(text for _, _, text in said)
    for wanted in ("measuring", "fitting 2.weight", "scoring: before", "tuning", "converting it to ONNX", "distilling"):
        assert wanted in texts
    assert all(0 <= done <= total and total >= 1 for done, total, _ in said)


def test_what_was_prepared_tells_when_it_is_converted() -> None:
    said: list[str] = []
    prepared = gz.prepare(net(), FIT, (DATA[0],), calibration=DATA, progress=lambda *what: said.append(what[2]))
    assert any("tracing" in text for text in said)
    said.clear()
    copy.deepcopy(prepared).convert()
    assert "carrying out cluster_merge" in said


def test_what_was_prepared_with_a_bar_can_be_pickled() -> None:
    prepared = gz.prepare(net(), FIT, (DATA[0],), calibration=DATA, progress=True)
    assert pickle.loads(pickle.dumps(prepared)).convert().report.changed


def test_by_default_it_is_in_the_log_alone(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "graphzip.progress"):
        gz.compile(net(), FIT, (DATA[0],), calibration=DATA)
    assert "carrying out cluster_merge" in caplog.messages
    assert capfd.readouterr() == ("", "")


def test_off_a_terminal_there_is_a_line_for_ten_per_cent(capfd: pytest.CaptureFixture[str]) -> None:
    with watched(True):
        step("a long step, which has no share")
        for _ in counted(range(40), "fitting", map(str, range(40))):
            pass
        for _ in counted(range(2), "comparing"):
            pass
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line.partition(", about")[0] for line in err.splitlines()]
    assert lines[:2] == ["graphzip: 10 % fitting: 4", "graphzip: 20 % fitting: 8"]
    assert len(lines) == 10  # what has two parts is not worth a line


def test_on_a_terminal_there_is_a_bar_with_the_time_that_is_left() -> None:
    sink = io.StringIO()
    console = Console(file=sink, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Bar(console) as bar:
        bar(0, 1, "tracing")
        bar(1, 4, "fitting [conv1]")
        bar._bars.refresh()
    assert "fitting [conv1]" in sink.getvalue()
    assert "1/4" in sink.getvalue()
    assert ":" in sink.getvalue()  # the time that is left


def test_parts_of_something_that_is_counted_are_not_told() -> None:
    said: list[str] = []
    with watched(lambda *what: said.append(what[2])):
        told(0, 2, "outside")
        with unwatched():
            told(0, 9, "inside")
        told(1, 2, "outside again")
    told(2, 2, "nobody hears this")
    assert said == ["outside", "outside again"]


def test_one_bar_is_enough(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with watched(lambda *what: said.append(what[2])), watched(True), watched(None), watched(False):
        told(1, 1, "all of it")
    assert said == ["all of it"]
    assert capfd.readouterr().err == ""


def test_an_interrupt_ends_the_bar() -> None:
    with pytest.raises(KeyboardInterrupt), watched(True):
        raise KeyboardInterrupt
    with watched(True):
        step("another bar")


@pytest.mark.slow
def test_in_a_notebook_there_is_a_bar_that_goes_when_it_is_done() -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[docs]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[docs]'")
    pytest.importorskip("ipykernel", reason="pip install -e '.[docs]'")
    begin = (
        "from graphzip.progress import Bar; bar = Bar().__enter__(); bar(0, 4, 'fitting'); bar(3, 4, 'fitting conv1')"
    )
    ended = "with Bar() as bar: bar(1, 4, 'comparing')"
    cells = [nbformat.v4.new_code_cell(source) for source in (begin, ended)]
    node = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(node, timeout=120, kernel_name="python3").execute()
    (shown,), (gone,) = (cell.outputs for cell in node.cells)
    assert "fitting" in shown["data"]["text/html"]
    assert "/4" in shown["data"]["text/html"]
    assert gone["data"]["text/html"] == ""
