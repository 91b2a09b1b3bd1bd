"""What running a model in onnxruntime takes on this machine: time, and memory."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from graphzip.errors import GraphZipError, VerificationError
from graphzip.export.example import free_sizes, tensor_leaves
from graphzip.export.onnx import export_onnx
from graphzip.export.optional_packages import require
from graphzip.export.runs import session_of, short
from graphzip.files import as_path
from graphzip.graph.restore_modules import to_module
from graphzip.graph.traced import Traced
from graphzip.report.card import Latency

__all__ = ["OnnxModule", "latencies_of", "latency_of", "machine", "memory_of"]

_RUNS: Final = 20  # at least so many, and so many seconds
_LONG: Final = 0.3
_MOST: Final = 1000
_PATIENCE: Final = 120  # seconds that a process to measure memory in may take

Feed = dict[str, Any]

_ALONE: Final = """
import json, sys, numpy, onnxruntime

def status(key):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

options = onnxruntime.SessionOptions()
options.log_severity_level = 4
with numpy.load(sys.argv[2]) as stored:
    feed = {name: stored[name] for name in stored.files}
try:
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
except OSError:
    pass
before = status("VmRSS")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, feed)
print(json.dumps(status("VmHWM") - before))
"""
"""Runs a file once; prints how far memory rose above what Python and onnxruntime take by themselves."""


class OnnxModule(nn.Module):
    """An ONNX file as a module, for what judges modules: `evaluate(OnnxModule("slim.int8.onnx"))`.

    It takes what the file takes, by position or by the names of the file, and gives a tensor, or a tuple of several. It
    runs on the CPU and has no parameters. Raises `VerificationError` where the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        try:
            self._session = session_of(as_path(path, VerificationError))
        except GraphZipError:
            raise
        except Exception as error:  # onnxruntime's
            raise VerificationError(f"{path} cannot be run in onnxruntime: {short(error)}") from error
        self.eval()

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """Run the file."""
        names = [each.name for each in self._session.get_inputs()]
        feed = dict(zip(names, args, strict=False)) | kwargs
        found = self._session.run(None, {name: value.detach().cpu().numpy() for name, value in feed.items()})
        results = tuple(torch.from_numpy(each) for each in found)
        return results[0] if len(results) == 1 else results


def machine() -> str:
    """Where things are measured: processor, cores, runtime."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runtime = require("onnxruntime").__version__
    return f"{_processor()} with {cores} {'core' if cores == 1 else 'cores'}, onnxruntime {runtime} on the CPU"


def _processor() -> str:
    """As its maker calls it, where the system tells."""
    with contextlib.suppress(OSError):
        told = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in told.items()}.get("model name", "")
        if named and named != "unknown":
            return named
    return platform.processor() or platform.machine()


def latency_of(traced: Traced) -> float:
    """Median milliseconds of one run for one sample (for the whole example where no batch is its first dimension)."""
    module = to_module(traced).eval()
    example = traced.example_inputs, traced.example_kwargs
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(module, example[0], file, example_kwargs=example[1], free=free_sizes(traced), verify=False)
        (found,) = latencies_of([file], tensor_leaves(example), batches=(1,))
    return found[0].median


def latencies_of(
    files: Sequence[Path], leaves: Sequence[torch.Tensor], *, batches: Sequence[int]
) -> list[tuple[Latency, ...]]:
    """How long one run of each file takes at each batch, by turns, so that all see the same machine.

    `leaves` are example inputs in the order of the files' own. Batches that a file does not take are left out; one that
    takes none of them is run on the example.
    """
    sessions = [session_of(file) for file in files]
    found: list[list[Latency]] = [[] for _ in files]
    for batch in (*batches, None):
        feeds = [_feed(session, leaves, batch) for session in sessions]
        asked = [
            (number, feed)
            for number, feed in enumerate(feeds)
            if feed is not None and (batch is not None or not found[number]) and _runs(sessions[number], feed, batch)
        ]
        times = _timed([(sessions[number], feed) for number, feed in asked])
        for (number, _), taken in zip(asked, times, strict=True):
            low, median, high = (1e3 * float(value) for value in np.percentile(taken, [25, 50, 75]))
            found[number].append(Latency(batch, median, low, high, len(taken)))
    return [tuple(each) for each in found]


def _runs(session: Any, feed: Feed, batch: int | None) -> bool:
    """Whether the file takes this batch; a file that fails on the example raises onnxruntime's own error."""
    try:
        session.run(None, feed)
    except Exception:  # of onnxruntime, which has no class for it: a model may take even batches alone
        if batch is None:
            raise
        return False
    return True


def _timed(runs: Sequence[tuple[Any, Feed]]) -> list[list[float]]:
    """Seconds of every run; the first ones warm up and do not count."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(2):
        for session, feed in runs:
            session.run(None, feed)
    while runs and (len(times[0]) < _RUNS or min(map(sum, times)) < _LONG) and len(times[0]) < _MOST:
        for taken, (session, feed) in zip(times, runs, strict=True):
            start = time.perf_counter()
            session.run(None, feed)
            taken.append(time.perf_counter() - start)
    return times


def _feed(session: Any, leaves: Sequence[torch.Tensor], batch: int | None) -> Feed | None:
    """The example with so many rows where the file leaves their number open; `None` where it does not."""
    feed, is_open = {}, False
    for each, leaf in zip(session.get_inputs(), leaves, strict=True):
        free = bool(each.shape) and not isinstance(each.shape[0], int)
        is_open |= free
        feed[each.name] = (_rows(leaf, batch) if free and batch is not None else leaf).detach().cpu().numpy()
    return feed if is_open or batch is None else None


def _rows(leaf: torch.Tensor, count: int) -> torch.Tensor:
    return leaf[torch.arange(count) % len(leaf)]


def memory_of(file: Path, leaves: Sequence[torch.Tensor]) -> int | None:
    """Bytes that loading a file and running it once on one sample take at their peak, in a process of its own.

    What Python and onnxruntime take by themselves is not counted. `None` where the system does not tell (it is Linux's
    `/proc` that is read), or the process fails.
    """
    if not sys.platform.startswith("linux"):
        return None
    session = session_of(file)
    feed = _feed(session, leaves, 1)
    if feed is None or not _runs(session, feed, 1):
        feed = _feed(session, leaves, None)
    del session
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "inputs.npz"
        np.savez(stored, **(feed or {}))
        command = [sys.executable, "-c", _ALONE, str(file), str(stored)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
            return int(json.loads(done.stdout))
        except (subprocess.SubprocessError, OSError, ValueError):
            return None
