"""One shot, no training: graphzip against others at the same multiply-accumulates, on the trained CIFAR ResNets.

    python tools/bench/compare.py --net resnet20 --cells compare.json

Every method gets the same 512 unlabelled images and no training. `graphzip` is `plan_for` and `compile`; `l1` and
`fold` shrink every inner width alike, by the smallest kernels and by k-means of the kernels; `torch-pruning` is the
best, on 1,000 test images, of five importances (group magnitude L1 and L2, batch norm scale, Taylor and Hessian with
the model's own answers for labels), each of them local and global. All but graphzip have their batch norms re-estimated
on the images, for without it they are worse. Accuracy is the share of right answers on the test images, in percent.
With `--epochs` every result is trained that long afterwards, alike.

Cells that are in the file `--cells` are not measured again. Needs the data of the folder GRAPHZIP_DATA (default:
../shared/data beside the repository); what is missing is said and skipped.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import CifarResNet, accuracy, augmented, data_folder, normalised, read_images
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import graphzip as gz

NETS = {"resnet20": 3, "resnet56": 9}
BUDGETS = (0.7, 0.5, 0.3)
UNLABELLED, BATCH_SIZE = 512, 64
JUDGED = 1000  # test images on which the best variant of torch-pruning is chosen
EXAMPLE = (2, 3, 32, 32)
INNER = "layer?.*.conv1"
STEPS = 7
HESSIAN = 16  # images of a batch: each one is differentiated alone


@dataclass
class Bench:
    """A trained network, the unlabelled images in batches, and the test images."""

    name: str
    model: nn.Module
    images: list[Tensor]
    test: tuple[Tensor, Tensor]
    cache: Path

    @property
    def example(self) -> tuple[Tensor, ...]:
        return (torch.randn(EXAMPLE, generator=torch.Generator().manual_seed(0)),)

    @property
    def macs(self) -> int:
        return gz.cost(self.model, self.example).macs


# ------------------------------------------------------------------------------------------------- methods


def graphzip(bench: Bench, share: float) -> tuple[str, nn.Module]:
    plan = gz.plan_for(bench.model, bench.example, macs=share, calibration=bench.images, cache=bench.cache)
    return "", gz.compile(bench.model, plan, bench.example, calibration=bench.images).module


def fold(bench: Bench, share: float) -> tuple[str, nn.Module]:
    found = evenly(bench.model, bench.example, share, lambda keep: gz.ClusterMerge(keep={INNER: keep}))
    return "", re_estimated(found.module, bench.images)


def l1(bench: Bench, share: float) -> tuple[str, nn.Module]:
    found = evenly(bench.model, bench.example, share, lambda keep: gz.PruneChannels(keep={INNER: keep}))
    return "", re_estimated(found.module, bench.images)


def torch_pruning(bench: Bench, share: float) -> tuple[str, nn.Module]:
    test = shuffled(bench.test)
    found = {}
    for name in ("magnitude-l1", "magnitude-l2", "bn-scale", "taylor", "hessian"):
        for scope in ("local", "global"):
            module = re_estimated(torch_pruned(bench, share, name, scope == "global"), bench.images)
            found[f"{name}, {scope}"] = accuracy(module, *test), module
            print(f"  torch-pruning {name}, {scope}: {found[f'{name}, {scope}'][0]:.2f}", file=sys.stderr)
    best = max(found, key=lambda each: found[each][0])
    return best, found[best][1]


METHODS: dict[str, Callable[[Bench, float], tuple[str, nn.Module]]] = {
    "graphzip": graphzip,
    "torch-pruning": torch_pruning,
    "fold": fold,
    "l1": l1,
}


def evenly(model: nn.Module, example: tuple[Tensor, ...], share: float, options: Callable[[float], Any]) -> gz.Compiled:
    """The widest even plan that fits the share of the multiply-accumulates."""
    low, high, found = 0.01, 1.0, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        compiled = gz.compile(model, gz.Plan([options(middle)]), example)
        fits = compiled.report.after.macs <= share * compiled.report.before.macs
        low, high, found = (middle, high, compiled) if fits else (low, middle, found)
    assert found is not None
    return found


def torch_pruned(bench: Bench, share: float, importance: str, everywhere: bool) -> nn.Module:
    """The least pruned model that fits the share; inner widths alone, for padded shortcuts break it."""
    low, high, found = 0.0, 0.98, None
    whole = counted(bench.model)
    for _ in range(STEPS):
        middle = (low + high) / 2
        model = pruned_at(bench, middle, importance, everywhere)
        fits = counted(model) <= share * whole
        low, high, found = (low, middle, model) if fits else (middle, high, found)
    assert found is not None
    return found


def counted(model: nn.Module) -> int:
    """Twice the multiply-accumulates, without tracing: for many models in a row."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *EXAMPLE[1:]))
    return counter.get_total_flops()


