"""The scripts of `tools/bench`, imported for a test and forgotten after it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["BENCH", "bench_modules"]

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


def bench_modules(*names: str) -> Iterator[dict[str, Any]]:
    """The modules by name; a test that needs what is not installed is skipped."""
    pytest.importorskip("PIL")
    pytest.importorskip("torchvision")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)
