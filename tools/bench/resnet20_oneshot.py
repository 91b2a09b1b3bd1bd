"""Accuracy of the trained CIFAR ResNet-20 before and after one-shot cluster-merging, without training.

    python tools/bench/resnet20_oneshot.py --keep 0.75 --json

Needs `resnet20_cifar10.safetensors` and `cifar10_jpeg.npz` in the folder that the environment variable GRAPHZIP_DATA
names (default: ../shared/data beside the repository). What is missing is said and skipped. Accuracy is the share of
right answers on the test images, in percent; multiply-accumulates are for one image of 32 x 32.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

import graphzip as gz

THREADS = 2
BATCH = 500
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
REPOSITORY = Path(__file__).resolve().parents[2]


class Block(nn.Module):
    """Two 3 x 3 convolutions; where the width changes, the shortcut is subsampled and padded with zero channels."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        stride = 1 if inner == outer else 2
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.pad = 0 if inner == outer else outer // 4

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """CIFAR ResNet-20 (He et al. 2016, section 4.2): three stages of three blocks, widths 16, 32, 64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def data_folder() -> Path:
    return Path(os.environ.get("GRAPHZIP_DATA", REPOSITORY.parent / "shared" / "data"))


def read_images(archive: Path, count: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced test images, uint8 of shape (count, 3, 32, 32), and their labels."""
    with np.load(archive) as data:
        jpeg, offsets, labels = data["test_jpeg"].tobytes(), data["test_offsets"], data["test_labels"]
    chosen = np.linspace(0, len(labels) - 1, min(count, len(labels))).round().astype(int)
    pixels = [
        np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]])).convert("RGB")) for i in chosen.tolist()
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.from_numpy(labels[chosen].astype(np.int64))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent right."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    right = 0
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        right += int((model((x / 255 - mean) / std).argmax(1) == y).sum())
    return 100 * right / len(labels)


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile, evaluate where there are images, export."""
    weights, archive = folder / "resnet20_cifar10.safetensors", folder / "cifar10_jpeg.npz"
    result: dict[str, Any] = {"keep": options.keep, "clustering": options.clustering, "skipped": []}
    model = ResNet20().eval()
    if weights.exists():
        model.load_state_dict(load_file(weights))
    else:
        result["skipped"].append(f"trained weights: {weights} is missing; the weights are random")
    images = read_images(archive, options.images) if weights.exists() and archive.exists() else None
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
