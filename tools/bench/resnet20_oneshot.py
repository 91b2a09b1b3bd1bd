"""Accuracy of the trained CIFAR ResNet-20 before and after one-shot cluster-merging, without training.

    python tools/bench/resnet20_oneshot.py --keep 0.75 --json

Needs `resnet20_cifar10.safetensors` and `cifar10_jpeg.npz` in the folder that the environment variable GRAPHZIP_DATA
names (default: ../shared/data beside the repository). What is missing is said and skipped. Accuracy is the share of
right answers on the test images, in percent; multiply-accumulates are for one image of 32 x 32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cifar import CifarResNet, accuracy, data_folder, read_images
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import graphzip as gz

THREADS = 2


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile, evaluate where there are images, export."""
    weights, archive = folder / "resnet20_cifar10.safetensors", folder / "cifar10_jpeg.npz"
    result: dict[str, Any] = {"keep": options.keep, "clustering": options.clustering, "skipped": []}
    model = CifarResNet(3).eval()
    if weights.exists():
        model.load_state_dict(load_file(weights))
    else:
        result["skipped"].append(f"trained weights: {weights} is missing; the weights are random")
    images = read_images(archive, "test", options.images) if weights.exists() and archive.exists() else None
    if not archive.exists():
        result["skipped"].append(f"accuracy: {archive} is missing")
    elif images is None:
        result["skipped"].append("accuracy: it means nothing with random weights")
    start = time.perf_counter()
    plan = gz.Plan([gz.ClusterMerge(keep=options.keep, clustering=options.clustering)])
    compiled = gz.compile(model, plan, (torch.randn(2, 3, 32, 32),))
    result["compile_seconds"] = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder_name:
        exported = compiled.export(options.output or Path(folder_name) / "resnet20.onnx")
        result["onnx"] = {"bytes": exported.bytes, "opset": exported.opset}
    for moment, module in (("before", model), ("after", compiled.module)):
        cost: gz.Cost = getattr(compiled.report, moment)
        result[moment] = {"params": cost.params, "macs": cost.macs}
        if images is not None:
            result[moment]["accuracy"] = accuracy(module, *images)
            result["images"] = len(images[1])
    return result


def table(result: dict[str, Any]) -> Table:
    """Before and after, side by side."""
    columns = ("before", "after")
    rendered = Table(title=f"CIFAR ResNet-20, keep {result['keep']}, {result['clustering']}, no training")
    rendered.add_column("")
    for column in columns:
        rendered.add_column(column, justify="right")
    if "images" in result:
        values = (f"{result[column]['accuracy']:.2f}" for column in columns)
        rendered.add_row(f"accuracy (%), {result['images']} images", *values)
    rendered.add_row("parameters", *(f"{result[column]['params']:,}" for column in columns))
    rendered.add_row("MACs", *(f"{result[column]['macs']:,}" for column in columns))
    rendered.add_row("ONNX file (bytes)", "", f"{result['onnx']['bytes']:,}")
    return rendered


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--clustering", default="kmeans")
    parser.add_argument("--images", type=int, default=10_000, help="how many test images")
    parser.add_argument("--output", type=Path, default=None, help="where to leave the ONNX file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(THREADS)
    result = bench(options, data_folder())
    for line in result["skipped"]:
        print(f"skipped {line}", file=sys.stderr)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        Console(width=110).print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
