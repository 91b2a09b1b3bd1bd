"""Weights shared by two LeNet-5 on two versions of MNIST, against pruning each of them and against random sharing.

The toy task of Gao, Deng and Huang, "Cross Domain Model Compression by Structurally Weight Sharing" (2019): MNIST
turned by 45 degrees and MNIST blurred by motion are two domains of the same digits. A pair of trained networks goes
through one of

    share        CrossDomainShare: training with its regulariser, clusters of channels, fine-tuning
    random       the same with clusters drawn at random, and no regulariser
    inside       the same with clusters of each domain alone, which stay as they are
    channels     each network alone: in every layer the input channels with the smallest weights go
    weights      each network alone: in every layer the smallest weights go (which saves no multiplications)
    bytes        two thirds as many weights: with 2 bytes for the index of each they take as much memory as the others

with the same epochs and learning rates, cut to the same number of weights in every layer; the accuracy of each domain
and of the mean of both scores is measured, with --held-out on training pictures that no network is trained on, to
choose settings by. Without epochs and fine-tuning nothing is trained after the cut. With --pictures the correlations of
weights and of features of both domains are drawn before and after the training with the graph embedding and with GrOWL
(Fig. 2).

    python tools/bench/cross_domain_mnist.py --images 20000 --seeds 3 --pictures figures
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common.digits import view
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphzip as gz

REPOSITORY = Path(__file__).resolve().parents[2]
TASKS = ("turned", "blurred")
CLUSTERS = {4: {"conv2": 24, "fc1": 348}, 8: {"conv2": 16, "fc1": 152}, 16: {"conv2": 10, "fc1": 60}}
"""Clusters of both domains that leave a 4th, 8th and 16th of all weights."""

INPUTS = {"conv2": 40, "fc1": 1600}
"""Input channels of both domains."""

SHOWN = 6
"""Clusters that channels are put in order by in the pictures."""

CALIBRATION = 1000
"""Training pictures that shared weights are fitted on."""


@dataclass(frozen=True)
class Data:
    """Pictures of each domain (n, 1, 28, 28), the same digits in the same order, and the labels."""

    pictures: dict[str, Tensor]
    labels: Tensor


def lenet() -> nn.Sequential:
    """LeNet-5 as in Caffe."""
    layers = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu3=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )
    return layers.to(memory_format=torch.channels_last)  # a third faster on one core


def domains(images: np.ndarray) -> dict[str, Tensor]:
    """The digits turned by 45 degrees, and blurred along 9 pixels."""
    return {name: view(name, images) for name in TASKS}


def part(images: np.ndarray, labels: np.ndarray, most: int | None, skipped: int = 0) -> Data:
    """As many of the digits, which are sorted, in a random order that begins behind some."""
    chosen = np.random.default_rng(0).permutation(len(labels))[skipped:][:most]
    return Data(domains(images[chosen]), torch.from_numpy(labels[chosen].astype(np.int64)))


def load(folder: Path, images: int, held_out: int = 0) -> tuple[Data, Data] | None:
    """Training data and what accuracy is measured on, or nothing where the file is missing, which is said."""
    path = folder / "mnist.npz"
    if not path.exists():
        print(f"skipped: {path} is missing", file=sys.stderr)
        return None
    with np.load(path) as file:
        known = file["train_images"], file["train_labels"]
        train = part(*known, images)
        test = part(*known, held_out, images) if held_out else part(file["test_images"], file["test_labels"], None)
    return train, test


@dataclass(frozen=True)
class Run:
    """What a method is given."""

    models: dict[str, nn.Module]
    """Trained."""
    continued: dict[str, nn.Module]
    """The same after as much plain training as the stage "regularize" takes."""
    train: Data
    options: argparse.Namespace
    clusters: dict[str, int]
    seed: int

    def batches(self, epochs: int, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """The same order for every method of a seed."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        for _ in range(epochs):
            for chosen in torch.randperm(len(self.train.labels), generator=generator).split(self.options.batch):
                yield {name: each[chosen] for name, each in self.train.pictures.items()}, self.train.labels[chosen]

    def steps(self, epochs: int) -> int:
        return epochs * -(-len(self.train.labels) // self.options.batch)


def loss_of(scores: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Of each domain, and of the mean of their scores."""
    fused = torch.stack(list(scores.values())).mean(0)
    terms = [F.cross_entropy(each, labels) for each in (*scores.values(), fused)]
    return torch.stack(terms).sum()


def train(
    run: Run,
    call: Callable[..., dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    seed: int,
    term: Callable[[], Tensor] | None = None,
    after: Callable[[], None] | None = None,
) -> None:
    """Cosine learning rate; `term` is added to the loss, `after` is called after every step."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, run.steps(epochs)))
    for pictures, labels in run.batches(epochs, seed):
        loss = loss_of(call(**pictures), labels)
        if term is not None:
            loss = loss + term()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if after is not None:
            after()


def caller(models: dict[str, nn.Module]) -> Callable[..., dict[str, Tensor]]:
    """Calls all models, each with the pictures of its domain."""

    def call(**pictures: Tensor) -> dict[str, Tensor]:
        return {name: models[name](each) for name, each in pictures.items()}

    return call


def settings(lr: float) -> dict[str, Any]:
    return {"lr": lr, "momentum": 0.9, "weight_decay": 1e-4}


def fit_plainly(
    run: Run, models: dict[str, nn.Module], *, epochs: int, lr: float, seed: int, after: Any = None
) -> None:
    optimizer = torch.optim.SGD(nn.ModuleDict(models).parameters(), **settings(lr))
    train(run, caller(models), optimizer, epochs=epochs, seed=seed, after=after)


@torch.no_grad()
def accuracies(models: dict[str, nn.Module], data: Data) -> dict[str, float]:
    """Percent right by domain, and of the fused scores."""
    scores = {
        name: torch.cat([model(part) for part in data.pictures[name].split(1000)]) for name, model in models.items()
    }
    scores["fused"] = torch.stack(list(scores.values())).mean(0)
    return {name: 100 * float((each.argmax(1) == data.labels).float().mean()) for name, each in scores.items()}


def prepared(run: Run, models: dict[str, nn.Module], **options: Any) -> gz.Prepared:
    plan = gz.Plan([gz.CrossDomainShare(clusters=run.clusters, **options)])
    example = {name: (each[:2],) for name, each in run.train.pictures.items()}
    calibration = {name: each[:CALIBRATION].split(500) for name, each in run.train.pictures.items()}
    return gz.prepare(models, plan, example, calibration=calibration, seed=run.seed)


def fit(run: Run, ready: gz.Prepared, *, finetune: bool) -> None:
    """The training of one stage."""
    options = run.options
    epochs, lr = (options.finetune, options.finetune_lr) if finetune else (options.epochs, options.lr)
    optimizer = ready.optimizer(torch.optim.SGD, **settings(lr))
    train(run, ready, optimizer, epochs=epochs, seed=2 if finetune else 1, term=ready.regularizer)


def tasks_of(ready: gz.Prepared) -> dict[str, nn.Module]:
    compiled = ready.convert()
    return {name: compiled.task(name).eval() for name in compiled.tasks}


def share(run: Run) -> dict[str, nn.Module]:
    ready = prepared(run, run.models, regularizer=run.options.regularizer, strength=run.options.strength)
    for stage in ready.steps():
        fit(run, ready, finetune=stage == "finetune")
    return tasks_of(ready)


def random(run: Run) -> dict[str, nn.Module]:
    ready = prepared(run, run.continued, regularizer=None)
    for stage in ready.steps():
        if stage == "regularize":
            ready.clusters.copy_(drawn(run))
        else:
            fit(run, ready, finetune=True)
    return tasks_of(ready)


def drawn(run: Run) -> Tensor:
    """The number of the cluster of every channel: drawn at random, clusters of one size up to one channel."""
    generator = torch.Generator().manual_seed(run.seed)
    return torch.cat(
        [
            (torch.arange(count) % run.clusters[layer])[torch.randperm(count, generator=generator)]
            for layer, count in INPUTS.items()
        ]
    )


def inside(run: Run) -> dict[str, nn.Module]:
    """Clusters of channels of one domain each, by the correlation of their features."""
    options = run.options
    ready = prepared(run, run.models, regularizer=options.regularizer, strength=options.strength)
    for stage in ready.steps():
        fit(run, ready, finetune=stage == "finetune")
        if stage == "regularize":
            ready.clusters.copy_(apart(run, ready))
    return tasks_of(ready)


def apart(run: Run, ready: gz.Prepared) -> Tensor:
    """The number of the cluster of every channel: half of the clusters for each domain."""
    found = []
    for layer in INPUTS:
        features, count = correlations(ready, run.train, layer)[1], run.clusters[layer] // 2
        half = len(features) // 2
        found += [clustered(features[:half, :half], count), clustered(features[half:, half:], count) + count]
    return torch.cat(found)


def channels(run: Run) -> dict[str, nn.Module]:
    def mask(weight: Tensor, clusters: int) -> Tensor:
        norms = weight.transpose(0, 1).flatten(1).norm(dim=1)
        kept = torch.zeros_like(norms)
        kept[norms.topk(clusters // 2).indices] = 1.0
        return kept.reshape(1, -1, *[1] * (weight.dim() - 2))

    return pruned(run, mask)


def weights(run: Run, *, share: float = 1.0) -> dict[str, nn.Module]:
    def mask(weight: Tensor, clusters: int) -> Tensor:
        size = weight.abs().flatten()
        kept = torch.zeros_like(size)
        kept[size.topk(int(share * clusters * weight[:, 0].numel() / 2)).indices] = 1.0
        return kept.reshape(weight.shape)

    return pruned(run, mask)


def same_bytes(run: Run) -> dict[str, nn.Module]:
    """A weight takes 4 bytes, and 2 more tell where it is."""
    return weights(run, share=4 / 6)


def pruned(run: Run, mask: Callable[[Tensor, int], Tensor]) -> dict[str, nn.Module]:
    """The cut, then fine-tuning of what is left."""
    models = copy.deepcopy(run.continued)
    held = [(model.get_parameter(f"{name}.weight"), k) for model in models.values() for name, k in run.clusters.items()]
    masks = [(weight, mask(weight.detach(), k)) for weight, k in held]

    @torch.no_grad()
    def cut() -> None:
        for weight, kept in masks:
            weight.mul_(kept)

    cut()
    fit_plainly(run, models, epochs=run.options.finetune, lr=run.options.finetune_lr, seed=2, after=cut)
    return {name: model.eval() for name, model in models.items()}


METHODS: dict[str, Callable[[Run], dict[str, nn.Module]]] = {
    "share": share,
    "random": random,
    "inside": inside,
    "channels": channels,
    "weights": weights,
    "bytes": same_bytes,
}


def correlations(ready: gz.Prepared, data: Data, layer: str) -> tuple[Tensor, Tensor]:
    """Of the weights (Eq. 3) and of the features (Eq. 5) of a layer's input channels, of both domains together."""
    rows, features = [], []
    for name in TASKS:
        module = ready.task(name)
        rows.append(module.get_parameter(f"{layer}.weight").detach().transpose(0, 1).flatten(1))
        seen: list[Tensor] = []
        hook = module.get_submodule(layer).register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        with torch.no_grad():
            module(data.pictures[name][:500])
        hook.remove()
        features.append(seen[0].transpose(0, 1).flatten(1))
    found = (F.normalize(torch.cat(each), dim=1) for each in (rows, features))
    left, right = (each @ each.t() for each in found)
    return left, right


def across(correlation: Tensor) -> float:
    """How like its best match in the other domain a channel is, on average."""
    half = len(correlation) // 2
    return float(correlation[:half, half:].abs().max(1).values.mean())


def clustered(features: Tensor, count: int) -> Tensor:
    """The cluster of every channel of both domains by the correlation of features."""
    from sklearn.cluster import SpectralClustering

    method = SpectralClustering(count, affinity="precomputed", random_state=0)
    return torch.from_numpy(method.fit_predict(features.abs().clamp_min(1e-6).double().numpy())).long()


def blocks(correlation: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean correlation across the domains: with the best match, within clusters (where any is common), between them."""
    half = len(labels) // 2
    values, same = correlation[:half, half:].abs(), labels[:half, None] == labels[half:]
    parts = {"within": values[same], "between": values[~same]}
    return {"best": across(correlation)} | {name: float(part.mean()) for name, part in parts.items() if len(part)}


def pictures(run: Run, data: Data, folder: Path) -> dict[str, Any]:
    """Correlations before and after the training with each regulariser, drawn and summed up.

    The channels of each domain are in the order of the clusters of both, so that clusters in common are blocks.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    shown: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    labels: dict[str, dict[str, Tensor]] = {}
    for kind, strength in (("before", 0.0), ("normalized", run.options.strength), ("growl", run.options.growl)):
        ready = prepared(run, run.models, regularizer=None if kind == "before" else kind, strength=strength)
        if kind != "before":
            fit(run, ready, finetune=False)
        shown[kind] = {layer: correlations(ready, data, layer) for layer in INPUTS}
        labels[kind] = {layer: clustered(pair[1], SHOWN) for layer, pair in shown[kind].items()}
        if kind == "normalized":
            compiled = ready.convert()
            gz.draw_sharing(compiled.report, folder / "clusters.svg")
    for layer in INPUTS:
        figure = Figure(figsize=(3 * len(shown), 6), layout="constrained")
        for column, (kind, found) in enumerate(shown.items(), start=1):
            parts = labels[kind][layer].chunk(2)
            order = torch.cat([part.argsort(stable=True) + len(part) * number for number, part in enumerate(parts)])
            for row, (what, matrix) in enumerate(zip(("weights", "features"), found[layer], strict=True)):
                axes = figure.add_subplot(2, len(shown), row * len(shown) + column)
                image = axes.imshow(matrix[order][:, order].abs().numpy(), vmin=0, vmax=1)
                axes.set_title(f"{what}, {kind}", fontsize=8)
        figure.colorbar(image, ax=figure.axes, shrink=0.5)
        figure.savefig(folder / f"{layer}.png", dpi=110)
    return {
        kind: {
            layer: {
                what: blocks(matrix, labels[kind][layer])
                for what, matrix in zip(("weights", "features"), pair, strict=True)
            }
            for layer, pair in found.items()
        }
        for kind, found in shown.items()
    }


def measure(options: argparse.Namespace, train_data: Data, test: Data) -> dict[str, Any]:
    """Every method at every cut with every seed."""
    found: dict[str, Any] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        torch.manual_seed(seed)
        models: dict[str, nn.Module] = {name: lenet() for name in TASKS}
        run = Run(models, models, train_data, options, CLUSTERS[4], seed)
        fit_plainly(run, models, epochs=options.start, lr=options.lr, seed=0)
        run = replace(run, continued=copy.deepcopy(models))
        fit_plainly(run, run.continued, epochs=options.epochs, lr=options.lr, seed=1)
        found.setdefault("uncut", {}).setdefault(1, []).append(accuracies(run.continued, test))
        if options.pictures is not None and seed == options.first_seed:
            found["correlation"] = pictures(run, test, options.pictures)
            print(json.dumps(found["correlation"], indent=2), file=sys.stderr)
        for times in options.times:
            for name in options.methods.split(","):
                start = time.perf_counter()
                result = accuracies(METHODS[name](replace(run, clusters=CLUSTERS[times])), test)
                found.setdefault(name, {}).setdefault(times, []).append(result)
                text = ", ".join(f"{key} {value:.2f}" for key, value in result.items())
                print(
                    f"seed {seed}, {times} times, {name}: {text}, {time.perf_counter() - start:.0f} s", file=sys.stderr
                )
    return found


def table(found: dict[str, Any], options: argparse.Namespace) -> Table:
    """One line per method and cut: means over seeds, and the spread of the fused accuracy."""
    what = "held-out" if options.held_out else "test"
    rendered = Table(title=f"{what} accuracy in percent, {options.seeds} seeds, {options.images} pictures")
    for column in ("times fewer weights", "method", *TASKS, "fused", "spread"):
        rendered.add_column(column, justify="left" if column == "method" else "right")
    rows = [
        (times, name, each) for name, cuts in found.items() if name != "correlation" for times, each in cuts.items()
    ]
    for times, name, each in sorted(rows, key=lambda row: row[0]):
        means = [f"{statistics.mean(result[key] for result in each):.2f}" for key in (*TASKS, "fused")]
        spread = statistics.stdev(result["fused"] for result in each) if len(each) > 1 else float("nan")
        rendered.add_row(str(times), name, *means, f"{spread:.2f}")
    return rendered


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4_000, help="how many pictures to train on")
    parser.add_argument("--held-out", type=int, default=0, help="how many more to measure on in place of test data")
    parser.add_argument("--start", type=int, default=4, help="epochs of the networks that are cut")
    parser.add_argument("--epochs", type=int, default=2, help="epochs with the regulariser, or of plain training")
    parser.add_argument("--finetune", type=int, default=10, help="epochs after the cut")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--finetune-lr", type=float, default=0.03)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--times", type=int, nargs="+", default=list(CLUSTERS), choices=list(CLUSTERS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--regularizer", choices=("normalized", "plain", "simple", "growl"), default="normalized")
    parser.add_argument("--strength", type=float, default=0.25, help="share of the gradient of the loss")
    parser.add_argument("--growl", type=float, default=0.25, help="strength of GrOWL in the pictures")
    parser.add_argument("--pictures", type=Path, help="draw the correlations into this folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    logging.getLogger("graphzip").setLevel(logging.WARNING)
    folder = Path(os.environ.get("GRAPHZIP_DATA", REPOSITORY.parent / "shared" / "data"))
    loaded = load(folder, options.images, options.held_out)
    if loaded is None:
        return 0
    found = measure(options, *loaded)
    if options.json:
        print(json.dumps({"options": vars(options) | {"pictures": str(options.pictures)}, "found": found}, indent=2))
    else:
        Console(width=100).print(table(found, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
