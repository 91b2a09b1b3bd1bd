"""Zip two LeNets that were trained apart on MNIST (MTZ, Table 1 and Fig. 2).

    python tools/bench/mtz_mnist.py --net lenet-300-100
    python tools/bench/mtz_mnist.py --net lenet-5 --retrain 600
    python tools/bench/mtz_mnist.py --curve curve.png
    python tools/bench/mtz_mnist.py --compare

Trains (or reads from `--cache`) two networks from different seeds, puts the hidden units of each in a random order, and
prints test errors in percent: alone, with the first layer zipped, with all hidden layers zipped (as it is done by
default, without the re-fit of what is not shared, and as the paper has it), and after retraining.
`--compare` zips shares of all hidden layers by every metric, re-fitted and not, and with an eighth of the units of each
network merged within it before, nothing retrained.
`--sparse` first prunes the smallest weights and trains on what is left. Data: `mnist.npz` in the folder that
GRAPHZIP_DATA names.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common.teaching import taught
from torch import Tensor, nn

import graphzip as gz

DATA = Path(os.environ.get("GRAPHZIP_DATA", "../shared/data"))
BATCH = 100
SPARSITY = {"lenet-300-100": 0.9, "lenet-5": 0.9}
LAST = 2 / 3
"""The share of the retraining that comes after the last layer."""
TAUGHT = 0.9
"""The share of the loss that is the answers of the networks before."""


def lenet_300_100() -> nn.Module:
    """Two hidden layers of 300 and 100 units."""
    layers = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def lenet_5() -> nn.Module:
    """Two convolutions of 20 and 50 channels and one hidden layer of 500 units."""
    first = nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


NETS: dict[str, Callable[[], nn.Module]] = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5}


class Images:
    """MNIST as tensors: images in [0, 1], `(n, 1, 28, 28)`."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as data:
            self.train, self.labels = self._of(data["train_images"]), torch.from_numpy(data["train_labels"]).long()
            self.test, self.truth = self._of(data["test_images"]), torch.from_numpy(data["test_labels"]).long()

    @staticmethod
    def _of(images: np.ndarray) -> Tensor:
        return torch.from_numpy(images).float().unsqueeze(1) / 255.0

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random training batches without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for index in torch.randperm(len(self.train), generator=generator).split(BATCH):
                yield self.train[index], self.labels[index]

    def calibration(self, count: int, seed: int) -> list[Tensor]:
        chosen = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))[:count]
        return list(self.train[chosen].split(500))

    @torch.no_grad()
    def error(self, net: nn.Module) -> float:
        """Test error in percent."""
        net.eval()
        wrong = sum(
            int((net(x).argmax(1) != y).sum())
            for x, y in zip(self.test.split(1000), self.truth.split(1000), strict=True)
        )
        return 100.0 * wrong / len(self.truth)


def train(net: nn.Module, data: Images, steps: int, seed: int, *, lr: float) -> nn.Module:
    """SGD with momentum, the rate going down to nothing along a cosine; zero weights of a sparse network stay zero."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    masks = [(p, p != 0.0) for p in net.parameters() if p.dim() > 1]
    net.train()
    for _, (x, y) in zip(range(steps), data.batches(seed), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        plan.step()
        _masked(masks)
    return net


@torch.no_grad()
def _masked(masks: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, mask in masks:
        parameter.mul_(mask)


@torch.no_grad()
def prune(net: nn.Module, share: float) -> None:
    """Set the smallest weights of every layer to zero."""
    for parameter in net.parameters():
        if parameter.dim() > 1:
            bound = parameter.abs().flatten().kthvalue(max(1, int(share * parameter.numel()))).values
            parameter.mul_(parameter.abs() > bound)


@torch.no_grad()
def shuffle(net: nn.Module, seed: int) -> None:
    """Put the hidden units of a chain in a random order."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [layer for layer in net.children() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for one, two in itertools.pairwise(layers):
        order = torch.randperm(one.weight.shape[0], generator=generator)  # type: ignore[index, union-attr, arg-type]
        one.weight.copy_(one.weight[order])  # type: ignore[union-attr, index, operator]
        one.bias.copy_(one.bias[order])  # type: ignore[union-attr, index, operator]
        wide = two.weight.reshape(two.weight.shape[0], len(order), -1)  # type: ignore[union-attr, operator]
        two.weight.copy_(wide[:, order].reshape(two.weight.shape))  # type: ignore[union-attr, operator]


