"""The demo: a real run, and the places it may not write to."""

from __future__ import annotations

import json
import time
from pathlib import Path

import onnx
import pytest
import torch
from typer.testing import CliRunner, Result

from graphzip.commands import cli, demo
from graphzip.errors import ExportError


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "kept"


@pytest.fixture(scope="module")
def result(kept: Path) -> tuple[Result, float]:
    start = time.process_time()
    return CliRunner().invoke(cli.app, ["demo", "--json", "--out", str(kept)]), time.process_time() - start


def test_demo_halves_the_network(result: tuple[Result, float]) -> None:
    ran, seconds = result
    assert ran.exit_code == 0, ran.stderr
    data = json.loads(ran.stdout)
    before, after = data["before"], data["after"]
    assert before["accuracy"] > 0.97
    assert after["accuracy"] > before["accuracy"] - 0.02
    assert after["params"] < 0.3 * before["params"]
    assert after["macs"] < 0.3 * before["macs"]
    assert after["bytes"] < 0.4 * before["bytes"]
    assert after["latency_ms"] < before["latency_ms"]
    assert seconds < 60


def test_demo_shows_its_channel_groups(result: tuple[Result, float]) -> None:
    groups = json.loads(result[0].stdout)["groups"]["groups"]
    assert {group["name"]: group["size"] for group in groups if group["mergeable"]} == {
        "stem": 32,
        "block1.conv1": 32,
        "block2.conv1": 64,
        "block2.conv2": 64,
        "block3.conv1": 64,
    }


def test_demo_keeps_its_files_where_asked(result: tuple[Result, float], kept: Path) -> None:
    data = json.loads(result[0].stdout)
    assert data["files"] == [str(kept / "before.onnx"), str(kept / "after.onnx")]
    for name, half in (("before", False), ("after", True)):
        path = kept / f"{name}.onnx"
        assert path.stat().st_size == data[name]["bytes"]
        shapes = {tuple(value.dims) for value in onnx.load(path).graph.initializer}
        assert ((32, 16, 3, 3) in shapes) == half
        assert ((64, 32, 3, 3) in shapes) != half


def test_settings_are_put_back() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with torch.no_grad():
        with demo._settings(3):
            assert torch.is_grad_enabled()
            torch.rand(1)
        assert not torch.is_grad_enabled()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(ExportError) as error:
        demo.run(out=tmp_path / "kept")
    assert str(error.value) == f"{tmp_path / 'kept'} is not a directory; give a directory for the two ONNX files"


def test_out_has_no_parent(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as error:
        demo.run(out=tmp_path / "no" / "kept")
    assert str(error.value) == (
        f"cannot write {tmp_path / 'no' / 'kept'}: the directory {tmp_path / 'no'} does not exist; create it first"
    )
    assert not (tmp_path / "no").exists()


def test_out_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ExportError, match=r"No space left on device; choose another directory$"):
        demo._keep((), tmp_path / "kept")


def test_factory_for_the_command_line() -> None:
    assert demo.digits_net()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
