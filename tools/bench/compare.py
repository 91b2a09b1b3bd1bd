"""One shot, no training: graphzip against others at the same multiply-accumulates, on networks trained on CIFAR-10.

    python tools/bench/compare.py --net resnet20 --epochs 0 1 --cells compare.json

Every method gets the same 512 unlabelled images and no training. `graphzip` is `plan_for(effort="thorough")` and
`compile`, `graphzip-normal` the same at the default effort, and with that effort `graphzip-tuned` has `tune=` on these
images, mirrored and moved at random, and `graphzip-ranks` and `graphzip-mixed` ranks of layers in place of widths and
both; `l1` and `fold` shrink all widths alike (of ResNets the inner ones), by the smallest kernels and by k-means of the
kernels; `torch-pruning` is the best, on 1,000 test images, of five importances (group magnitude L1 and L2, batch norm
scale, Taylor and Hessian with the model's own answers for labels), each of them local and global. All but graphzip have
their batch norms re-estimated on the images, for without it they are worse. Accuracy is the share of right answers on
the test images, in percent. `--epochs 0 1` measures every result as it is and after one epoch of training, alike for
all.

The ResNets come trained. A VGG-16 with batch norm of half the width and a MobileNetV2 are trained first, and kept
beside the file `--cells`. Cells that are in that file are not measured again. Needs the data of the folder
GRAPHZIP_DATA (default: ../shared/data beside the repository); what is missing is said and skipped.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from cifar import accuracy, data_folder, drawn, normalised, read_images
from compare_methods import METHODS, Bench
from compare_nets import NETS, fine_tuned, weights_of
from rich.console import Console
from rich.table import Table

import graphzip as gz

BUDGETS = (0.7, 0.5, 0.3)
UNLABELLED, BATCH_SIZE = 512, 64


def load(name: str, folder: Path, options: argparse.Namespace) -> Bench:
    images = drawn(read_images(folder / "cifar10_jpeg.npz", "train", UNLABELLED), UNLABELLED)[0]
    kept = options.cells.with_suffix(f".{name}.safetensors")
    model = weights_of(name, folder, kept, functools.partial(training_data, folder))
    cache = options.cells.with_suffix(f".{name}.sensitivities.json")
    test = read_images(folder / "cifar10_jpeg.npz", "test", options.images)
    batches = list(normalised(images).split(BATCH_SIZE))
    return Bench(name=name, model=model, images=batches, groups=NETS[name].groups, test=test, cache=cache)


@functools.cache
def training_data(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return read_images(folder / "cifar10_jpeg.npz", "train", 50_000)


def key_of(name: str, method: str, share: float, epochs: int, options: argparse.Namespace) -> str:
    share, epochs = (1.0, 0) if method == "dense" else (share, epochs)
    return f"{name} {method} {share} {options.images} {epochs}"


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the cells that are not in the file yet."""
    cells: dict[str, Any] = json.loads(options.cells.read_text()) if options.cells.exists() else {}
    for name in options.net:
        needed = [folder / "cifar10_jpeg.npz", *([] if NETS[name].epochs else [folder / f"{name}_cifar10.safetensors"])]
        missing = [path for path in needed if not path.exists()]
        if missing:
            print(f"skipped {name}: {missing[0]} is missing", file=sys.stderr)
            continue
        bench = load(name, folder, options)
        wanted = [("dense", 1.0), *((method, share) for share in options.share for method in options.method)]
        for method, share in wanted:
            epochs = [0] if method == "dense" else options.epochs
            left = [each for each in epochs if key_of(name, method, share, each, options) not in cells]
            if left:
                measured = measure(bench, method, share, left, folder)
                cells |= {key_of(name, method, share, each, options): cell for each, cell in measured.items()}
                options.cells.write_text(json.dumps(cells, indent=1))
    return cells


def measure(bench: Bench, method: str, share: float, epochs: list[int], folder: Path) -> dict[int, Any]:
    """One result, after each of so many epochs of training."""
    start = time.perf_counter()
    variant, module = ("", bench.model) if method == "dense" else METHODS[method](bench, share)
    seconds = time.perf_counter() - start
    macs = gz.cost(module, bench.example).macs / bench.macs
    found = {}
    for count in epochs:
        trained = fine_tuned(copy.deepcopy(module), training_data(folder), count) if count else module
        found[count] = {
            "accuracy": accuracy(trained, *bench.test),
            "variant": variant,
            "seconds": seconds,
            "macs": macs,
        }
        print(f"{bench.name} {method} {share}, {count} epochs: {found[count]}", file=sys.stderr)
    return found


def table(cells: dict[str, Any], options: argparse.Namespace, epochs: int) -> Table:
    """Accuracy by method, one column per network and share of the multiply-accumulates."""
    rendered = Table("MACs cut")
    columns = [(name, share) for name in options.net for share in options.share]
    for name, share in columns:
        rendered.add_column(f"{name}\n{round(100 * (1 - share))} %", justify="right")
    for method in ("dense", *options.method):
        found = [cells.get(key_of(name, method, share, epochs, options)) for name, share in columns]
        rendered.add_row(method, *("-" if cell is None else f"{cell['accuracy']:.2f}" for cell in found))
    return rendered


def add_options(parser: argparse.ArgumentParser, *, nets: list[str], cells: str, choices: Iterable[str] = NETS) -> None:
    """Those of every comparison of cells: networks, budgets, test images, the file, threads."""
    parser.add_argument("--net", nargs="+", choices=[*choices], default=nets)
    parser.add_argument("--share", nargs="+", type=float, default=list(BUDGETS), help="of the MACs that stay")
    parser.add_argument("--images", type=int, default=10_000, help="how many test images")
    parser.add_argument("--cells", type=Path, default=Path(cells), help="file that keeps what was measured")
    parser.add_argument("--threads", type=int, default=2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, nets=list(NETS), cells="compare.json")
    parser.add_argument("--method", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--epochs", nargs="+", type=int, default=[0], help="of training after it, a table each")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    cells = run(options, data_folder())
    console = Console(width=140)
    for epochs in options.epochs:
        after = f"epochs of training: {epochs}" if epochs else "no training"
        console.print(f"CIFAR-10, {options.images:,} test images, {UNLABELLED} unlabelled images, {after}")
        console.print(table(cells, options, epochs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
