"""Writing whole or not at all: leftovers, links, modes, companions, and a process that is killed at any moment."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graphzip.errors import ExportError
from graphzip.files import companion, staged, write_text

ROOT = Path(__file__).resolve().parents[2]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_a_killed_writer_go_with_the_next_write(tmp_path: Path) -> None:
    code = (
        "import os, sys; from graphzip.errors import ExportError; from graphzip.files import staged\n"
        "with staged(sys.argv[1], ExportError) as file: file.write_text('half'); os.kill(os.getpid(), 9)"
    )
    (tmp_path / "[a]").write_text("old")
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "[a]")], cwd=ROOT, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(left_in(tmp_path)) == 2
    assert (tmp_path / "[a]").read_text() == "old"
    write_text(tmp_path / "[a]", "new", ExportError)
    assert left_in(tmp_path) == ["[a]"]


def test_a_writer_that_lives_is_left_alone(tmp_path: Path) -> None:
    with staged(tmp_path / "a", ExportError) as first:
        first.write_text("first")
        write_text(tmp_path / "a", "second", ExportError)
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first"
    assert left_in(tmp_path) == ["a"]


def test_what_a_link_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "real").write_text("old")
    (tmp_path / "link").symlink_to(Path("deep") / "real")
    (tmp_path / "dangling").symlink_to(Path("deep") / "later")
    write_text(tmp_path / "link", "new", ExportError)
    write_text(tmp_path / "dangling", "new", ExportError)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "deep" / "real").read_text() == (tmp_path / "deep" / "later").read_text() == "new"


@pytest.mark.skipif(os.name == "nt", reason="file modes are those of POSIX")
def test_the_mode_of_a_file_is_kept_and_a_new_one_has_the_usual(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_text(tmp_path / "a", "text", ExportError)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode
    for mode in (0o600, 0o640, 0o444):
        (tmp_path / "a").chmod(mode)
        write_text(tmp_path / "a", f"{mode:o}", ExportError)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
        assert (tmp_path / "a").read_text() == f"{mode:o}"


def write_pair(path: Path, text: str) -> None:
    with staged(path, ExportError) as file:
        data = companion(path.name)
        file.with_name(data).write_text(text * 2000)
        file.write_text(f"{text} {data}")


def test_companions_of_earlier_writes_go(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text("somebody else's")
    for text in "xyz":
        write_pair(tmp_path / "a", text)
        assert len(left_in(tmp_path)) == 3
    write_text(tmp_path / "a", "alone", ExportError)
    assert left_in(tmp_path) == ["a", "a.data"]


WRITER = """
import sys
from pathlib import Path
from graphzip.errors import ExportError
from graphzip.files import companion, staged, write_text
folder = Path(sys.argv[1])
number = int(sys.argv[2])
print("ready", flush=True)
while True:
    number += 1
    write_text(folder / "single", f"{number} " * 3000, ExportError)
    with staged(folder / "pair", ExportError) as file:
        data = companion("pair")
        file.with_name(data).write_text(f"{number} " * 3000)
        file.write_text(f"{number} {data}")
"""


def whole(folder: Path) -> int:
    """The number that the pair was written with, once everything has been found to fit."""
    single = (folder / "single").read_text().split()
    assert len(single) == 3000
    assert len(set(single)) == 1
    number, data = (folder / "pair").read_text().split()
    inside = (folder / data).read_text().split()
    assert inside == [number] * 3000
    return int(number)


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize("moments", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment(moments: int, tmp_path: Path) -> None:
    write_text(tmp_path / "single", "0 " * 3000, ExportError)
    with staged(tmp_path / "pair", ExportError) as file:
        data = companion("pair")
        file.with_name(data).write_text("0 " * 3000)
        file.write_text(f"0 {data}")
    rng, last = random.Random(0), 0
    for _ in range(moments):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(last)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(rng.random() * 0.4)
            writer.kill()
        number = whole(tmp_path)
        assert number >= last
        last = number
    assert last > 0
    for name in ("single", "pair"):
        write_text(tmp_path / name, "end", ExportError)
    assert left_in(tmp_path) == ["pair", "single"]
