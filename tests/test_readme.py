"""The README tells the truth: its Python and its commands run, and print what it shows."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import graphzip as gz
from graphzip import cli, demo

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line it starts at."""

    language: str
    text: str
    line: int


def blocks() -> list[Block]:
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2].strip("\n"), README.count("\n", 0, match.start()) + 1) for match in found]


BLOCKS = blocks()


def shown_after(block: Block) -> str | None:
    """The output that the README shows for a block."""
    following = BLOCKS[BLOCKS.index(block) + 1 :]
    return following[0].text if following and following[0].language == "text" else None


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, str]]:
    """What each Python block prints, by its line; they run in order and share their names, as a reader's do."""
    pytest.importorskip("torchvision")
    names: dict[str, Any] = {}
    outputs = {}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(tmp_path_factory.mktemp("readme"))
        torch.manual_seed(0)
        for block in of("python"):
            sink = io.StringIO()
            with contextlib.redirect_stdout(sink):
                exec(compile(block.text, f"README.md, line {block.line}", "exec"), names)
            outputs[block.line] = sink.getvalue().strip("\n")
        yield outputs


@pytest.mark.parametrize("block", of("python"), ids=lambda block: f"line {block.line}")
def test_python(printed: dict[int, str], block: Block) -> None:
    assert printed[block.line] == (shown_after(block) or "")


def without_measured_numbers(text: str) -> list[str]:
    """Lines of the text; in those on onnxruntime every number is `#`, for it differs between machines."""
    return [re.sub(r"[\d.]+(e-\d+)?", "#", line) if "onnxruntime" in line else line for line in text.splitlines()]


@pytest.mark.parametrize("block", of("console"), ids=lambda block: f"line {block.line}")
def test_commands(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    (plan,) = of("yaml")
    Path("plan.yaml").write_text(plan.text)
    command, _, shown = block.text.partition("\n")
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "graphzip"
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.stderr
    assert without_measured_numbers(result.stdout.strip("\n")) == without_measured_numbers(shown)


def test_output_of_the_demo() -> None:
    (block,) = [block for block in of("sh") if block.text.endswith("graphzip demo")]
    shown = shown_after(block)
    assert shown is not None
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
    install, test = (block.text for block in of("sh"))
    for command in (install, test):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert "\n" not in command
    runs = test.rpartition(" && ")[2].removeprefix(".venv/bin/")
    assert f"\n{runs}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_command_and_exit_code_is_explained() -> None:
    for command in ("inspect", "compile", "demo"):
        assert f"| `graphzip {command}" in README
    for code in (0, 1, 2, 3, 4):
        assert re.search(rf"\b{code} ", README[README.index("Exit codes:") :])
