"""What zipping costs: two VGG-16 at full size, and one small network after the other.

    python tools/bench/cost/mtz_cost.py --vgg
    python tools/bench/cost/mtz_cost.py --vgg --mapped
    python tools/bench/cost/mtz_cost.py --networks 5

`--vgg` zips two VGG-16 with random weights on 200 random images of 224 x 224, the fully connected layers with their
25,088 and 4,096 inputs included. `--mapped` reads their weights from safetensors files that are mapped into memory,
where the system can drop what is not looked at. `--networks` zips 2, 3, ... networks of four convolutions and prints
the seconds that each number takes. Memory is the process's own, sampled twenty times a second: `anonymous` cannot be
dropped, `resident` counts mapped files as well (Linux).
"""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

import graphzip as gz

GIB = 2**30
STATUS = Path("/proc/self/status")


class Peak:
    """The most anonymous memory of this process while it was watched, in bytes; nothing where the system has none."""

    def __init__(self) -> None:
        self.anonymous = 0

    @contextmanager
    def watched(self) -> Iterator[Peak]:
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()

    def _watch(self, done: threading.Event) -> None:
        while STATUS.exists() and not done.wait(0.05):
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
            self.anonymous = max(self.anonymous, 1024 * int(line.split()[1]))


def vgg(seed: int, mapped: Path | None) -> nn.Module:
    torch.manual_seed(seed)
    net = torchvision.models.vgg16(weights=None).eval()
    if mapped is not None:
        file = mapped / f"{seed}.safetensors"
        save_file(net.state_dict(), file)
        with torch.device("meta"):
            net = torchvision.models.vgg16(weights=None).eval()
        net.load_state_dict(load_file(file), assign=True)
    return net


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    widths = 3, 32, 64, 64, 128
    layers: list[nn.Module] = []
    for one, two in itertools.pairwise(widths):
        layers += [nn.Conv2d(one, two, 3, padding=1, bias=False), nn.BatchNorm2d(two), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4, 10)).eval()


def zipped(nets: dict[str, nn.Module], images: int, size: int, batch: int) -> tuple[gz.Compiled, float]:
    """The networks in one, and how many seconds that took."""
    calibration = {
        name: list(torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(number)).split(batch))
        for number, name in enumerate(nets)
    }
    examples = {name: (batches[0][:2],) for name, batches in calibration.items()}
    start = time.perf_counter()
    compiled = gz.compile(nets, gz.Plan([gz.Zip(share=1.0)]), examples, calibration=calibration)
    return compiled, time.perf_counter() - start


def large(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mapped = Path(folder) if options.mapped else None
        nets = {"a": vgg(0, mapped), "b": vgg(1, mapped)}
        with Peak().watched() as peak:
            compiled, seconds = zipped(nets, options.images, 224, 10)
    before, after = compiled.report.before.params, compiled.report.after.params
    print(f"two VGG-16, {options.images} images of 224 x 224: {seconds:.0f} s on {torch.get_num_threads()} threads")
    print(f"{before:,} parameters, now {after:,}")
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"at most {peak.anonymous / GIB:.2f} GiB anonymous, {resident / GIB:.2f} GiB resident")


def growing(options: argparse.Namespace) -> None:
    table = Table(title="zipping small networks, 200 images of 32 x 32")
    for column in ("networks", "seconds", "per network"):
        table.add_column(column, justify="right")
    zipped({name: small(seed) for seed, name in enumerate("ab")}, 20, 32, 20)
    for count in range(2, options.networks + 1):
        nets = {f"net{seed}": small(seed) for seed in range(count)}
        seconds = min(zipped(nets, 200, 32, 50)[1] for _ in range(options.repeats))
        table.add_row(str(count), f"{seconds:.2f}", f"{seconds / count:.2f}")
    Console(width=80).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vgg", action="store_true", help="two VGG-16")
    parser.add_argument("--mapped", action="store_true", help="their weights mapped from files")
    parser.add_argument("--images", type=int, default=200, help="calibration images of each VGG-16")
    parser.add_argument("--networks", type=int, default=0, help="up to how many small networks")
    parser.add_argument("--repeats", type=int, default=3, help="of each number of small networks; the fastest counts")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.vgg and options.networks < 2:
        parser.error("nothing to measure: give --vgg, or --networks 2 or more")
    if options.vgg:
        large(options)
    if options.networks:
        growing(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
