"""What PyTorch does not call public is used through one file, which says what for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphzip.graph import torch_private

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "graphzip" / "graph" / "torch_private.py"
FILES = sorted({*(ROOT / "graphzip").rglob("*.py"), *(ROOT / "passes").rglob("*.py")} - {HOME})
PYTHONS = {"_getframe", "_replace", "_fields"}  # of sys and of named tuples
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def private(dotted: str) -> bool:
    """Whether a name is one that PyTorch may move without a word."""
    parts = dotted.split(".")
    return parts[0] == "torch" and (dotted.startswith("torch.fx.experimental") or any(is_private(p) for p in parts))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_names() -> set[str]:
    """Private names that graphzip gives itself: functions, classes, fields, attributes."""
    found: set[str] = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


OWN = own_names()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_private_names_come_from_one_file(file: Path) -> None:
    assert not [name for name in imported(TREES[file]) if private(name)]
    reads = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.Attribute)]
    foreign = {node.attr for node in reads if is_private(node.attr) and node.attr not in OWN}
    assert foreign <= {*torch_private.ATTRIBUTES, *PYTHONS}


def test_nothing_is_listed_that_is_not_used() -> None:
    text = "\n".join(file.read_text(encoding="utf-8") for file in FILES)
    for name in torch_private.ATTRIBUTES:
        assert re.search(rf"\.{name}\b", text), name
    for name in set(torch_private.__all__) - {"ATTRIBUTES"}:
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [("torch._ops.OpOverload", True), ("torch.fx.experimental.sym_node", True), ("torch.fx.graph._PyTreeInfo", True),
     ("torch.utils.data", False), ("torch.__version__", False), ("numpy._core", False)],
)  # fmt: skip
def test_what_is_private(name: str, expected: bool) -> None:
    assert private(name) is expected
