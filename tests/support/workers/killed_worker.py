"""Real exports that are killed at random moments; prints how often, and how many writes were seen whole.

The models are made once. Every child writes one version after the other, in which all weights are the number of the
version, and is killed at a random moment.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

import graphzip as gz
from graphzip import folders
from graphzip.export import convert, joint
from graphzip.export import onnx as exporter


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 4)).eval()


def compiled() -> tuple[gz.Compiled, gz.Compiled]:
    """One model, and two that are written per task."""
    x = (torch.randn(2, 3, 8, 8),)
    both = gz.compile(
        {"a": network(), "b": network()}, gz.Plan([gz.Zip(share=0.5, metric="euclidean")]), {"a": x, "b": x}
    )
    return gz.compile(network(), gz.Plan([]), x), both


def numbers(path: Path) -> set[float]:
    """What the weights of a file are, where it can be read."""
    weights = onnx.load(path).graph.initializer
    arrays = [numpy_helper.to_array(each) for each in weights]
    return {float(value) for array in arrays if array.dtype == np.float32 for value in np.unique(array)}


def version(folder: Path, *, mixed: bool = False) -> tuple[float, ...]:
    """The versions of the single model and of the tasks. Raises where a file is lost or holds several versions.

    So it does where the tasks are of different versions, unless they may be `mixed`.
    """
    (single,), (one,), (other,) = (numbers(folder / name) for name in ("single.onnx", "tasks/a.onnx", "tasks/b.onnx"))
    assert mixed or one == other
    return single, one, other


class Stop(BaseException):
    """Everything has been built."""


def stop(*_: Any) -> None:
    raise Stop


def export(single: gz.Compiled, both: gz.Compiled, folder: Path) -> None:
    for stage in (
        lambda: single.export(folder / "single.onnx", verify=False),
        lambda: both.export(folder / "tasks", per_task=True, verify=False),
    ):
        with contextlib.suppress(Stop):
            stage()


def built(single: gz.Compiled, both: gz.Compiled, number: int, folder: Path) -> list[Any]:
    """What is written of one version, in order: tracing and converting take long, and are not what is tested."""
    single, both = copy.deepcopy((single, both))  # what is built holds the very weights
    with torch.no_grad():
        for module in (single.module, both.module):
            for value in module.parameters():
                value.fill_(number)
    found: list[Any] = []

    def build(*args: Any, **kwargs: Any) -> Any:
        found.append(exporter_build(*args, **kwargs))
        return found[-1]

    exporter_build = exporter.build
    with patched(build=build, staged=stop, staged_folder=stop):
        export(single, both, folder)
    return found


@contextlib.contextmanager
def patched(*, build: Any, staged: Any, staged_folder: Any) -> Iterator[None]:
    before = exporter.build, exporter.staged, joint.staged_folder  # type: ignore[attr-defined]
    exporter.build = joint.build = build  # type: ignore[attr-defined]
    exporter.staged, joint.staged_folder = staged, staged_folder  # type: ignore[attr-defined]
    try:
        yield
    finally:
        exporter.build = joint.build = before[0]  # type: ignore[attr-defined]
        exporter.staged, joint.staged_folder = before[1:]  # type: ignore[attr-defined]


def write(single: gz.Compiled, both: gz.Compiled, versions: list[list[Any]], folder: Path) -> None:
    """One version after the other; what was built can be written once."""
    ready = iter([each for version in versions for each in version])
    with patched(build=lambda *_, **__: next(ready), staged=exporter.staged, staged_folder=joint.staged_folder):
        for _ in versions:
            export(single, both, folder)


def main(folder: Path, moments: int, exchange: bool) -> None:
    torch.set_num_threads(1)
    convert.SINGLE_FILE_LIMIT = 1000
    if not exchange:
        folders._exchanges = lambda _: False  # type: ignore[assignment]
    single, both = compiled()
    versions = [built(single, both, number, folder) for number in (1, 2)]
    write(single, both, [built(single, both, 0, folder)], folder)
    rng, seen, last, longest = random.Random(moments), 0, version(folder), 0.3
    for _ in range(moments):
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            write(single, both, rng.sample(versions, 2), folder)
            os._exit(0)
        time.sleep(rng.random() * longest)
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            longest = max(0.05, 0.9 * (time.monotonic() - started))
        found = version(folder, mixed=not exchange)
        seen += found != last
        last = found
    write(single, both, versions, folder)
    assert version(folder) == (2, 2, 2)
    assert len(list(folder.iterdir())) == 3, list(folder.iterdir())
    assert len(list((folder / "tasks").iterdir())) == 3
    print(f"{moments} kills, which left another state {seen} times: 0 lost, 0 mixed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), exchange=sys.argv[3] == "exchange")
