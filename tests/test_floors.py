"""Imports go down: every module has a floor and imports from its own floor or from below."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS: tuple[tuple[str, ...], ...] = (
    ("graphzip.alone", "graphzip.errors", "graphzip.graph.torch_private", "graphzip.locks", "graphzip.version"),
    (
        "graphzip.arguments",
        "graphzip.files",
        "graphzip.folders",
        "graphzip.guard",
        "graphzip.numeric",
        "graphzip.tables",
    ),
    ("graphzip.graph",),
    ("graphzip.labels",),
    ("graphzip.ops",),
    ("graphzip.analysis",),
    (
        "graphzip.allocation",
        "graphzip.distill",
        "graphzip.history",
        "graphzip.picture",
        "graphzip.plan",
        "graphzip.plan_checks",
        "graphzip.plan_yaml",
        "graphzip.results",
    ),
    ("graphzip.rewrite",),
    ("graphzip.export",),
    ("graphzip.calibration", "graphzip.compiled"),
    ("graphzip_passes",),
    ("graphzip.prepared",),
    ("graphzip.api", "graphzip.budget", "graphzip.measurements", "graphzip.widening"),
    ("graphzip.grow",),
    ("graphzip",),
    ("graphzip.models", "graphzip.weights"),
    ("graphzip.demo", "graphzip.report"),
    ("graphzip.terminal",),
    ("graphzip.usage",),
    ("graphzip.cli",),
    ("graphzip.__main__",),
)
"""From the lowest; a package stands for all its modules, `graphzip` alone for its face (`graphzip/__init__.py`)."""

FOR_PEOPLE = (
    "graphzip.models",
    "graphzip.weights",
    "graphzip.report",
    "graphzip.demo",
    "graphzip.terminal",
    "graphzip.usage",
    "graphzip.cli",
    "graphzip.__main__",
)
"""What people see: built on the public names and on the two lowest floors alone."""

SHARED_BY_PASSES = (
    "graphzip_passes.activations",
    "graphzip_passes.atom_fit",
    "graphzip_passes.base",
    "graphzip_passes.centripetal",
    "graphzip_passes.clustering",
    "graphzip_passes.conv_layers",
    "graphzip_passes.embedding",
    "graphzip_passes.elimination",
    "graphzip_passes.input_moments",
    "graphzip_passes.layer_rows",
    "graphzip_passes.refit",
    "graphzip_passes.segments",
    "graphzip_passes.shared_fit",
    "graphzip_passes.shared_layers",
    "graphzip_passes.similarity",
    "graphzip_passes.trimmed",
    "graphzip_passes.variance",
    "graphzip_passes.widths",
    "graphzip_passes.zip_channels",
    "graphzip_passes.zip_inputs",
    "graphzip_passes.zip_layers",
    "graphzip_passes.zip_readings",
    "graphzip_passes.zip_solve",
    "graphzip_passes.zip_weights",
)
TABLE_OF_PASSES = "graphzip_passes.table"


def files() -> dict[str, Path]:
    """Every module of both packages, by its dotted name."""
    found = {}
    for folder, package in ((ROOT, "graphzip"), (ROOT / "passes", "graphzip_passes")):
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = files()


def floor_of(module: str) -> int | None:
    """The number of the floor whose name is the longest prefix of `module`."""
    if module == "graphzip":
        return next(number for number, names in enumerate(FLOORS) if names == ("graphzip",))
    for number, names in enumerate(FLOORS):
        if any(module == name or module.startswith(f"{name}.") for name in names if name != "graphzip"):
            return number
    return None


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


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.startswith("graphzip_passes.") and name != TABLE_OF_PASSES]
)
def test_a_pass_never_reaches_into_another(module: str) -> None:
    others = {name for name in imported_by(module) if name.startswith("graphzip_passes")} - {module, *SHARED_BY_PASSES}
    assert not others, f"{module} imports {sorted(others)}; passes share only {SHARED_BY_PASSES}"


@pytest.mark.parametrize("module", FOR_PEOPLE)
def test_what_people_see_is_built_on_public_names(module: str) -> None:
    allowed = {"graphzip", *FOR_PEOPLE, *FLOORS[0], *FLOORS[1]}
    assert set(imported_by(module)) <= allowed


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
        ("import graphzip_passes.clustering", ["graphzip_passes.clustering"]),
        ("from graphzip import plan", ["graphzip.plan"]),
        ("from graphzip import Plan", ["graphzip"]),
        ("from . import conv", ["graphzip.ops.conv"]),
        ("from ..analysis.groups import ChannelGroup", ["graphzip.analysis.groups"]),
        ("def late():\n    import graphzip.cli", ["graphzip.cli"]),
        ("import numpy", []),
    ],
)
def test_imports_are_found(source: str, found: list[str]) -> None:
    known = ["graphzip.plan", "graphzip.ops.conv"]
    assert list(imports(source, "graphzip.ops.linear", known=known)) == found


def test_an_import_that_goes_up_is_found() -> None:
    assert upward("graphzip.ops.linear", ["graphzip.labels", "graphzip.ops.conv", "graphzip.analysis.groups"]) == [
        "graphzip.analysis.groups"
    ]
    assert upward("graphzip.ops.linear", ["graphzip"]) == ["graphzip"]
    assert upward("graphzip.ops.linear", ["graphzip.nowhere"]) == ["graphzip.nowhere"]
