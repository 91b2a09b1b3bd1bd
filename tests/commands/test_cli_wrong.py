"""Some three hundred wrong command lines: each is told what is wrong with it, and leaves every file as it was."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner
from wrong_calls import BROKEN, WRONG, write_files

from graphzip.commands import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wrong")
    write_files(made)
    return made


def state(folder: Path) -> dict[str, int]:
    return {path.name: path.lstat().st_mtime_ns for path in folder.iterdir() if path.name != "__pycache__"}


def refused(line: str, folder: Path, code: int, said: str) -> None:
    before = state(folder)
    result = CliRunner().invoke(cli.app, shlex.split(line.format(d=folder, long=f"/tmp/{'n' * 300}")))
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert said.format(d=folder) in result.stderr
    assert "fault of graphzip" not in result.stderr
    assert "inside graphzip" not in result.stderr
    assert "Traceback" not in result.stderr
    assert state(folder) == before


def short(row: tuple[str, str]) -> str:
    return row[0].replace("{d}/", "")[:100]


@pytest.mark.parametrize("row", WRONG, ids=short)
def test_wrong_usage(row: tuple[str, str], folder: Path) -> None:
    line, said = row
    for library in ("torchvision", "timm"):
        if f"{library}:" in line:
            pytest.importorskip(library)
    refused(line, folder, 2, said)


@pytest.mark.parametrize("row", BROKEN, ids=short)
def test_a_model_that_fails(row: tuple[str, str], folder: Path) -> None:
    line, said = row
    if "timm:" in line:
        pytest.importorskip("timm")
    refused(line, folder, 1, said)


def test_there_are_many() -> None:
    assert len({line for line, _ in WRONG}) >= 300
