"""Zip two networks of five classes of CIFAR-10 each, beside other ways to merge networks without training.

    python tools/bench/zip_cifar.py --cache nets

Two ResNet-20 of doubled width, one for each half of the classes, are trained here (about 8 epochs each, which takes
both cores twenty to thirty minutes) and kept in the cache folder, and so is every row of the table: a run that was
stopped goes on. Of every merged pair: the accuracy over all ten classes by the larger of all logits (joint), and the
mean of each task on its own classes; as merged, and with batch norms re-estimated on training images.

    zip          gz.Zip with its defaults: that share of the channels of every layer
    averaging    weights averaged as they stand, up to a block; behind it every task goes on with its own layers
    permutation  the same, channels of one network paired with those of the other by correlation of activations
    zipit        the same, pairs by correlation within a network, too (Stoica et al., "ZipIt!", ICLR 2024, section 4)

The last three merge the first blocks, that share of them. Parameters of the pair are beside every row.

Needs `cifar10_jpeg.npz` in the folder that GRAPHZIP_DATA names, by default ../shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import BATCH, CifarResNet, augmented, data_folder, drawn, normalised, read_images
from common.merging import METHODS, merged
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphzip as gz

TASKS = {"first": range(5), "second": range(5, 10)}
ARCHIVE = "cifar10_jpeg.npz"

Images = tuple[Tensor, Tensor]
"""Pictures (n, 3, 32, 32) and classes (n,)."""


def of_task(data: Images, task: str) -> Images:
    """The images of a task's classes, which count from zero."""
    chosen = torch.isin(data[1], torch.tensor(list(TASKS[task])))
    return data[0][chosen], data[1][chosen] - TASKS[task].start


