"""Centripetal SGD against Torch-Pruning on CIFAR-10: the same MACs, the same epochs, the same optimizer.

    pip install torch-pruning
    python tools/bench/csgd_cifar.py --model resnet20 --epochs 2 --seeds 3

From one trained network each method makes a slim one (by default 5/8 of every width: 10-20-40) and trains for the same
number of epochs with the same optimizer, learning-rate schedule and batches:

- `csgd`: Centripetal SGD from a warm start. `plan_for` splits the MACs that the uniform widths have over the groups,
  `Prepared.collapse_` makes the filters of every cluster equal and fits what reads them, both on 512 of the training
  images without labels; all epochs are by `Prepared.optimizer`, then comes the merge, and nothing is trained after it.
- `uniform`: the same with the uniform widths.
- `cold`: the paper's, clusters by k-means and filters drawn together while they train.
- `merge`: the merge at once, then plain training of the slim network.
- `magnitude`: the channels with the smallest kernels are dropped (`PruneChannels`), then plain training.
- `torch-pruning`: group magnitude importance, local ratios, then plain training. Its shortcuts are 1 x 1 convolutions
  that compute what the padded ones do, for it follows no padding; they are not counted, and may train. The ratio is
  searched for that comes closest to the MACs of the others from above.

Needs `<model>_cifar10.safetensors` and `cifar10_jpeg.npz` in the folder that GRAPHZIP_DATA names (default:
../shared/data beside the repository). What is missing is said and skipped. Accuracy is the percentage of right answers
on the test images, mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import Block, CifarResNet, accuracy, augmented, data_folder, normalised, read_images
from common.teaching import taught
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import graphzip as gz

BLOCKS = {"resnet20": 3, "resnet56": 9}
EXAMPLE = (2, 3, 32, 32)
UNLABELLED = 512


@dataclass
class Data:
    """Images (uint8, NCHW) and labels, on the device."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass
class Run:
    """What one method has to work with."""

    model: nn.Module
    data: Data
    options: argparse.Namespace
    seed: int

    @property
    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace with."""
        return (torch.zeros(EXAMPLE, device=self.options.device),)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.options.epochs * (len(self.data.train[1]) // self.options.batch)


def batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, augmented batches of all epochs; the same for every method of a seed."""
    generator = torch.Generator().manual_seed(run.seed)
    images, labels = run.data.train
    for _ in range(run.options.epochs):
        order = torch.randperm(len(labels), generator=generator).to(images.device)
        for chosen in order.split(run.options.batch):
            if len(chosen) == run.options.batch:
                yield augmented(normalised(images[chosen]), generator), labels[chosen]


def settings(run: Run) -> dict[str, Any]:
    return {"lr": run.options.lr, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}


