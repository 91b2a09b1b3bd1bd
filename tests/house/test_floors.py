"""Imports go down: every module has a floor and imports from its own floor or from below."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tools.floors import FLOORS, floor_of, modules

ROOT = Path(__file__).resolve().parents[2]

FOR_PEOPLE = ("graphzip.commands", "graphzip.__main__")
"""What people see: built on the public names and on the two lowest floors alone."""

SHARED_BY_PASSES = ("graphzip_passes.base", "graphzip_passes.parts", "graphzip_passes.registry")
REGISTRY_OF_PASSES = "graphzip_passes.registry"


MODULES = modules()


def imports(source: str, module: str, *, package: bool = False, known: Iterable[str] = tuple(MODULES)) -> Iterator[str]:
    """The modules of both packages that `source`, the text of `module`, imports anywhere, also for types only."""
    known = set(known)
    here = module if package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = here.split(".")[: len(here.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in {"graphzip", "graphzip_passes"})


def upward(module: str, imported: Iterable[str]) -> list[str]:
    """Those of the imported modules that lie above `module`."""
    own = floor_of(module)
    assert own is not None
    return [name for name in imported if (floor := floor_of(name)) is None or floor > own]


def imported_by(module: str) -> list[str]:
    path = MODULES[module]
    return list(imports(path.read_text(encoding="utf-8"), module, package=path.name == "__init__.py"))


@pytest.mark.parametrize("module", [name for name in MODULES if name != "graphzip"])
def test_imports_go_down(module: str) -> None:
    assert floor_of(module) is not None, f"{module} has no floor; give it one in FLOORS"
    above = upward(module, imported_by(module))
    assert not above, f"{module} imports {above}, which lie above it"


def method_of(module: str) -> str:
    """The file or folder in which a pass is at home."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.startswith("graphzip_passes.") and name != REGISTRY_OF_PASSES]
)
def test_a_method_never_reaches_into_another(module: str) -> None:
    shared = {method_of(module), *SHARED_BY_PASSES}
    others = {
        name for name in imported_by(module) if name.startswith("graphzip_passes") and method_of(name) not in shared
    }
    assert not others, f"{module} imports {sorted(others)}; methods share only {SHARED_BY_PASSES}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(FOR_PEOPLE)])
def test_what_people_see_is_built_on_public_names(module: str) -> None:
    allowed = {"graphzip", *FLOORS[0], *FLOORS[1]}
    assert [name for name in imported_by(module) if name not in allowed and not name.startswith(FOR_PEOPLE)] == []


def test_labels_know_nothing_of_torch() -> None:
    tree = ast.parse(MODULES["graphzip.labels"].read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in names if name.split(".")[0] == "torch"]
    assert {name for name in names if name.startswith("graphzip")} <= {"graphzip.errors"}


def test_every_floor_has_a_module() -> None:
    inhabited = {floor_of(module) for module in MODULES}
    assert [FLOORS[number] for number in range(len(FLOORS)) if number not in inhabited] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from graphzip.api import compile", ["graphzip.api"]),
        ("import graphzip_passes.parts.clustering", ["graphzip_passes.parts.clustering"]),
        ("from graphzip.plan import plan", ["graphzip.plan.plan"]),
        ("from graphzip import Plan", ["graphzip"]),
        ("from . import conv", ["graphzip.ops.conv"]),
        ("from ..analysis.groups import ChannelGroup", ["graphzip.analysis.groups"]),
        ("def late():\n    import graphzip.commands.cli", ["graphzip.commands.cli"]),
        ("import numpy", []),
    ],
)
def test_imports_are_found(source: str, found: list[str]) -> None:
    known = ["graphzip.plan.plan", "graphzip.ops.conv"]
    assert list(imports(source, "graphzip.ops.linear", known=known)) == found


def test_an_import_that_goes_up_is_found() -> None:
    assert upward("graphzip.ops.linear", ["graphzip.labels", "graphzip.ops.conv", "graphzip.analysis.groups"]) == [
        "graphzip.analysis.groups"
    ]
    assert upward("graphzip.ops.linear", ["graphzip"]) == ["graphzip"]
    assert upward("graphzip.ops.linear", ["graphzip.nowhere"]) == ["graphzip.nowhere"]
