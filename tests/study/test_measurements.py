"""The file that keeps measurements: damaged lines, several writers at once, and what tells one study from another."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphzip import PlanError
from graphzip.study.measurements import Measurements, beside_others, identity

KEY = "k" * 64


def line(**changed: Any) -> str:
    entry = {"graphzip": "measurement", "study": KEY, "group": "conv1", "width": 4, "loss": 0.25}
    return json.dumps(entry | changed)


def test_what_is_put_is_there_again(tmp_path: Path) -> None:
    first = Measurements(tmp_path / "cache", KEY)
    first.put("conv1", 4, 0.25)
    first.put("conv1", 4, 0.5)
    first.put("größe#2", 1, 0.0)
    again = Measurements(tmp_path / "cache", KEY)
    assert (again.get("conv1", 4), again.get("größe#2", 1), again.get("conv1", 5)) == (0.5, 0.0, None)
    assert Measurements(tmp_path / "cache", "other").get("conv1", 4) is None


@pytest.mark.parametrize("beside", [False, True])
def test_a_file_of_other_studies_alone_is_said_where_that_is_not_expected(
    beside: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text(line() + "\n")
    with beside_others() if beside else contextlib.nullcontext():
        assert not len(Measurements(tmp_path / "cache", "other"))
    assert ("measured with another model" in caplog.text) != beside


# ------------------------------------------------------------------------------------------------- damage

DAMAGED: dict[str, str] = {
    "NaN": line(loss=math.nan),
    "infinite": line(loss=math.inf),
    "minus infinite": line(loss=-math.inf),
    "negative": line(loss=-1e-9),
    "an endless loss": line().replace("0.25", "1e999"),
    "a flag for a loss": line(loss=True),
    "text for a loss": line(loss="0.25"),
    "no loss": line(loss=None),
    "a list for a loss": line(loss=[0.25]),
    "an endless number": line().replace("0.25", "9" * 5000),
    "no width": line(width=0),
    "a negative width": line(width=-4),
    "a width that is no int": line(width=4.0),
    "a flag for a width": line(width=True),
    "text for a width": line(width="4"),
    "no group": line(group=None),
    "a number for a group": line(group=3),
    "a list for a group": line(group=["conv1"]),
    "no study": line(study=None),
    "a mapping for a study": line(study={}),
    "without its group": json.dumps({"graphzip": "measurement", "study": KEY, "width": 4, "loss": 0.25}),
    "a list": "[1, 2, 3]",
    "a number": "3",
    "text": "nothing of use",
    "half a line": line()[:-9],
    "two in one": line() + line(),
    "a deep list": "[" * 100_000,
    "a control character": line().replace("conv1", "conv\x01"),
    "no text": "\udcff\udcfe",
    "zeros": "\0" * 4096,
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("ending", ["\n", ""], ids=["whole", "cut off"])
def test_a_damaged_line_is_passed_over(
    name: str, ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache"
    text = f"{line(group='before', loss=0.125)}\n{DAMAGED[name]}{ending}"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with caplog.at_level(logging.WARNING):
        found = Measurements(path, KEY)
    assert "1 lines that are damaged or no losses" in caplog.text
    assert (found.get("before", 8), found.get("before", 4), found.get("conv1", 4)) == (None, 0.125, None)
    found.put("after", 2, 0.5)
    again = Measurements(path, KEY)
    assert (again.get("before", 4), again.get("after", 2)) == (0.125, 0.5)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{", b'{"graphzip"', b'{"graphzip": "measurement"'])
def test_a_file_that_is_hardly_begun_goes_on(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(content)
    if content == b"\n\n":
        with pytest.raises(PlanError, match="is not a file of measurements"):
            Measurements(tmp_path / "cache", KEY)
        return
    for width in (4, 2):
        Measurements(tmp_path / "cache", KEY).put("conv1", width, 0.25)
    found = Measurements(tmp_path / "cache", KEY)
    assert (found.get("conv1", 4), found.get("conv1", 2)) == (0.25, 0.25)


@pytest.mark.parametrize(
    "content",
    [b"version: 1\n", b"[]", b'{\n  "mine": 1\n}\n', b"\xff\xfe", b'{"losses": {}}', b"[" * 100_000, b"x" * 99],
)
def test_a_file_of_something_else_is_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(content)
    with pytest.raises(PlanError, match="mine is not a file of measurements; name another one"):
        Measurements(tmp_path / "mine", KEY)
    assert (tmp_path / "mine").read_bytes() == content


def test_a_file_that_cannot_be_written_keeps_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = Measurements(tmp_path / "cache", KEY)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graphzip.study.measurements.os.write", full)
    found.put("conv1", 4, 0.25)
    assert found.get("conv1", 4) == 0.25
    assert "No space left on device" in caplog.text


# ------------------------------------------------------------------------------------------------- several writers

WRITERS, EACH = 4, 150


def write(path: str, number: int) -> None:
    found = Measurements(path, KEY)
    for width in range(1, EACH + 1):
        found.put(f"{'group' * 40}.{number}", width, width / EACH)


def test_several_processes_write_one_file(tmp_path: Path) -> None:
    path = str(tmp_path / "cache")
    context = multiprocessing.get_context("fork" if hasattr(multiprocessing, "get_all_start_methods") else None)
    writers = [context.Process(target=write, args=(path, number)) for number in range(WRITERS)]
    for each in writers:
        each.start()
    for each in writers:
        each.join(60)
    assert [each.exitcode for each in writers] == [0] * WRITERS
    found = Measurements(path, KEY)
    for number in range(WRITERS):
        for width in range(1, EACH + 1):
            assert found.get(f"{'group' * 40}.{number}", width) == width / EACH
    assert len(Path(path).read_bytes().splitlines()) == WRITERS * EACH


# ------------------------------------------------------------------------------------------------- identity


def scored(factor: float, data: Any = None) -> Callable[[nn.Module], float]:
    def evaluate(module: nn.Module) -> float:
        return factor * len(data or "")

    return evaluate


class Judge:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, module: nn.Module) -> float:
        return float(self.value)

    def method(self, module: nn.Module) -> float:
        return float(self.value)


def helper_one() -> float:
    return 1.0


def helper_two() -> float:
    return 2.0


def of_helper(helper: Callable[[], float]) -> Callable[[nn.Module], float]:
    return lambda module: helper()


def with_default(value: Any) -> Callable[..., float]:
    def evaluate(module: nn.Module, *, threshold: Any = value) -> float:
        return 0.0

    return evaluate


def weighted(value: float) -> nn.Module:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, value)
    nn.init.zeros_(layer.bias)
    return layer


PAIRS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "a number in a closure": lambda which: scored((1.0, 2.0)[which]),
    "an int and a float": lambda which: scored((1, 1.0)[which]),
    "a list": lambda which: scored(1.0, ([1, 2], [2, 1])[which]),
    "a mapping": lambda which: scored(1.0, ({"a": 1}, {"a": 2})[which]),
    "a tensor": lambda which: scored(1.0, (torch.zeros(2), torch.ones(2))[which]),
    "the shape of a tensor": lambda which: scored(1.0, (torch.zeros(2, 3), torch.zeros(3, 2))[which]),
    "the kind of a tensor": lambda which: scored(1.0, (torch.zeros(2), torch.zeros(2).int())[which]),
    "an array": lambda which: scored(1.0, (np.zeros(2), np.ones(2))[which]),
    "a model": lambda which: scored(1.0, (weighted(1.0), weighted(2.0))[which]),
    "an object": lambda which: Judge((1, 2)[which]),
    "an object's method": lambda which: Judge((1, 2)[which]).method,
    "a partial": lambda which: functools.partial(scored, (1.0, 2.0)[which]),
    "a keyword of a partial": lambda which: functools.partial(scored, data=(1.0, 2.0)[which]),
    "another function inside": lambda which: of_helper((helper_one, helper_two)[which]),
    "a default": lambda which: with_default((1, 2)[which]),
    "a not-a-number": lambda which: scored((float("nan"), 0.0)[which]),
    "the sign of zero": lambda which: scored((0.0, -0.0)[which]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_computes_something_else_is_another_one(name: str) -> None:
    made = PAIRS[name]
    assert identity(made(0)) == identity(made(0))
    assert identity(made(0)) != identity(made(1))


def test_what_is_in_itself_has_an_identity() -> None:
    data: list[Any] = [1]
    data.append(data)
    assert identity(scored(1.0, data)) == identity(scored(1.0, data))


@pytest.mark.parametrize(
    "value",
    [iter([1]), (number for number in range(3)), open(__file__, "rb")],  # noqa: SIM115
    ids=["iterator", "generator", "file"],
)
def test_what_cannot_be_told_apart_is_said(value: Any) -> None:
    with pytest.raises(ValueError, match=type(value).__name__):
        identity(scored(1.0, value))