def pruned_at(bench: Bench, ratio: float, importance: str, everywhere: bool) -> nn.Module:
    import torch_pruning as tp

    model = copy.deepcopy(bench.model).eval()
    kinds = {
        "magnitude-l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "magnitude-l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "bn-scale": tp.importance.BNScaleImportance,
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
    }
    kind = kinds[importance]()
    layers = dict(model.named_modules())
    inner = [layer for name, layer in layers.items() if name.endswith(".conv1") and name != "conv1"]
    kept = [layer for layer in layers.values() if isinstance(layer, nn.Conv2d | nn.Linear) and layer not in inner]
    pruner = tp.pruner.BasePruner(
        model,
        bench.example[0],
        importance=kind,
        pruning_ratio=ratio,
        global_pruning=everywhere,
        ignored_layers=kept,
        max_pruning_ratio=0.98,
    )
    if importance in {"taylor", "hessian"}:
        for x in bench.images[:2]:
            logits = model(x)
            losses = F.cross_entropy(logits, logits.argmax(1), reduction="none")
            if importance == "taylor":
                losses.sum().backward()
                continue
            for loss in losses[:HESSIAN]:
                model.zero_grad()
                loss.backward(retain_graph=True)
                kind.accumulate_grad(model)
    pruner.step()
    return model


@torch.no_grad()
def re_estimated(model: nn.Module, images: list[Tensor]) -> nn.Module:
    """The running statistics of every batch norm, taken anew."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for x in images:
        model(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


# ------------------------------------------------------------------------------------------------- measuring


def shuffled(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Some of them at random: the files are sorted by class."""
    order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(0))[:JUDGED]
    return data[0][order], data[1][order]


def trained(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int) -> nn.Module:
    """Fine-tuned on labels by SGD, the rate falling to zero; the same for all."""
    images, labels = data
    steps = epochs * (len(labels) // 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
    model.train()
    for chosen in _batches(len(labels), epochs):
        x = normalised(augmented(images[chosen], torch.Generator().manual_seed(int(chosen[0]))))
        loss = F.cross_entropy(model(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _batches(count: int, epochs: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(count, generator=generator).split(128):
            if len(chosen) == 128:
                yield chosen


def load(name: str, folder: Path, options: argparse.Namespace) -> Bench | None:
    weights, archive = folder / f"{name}_cifar10.safetensors", folder / "cifar10_jpeg.npz"
    missing = [path for path in (weights, archive) if not path.exists()]
    if missing:
        print(f"skipped {name}: {missing[0]} is missing", file=sys.stderr)
        return None
    model = CifarResNet(NETS[name]).eval()
    model.load_state_dict(load_file(weights))
    images, _ = read_images(archive, "train", UNLABELLED)
    order = torch.randperm(UNLABELLED, generator=torch.Generator().manual_seed(0))
    batches = list(normalised(images[order]).split(BATCH_SIZE))
    cache = options.cells.with_suffix(f".{name}.sensitivities.json")
    return Bench(name, model, batches, read_images(archive, "test", options.images), cache)


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the cells that are not in the file yet."""
    cells: dict[str, Any] = json.loads(options.cells.read_text()) if options.cells.exists() else {}
    train_data = None
    for name in options.net:
        bench = load(name, folder, options)
        if bench is None:
            continue
        wanted = [("dense", 1.0), *((method, share) for share in options.share for method in options.method)]
        for method, share in wanted:
            key = f"{name} {method} {share} {options.images} {options.epochs}"
            if key in cells:
                continue
            start = time.perf_counter()
            variant, module = ("", bench.model) if method == "dense" else METHODS[method](bench, share)
            seconds = time.perf_counter() - start
            if options.epochs and method != "dense":
                if train_data is None:
                    train_data = read_images(folder / "cifar10_jpeg.npz", "train", 50_000)
                module = trained(module, train_data, options.epochs)
            found = {"accuracy": accuracy(module, *bench.test), "variant": variant, "seconds": seconds}
            cells[key] = found | {"macs": gz.cost(module, bench.example).macs / bench.macs}
            print(f"{key}: {cells[key]}", file=sys.stderr)
            options.cells.write_text(json.dumps(cells, indent=1))
    return cells


def table(cells: dict[str, Any], options: argparse.Namespace) -> Table:
    """Accuracy by method, one column per network and share of the multiply-accumulates."""
    after = f"{options.epochs} epochs of training" if options.epochs else "no training"
    rendered = Table(title=f"CIFAR-10, {options.images:,} test images, {UNLABELLED} unlabelled images, {after}")
    rendered.add_column("MACs cut")
    columns = [(name, share) for name in options.net for share in options.share]
    for name, share in columns:
        rendered.add_column(f"{name}\n{round(100 * (1 - share))} %", justify="right")
    for method in ("dense", *options.method):
        row = []
        for name, share in columns:
            key = f"{name} {method} {1.0 if method == 'dense' else share} {options.images} {options.epochs}"
            row.append(f"{cells[key]['accuracy']:.2f}" if key in cells else "-")
        rendered.add_row(method, *row)
    return rendered


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=[*NETS], default=[*NETS])
    parser.add_argument("--share", nargs="+", type=float, default=list(BUDGETS), help="of the MACs that stay")
    parser.add_argument("--method", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--images", type=int, default=10_000, help="how many test images")
    parser.add_argument("--epochs", type=int, default=0, help="of training after it")
    parser.add_argument("--cells", type=Path, default=Path("compare.json"), help="file that keeps what was measured")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    Console(width=120).print(table(run(options, data_folder()), options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