def train(run: Run, model: nn.Module, optimizer: Optimizer, *, teacher: nn.Module | None = None) -> None:
    """Cosine learning rate, cross entropy; with a teacher a share of the loss is its answers (Hinton et al. 2015)."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    share = run.options.distill if teacher is not None else 0.0
    model.train()
    for images, labels in batches(run):
        logits = model(images)
        loss = (1 - share) * F.cross_entropy(logits, labels)
        if teacher is not None:
            loss = loss + share * taught(logits, teacher, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def teacher_of(run: Run) -> nn.Module | None:
    return copy.deepcopy(run.model).eval() if run.options.distill else None


def fine_tuned(run: Run, model: nn.Module) -> nn.Module:
    """The slim model after plain training."""
    train(run, model, SGD(model.parameters(), **settings(run)), teacher=teacher_of(run))
    return model


def unlabelled(run: Run) -> list[tuple[Tensor]]:
    """Some of the training images, the same for every seed."""
    chosen = torch.randperm(len(run.data.train[1]), generator=torch.Generator().manual_seed(0))[:UNLABELLED]
    return [(x,) for x in normalised(run.data.train[0][chosen.to(run.options.device)]).split(64)]


def uniform_macs(run: Run) -> int:
    """What uniform widths leave."""
    plan = gz.Plan([gz.ClusterMerge(keep=run.options.keep, clustering="even")])
    return gz.compile(run.model, plan, run.example).report.after.macs


def csgd(run: Run) -> nn.Module:
    calibration = unlabelled(run)
    wanted = uniform_macs(run)
    plan = gz.plan_for(run.model, run.example, macs=wanted, calibration=calibration, cache=run.options.cache)
    return warm(run, plan, calibration)


def uniform(run: Run) -> nn.Module:
    plan = gz.Plan([gz.ClusterMerge(keep=run.options.keep, clustering="reconstruction", compensate="data")])
    return warm(run, plan, unlabelled(run))


def warm(run: Run, plan: gz.Plan, calibration: list[tuple[Tensor]]) -> nn.Module:
    prepared = gz.prepare(run.model, plan, run.example, seed=run.seed, calibration=calibration)
    prepared.collapse_()
    print(f"  {accuracy(prepared.eval(), *run.data.test):.2f} % before the training", file=sys.stderr)
    return centripetal(run, prepared)


def cold(run: Run) -> nn.Module:
    plan = gz.Plan([gz.ClusterMerge(keep=run.options.keep, strength=run.options.strength)])
    return centripetal(run, gz.prepare(run.model, plan, run.example, seed=run.seed))


def centripetal(run: Run, prepared: gz.Prepared) -> nn.Module:
    optimizer = prepared.optimizer(SGD, steps=run.steps, **settings(run))
    train(run, prepared, optimizer, teacher=teacher_of(run))
    print(f"  deviation before the merge {prepared.deviation():.1e}", file=sys.stderr)
    if run.options.plot is not None:
        prepared.history.plot(run.options.plot)
    return prepared.convert().module


def merge(run: Run) -> nn.Module:
    plan = gz.Plan([gz.ClusterMerge(keep=run.options.keep)])
    return fine_tuned(run, gz.compile(run.model, plan, run.example, seed=run.seed).module)


def magnitude(run: Run) -> nn.Module:
    plan = gz.Plan([gz.PruneChannels(keep=run.options.keep)])
    return fine_tuned(run, gz.compile(run.model, plan, run.example, seed=run.seed).module)


class Shortcut(nn.Conv2d):
    """The padded, subsampled shortcut as a 1 x 1 convolution."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer, 1, 2, bias=False)
        with torch.no_grad():
            self.weight.zero_()
            self.weight[outer // 4 : outer // 4 + inner, :, 0, 0] = torch.eye(inner)


class ProjectedBlock(Block):
    """A block whose shortcut is a module."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def with_projections(model: nn.Module) -> nn.Module:
    """A copy that computes the same with convolutions for shortcuts."""
    model = copy.deepcopy(model)
    for block in [module for module in model.modules() if type(module) is Block]:
        inner, outer = block.conv1.in_channels, block.conv2.out_channels
        block.shortcut = Shortcut(inner, outer).to(block.conv1.weight.device) if block.pad else nn.Identity()
        block.__class__ = ProjectedBlock
    return model


def macs(model: nn.Module) -> int:
    """Multiply-accumulates for one image, without those of shortcuts that stand for padding."""
    shortcuts = [(name, m) for name, m in model.named_modules() if isinstance(m, Shortcut)]
    extra = sum(m.weight.numel() * (16 if name.startswith("layer2") else 8) ** 2 for name, m in shortcuts)
    device = next(model.parameters()).device
    return gz.cost(model, (torch.zeros(EXAMPLE, device=device),)).macs - extra


def torch_pruned(run: Run, ratio: float) -> nn.Module:
    import torch_pruning as tp

    model = with_projections(run.model).eval()
    pruner = tp.pruner.BasePruner(
        model,
        run.example[0],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[model.linear],
        global_pruning=False,
    )
    pruner.step()
    return model


def torch_pruning(run: Run) -> nn.Module:
    wanted = uniform_macs(run)
    low, high = 0.0, 1.0 - run.options.keep / 2
    for _ in range(8):  # the largest ratio that leaves at least the MACs of the others: widths are whole numbers
        middle = (low + high) / 2
        low, high = (middle, high) if macs(torch_pruned(run, middle)) >= wanted else (low, middle)
    return fine_tuned(run, torch_pruned(run, low))


METHODS: dict[str, Callable[[Run], nn.Module]] = {
    "csgd": csgd,
    "uniform": uniform,
    "cold": cold,
    "merge": merge,
    "magnitude": magnitude,
    "torch-pruning": torch_pruning,
}


def load(options: argparse.Namespace, folder: Path) -> tuple[nn.Module, Data] | None:
    """The trained network and the images, or nothing where a file is missing, which is said."""
    weights, archive = folder / f"{options.model}_cifar10.safetensors", folder / "cifar10_jpeg.npz"
    missing = [path for path in (weights, archive) if not path.exists()]
    for path in missing:
        print(f"skipped: {path} is missing", file=sys.stderr)
    if missing:
        return None
    model = CifarResNet(BLOCKS[options.model])
    model.load_state_dict(load_file(weights))
    parts = [read_images(archive, part, options.images) for part in ("train", "test")]
    train_part, test_part = (tuple(t.to(options.device) for t in part) for part in parts)
    return model.to(options.device).eval(), Data(train_part, test_part)


def measure(options: argparse.Namespace, model: nn.Module, data: Data) -> dict[str, Any]:
    """Every method with every seed."""
    found: dict[str, Any] = {"before": {"accuracy": accuracy(model, *data.test), "macs": macs(model)}}
    for name in options.methods.split(","):
        rows = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            start = time.perf_counter()
            try:
                slim = METHODS[name](Run(model, data, options, seed))
            except ImportError as error:
                print(f"skipped {name}: {error}; pip install torch-pruning", file=sys.stderr)
                break
            rows.append((accuracy(slim.eval(), *data.test), macs(slim), time.perf_counter() - start))
            print(f"{name}, seed {seed}: {rows[-1][0]:.2f} %, {rows[-1][2]:.0f} s", file=sys.stderr)
        if rows:
            scores = [row[0] for row in rows]
            found[name] = {
                "accuracies": scores,
                "accuracy": statistics.mean(scores),
                "spread": statistics.stdev(scores) if len(scores) > 1 else math.nan,
                "macs": rows[0][1],
                "seconds": statistics.mean(row[2] for row in rows),
            }
    return found


def table(found: dict[str, Any], options: argparse.Namespace) -> Table:
    """One line per method."""
    rendered = Table(title=f"{options.model}, {options.epochs} epochs, {options.seeds} seeds")
    for column in ("", "accuracy (%)", "spread", "MACs", "seconds"):
        rendered.add_column(column, justify="left" if not column else "right")
    for name, row in found.items():
        spread, seconds = (f"{row[key]:.2f}" if key in row else "" for key in ("spread", "seconds"))
        rendered.add_row(name, f"{row['accuracy']:.2f}", spread, f"{row['macs']:,}", seconds)
    return rendered


def strength(text: str) -> float | str:
    return text if text == "auto" else float(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BLOCKS, default="resnet20")
    parser.add_argument("--keep", type=float, default=0.625)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--strength", type=strength, default="auto")
    parser.add_argument("--distill", type=float, default=0.0, help="share of the loss that is the original's answers")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--images", type=int, default=50_000, help="how many images of each part")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, help="keep the sensitivities that csgd measures in this file")
    parser.add_argument("--plot", type=Path, help="draw the deviation of the last csgd run into this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    loaded = load(options, data_folder())
    if loaded is None:
        return 0
    found = measure(options, *loaded)
    if options.json:
        print(json.dumps({"options": vars(options), "found": found}, indent=2, default=str))
    else:
        Console(width=100).print(table(found, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