def trained(task: str, data: Images, options: argparse.Namespace) -> nn.Module:
    """The network of a task, from the cache where it is there."""
    cached = options.cache / f"{task}-{options.width}-{options.images}-{options.epochs}.pt"
    torch.manual_seed(TASKS[task].start)
    net = CifarResNet(3, options.width, len(TASKS[task]))
    if cached.exists():
        net.load_state_dict(torch.load(cached))
        return net.eval()
    pictures, labels = normalised(data[0]), data[1]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = options.epochs * -(-len(labels) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=max(steps, 2))
    for epoch in range(options.epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(options.batch):
            loss = F.cross_entropy(net(augmented(pictures[chosen], generator)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{task}: epoch {epoch + 1} of {options.epochs}, loss {float(loss.detach()):.3f}", file=sys.stderr)
    torch.save(net.state_dict(), cached)
    return net.eval()


@torch.no_grad()
def accuracies(nets: Mapping[str, Callable[[Tensor], Tensor]], data: Images) -> dict[str, float]:
    """Percent right over all classes (`joint`), and the mean of every task on its own."""
    logits = [torch.cat([net(normalised(x)) for net in nets.values()], 1) for x in data[0].split(BATCH)]
    found = torch.cat(logits)
    joint = float((found.argmax(1) == data[1]).float().mean())
    own = []
    for classes in TASKS.values():
        chosen = torch.isin(data[1], torch.tensor(list(classes)))
        guess = found[chosen][:, classes.start : classes.stop].argmax(1)
        own.append(float((guess + classes.start == data[1][chosen]).float().mean()))
    return {"joint": 100 * joint, "own": 100 * sum(own) / len(own)}


@torch.no_grad()
def reestimated(nets: Mapping[str, nn.Module], calibration: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Copies whose batch norms have the statistics of the calibration images of all tasks."""
    fresh: dict[str, nn.Module] = copy.deepcopy(dict(nets))
    norms = [each for net in fresh.values() for each in net.modules() if hasattr(each, "running_var")]
    for norm in norms:
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]
    for name, net in fresh.items():
        net.train()
        own = torch.cat(list(calibration.values())) if len(set(map(id, norms))) < len(norms) else calibration[name]
        for x in own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))].split(BATCH):
            net(x)
        net.eval()
    return fresh


def zipped(
    nets: Mapping[str, nn.Module], share: float, calibration: Mapping[str, Tensor]
) -> tuple[dict[str, nn.Module], int]:
    """The tasks of a zipped pair, and the parameters of both."""
    batches = {name: each.split(100) for name, each in calibration.items()}
    examples = {name: (each[:2],) for name, each in calibration.items()}
    compiled = gz.compile(dict(nets), gz.Plan([gz.Zip(share=share)]), examples, calibration=batches)
    return {name: compiled.task(name).eval() for name in nets}, compiled.report.after.params


def row(method: str, share: float, nets: Mapping[str, nn.Module], data: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    calibration = data["calibration"]
    if method == "zip":
        found, params = zipped(nets, share, calibration)
    else:
        found = merged(method, list(nets.values()), share, torch.cat(list(calibration.values())))
        found = dict(zip(nets, found.values(), strict=True))
        params = sum({id(p): p.numel() for net in found.values() for p in net.parameters()}.values())
    plain, fresh = accuracies(found, data["test"]), accuracies(reestimated(found, calibration), data["test"])
    return {"method": method, "share": share, "params": params, "plain": plain, "reestimated": fresh}


def rows(nets: Mapping[str, nn.Module], data: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every line; those that an earlier run with these options measured are read."""
    kept = (
        options.cache
        / f"rows-{options.width}-{options.images}-{options.epochs}-{options.calibration}-{options.tests}.jsonl"
    )
    known = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    found = {(each["method"], each["share"]): each for each in known}
    for share in options.shares:
        for method in options.methods:
            if (method, share) not in found:
                found[method, share] = row(method, share, nets, data)
                with kept.open("a") as file:
                    file.write(json.dumps(found[method, share]) + "\n")
                print(found[method, share], file=sys.stderr)
    return [found[method, share] for share in options.shares for method in options.methods]


def table(lines: Sequence[Mapping[str, Any]], alone: Mapping[str, float], params: int) -> Table:
    made = Table(title="two networks of five classes of CIFAR-10 in one, percent right of the test images")
    for column in ("share", "method", "parameters", "joint", "own", "joint, norms again", "own, norms again"):
        made.add_column(column, justify="left" if column == "method" else "right")
    made.add_row("", "apart", f"{params:,}", *(f"{alone[key]:.2f}" for key in ("joint", "own")), "", "")
    for each in lines:
        figures = [f"{each[kind][key]:.2f}" for kind in ("plain", "reestimated") for key in ("joint", "own")]
        made.add_row(f"{100 * each['share']:g} %", each["method"], f"{each['params']:,}", *figures)
    return made


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("zip_nets"), help="a folder for trained networks and rows")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.65, 0.35])
    parser.add_argument("--methods", nargs="+", default=["zip", *METHODS], choices=("zip", *METHODS))
    parser.add_argument("--width", type=int, default=32, help="of the first stage; that of ResNet-20 is 16")
    parser.add_argument("--images", type=int, default=50_000, help="training images of both tasks")
    parser.add_argument("--tests", type=int, default=10_000)
    parser.add_argument("--calibration", type=int, default=500, help="images of each task that methods see")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    archive = data_folder() / ARCHIVE
    if not archive.exists():
        print(f"skipped: {archive} is missing", file=sys.stderr)
        return 0
    options.cache.mkdir(parents=True, exist_ok=True)
    train = drawn(read_images(archive, "train", options.images), options.images)
    parts = {task: of_task(train, task) for task in TASKS}
    nets = {task: trained(task, part, options) for task, part in parts.items()}
    calibration = {task: normalised(pictures[: options.calibration]) for task, (pictures, _) in parts.items()}
    data = {"calibration": calibration, "test": read_images(archive, "test", options.tests)}
    alone = accuracies(nets, data["test"])
    params = sum(p.numel() for net in nets.values() for p in net.parameters())
    Console(width=120).print(table(rows(nets, data, options), alone, params))
    return 0


if __name__ == "__main__":
    sys.exit(main())
