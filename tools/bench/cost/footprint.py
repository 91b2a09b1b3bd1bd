"""Processor time and peak memory of halving a network: graphzip's `compile` next to torch-pruning's graph and pruning.

    python tools/bench/cost/footprint.py resnet50 --repeats 3

Every cell is measured in child processes of its own, the methods in turns, on one thread: seconds of processor time of
the first call in a process (with imports) and of a second one, and by how much the first call raised the peak of
resident memory. Medians of the repeats. Both methods get the model on the CPU with random weights and leave it as it
is.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.export import Dim, export

SIZE = 224
HEADINGS = {"first": "first call, s", "second": "second call, s", "memory": "more memory, MiB"}


def exported(model: nn.Module, x: Tensor) -> Any:
    return export(model, (x,), dynamic_shapes=({0: Dim.AUTO},), strict=False)


def compiled(model: nn.Module, x: Tensor, clustering: str) -> Any:
    import graphzip as gz

    return gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5, clustering=clustering)]), (x,))


def pruned(model: nn.Module, x: Tensor) -> nn.Module:
    import torch_pruning as tp

    slim = copy.deepcopy(model)
    last = [layer for layer in slim.modules() if isinstance(layer, nn.Linear)][-1]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(slim, x, importance=importance, pruning_ratio=0.5, ignored_layers=[last]).step()
    return slim


METHODS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "torch.export": exported,
    "graphzip, even": lambda model, x: compiled(model, x, "even"),
    "graphzip, kmeans": lambda model, x: compiled(model, x, "kmeans"),
    "torch-pruning": pruned,
}


def measure(method: str, name: str) -> dict[str, float]:
    """In this process, which has done nothing else."""
    from torchvision import models

    torch.set_num_threads(1)
    model, x = models.get_model(name, weights=None).eval(), torch.randn(2, 3, SIZE, SIZE)
    taken, peaks = [], [peak()]
    for _ in range(2):
        start = time.process_time()
        METHODS[method](model, x)
        taken.append(time.process_time() - start)
        peaks.append(peak())
    return {"first": taken[0], "second": taken[1], "memory": peaks[1] - peaks[0]}


def peak() -> float:
    """The most resident memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (10 if sys.platform != "darwin" else 20))


def in_child(method: str, name: str) -> dict[str, float]:
    command = [sys.executable, __file__, name, "--only", method]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="resnet50", help="name of a torchvision model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=[*METHODS], help="measure this method here and print JSON")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.only:
        print(json.dumps(measure(options.only, options.model)))
        return 0
    cells: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for repeat in range(options.repeats):
        for method, found in cells.items():
            print(f"{method}, {repeat + 1} of {options.repeats} ...", file=sys.stderr)
            found.append(in_child(method, options.model))
    table = Table("method", title=f"{options.model}, half of the channels, one thread, torch {torch.__version__}")
    for heading in HEADINGS.values():
        table.add_column(heading, justify="right")
    for method, found in cells.items():
        medians = {key: statistics.median(each[key] for each in found) for key in HEADINGS}
        table.add_row(method, f"{medians['first']:.2f}", f"{medians['second']:.2f}", f"{medians['memory']:.0f}")
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
