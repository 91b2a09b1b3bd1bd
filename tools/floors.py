"""The floors of the house, from the lowest: data flows one way, and imports only go down.

`docs/architecture.md` draws them, `tests/` holds every import to them, and `tools/climbs.py` counts the calls that go
back up. `python tools/floors.py` prints the drawing.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

__all__ = ["FLOORS", "drawing", "floor_of", "modules"]

ROOT = Path(__file__).resolve().parent.parent

FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "graphzip.global_lock",
        "graphzip.errors",
        "graphzip.graph.torch_private",
        "graphzip.file_locks",
        "graphzip.limits",
        "graphzip.version",
        "graphzip_passes.registry",
    ),
    (
        "graphzip.arguments",
        "graphzip.boundary",
        "graphzip.calls",
        "graphzip.files",
        "graphzip.folders",
        "graphzip.mapped",
        "graphzip.numeric",
        "graphzip.process_groups",
        "graphzip.progress",
        "graphzip.report.tables",
        "graphzip.scores",
    ),
    ("graphzip.graph",),
    ("graphzip.canonical",),
    ("graphzip.tracing",),
    ("graphzip.labels",),
    ("graphzip.ops",),
    ("graphzip.analysis",),
    (
        "graphzip.plan",
        "graphzip.report",
        "graphzip.study.allocation",
        "graphzip.study.cost_model",
        "graphzip.training.distill",
        "graphzip.training.history",
    ),
    ("graphzip.rewrite",),
    ("graphzip.export", "graphzip.runtime"),
    ("graphzip.calibration", "graphzip.compiled", "graphzip.devices", "graphzip.measuring", "graphzip.traces"),
    ("graphzip_passes",),
    (
        "graphzip.training.account",
        "graphzip.training.prepared",
        "graphzip.training.sharding",
        "graphzip.training.tune",
    ),
    ("graphzip.api", "graphzip.formats", "graphzip.study", "graphzip.training.widen"),
    ("graphzip.training",),
    ("graphzip",),
    ("graphzip.commands.models", "graphzip.commands.weights"),
    ("graphzip.commands.demo", "graphzip.commands.text"),
    ("graphzip.commands.ranks", "graphzip.commands.terminal"),
    ("graphzip.commands.usage",),
    ("graphzip.commands",),
    ("graphzip.__main__",),
)
"""From the lowest; a package stands for all its modules, `graphzip` alone for its face (`graphzip/__init__.py`)."""


def modules() -> dict[str, Path]:
    """Every module of both packages, by its dotted name."""
    found = {}
    for folder, package in ((ROOT, "graphzip"), (ROOT / "passes", "graphzip_passes")):
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def floor_of(module: str) -> int | None:
    """The number of the floor whose name is the longest prefix of `module`."""
    if module == "graphzip":
        return next(number for number, names in enumerate(FLOORS) if names == ("graphzip",))
    for number, names in enumerate(FLOORS):
        if any(module == name or module.startswith(f"{name}.") for name in names if name != "graphzip"):
            return number
    return None


def drawing() -> str:
    """The floors as text, the highest first: what stands on one line, or on indented ones, is one floor."""
    lines = []
    for number in range(len(FLOORS) - 1, -1, -1):
        names = ", ".join(FLOORS[number])
        lines += textwrap.wrap(f"{number:>2}  {names}", 100, subsequent_indent="    ")
    return "\n".join(lines)


def main() -> None:
    """Print the drawing."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(drawing())


if __name__ == "__main__":
    main()
