"""The pictures of the manual are those that are drawn, and its tutorials are notebooks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tools.manual.pages import ROOT
from tools.manual.pictures import FOLDER, pictures

NOTEBOOKS = ROOT / "tools" / "manual" / "notebooks.py"
TUTORIALS = sorted(path.stem for path in (ROOT / "docs" / "tutorials").glob("*.md"))


def test_pictures_are_those_that_are_drawn() -> None:
    drawn = pictures()
    assert {name: (FOLDER / name).read_text(encoding="utf-8") for name in drawn} == drawn
    for text in drawn.values():
        assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"


def written(folder: Path, *options: str) -> dict[str, dict[str, object]]:
    """The cells of each notebook, by its name."""
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[docs]'")
    pytest.importorskip("nbclient", reason="pip install -e '.[docs]'")
    paths = os.pathsep.join(str(ROOT / each) for each in (".", "passes"))
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, str(NOTEBOOKS), "--out", str(folder), *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {path.stem: nbformat.read(path, as_version=4) for path in folder.glob("*.ipynb")}
    for node in found.values():
        nbformat.validate(node)
    return {name: node.cells for name, node in found.items()}


def test_every_tutorial_is_a_notebook(tmp_path: Path) -> None:
    every = written(tmp_path)
    assert sorted(every) == TUTORIALS
    for cells in every.values():
        sources = [cell.source for cell in cells if cell.cell_type == "code"]
        assert any("import graphzip as gz" in source for source in sources)
        assert not any("```" in source for source in sources)
    files = [cell.source for cell in every["ship-tonight"] if cell.source.startswith("%%writefile ")]
    assert [source.split()[1] for source in files] == ["model.py", "train.py"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_notebooks_run(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ipykernel", reason="pip install -e '.[docs]'")
    if name == "hugging-face":
        pytest.importorskip("transformers")
    cells = written(tmp_path, "--execute", name)[name]
    told = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert "right" in told
    assert "Traceback" not in told
    assert "Error" not in told