def trained(kind: str, data: Images, seed: int, args: argparse.Namespace) -> nn.Module:
    """A trained network with its units shuffled, from the cache where it is there."""
    torch.manual_seed(seed)
    net = NETS[kind]()
    name = f"{kind}-{'sparse' if args.sparse else 'dense'}-{args.steps}-{seed}.pt"
    cached = args.cache / name if args.cache else None
    if cached is not None and cached.exists():
        net.load_state_dict(torch.load(cached))
    else:
        train(net, data, args.steps, seed, lr=0.05)
        if args.sparse:
            prune(net, SPARSITY[kind])
            train(net, data, args.steps // 4, seed + 100, lr=0.02)
        if cached is not None:
            torch.save(net.state_dict(), cached)
    shuffle(net, seed)
    return net.eval()


def zipped(
    nets: dict[str, nn.Module], data: Images, args: argparse.Namespace, *, retrain: int = 0, **options: object
) -> gz.Compiled:
    """Zip the networks; of `retrain` iterations most come after the last layer, the others after each one before."""
    layers = layers_of(nets)
    calibration = dict.fromkeys(nets, data.calibration(args.images, args.seed))
    x = data.train[:2]
    given = {"damping": args.damping, "pairing": args.pairing, "metric": args.metric}
    plan = gz.Plan([gz.Zip(**{name: value for name, value in {**given, **options}.items() if value is not None})])

    def train_jointly(prepared: gz.Prepared, stage: str) -> None:
        steps = round(retrain * (LAST if stage.endswith(layers[-1]) else (1 - LAST) / (len(layers) - 1)))
        optimizer = prepared.optimizer(torch.optim.SGD, lr=args.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        masks = [(p, p != 0.0) for p in prepared.parameters() if p.dim() > 1 and args.sparse]
        batches = [data.batches(args.seed + 7 * number + 1) for number in range(len(nets))]
        prepared.train()
        for _ in range(steps):
            given = [next(each) for each in batches]
            out = prepared(**{name: x for name, (x, _) in zip(nets, given, strict=True)})
            loss = sum(_loss(out[name], nets[name], x, y) for name, (x, y) in zip(nets, given, strict=True))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
            schedule.step()
            _masked(masks)

    return gz.compile(
        nets,
        plan,
        dict.fromkeys(nets, (x,)),
        calibration=calibration,
        train=train_jointly if retrain else None,
        seed=args.seed,
    )


def _loss(logits: Tensor, before: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (1 - TAUGHT) * F.cross_entropy(logits, y) + TAUGHT * taught(logits, before, x)


def layers_of(nets: dict[str, nn.Module]) -> list[str]:
    """Names of the hidden layers."""
    first = next(iter(nets.values()))
    return [name for name, layer in first.named_children() if isinstance(layer, nn.Linear | nn.Conv2d)][:-1]


def errors(compiled: gz.Compiled, data: Images) -> list[float]:
    return [data.error(compiled.task(name)) for name in compiled.tasks]


def show(what: str, found: list[float], base: float) -> None:
    mean = sum(found) / len(found)
    print(
        f"{what:<46}" + "  ".join(f"{each:6.2f}" for each in found) + f"   mean {mean:6.2f} ({mean - base:+.2f})",
        flush=True,
    )


def draw(path: Path, nets: dict[str, nn.Module], data: Images, args: argparse.Namespace) -> None:
    """The mean error over the share of the first, then of the second layer that is zipped (Fig. 2)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    layers, shares = layers_of(nets)[:2], [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for number, axis in enumerate(axes):
        for metric in (args.metric or "hessian", "random"):
            curve = []
            for share in shares:
                table = {**dict.fromkeys(layers[:number], 1.0), layers[number]: share}
                table = {name: amount for name, amount in table.items() if amount}
                found = (
                    errors(zipped(nets, data, args, share=table, metric=metric), data)
                    if table
                    else [data.error(net) for net in nets.values()]
                )
                curve.append(sum(found) / len(found))
                print(f"{metric}, layer {number + 1}, {share:.0%} shared: {curve[-1]:.2f} %", flush=True)
            axis.plot(
                [100 * share for share in shares], curve, marker="o", label="MTZ" if metric != "random" else metric
            )
        axis.set(xlabel=f"shared units of layer {number + 1} (%)", ylabel="mean test error (%)", yscale="log")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def compare(nets: dict[str, nn.Module], data: Images, args: argparse.Namespace, base: float) -> None:
    """Errors without retraining, and how many parameters of both networks are left."""
    ways: dict[str, dict[str, Any]] = {name: {"metric": name} for name in ("hessian", "correlation", "random")}
    ways["hessian, within 1/8"] = {"metric": "hessian", "within": 0.125}
    for share in (1.0, 0.65, 0.35):
        for name, options in ways.items():
            for refit in (True, False):
                result = zipped(nets, data, args, share=share, refit=refit, **options)
                left = result.report.after.params / result.report.before.params
                label = f"{share:4.0%} {name}{'' if refit else ', not re-fitted'}, {left:.0%} left"
                show(label, errors(result, data), base)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="lenet-300-100")
    parser.add_argument("--sparse", action="store_true", help="prune 90 %% of the weights first")
    parser.add_argument("--steps", type=int, default=10_500, help="training iterations of each network")
    parser.add_argument("--images", type=int, default=2_000, help="calibration images")
    parser.add_argument("--retrain", type=int, default=550, help="iterations of retraining, 0 for none")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate of retraining")
    parser.add_argument("--metric", choices=["hessian", "euclidean", "random"])
    parser.add_argument("--pairing", choices=["optimal", "greedy"])
    parser.add_argument("--damping", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="a folder to keep the trained networks in")
    parser.add_argument("--compare", action="store_true", help="compare metrics instead")
    parser.add_argument("--curve", type=Path, help="draw Fig. 2 into this file instead")
    args = parser.parse_args()
    if not (DATA / "mnist.npz").exists():
        print(f"skipped: there is no {DATA / 'mnist.npz'}; set GRAPHZIP_DATA")
        return 0
    data = Images(DATA / "mnist.npz")
    nets = {name: trained(args.net, data, seed, args) for name, seed in (("a", args.seed), ("b", args.seed + 1))}
    if args.curve:
        draw(args.curve, nets, data, args)
        return 0
    alone = [data.error(net) for net in nets.values()]
    base = sum(alone) / len(alone)
    show("alone", alone, base)
    if args.compare:
        compare(nets, data, args, base)
        return 0
    first = layers_of(nets)[0]
    show(f"{first} zipped, no retraining", errors(zipped(nets, data, args, share={first: 1.0}), data), base)
    for refit in (True, False):
        drawn = zipped(nets, data, args, share={first: 1.0}, metric="random", refit=refit)
        show(f"{first} shared at random{'' if refit else ', not re-fitted'}", errors(drawn, data), base)
    show("all hidden layers zipped, no retraining", errors(zipped(nets, data, args), data), base)
    show("the same, nothing re-fitted", errors(zipped(nets, data, args, refit=False), data), base)
    if not args.pairing:
        show("the same, Algorithm 1 as it is", errors(zipped(nets, data, args, paper=True), data), base)
    if args.retrain:
        found = errors(zipped(nets, data, args, retrain=args.retrain), data)
        show(f"all zipped, {args.retrain} iterations", found, base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
