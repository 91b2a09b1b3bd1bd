"""Directories of several files: whole or not at all, with what others put there, and where nothing can be exchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphzip import folders
from graphzip.errors import ExportError
from graphzip.folders import staged_folder

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("a.onnx", "b.onnx")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="directories are exchanged on Linux")


def write(folder: Path, text: str) -> str:
    with staged_folder(folder, NAMES, ExportError) as (fresh, data):
        (fresh / data).write_text(text)
        for name in NAMES:
            (fresh / name).write_text(f"{text} {data}")
    return data


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def whole(folder: Path) -> str:
    """The text that all files were written with."""
    found = set()
    for name in NAMES:
        text, data = (folder / name).read_text().split()
        assert (folder / data).read_text() == text
        found.add(text)
    (text,) = found
    return text


def test_a_directory_is_made_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for text in ("one", "two", "three"):
        write(folder, text)
        assert whole(folder) == text
        assert left_in(tmp_path) == ["out"]
        assert len(left_in(folder)) == 3


@LINUX
def test_a_replaced_directory_keeps_its_mode_and_is_another_one(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, "one")
    folder.chmod(0o750)
    (folder / "a.onnx").chmod(0o600)
    before = folder.stat()
    assert write(folder, "two") == "weights.data"
    assert folder.stat().st_ino != before.st_ino
    assert folder.stat().st_mode == before.st_mode
    assert (folder / "a.onnx").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("other", ["notes.txt", "c.onnx", "deep/file", "link"])
def test_what_others_put_there_stays(other: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, "one")
    place = folder / other
    place.parent.mkdir(exist_ok=True)
    if other == "link":
        place.symlink_to("a.onnx")
    else:
        place.write_text("theirs")
    number = folder.stat().st_ino
    for text in ("two", "three"):
        write(folder, text)
        assert whole(folder) == text
    assert folder.stat().st_ino == number
    assert place.read_text() == (f"three {(folder / 'a.onnx').read_text().split()[1]}" if other == "link" else "theirs")
    assert (folder / "weights.data").exists() == (other == "c.onnx")


def test_without_an_exchange_data_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Path) -> None:
        raise OSError("not here")

    monkeypatch.setattr(folders, "_exchange", refuse)
    folder = tmp_path / "out"
    names = [write(folder, text) for text in ("one", "two", "three")]
    assert len(set(names)) == 3
    assert whole(folder) == "three"
    assert left_in(folder) == ["a.onnx", "b.onnx", names[-1]]


def test_a_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert whole(tmp_path / "real") == "two"


def fail(folder: Path) -> None:
    with staged_folder(folder, NAMES, ExportError) as (fresh, data):
        (fresh / data).write_text("half")
        raise RuntimeError


def test_nothing_changes_where_writing_fails(tmp_path: Path) -> None:
    write(tmp_path / "old", "one")
    for folder in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(RuntimeError):
            fail(folder)
    assert left_in(tmp_path) == ["old"]
    assert whole(tmp_path / "old") == "one"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param("exchange", marks=LINUX), "one by one"])
def test_real_exports_that_are_killed_leave_whole_files(how: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "workers" / "killed_worker.py"),
        str(tmp_path),
        "200",
        how,
    ]
    paths = os.pathsep.join(str(ROOT / each) for each in (".", "passes", "tests/support", "tests/support/networks"))
    found = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=900
    )
    assert found.returncode == 0, found.stderr
    assert "0 lost, 0 mixed" in found.stdout


def test_places_that_cannot_be_written_are_told_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "b.onnx").mkdir()
    (tmp_path / "a.onnx").write_text("old")
    with pytest.raises(ExportError, match=r"b\.onnx is a directory"), staged_folder(tmp_path, NAMES, ExportError):
        raise AssertionError
    assert (tmp_path / "a.onnx").read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_the_working_directory_is_not_exchanged_and_links_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "a.onnx").write_text("old")
    (here / "a.onnx").symlink_to(tmp_path / "a.onnx")
    monkeypatch.chdir(here)
    with staged_folder(Path(), NAMES, ExportError) as (fresh, data):
        for name in (*NAMES, data):
            (fresh / name).write_text(f"new {name}")
    assert Path.cwd() == here
    assert (here / "b.onnx").read_text() == "new b.onnx"
    assert (here / "a.onnx").is_symlink()
    assert (tmp_path / "a.onnx").read_text() == "new a.onnx"
