"""Train every variant of stored kernels on MNIST from random weights, beside the dense network.

    python tools/bench/atoms_mnist.py
    python tools/bench/atoms_mnist.py --epochs 1 --only "csg 64" --seeds 1

A network of five 3 x 3 convolutions is trained for two epochs as it is, with atoms whose coefficients the whole
network, its blocks or single layers share (ACDC; with groups of channels where the name says g), and with kernels
generated from codes (CSG; BCSG with a fixed generator of +1 and -1). Prints the parameters, the percentage of the test
images that is right, mean and spread over the seeds, and how many of the trained numbers never had a gradient.

Data: `mnist.npz` in the folder that GRAPHZIP_DATA names; by default ../shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase

import numpy as np
import torch
import torch.nn.functional as F
from cifar import data_folder
from common.digits import view
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphzip as gz

BATCH = 100
RATE = 0.05

VARIANTS: dict[str, gz.AtomFactorize | gz.SliceGenerate | None] = {
    "dense": None,
    "net m8": gz.AtomFactorize(share="net", atoms=8, init="random"),
    "block m8": gz.AtomFactorize(share="block", atoms=8, init="random"),
    "g-net m8 s16": gz.AtomFactorize(share="net", atoms=8, group_size=16, init="random"),
    "g-block m8 s16": gz.AtomFactorize(share="block", atoms=8, group_size=16, init="random"),
    "g-layer m8 s16": gz.AtomFactorize(share="layer", atoms=8, group_size=16, init="random"),
    "csg 64": gz.SliceGenerate(code=64, init="random"),
    "bcsg 128": gz.SliceGenerate(code=128, binary=True, init="random"),
}


def network() -> nn.Module:
    """Widths 32, 32, 32, pooled, 64, 64, averaged."""
    layers: list[nn.Module] = []
    for one, two, step in ((1, 32, 1), (32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(one, two, 3, step, 1, bias=False), nn.BatchNorm2d(two), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if one == 1 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def batches(images: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order."""
    for chosen in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).split(BATCH):
        yield images[chosen], labels[chosen]


def trained(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> int:
    """Train `net` by SGD, the rate going up and down once; how many of its numbers never had a gradient."""
    steps = epochs * -(-len(labels) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    moved = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in net.named_parameters()}
    net.train()
    for epoch in range(epochs):
        for x, y in batches(images, labels, 1000 * seed + epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            for name, parameter in net.named_parameters():
                if parameter.grad is not None:
                    moved[name] |= parameter.grad != 0
            optimizer.step()
            schedule.step()
    net.eval()
    return sum(int((~each).sum()) for each in moved.values())


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images that is right."""
    parts = zip(images.split(1000), labels.split(1000), strict=True)
    return 100 * sum(int((net(x).argmax(1) == y).sum()) for x, y in parts) / len(labels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1, help="how many trainings of each variant")
    parser.add_argument("--only", nargs="+", default=["*"], help="globs of the variants to train")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    file = data_folder() / "mnist.npz"
    if not file.exists():
        print(f"skipped: there is no {file}; set GRAPHZIP_DATA", file=sys.stderr)
        return 0
    with np.load(file) as data:
        parts = [
            (view("mnist", data[f"{part}_images"]), torch.from_numpy(data[f"{part}_labels"]).long())
            for part in ("train", "test")
        ]
    table = Table(title=f"MNIST from random weights, {options.epochs} epochs")
    for column in ("variant", "parameters", "% right", "without gradient"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, variant in VARIANTS.items():
        if not any(fnmatchcase(name, glob) for glob in options.only):
            continue
        found, idle = [], 0
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            plan = gz.Plan([] if variant is None else [variant])
            prepared = gz.prepare(network(), plan, (parts[0][0][:2],), seed=seed)
            idle = trained(prepared, *parts[0], options.epochs, seed)
            compiled = prepared.convert()
            found.append(accuracy(compiled.module.eval(), *parts[1]))
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        table.add_row(name, f"{compiled.report.after.params:,}", f"{statistics.mean(found):.2f}{spread}", str(idle))
        print(f"{name}: {statistics.mean(found):.2f} %", file=sys.stderr)
    Console(width=90).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
