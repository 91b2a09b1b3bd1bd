"""Do something for each of many models: each in a process of its own with bounded time and memory, and resumable.

A script calls `main_loop` with the names of the models, and `child` where it was started with `--child`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["add_options", "child", "main_loop"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `child` and `main_loop` read."""
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of all models, only each N-th")
    parser.add_argument("--out", type=Path, help="file of JSON lines to continue and append to")
    parser.add_argument("--seconds", type=float, default=300.0, help="time for each model")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB for each model")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def child(options: argparse.Namespace, work: Callable[[str], dict[str, Any]]) -> int:
    """Do it for one model in this process and print the result as JSON on the last line of stdout."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory * 2**30),) * 2)
    try:
        result = {"model": options.child, **work(options.child)}
    except BaseException as error:
        result = {"model": options.child, "error": type(error).__name__, "reason": (str(error) or repr(error))[:600]}
    print("\n" + json.dumps(result))
    return 0


def main_loop(script: str, options: argparse.Namespace, models: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of all models; results that the file `options.out` has are taken from there."""
    known = {}
    if options.out is not None and options.out.exists():
        known = {row["model"]: row for row in map(json.loads, options.out.read_text(encoding="utf-8").splitlines())}
    rows = []
    for model in list(models)[:: options.every]:
        if model not in known:
            print(f"{model} ...", file=sys.stderr, flush=True)
            known[model] = _run(script, model, options)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(known[model]) + os.linesep)
        rows.append(known[model])
    return rows


def _run(script: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, script, "--child", model, "--memory", str(options.memory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"model": model, "error": "timeout", "reason": f"took more than {options.seconds:g} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"model": model, "error": "crash", "reason": done.stderr.strip()[-300:] or f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
