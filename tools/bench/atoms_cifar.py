"""Parameters against accuracy of the trained CIFAR ResNet-20 when its kernels are stored as atoms or slices.

    python tools/bench/atoms_cifar.py --images 1000
    python tools/bench/atoms_cifar.py --epochs 1 --start both --only "net m8" "csg 64"

Without `--epochs` nothing is trained: the fit is the result. With it every variant is trained from the fitted start, a
random one, or both, for that many epochs of the training images (`--train-images` takes some of them), with SGD and
one cycle of the learning rate. `--weighted` weighs the fit by the inputs of 512 training images, and
`--compensate` lets batch norms and the layers that keep their kernels follow on these: the default where there is data.

Needs `resnet20_cifar10.safetensors` and `cifar10_jpeg.npz` in the folder that GRAPHZIP_DATA names (default:
../shared/data beside the repository); what is missing is said. Accuracy is in percent of the test images; the error is
the mean over the layers of the relative error of the kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import CifarResNet, accuracy, data_folder, normalised, read_images
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import graphzip as gz

EXAMPLE = (torch.zeros(2, 3, 32, 32),)
CALIBRATION = 512
BATCH = 128
RATES = {"fit": 0.01, "random": 0.05}
"""Peak learning rates: a fitted start is lost at the rate from which a random one learns best."""


def variants(*, weighted: bool, start: str, compensate: str = "none") -> dict[str, gz.AtomFactorize | gz.SliceGenerate]:
    """Every variant by its name."""

    def atoms(share: str | None, count: int, size: int | None = None) -> gz.AtomFactorize:
        given = {"share": share, "atoms": count, "group_size": size, "weighted": weighted, "init": start}
        return gz.AtomFactorize(**given, force=True, atom_drop=0.0, compensate=compensate)

    made: dict[str, gz.AtomFactorize | gz.SliceGenerate] = {f"unshared m{m}": atoms(None, m) for m in range(1, 10)}
    made |= {f"{share} m{m}": atoms(share, m) for share in ("block", "net") for m in (4, 8, 16, 32, 54)}
    made |= {f"g-{share} m8 s16": atoms(share, 8, 16) for share in ("layer", "block", "net")}
    slices = {"init": start, "compensate": compensate, "weighted": weighted}
    made |= {f"csg {code}": gz.SliceGenerate(code=code, force=True, **slices) for code in (16, 32, 64, 128, 256, 512)}
    made |= {f"bcsg {code}": gz.SliceGenerate(code=code, force=True, binary=True, **slices) for code in (128, 512)}
    return made


def train(prepared: gz.Prepared, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """SGD with momentum, flips and shifts of up to four pixels, one cycle of the learning rate."""
    random = torch.Generator().manual_seed(0)
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 1))
    prepared.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=random)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            x = normalised(images[chosen])
            if torch.rand((), generator=random) < 0.5:
                x = x.flip(3)
            down, right = torch.randint(0, 9, (2,), generator=random).tolist()
            x = F.pad(x, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
            optimizer.zero_grad()
            x = x.contiguous(memory_format=torch.channels_last)  # faster on a CPU
            F.cross_entropy(prepared(x), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    prepared.eval()


def bench(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per variant and start."""
    weights, archive = folder / "resnet20_cifar10.safetensors", folder / "cifar10_jpeg.npz"
    model = CifarResNet(3).eval()
    model.load_state_dict(load_file(weights))
    test = read_images(archive, "test", options.images)
    training = read_images(archive, "train", options.train_images) if options.epochs else None
    calibration = None
    if options.weighted or options.compensate:
        calibration = list(normalised(read_images(archive, "train", CALIBRATION)[0]).split(BATCH))
    before = gz.cost(model, EXAMPLE)
    rows: list[dict[str, Any]] = [{"variant": "dense", "params": before.params, "accuracy": accuracy(model, *test)}]
    for start in ("fit", "random") if options.start == "both" else (options.start,):
        how = "auto" if options.compensate else "none"
        for name, variant in variants(weighted=options.weighted, start=start, compensate=how).items():
            if not any(fnmatchcase(name, pattern) for pattern in options.only):
                continue
            began = time.perf_counter()
            prepared = gz.prepare(model, gz.Plan([variant]), EXAMPLE, calibration=calibration)
            seconds = time.perf_counter() - began
            if training is not None:
                train(prepared, *training, options.epochs, options.rate or RATES[start])
            compiled = prepared.convert()
            (found,) = compiled.report.passes[0].values()
            errors = list(found["relative_error"].values())
            rows.append(
                {
                    "variant": name,
                    "start": start,
                    "params": compiled.report.after.params,
                    "macs": compiled.report.after.macs,
                    "error": sum(errors) / len(errors) if errors else None,
                    "accuracy": accuracy(compiled.module.eval(), *test),
                    "seconds": seconds,
                }
            )
            print(f"{name} ({start}): {rows[-1]['accuracy']:.2f} %", file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    rendered = Table(title=title)
    for column in ("variant", "start", "parameters", "of dense", "MACs", "error", "accuracy", "fit (s)"):
        rendered.add_column(column, justify="left" if column in ("variant", "start") else "right")
    for row in rows:
        rendered.add_row(
            row["variant"],
            row.get("start", ""),
            f"{row['params']:,}",
            f"{100 * row['params'] / rows[0]['params']:.1f} %",
            f"{row['macs']:,}" if "macs" in row else "",
            f"{row['error']:.3f}" if row.get("error") is not None else "",
            f"{row['accuracy']:.2f}",
            f"{row['seconds']:.1f}" if "seconds" in row else "",
        )
    return rendered


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="how many test images")
    parser.add_argument("--train-images", type=int, default=50_000, help="how many training images")
    parser.add_argument("--epochs", type=int, default=0, help="epochs of training")
    parser.add_argument("--rate", type=float, default=None, help=f"peak learning rate; by default {RATES}")
    parser.add_argument("--start", choices=("fit", "random", "both"), default="fit")
    parser.add_argument("--weighted", action="store_true", help="weigh the fit of atoms by calibration data")
    parser.add_argument("--compensate", action="store_true", help="re-fit what follows, as is done where there is data")
    parser.add_argument("--only", nargs="+", default=["*"], help="globs of the variants to run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def main() -> int:
    options, folder = arguments(), data_folder()
    torch.set_num_threads(options.threads)
    missing = [name for name in ("resnet20_cifar10.safetensors", "cifar10_jpeg.npz") if not (folder / name).exists()]
    if missing:
        print(f"skipped: {', '.join(missing)} missing in {folder}; set GRAPHZIP_DATA", file=sys.stderr)
        return 0
    rows = bench(options, folder)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        title = f"CIFAR ResNet-20, {options.images} test images, {options.epochs} epochs of training"
        Console(width=110).print(table(rows, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
