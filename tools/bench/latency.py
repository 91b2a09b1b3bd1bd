"""How much faster the slim file runs in onnxruntime than the dense one, beside the multiply-accumulates.

    python tools/bench/latency.py resnet50 --macs 0.5

Every channel group is narrowed to the same share of its width, rounded to multiples of 8, such that the budget is met
(which channels stay makes no difference to the time). Both files are exported and verified in the same way and run by
turns at each batch size; printed are the medians, and the median of the ratios of each turn. `--profile` also prints
how the time of the slim file is divided over kinds of operators.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torchvision
from common.side_by_side import seconds, side_by_side
from compare_methods import evenly
from rich.console import Console
from rich.table import Table

import graphzip as gz


def session(path: Path, threads: int, *, profile: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.enable_profiling, options.profile_file_prefix = profile, str(path.with_suffix(""))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(ready: Any, x: torch.Tensor) -> Callable[[], float]:
    feed = {ready.get_inputs()[0].name: x.numpy()}
    return lambda: seconds(lambda: ready.run(None, feed))


def shares(path: Path, x: torch.Tensor, threads: int) -> dict[str, float]:
    """The share of the time of each kind of operator."""
    ready = session(path, threads, profile=True)
    for _ in range(10):
        ready.run(None, {ready.get_inputs()[0].name: x.numpy()})
    times: dict[str, float] = collections.Counter()
    for event in json.loads(Path(ready.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"]] += event["dur"]
    return {kind: took / sum(times.values()) for kind, took in sorted(times.items(), key=lambda item: -item[1])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names of torchvision models")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the MACs that stays")
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(title=f"onnxruntime, {options.threads} threads, images of {options.size} x {options.size}")
    for column in ("model", "MACs", "batch", "dense (ms)", "slim (ms)", "times as fast"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in options.models:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        example = (torch.randn(2, 3, options.size, options.size),)
        slim = evenly(
            model,
            example,
            options.macs,
            lambda keep: gz.ClusterMerge(keep=keep, clustering="even", round_to=options.round_to),
        )
        share = slim.report.after.macs / slim.report.before.macs
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / "dense.onnx", Path(folder) / "slim.onnx"]
            gz.compile(model, gz.Plan([]), example).export(files[0])
            slim.export(files[1])
            ready = [session(file, options.threads) for file in files]
            for batch in options.batches:
                x = torch.randn(batch, 3, options.size, options.size)
                dense, thin = (runner(each, x) for each in ready)
                dense(), thin()
                one, two, ratio = side_by_side(dense, thin, options.turns)
                table.add_row(name, f"{share:.1%}", str(batch), f"{one:.1f}", f"{two:.1f}", f"{1 / ratio:.2f}")
            found = shares(files[1], x, options.threads) if options.profile else {}
        for kind, part in found.items():
            print(f"{name} {kind}: {part:.1%}", file=sys.stderr)
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
