"""Processor time of halving a network: traced anew, from one trace, and next to Torch-Pruning and a bare export.

    python tools/bench/cost/compile_time.py resnet50 mobilenet_v2 densenet121 --repeats 3

One process and one thread. After a first round that is not counted, each repeat runs a bare static `torch.export`,
`graphzip.compile` of the model, `graphzip.compile` of a `graphzip.trace` that was made before, and Torch-Pruning (graph
and pruning), one after the other. Medians of the repeats, and ratios of the same repeat.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.export import export

import graphzip as gz

SIZE = 224


def pruned(model: nn.Module, x: Tensor) -> None:
    import torch_pruning as tp

    slim = copy.deepcopy(model)
    last = [layer for layer in slim.modules() if isinstance(layer, nn.Linear)][-1]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(slim, x, importance=importance, pruning_ratio=0.5, ignored_layers=[last]).step()


def seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(name: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of every kind of work in every repeat."""
    from torchvision import models

    model, x = models.get_model(name, weights=None).eval(), torch.randn(2, 3, SIZE, SIZE)
    plan, traced = gz.Plan([gz.ClusterMerge(keep=0.5, clustering="even")]), gz.trace(model, (x,))
    kinds: dict[str, Callable[[], Any]] = {
        "export": lambda: export(model, (x,), strict=False),
        "compile": lambda: gz.compile(model, plan, (x,)),
        "of a trace": lambda: gz.compile(traced, plan),
        "torch-pruning": lambda: pruned(model, x),
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(repeats + 1):
        for kind, work in kinds.items():
            taken = seconds(work)
            if repeat:
                found[kind].append(taken)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet50"], help="names of torchvision models")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", title=f"half of the channels, processor seconds, one thread, torch {torch.__version__}")
    for heading in ("export", "compile", "of a trace", "torch-pruning", "compile / export", "of a trace / t.-pruning"):
        table.add_column(heading, justify="right")
    for name in options.models:
        print(f"measuring {name} ...", file=sys.stderr)
        found = measure(name, options.repeats)
        ratios = [
            statistics.median(one / other for one, other in zip(found[left], found[right], strict=True))
            for left, right in (("compile", "export"), ("of a trace", "torch-pruning"))
        ]
        cells = [*(statistics.median(each) for each in found.values()), *ratios]
        table.add_row(name, *(f"{cell:.2f}" for cell in cells))
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
