"""Load each archive that is named on the command line and print what came of it, and what it did to the process.

The last line of stdout is JSON: per file the error's class and text (or null), seconds, files opened and modules
imported meanwhile, whether the state of the process changed; and by how many bytes the peak of memory grew.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import threading
import time
import warnings
from typing import Any

import torch

import graphzip as gz

seen: list[str] = []
watching = False
DANGEROUS = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pickle.", "marshal.", "urllib.", "webbrowser.")


def audit(event: str, args: tuple[Any, ...]) -> None:
    """Note what a load should not do."""
    if not watching:
        return
    if event == "open" and "graphzip/" not in str(args[0]).replace(os.sep, "/"):
        seen.append(f"open {args[0]}")
    elif event == "import" and str(args[0]) not in sys.modules:
        seen.append(f"import {args[0]}")
    elif event.startswith(DANGEROUS) and event not in {"os.listdir", "os.scandir"}:
        seen.append(f"{event} {args}")


def state() -> tuple[Any, ...]:
    """What a load must leave alone."""
    return (
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.backends.mha.get_fastpath_enabled(),
        os.getcwd(),
        dict(os.environ),
        len(warnings.filters),
        len(logging.getLogger().handlers),
        threading.active_count(),
        sys.getrecursionlimit(),
    )


def load(path: str) -> dict[str, Any]:
    """One file."""
    global watching
    before, start = state(), time.perf_counter()
    seen.clear()
    watching = True
    error = None
    try:
        gz.load(path)
    except BaseException as found:
        error = [type(found).__name__, str(found)]
    watching = False
    seconds = time.perf_counter() - start
    opened = [each for each in seen if each != f"open {path}"]
    return {"error": error, "seconds": seconds, "did": opened, "changed": before != state()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    good, *others = sys.argv[1:]
    gz.load(good)
    sys.addaudithook(audit)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {path: load(path) for path in (good, *others)}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"files": found, "grown": grown}))
