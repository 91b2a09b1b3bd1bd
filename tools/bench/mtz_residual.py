"""Zip five residual networks of five tasks into one (MTZ, Table 4).

    python tools/bench/mtz_residual.py --cache nets
    python tools/bench/mtz_residual.py --cache nets --tasks 3 --retrain 0

The tasks are CIFAR-10, with the trained ResNet-20 of the data folder, and MNIST as it is, turned by 45 degrees, blurred
along 9 pixels, and with light and dark exchanged, with a ResNet-20 each that is trained here (or read from `--cache`).
Prints the test errors in percent of every network alone, zipped, and after retraining with the networks before as
teachers, and how many parameters all of them have together in networks of one.

Needs `resnet20_cifar10.safetensors`, `cifar10_jpeg.npz` and `mnist.npz` in the folder that GRAPHZIP_DATA names; by
default that is ../shared/data beside the repository. What is missing is said.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cifar import CifarResNet, data_folder, normalised, read_images
from common.digits import VIEWS, view
from common.teaching import taught
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

import graphzip as gz

BATCH = 64
RETRAIN = {"cifar10": 96}
"""Images per iteration of retraining: most are of the task that is hardest by far."""
OTHERS = 16
NAMES = ("cifar10", *VIEWS)
FILES = ("resnet20_cifar10.safetensors", "cifar10_jpeg.npz", "mnist.npz")

Images = tuple[Tensor, Tensor]
"""Pictures (n, c, h, w), ready for a network, and labels (n,)."""


class Tasks:
    """Training and test images by task."""

    def __init__(self, folder: Path, names: list[str], images: int, tests: int) -> None:
        self.train: dict[str, Images] = {}
        self.test: dict[str, Images] = {}
        with np.load(folder / "mnist.npz") as file:
            digits = {part: (file[f"{part}_images"], file[f"{part}_labels"]) for part in ("train", "test")}
        for name in names:
            for part, count, held in (("train", images, self.train), ("test", tests, self.test)):
                if name == "cifar10":
                    pictures, labels = read_images(folder / "cifar10_jpeg.npz", part, count)
                    held[name] = normalised(pictures), labels
                else:
                    chosen = np.random.default_rng(0).permutation(len(digits[part][1]))[:count]
                    held[name] = view(name, digits[part][0][chosen]), torch.from_numpy(digits[part][1][chosen]).long()

    def batches(self, name: str, seed: int, size: int = BATCH) -> Iterator[Images]:
        """Random training batches without end."""
        pictures, labels = self.train[name]
        generator = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(len(labels), generator=generator).split(size):
                yield pictures[chosen], labels[chosen]

    @torch.no_grad()
    def error(self, name: str, net: nn.Module) -> float:
        """Test error in percent."""
        pictures, labels = self.test[name]
        parts = zip(pictures.split(500), labels.split(500), strict=True)
        return 100 * sum(int((net(x).argmax(1) != y).sum()) for x, y in parts) / len(labels)


def trained(name: str, tasks: Tasks, folder: Path, options: argparse.Namespace) -> nn.Module:
    """The network of a task, from a file where there is one."""
    torch.manual_seed(NAMES.index(name))
    net = CifarResNet(3)
    cached = folder / FILES[0] if name == "cifar10" else options.cache / f"{name}-{options.images}.pt"
    if name != "cifar10":
        net.conv1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
    if cached.exists():
        net.load_state_dict(load_file(cached) if name == "cifar10" else torch.load(cached))
        return net.eval()
    steps = options.epochs * len(tasks.train[name][1]) // BATCH
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _, (x, y) in zip(range(steps), tasks.batches(name, 0), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), cached)
    return net.eval()


def zipped(nets: dict[str, nn.Module], tasks: Tasks, options: argparse.Namespace) -> gz.Compiled:
    """All networks in one, trained jointly after the last layer."""
    examples = {name: (tasks.train[name][0][:2],) for name in nets}
    calibration = {name: list(tasks.train[name][0][: options.calibration].split(100)) for name in nets}
    zipping = gz.Zip(share=options.share, alpha=options.alpha, refit=options.refit)
    prepared = gz.prepare(nets, gz.Plan([zipping]), examples, calibration=calibration)
    for stage in prepared.steps():
        print(f"  {stage}", file=sys.stderr)
    if options.retrain:
        retrain(prepared, nets, tasks, options)
    return prepared.convert()


def retrain(prepared: gz.Prepared, nets: dict[str, nn.Module], tasks: Tasks, options: argparse.Namespace) -> None:
    """Cross entropy with the answers that the networks gave before."""
    optimizer = torch.optim.SGD(prepared.parameters(), lr=options.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.retrain)
    feeds: dict[str, Any] = {name: tasks.batches(name, 1, RETRAIN.get(name, OTHERS)) for name in nets}
    prepared.train()
    for _ in range(options.retrain):
        pictures = {name: next(feed)[0] for name, feed in feeds.items()}
        logits = prepared(**pictures)
        loss = torch.stack([taught(logits[name], nets[name], pictures[name]) for name in nets]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    prepared.eval()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=len(NAMES), help="how many of the tasks")
    parser.add_argument("--alpha", type=float, default=0.95, help="weight of the first task's error when zipping")
    parser.add_argument("--share", type=float, default=0.96, help="share of the channels that is shared")
    parser.add_argument(
        "--refit", action=argparse.BooleanOptionalAction, default=True, help="fit again what a task has alone"
    )
    parser.add_argument("--images", type=int, default=20_000, help="training images of each task")
    parser.add_argument("--tests", type=int, default=10_000, help="test images of each task")
    parser.add_argument("--epochs", type=int, default=2, help="epochs in which a network is trained")
    parser.add_argument("--calibration", type=int, default=500, help="images for the Hessians of each task")
    parser.add_argument("--retrain", type=int, default=700, help="iterations of retraining, 0 for none")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of retraining")
    parser.add_argument("--cache", type=Path, default=Path("mtz_nets"), help="a folder for trained networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    folder = data_folder()
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        print(f"skipped: {', '.join(missing)} missing in {folder}", file=sys.stderr)
        return 0
    names = list(NAMES[: options.tasks])
    tasks = Tasks(folder, names, options.images, options.tests)
    nets = {name: trained(name, tasks, folder, options) for name in names}
    alone = {name: tasks.error(name, net) for name, net in nets.items()}
    start = time.perf_counter()
    compiled = zipped(nets, tasks, options)
    taken = time.perf_counter() - start
    after = {name: tasks.error(name, compiled.task(name)) for name in names}
    one = sum(p.numel() for p in nets[names[0]].parameters())
    table = Table(title=f"{len(names)} ResNet-20, {options.share:.0%} of the channels shared")
    for column in ("task", "alone (% wrong)", "zipped (% wrong)"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name in names:
        table.add_row(name, f"{alone[name]:.2f}", f"{after[name]:.2f}")
    means = [sum(found.values()) / len(names) for found in (alone, after)]
    table.add_row("mean", f"{means[0]:.2f}", f"{means[1]:.2f} ({means[1] - means[0]:+.2f})")
    Console(width=100).print(table)
    total = compiled.report.after.params
    print(f"{total:,} parameters, {total / one:.2f} times one network; {taken:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
