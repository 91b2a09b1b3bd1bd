"""What `tools/new_pass.py` writes is green at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from graphzip.plan.passes import PASS_OPTIONS
from graphzip_passes.base import PASSES
from tools.new_pass import write, write_built_in

ROOT = Path(__file__).resolve().parents[2]


def test_what_it_writes_is_green(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "new_pass.py"), "round_weights", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "round_weights.py"), str(tmp_path / "test_round_weights.py")]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    found = subprocess.run(pytest_, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "2 passed" in found.stdout, found.stdout
    for check in (["check"], ["format", "--check"]):
        ruff = subprocess.run([sys.executable, "-m", "ruff", *check, str(tmp_path)], capture_output=True, check=False)
        assert ruff.returncode == 0, ruff.stdout


def test_a_pass_that_graphzip_brings(tmp_path: Path) -> None:
    folders = tmp_path / "passes" / "graphzip_passes", tmp_path / "tests" / "passes"
    for folder in folders:
        folder.mkdir(parents=True)
    own, test = write_built_in("round_weights", tmp_path)
    assert (own, test) == (folders[0] / "round_weights.py", folders[1] / "test_round_weights.py")
    assert "import graphzip as gz" not in own.read_text()
    assert "gz.RoundWeights(least=2)" in test.read_text()
    names: dict[str, object] = {"__name__": "graphzip_passes.round_weights"}
    try:
        exec(compile(own.read_text(), str(own), "exec"), names)
        assert PASSES[PASS_OPTIONS["round_weights"]].function is names["round_weights"]
    finally:
        del PASSES[PASS_OPTIONS.pop("round_weights")]
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), str(own), str(test)]
        ruff = subprocess.run(command, capture_output=True, check=False)
        assert ruff.returncode == 0, ruff.stdout


@pytest.mark.parametrize("kind", ["RoundWeights", "2d", "a b", ""])
def test_a_name_that_is_none(kind: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is no name for a pass"):
        write(kind, tmp_path)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    write("round_weights", tmp_path)
    with pytest.raises(SystemExit, match="exists; remove it"):
        write("round_weights", tmp_path)
