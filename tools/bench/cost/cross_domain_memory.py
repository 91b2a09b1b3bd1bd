"""Time and peak memory of sharing weights between two AlexNets: a compile in this process, which does nothing else.

    python tools/bench/cost/cross_domain_memory.py --threads 2

Two networks of torchvision with random weights, images of 224 x 224 pixels that are noise, `CrossDomainShare` at its
defaults. Printed are seconds, processor seconds, and the most resident memory of the process, Python and torch
included (some 0.4 GB); with `--json` as one line.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import torch
from torchvision import models

import graphzip as gz

TASKS = ("rgb", "flow")


def peak() -> float:
    """The most resident memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def measured(options: argparse.Namespace) -> dict[str, float]:
    """One compile, as a user would do it."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    nets = {name: models.get_model(options.net, weights=None).eval() for name in TASKS}
    data = {name: [torch.randn(options.images, 3, options.size, options.size)] for name in TASKS}
    inputs = {name: (batches[0][:2],) for name, batches in data.items()}
    before, wall, processor = peak(), time.perf_counter(), time.process_time()
    compiled = gz.compile(nets, gz.Plan([gz.CrossDomainShare()]), inputs, calibration=data)
    return {
        "seconds": time.perf_counter() - wall,
        "processor seconds": time.process_time() - processor,
        "GB before": before,
        "GB at most": peak(),
        "parameters": compiled.report.after.params / compiled.report.before.params,
        "drift": float(compiled.report.drift or 0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="alexnet", help="of torchvision")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measured(options)
    print(json.dumps(found) if options.json else "\n".join(f"{name}: {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
