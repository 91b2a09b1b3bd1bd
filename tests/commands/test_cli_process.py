"""The command line as a process: streams that are full, closed or of few characters, Ctrl-C, and code that is loud."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOUD = """
import atexit
import ctypes
import os
import subprocess
import sys
import torch

os.write(1, b"written to descriptor 1\\n")
print("printed")
print("printed past sys.stdout", file=sys.__stdout__)
subprocess.run(["echo", "said by a child"])
ctypes.CDLL(None).printf(b"printed by C\\n")
atexit.register(print, "said at exit")


def net():
    os.write(1, b"written while it is built\\n")
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).eval()
"""
SLOW = """
import pathlib
import time
import torch

pathlib.Path(__file__).with_suffix(".started").touch()


class Slow(torch.nn.Module):
    def forward(self, x):
        time.sleep(60)
        return x


def net():
    return Slow()
"""
PLAN = "version: 1\npasses: [cluster_merge]\n"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="streams and signals as POSIX has them")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "loud.py").write_text(LOUD)
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "passes"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **more}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "graphzip", *words]


def run(folder: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **options}
    return subprocess.run(command(*words), cwd=folder, check=False, **given)


def shell(folder: Path, line: str, **more: str) -> subprocess.CompletedProcess[bytes]:
    """A line of a shell in which `graphzip` is the command."""
    text = line.replace("graphzip", f"{sys.executable} -m graphzip", 1)
    return subprocess.run(["bash", "-c", text], cwd=folder, env=environment(**more), capture_output=True, check=False)


def quiet(done: subprocess.CompletedProcess[bytes]) -> str:
    said = done.stderr.decode(errors="replace")
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert "fault of graphzip" not in said
    return said


COMPILE = "compile loud.py:net --input 2x4 --plan plan.yaml -o slim.onnx"


def test_stdout_is_json_whatever_the_models_file_does(folder: Path) -> None:
    done = run(folder, *COMPILE.split(), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"]["changed"]
    said = quiet(done)
    for text in ("descriptor 1", "past sys.stdout", "by a child", "by C", "while it is built", "at exit"):
        assert text in said


@pytest.mark.parametrize("words", ["--version", "--help"])
def test_a_full_stdout(folder: Path, words: str) -> None:
    done = shell(folder, f"graphzip {words} > /dev/full")
    assert done.returncode == 1
    assert quiet(done) == "graphzip: error: stdout cannot be written: No space left on device\n"


def test_a_full_stdout_after_the_work(folder: Path) -> None:
    done = shell(folder, f"graphzip {COMPILE} > /dev/full")
    assert done.returncode == 1
    said = quiet(done)
    assert said.endswith(
        "stdout cannot be written: No space left on device; slim.onnx is written all the same\nsaid at exit\n"
    )
    assert (folder / "slim.onnx").exists()


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("graphzip --version >&-", 1, "graphzip: error: stdout cannot be written: it is closed\n"),
        ("graphzip prune 2>&-", 2, ""),
        ("graphzip prune 2>/dev/full", 1, ""),
        ("graphzip inspect keras:net 2>/dev/full", 2, ""),
        ("graphzip inspect keras:net <&- >&- 2>&-", 2, ""),
        ("set -o pipefail; graphzip --help | true", 1, ""),
        ("set -o pipefail; (sleep 0.2; graphzip --help) | true", 1, ""),
    ],
)
def test_closed_streams(folder: Path, line: str, code: int, said: str) -> None:
    done = shell(folder, line)
    if "| true" not in line or done.returncode:  # what reads may go before or after the text has come
        assert done.returncode == code
    assert quiet(done) == said


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_redirection_in_few_characters(folder: Path, encoding: str) -> None:
    (folder / "möd─l.py").write_text(LOUD)
    done = shell(folder, "graphzip inspect möd─l.py:net --input 2x4 > out.txt", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    quiet(done)
    lines = (folder / "out.txt").read_bytes().decode(encoding).splitlines()
    assert lines[0].split() == ["group", "channels", "producers", "consumers", "mergeable"]
    assert set(lines[1]) == ({"─"} if encoding.startswith("utf") else {"-"})


def test_names_that_are_no_text(folder: Path) -> None:
    name = b"n\xff.py"
    (folder / os.fsdecode(name)).write_text(LOUD)
    done = run(folder, "inspect", os.fsdecode(name) + ":net", "--input", "2x4")
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------- Ctrl-C


def started(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*words), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def interrupted(process: subprocess.Popen[bytes]) -> str:
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    return said.decode()


def test_ctrl_c_during_the_work(folder: Path) -> None:
    process = started(folder, "compile", "slow.py:net", "--input", "2x4", "--plan", "plan.yaml", "-o", "slim.onnx")
    while not (folder / "slow.started").exists():
        time.sleep(0.05)
    time.sleep(1.0)
    assert interrupted(process) == "graphzip: interrupted\n"
    left = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert left == {"loud.py", "slow.py", "plan.yaml", "slow.started"}


@pytest.mark.parametrize("after", [0.1, 0.3, 0.6, 1.2])
def test_ctrl_c_during_imports(folder: Path, after: float) -> None:
    (folder / "sitecustomize.py").write_text(HOOK.format(after=after))
    words = ["inspect", "slow.py:net", "--input", "2x4"]
    process = subprocess.Popen(
        command(*words),
        cwd=folder,
        env=environment() | {"PYTHONPATH": f"{folder}{os.pathsep}{environment()['PYTHONPATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said.decode() == "graphzip: interrupted\n"
    assert out == b""


@pytest.mark.parametrize("where", ["inspect text.py:net --input 2x4", "inspect m.onnx"])
def test_ctrl_c_in_text_that_is_executed(folder: Path, where: str) -> None:
    (folder / "text.py").write_text('exec("raise KeyboardInterrupt")\n')
    (folder / "sitecustomize.py").write_text(TEXT if where.endswith("onnx") else "")
    done = run(folder, *where.split(), env=environment(PYTHONPATH=f"{folder}{os.pathsep}{environment()['PYTHONPATH']}"))
    assert done.returncode == 130, done.stderr
    assert quiet(done) == "graphzip: interrupted\n"


TEXT = '''
import sys


class Interrupts:
    """Ctrl-C while graphzip's command is imported, in text that is executed."""

    def find_spec(self, name, path=None, target=None):
        if name == "graphzip.commands.cli":
            exec("raise KeyboardInterrupt")
        return None


sys.meta_path.insert(0, Interrupts())
'''
HOOK = '''
import os
import signal
import sys
import threading
import time


class Waits:
    """Once graphzip's command is imported, sends Ctrl-C after a while."""

    def __init__(self):
        self.begun = False

    def find_spec(self, name, path=None, target=None):
        if name == "graphzip.commands.cli" and not self.begun:
            self.begun = True
            threading.Thread(target=self.send, daemon=True).start()
        return None

    def send(self):
        time.sleep({after})
        os.kill(os.getpid(), signal.SIGINT)


sys.meta_path.insert(0, Waits())
'''
