"""What the first pages promise: two commands set everything up, the demo prints what they show, nothing grows again."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graphzip as gz
from graphzip.commands import demo
from tools.manual.pages import ROOT, blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
SHELL = (ROOT / "docs" / "how-to" / "command-line.md").read_text(encoding="utf-8")


def test_output_of_the_demo() -> None:
    every = blocks(INSTALL)
    shown = next(block.text for block in every if block.language == "text")
    model = demo.DigitsNet()
    example = (torch.zeros(2, 1, 8, 8),)
    assert shown.startswith(f"{gz.channel_groups(model, example)}\n\n")
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), example)
    costs = [line.split()[-6:] for line in str(compiled.report).splitlines()[2:4]]
    table = [line.split() for line in shown.splitlines()]
    assert ["parameters", *costs[0]] in table
    assert ["MACs", "per", "image", *costs[1]] in table
    assert {" ".join(row[:2]) for row in table[-5:]} == {
        "test accuracy", "parameters 151.3", "MACs per", "ONNX file", "onnxruntime, 64"
    }  # fmt: skip


def test_two_commands_do_all_the_setting_up() -> None:
    install, test = (block.text for block in blocks(README) if block.language == "sh" and "venv" in block.text)
    for command in (install, test):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert "\n" not in command
    assert install.endswith(".venv/bin/graphzip demo")
    runs = test.rpartition(" && ")[2].removeprefix(".venv/bin/")
    assert f"\n{runs}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_command_and_exit_code_is_explained() -> None:
    for command in ("inspect", "plan", "compile", "minimize", "demo"):
        assert f"| `graphzip {command}" in SHELL
    for code in (0, 1, 2, 3, 4):
        assert re.search(rf"\b{code} ", SHELL[SHELL.index("Exit codes:") :])


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 170


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """`pip install -e ".[docs]"` brings what it needs."""
    for package in ("material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reference = "".join(path.read_text() for path in (tmp_path / "site" / "reference").rglob("index.html"))
    assert [name for name in gz.__all__ if f'id="graphzip.{name}"' not in reference] == ["__version__"]
