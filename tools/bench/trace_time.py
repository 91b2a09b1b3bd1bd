"""How long trace, analysis and merging take next to a bare `torch.export` of the same model.

    python tools/bench/trace_time.py resnet50 mobilenet_v2 --repeats 3 --json

Each repeat runs, one after the other, a bare non-strict export with a dynamic batch, `graphzip.channel_groups` (trace
and analysis) and `graphzip.compile` (trace, analysis and cluster-merging), so that all feel the same load of the
machine; what one leaves behind is thrown away before the next. Times are seconds of wall clock on two threads; a
ratio is the median of the repeats' ratios to the bare export.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.export import Dim, export

import graphzip as gz

THREADS = 2
STAGES = ("export", "analyse", "compile")


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(model: nn.Module, size: int, plan: gz.Plan, repeats: int) -> dict[str, list[float]]:
    """Seconds per stage and repeat, the stages interleaved; a first round that is not counted warms up."""
    inputs = (torch.randn(2, 3, size, size),)
    stages: dict[str, Callable[[], Any]] = {
        "export": lambda: export(model, inputs, dynamic_shapes=({0: Dim.AUTO},), strict=False),
        "analyse": lambda: gz.channel_groups(model, inputs),
        "compile": lambda: gz.compile(model, plan, inputs),
    }
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for repeat in range(repeats + 1):
        for stage, work in stages.items():
            gc.collect()
            taken = seconds(work)
            if repeat:
                times[stage].append(taken)
    return times


def summary(name: str, size: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and ratios to the bare export of the same repeat."""
    row: dict[str, Any] = {"model": name, "size": size, "seconds": {s: statistics.median(times[s]) for s in STAGES}}
    for stage in STAGES[1:]:
        ratios = [taken / bare for taken, bare in zip(times[stage], times["export"], strict=True)]
        row[f"{stage}_ratio"] = {"median": statistics.median(ratios), "worst": max(ratios)}
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """One line per model."""
    result = Table(title=f"seconds, {THREADS} threads, torch {torch.__version__}")
    result.add_column("model")
    for heading in ("torch.export", "analyse", "compile", "analyse / export", "compile / export", "worst"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row["model"],
            *(f"{row['seconds'][stage]:.2f}" for stage in STAGES),
            f"{row['analyse_ratio']['median']:.2f}",
            f"{row['compile_ratio']['median']:.2f}",
            f"{row['compile_ratio']['worst']:.2f}",
        )
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet50"], help="names of torchvision models")
    parser.add_argument("--size", type=int, default=224, help="height and width of the input image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--clustering", default="kmeans")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(THREADS)
    try:
        from torchvision import models
    except ImportError:
        print("torchvision is missing; it names the models: pip install torchvision", file=sys.stderr)
        return 1
    plan = gz.Plan([gz.ClusterMerge(keep=options.keep, clustering=options.clustering)])
    rows = []
    for name in options.models:
        print(f"measuring {name} ...", file=sys.stderr)
        model = models.get_model(name, weights=None).eval()
        rows.append(summary(name, options.size, measure(model, options.size, plan, options.repeats)))
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        Console(width=110).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
