"""The manual tells the truth: what runs on its pages prints what they show, what they name is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import graphzip
from graphzip.graph.meta import NodeMeta
from tools.floors import drawing
from tools.manual.pages import PAGES, ROOT, blocks, front_matter, leeway, play, tells

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
ARCHITECTURE = TEXTS["docs/architecture.md"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
OF_THE_HOUSE = {"graphzip", "passes", "tests", "tools", "docs", "examples"}


def running() -> list[Any]:
    """The pages that have something to run; those that take long are marked."""
    found = []
    for name, page in TEXTS.items():
        if any(block.language in {"python", "console"} and block.title is None for block in blocks(page)):
            slow = [pytest.mark.slow] if front_matter(page).get("tests") == "slow" else []
            found.append(pytest.param(name, id=name, marks=slow))
    return found


@pytest.mark.parametrize("name", running())
def test_a_page_prints_what_it_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in front_matter(TEXTS[name]).get("needs", "").split():
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        told = list(play(TEXTS[name], name))
    assert told
    measured = leeway(TEXTS[name])
    for block, shown, printed in told:
        assert tells(shown, printed, *measured), f"{name}:{block.line} shows\n{shown}\nand prints\n{printed}"


def test_every_block_has_a_language() -> None:
    for name, page in TEXTS.items():
        fences = re.findall(r"^ *```(.*)$", page, flags=re.MULTILINE)
        assert all(fences[0::2]), name
        assert not any(fences[1::2]), name


def test_the_drawing_is_that_of_the_floors() -> None:
    (drawn,) = [block.text for block in blocks(ARCHITECTURE) if block.language == "floors"]
    assert drawn == drawing().strip()


def test_every_key_of_metadata_is_explained() -> None:
    section = ARCHITECTURE[ARCHITECTURE.index("| key |") :].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE) == list(NodeMeta.__annotations__)


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_are_there(name: str) -> None:
    named = re.findall(r"(?<![\w/])[\w./-]+/(?:[\w-]+\.\w+)?(?=[`)\s])", TEXTS[name])
    places = [ROOT, ROOT / "graphzip", (ROOT / name).parent]
    paths = {each for each in named if each.split("/")[0] in OF_THE_HOUSE}
    assert [each for each in sorted(paths) if not any((place / each).exists() for place in places)] == []


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    targets = {each.partition("#")[0] for each in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in each}
    missing = [each for each in sorted(targets - {""}) if not ((ROOT / name).parent / each).exists()]
    assert missing == []


def test_the_changelog_knows_this_version() -> None:
    versions = re.findall(r"^## \[(.+?)\]", CHANGELOG, flags=re.MULTILINE)
    assert versions[0] == "Unreleased"
    kinds = set(re.findall(r"^### (.+)$", CHANGELOG, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert graphzip.__version__ in versions or graphzip.__version__ == "0.1.0"


def test_times_of_a_card_are_those_of_a_machine() -> None:
    card = (
        "     before   after\n─────\n"
        "latency, batch 1   0.02 ms (0.01-0.03)   0.01 ms   -50.0 %\n"
        "weights   129.2 kB   60.48 kB\n"
    )
    other = card.replace("0.02 ms (0.01-0.03)", "12.5 ms (11.0-13.0)").replace("-50.0", "+9.5").replace("─", "───")
    assert tells(card, other)
    assert not tells(card, other.replace("60.48", "61.48"))
    assert not tells(card, other.replace("before   after", "before"))
