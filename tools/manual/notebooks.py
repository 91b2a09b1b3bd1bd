"""Write the tutorials as notebooks: `python tools/manual/notebooks.py --out notebooks [--execute [NAME ...]]`.

Python blocks become cells, files and commands cells of Jupyter's own (`%%writefile`, `!`). What a page shows as output
is left out, for a notebook has its own once it is executed.
"""

from __future__ import annotations

import argparse
import re
from itertools import pairwise
from pathlib import Path

import nbclient
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pages import ROOT, Block, blocks

__all__ = ["TUTORIALS", "execute", "notebook"]

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


def notebook(page: str) -> nbformat.NotebookNode:
    """A page as a notebook."""
    page = re.sub(r"\A---\n.*?\n---\n", "", page, flags=re.DOTALL)
    every = blocks(page)
    outputs = {later for block, later in pairwise(every) if block.language == "python" and later.language == "text"}
    cells, prose = [], []
    for part in re.split(r"(^```.*?^```$\n?)", page, flags=re.MULTILINE | re.DOTALL):
        if not part.startswith("```"):
            prose.append(part)
            continue
        block = every.pop(0)
        source = _source(block)
        if source is not None:
            cells += [*_markdown(prose), new_code_cell(source)]
            prose = []
        elif block not in outputs:
            prose.append(part)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=[*cells, *_markdown(prose)], metadata={"kernelspec": kernel})


def _markdown(parts: list[str]) -> list[nbformat.NotebookNode]:
    text = "".join(parts).strip()
    return [new_markdown_cell(text)] if text else []


def _source(block: Block) -> str | None:
    """What a cell holds, or nothing where the block is for reading."""
    if block.title:
        return f"%%writefile {block.title}\n{block.text}"
    if block.language == "python":
        return block.text
    if block.language == "console":
        commands = re.findall(r"^\$ (.+)$", block.text, flags=re.MULTILINE)
        return "\n".join(f"!{'python -m ' if each.startswith('graphzip ') else ''}{each}" for each in commands)
    return None


def execute(node: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run every cell in a folder; raises `nbclient.exceptions.CellExecutionError` where one fails."""
    client = nbclient.NotebookClient(node, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}})
    done: nbformat.NotebookNode = client.execute()
    return done


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--execute",
        nargs="*",
        metavar="NAME",
        help="run them, or those of these names, in the folder they are written to",
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for path in TUTORIALS:
        node = notebook(path.read_text(encoding="utf-8"))
        if given.execute is not None and (not given.execute or path.stem in given.execute):
            node = execute(node, given.out)
        nbformat.write(node, given.out / f"{path.stem}.ipynb")
        print(given.out / f"{path.stem}.ipynb")


if __name__ == "__main__":
    main()
