"""Every script in `tools/` starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "tools").rglob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_says_how_it_is_used(script: str) -> None:
    """Running it with --help imports all that it needs."""
    command = [sys.executable, str(ROOT / script), "--help"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "passes"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
