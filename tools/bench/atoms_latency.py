"""Latency of VGG16 stored as atoms in groups, in onnxruntime, against the dense network.

    python tools/bench/atoms_latency.py --group-size 32 --lower auto

Weights are random: they do not matter for the time. Every file is written and verified, then timed by turns, and the
median over the rounds is shown. `--share layer` with a group size is ACDC-g-layer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import graphzip as gz

ROUNDS = 15


def vgg16() -> nn.Module:
    """VGG16 for CIFAR images, with batch norm."""
    layers: list[nn.Module] = []
    width = 3
    for item in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if item == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(width, item, 3, 1, 1, bias=False), nn.BatchNorm2d(item), nn.ReLU()]
            width = item
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)).eval()


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--share", default="layer", choices=("net", "block", "layer"))
    parser.add_argument("--lower", nargs="+", default=["reconstruct", "atoms_first", "auto"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, example = vgg16(), (torch.randn(options.batch, 3, 32, 32),)
    plans = {"dense": gz.Plan([gz.FoldBatchNorm()])}
    for lower in options.lower:
        share = {"share": options.share, "atoms": options.atoms, "group_size": options.group_size}
        plans[lower] = gz.Plan([gz.AtomFactorize(init="random", lower=lower, **share)])
    rows, sessions, times = {}, {}, {name: [] for name in plans}
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in plans.items():
            compiled = gz.compile(model, plan, example)
            exported = compiled.export(Path(folder) / f"{name}.onnx")
            first = compiled.report.passes[-1].get("atom_factorize", {}).get("atoms_first", [])
            rows[name] = (compiled.report.after, exported.bytes, len(first))
            sessions[name] = session(exported.path, options.threads)
    x = example[0].numpy()
    feeds = {name: {each.get_inputs()[0].name: x} for name, each in sessions.items()}
    for each in range(ROUNDS + 1):
        for name, ready in sessions.items():
            start = time.perf_counter()
            ready.run(None, feeds[name])
            if each:  # the first run warms up
                times[name].append(time.perf_counter() - start)
    table = Table(title=f"VGG16, {options.batch} images of 32 x 32, {options.threads} threads")
    for column in ("", "parameters", "MACs", "ONNX bytes", "layers atoms first", "ms"):
        table.add_column(column, justify="right" if column else "left")
    for name, (cost, size, first) in rows.items():
        took = 1e3 * float(np.median(times[name]))
        table.add_row(name, f"{cost.params:,}", f"{cost.macs:,}", f"{size:,}", str(first), f"{took:.2f}")
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
