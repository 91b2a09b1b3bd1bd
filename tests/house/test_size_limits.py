"""What a person can hold in mind: sizes of folders, files, classes and functions, and names that mean one thing."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.floors import modules

ROOT = Path(__file__).resolve().parents[2]
MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
FOLDERS = ("graphzip", "passes", "tests", "tools", "examples")
OURS = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]

FILES_IN_A_FOLDER = 24
LINES_OF_A_FILE = 600
LINES_OF_A_CLASS = 400
LINES_OF_A_FUNCTION = 60
PARAMETERS = 10

BY_CONTRACT = {
    "graphzip.api.compile",
    "graphzip.api.prepare",
    "graphzip.commands.slim.compile_",
    "graphzip.compiled.Compiled.export",
    "graphzip.commands.slim.factorize",
    "graphzip.study.budget.WidthStudy.__init__",
    "graphzip.study.plans.plan_for",
}
"""Functions with more parameters, which users know by name: each is an option of the command line, or of a budget."""

SHARED_NAMES: set[str] = set()
"""What is still to be mended; nothing may be added."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(node: ast.AST, where: str) -> Iterator[tuple[str, Function]]:
    """Every function inside, by its dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield f"{where}.{child.name}", child
            yield from functions(child, f"{where}.{child.name}")
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{where}.{child.name}")
        else:
            yield from functions(child, where)


def lines_of(node: ast.ClassDef | Function) -> int:
    """Lines of a definition with its decorators."""
    assert node.end_lineno is not None
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    return node.end_lineno - first + 1


FUNCTIONS = [found for name, tree in TREES.items() for found in functions(tree, name)]


def test_no_folder_is_crowded() -> None:
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in OURS)
    assert {folder: count for folder, count in folders.items() if count > FILES_IN_A_FOLDER} == {}


def test_no_file_is_long() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in OURS}
    assert {file: length for file, length in lengths.items() if length > LINES_OF_A_FILE} == {}


def test_no_class_is_long() -> None:
    lengths = {
        f"{name}.{node.name}": lines_of(node)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert {name for name, length in lengths.items() if length > LINES_OF_A_CLASS} == set()


def test_no_function_is_long() -> None:
    lengths = {name: lines_of(node) for name, node in FUNCTIONS}
    assert {name: length for name, length in lengths.items() if length > LINES_OF_A_FUNCTION} == {}


def test_no_public_function_has_many_parameters() -> None:
    many = {}
    for name, node in FUNCTIONS:
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([each for each in given if each.arg not in {"self", "cls"}])
        is_public = node.name == "__init__" or not node.name.startswith("_")
        if is_public and count > PARAMETERS and name not in BY_CONTRACT:
            many[name] = count
    assert many == {}


def test_no_two_public_classes_share_a_name() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    assert {name for name, where in homes.items() if len(where) > 1} <= SHARED_NAMES


@pytest.mark.parametrize("name", sorted(BY_CONTRACT))
def test_what_the_contract_fixes_is_there(name: str) -> None:
    assert name in dict(FUNCTIONS)
