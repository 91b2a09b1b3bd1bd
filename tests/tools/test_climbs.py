"""Data walks down the house: few calls go back up a floor."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST = 5


@pytest.mark.slow
@pytest.mark.parametrize("path", ["zip", "plan_for", "compile"])
def test_few_calls_go_up(path: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / "climbs.py"), path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(rf"^{path}: (\d+) modules, (\d+) climbs$", done.stdout, flags=re.MULTILINE)
    assert found is not None
    assert int(found[1]) > 20, "nothing was seen"
    assert int(found[2]) <= MOST, done.stdout
