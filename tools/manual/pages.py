"""Run the pages of the manual, as a reader does: from top to bottom, in an empty folder.

`python tools/manual/pages.py docs/how-to/minimize.md` tells where a page does not say what happens; with `--update` it
writes what was printed into the page. What runs:

- a `python` block, in the names of the blocks before it; the `text` block behind it is what it prints;
- a block with a `title="plan.yaml"` is not run: it is written to the file of that name;
- a `console` block: lines that begin with `$ graphzip` or `$ python FILE`, each followed by what it prints.

`...` in what a page shows stands for anything. Blocks of other languages (`sh`, `bash`, `yaml` without a title) are for
reading. In its front matter a page may say `tests: slow`, `needs: PACKAGE ...`, and `measured: PATTERN`: on lines where
the pattern is found numbers differ between machines; those in percent may lie two points apart (`near: 6` allows six),
others anywhere. The latencies and the memory of a card are not compared.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["PAGES", "ROOT", "Block", "blocks", "front_matter", "leeway", "play", "shown_after", "tells"]

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
)

MEASURED = "onnxruntime"
NEAR = 2.0
MACHINE = r"^(?:latency, batch|peak memory).*\n"
PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s?%")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it starts at, and the file that it is."""

    language: str
    text: str
    line: int
    title: str | None = None


def blocks(page: str) -> list[Block]:
    """All blocks of a page, in order."""
    found = re.finditer(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', page, flags=re.MULTILINE | re.DOTALL)
    return [
        Block(match[1], match[3].strip("\n"), page.count("\n", 0, match.start()) + 1, match[2] or None)
        for match in found
    ]


def front_matter(page: str) -> dict[str, Any]:
    """What stands between dashes at the top of a page."""
    found = re.match(r"---\n(.*?)\n---\n", page, flags=re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


def shown_after(block: Block, every: Sequence[Block]) -> str | None:
    """The output that the page shows for a Python block."""
    following = every[every.index(block) + 1 :]
    return following[0].text if following and following[0].language == "text" else None


def play(page: str, name: str) -> Iterator[tuple[Block, str, str]]:
    """Run a page in the working directory: each block that runs, what the page shows for it, what it printed.

    What a block of commands shows and prints has the commands, too.
    """
    names: dict[str, Any] = {"__name__": "page"}
    every = blocks(page)
    with _at_home():
        for block in every:
            if block.title:
                Path(block.title).write_text(f"{block.text}\n", encoding="utf-8")
            elif block.language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(compile(block.text, f"{name}, line {block.line}", "exec"), names)
                yield block, shown_after(block, every) or "", _tidy(printed.getvalue())
            elif block.language == "console":
                yield block, block.text, _tidy(_console(block.text))


def _tidy(printed: str) -> str:
    return "\n".join(line.rstrip() for line in printed.strip("\n").splitlines())


def _console(text: str) -> str:
    """The commands of a block, each with what it prints to stdout."""
    told = []
    for command in re.findall(r"^\$ (.+)$", text, flags=re.MULTILINE):
        program, *arguments = shlex.split(command)
        told.append(f"$ {command}")
        if program == "graphzip":
            told.append(_graphzip(arguments))
        elif program == "python":
            told.append(_python(arguments))
        else:
            raise ValueError(f"a page runs `graphzip` and `python` alone, not {program!r}; write it in an `sh` block")
    return "\n".join(told)


def _graphzip(arguments: list[str]) -> str:
    from typer.testing import CliRunner

    from graphzip.commands.cli import app

    result = CliRunner().invoke(app, arguments)
    if result.exit_code:
        raise RuntimeError(f"graphzip {shlex.join(arguments)} gave {result.exit_code}:\n{result.stderr}")
    return result.stdout.strip("\n")


def _python(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"python {shlex.join(arguments)} gave {done.returncode}:\n{done.stderr}")
    return done.stdout.strip("\n")


@contextlib.contextmanager
def _at_home() -> Iterator[None]:
    """Modules of the working directory can be imported, as by a reader who starts Python there; then they are gone."""
    here, path, known = Path.cwd(), list(sys.path), set(sys.modules)
    sys.path.insert(0, str(here))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known:
            home = getattr(sys.modules[name], "__file__", None)
            if home is not None and here in Path(home).parents:
                del sys.modules[name]


def leeway(page: str) -> tuple[str, float]:
    """On which lines of a page numbers are measured, and how many points percentages may lie apart there."""
    matter = front_matter(page)
    return matter.get("measured", MEASURED), float(matter.get("near", NEAR))


def tells(shown: str, printed: str, measured: str = MEASURED, near: float = NEAR) -> bool:
    """Whether what is shown is what was printed: `...` is anything, numbers on lines that match `measured` are near.

    Times and memory are those of a machine: of such lines, and of how wide they make their table, nothing is compared.
    """
    shown, printed = (_without_machine(text) for text in (shown, printed))
    one, other = (re.sub(rf"^.*(?:{measured}).*$", _masked, text, flags=re.MULTILINE) for text in (shown, printed))
    percents = [
        [float(each) for text in _measured(side, measured) for each in PERCENT.findall(text)]
        for side in (shown, printed)
    ]
    close = all(abs(mine - theirs) <= near for mine, theirs in zip(*percents, strict=False))
    return close and doctest.OutputChecker().check_output(f"{one}\n", f"{other}\n", doctest.ELLIPSIS)


def _without_machine(text: str) -> str:
    if not re.search(MACHINE, text, flags=re.MULTILINE):
        return text
    text = re.sub(MACHINE, "", text, flags=re.MULTILINE)
    return re.sub(r"─+", "─", re.sub(r"[ \t]+", " ", text))


def _masked(line: re.Match[str]) -> str:
    return re.sub(r"\d[\d.]*(?:e-?\d+)?", "#", line[0])


def _measured(text: str, measured: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(measured, line)]


def update(path: Path) -> int:
    """Write what a page prints into it; how many blocks were another."""
    page = path.read_text(encoding="utf-8")
    measured = leeway(page)
    played = _in_empty_folder(page, path)
    wrong = [(block, printed) for block, shown, printed in played if not tells(shown, printed, *measured)]
    lines = page.splitlines(keepends=True)
    for block, printed in reversed(wrong):
        fence = next(i for i in range(block.line, len(lines)) if lines[i] == "```\n")
        if block.language == "console":
            lines[block.line : fence] = [f"{printed}\n"]
        else:
            every = blocks(page)
            behind = every[every.index(block) + 1] if shown_after(block, every) is not None else None
            if behind is not None:
                end = next(i for i in range(behind.line, len(lines)) if lines[i] == "```\n")
                lines[behind.line - 1 : end + 1] = [f"```text\n{printed}\n```\n"] if printed else []
            else:
                lines[fence + 1 : fence + 1] = [f"\n```text\n{printed}\n```\n"]
    path.write_text("".join(lines), encoding="utf-8")
    return len(wrong)


def _in_empty_folder(page: str, path: Path) -> list[tuple[Block, str, str]]:
    import torch

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        os.chdir(folder)
        try:
            return list(play(page, path.name))
        finally:
            os.chdir(before)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--update", action="store_true", help="write what is printed into the page")
    given = parser.parse_args()
    failed = False
    for path in given.pages:
        if given.update:
            print(f"{path}: {update(path)} blocks written")
            continue
        page = path.read_text(encoding="utf-8")
        measured = leeway(page)
        for block, shown, printed in _in_empty_folder(page, path):
            if not tells(shown, printed, *measured):
                failed = True
                print(f"{path}:{block.line} shows\n{shown}\nand prints\n{printed}\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
