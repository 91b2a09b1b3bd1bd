"""What a Centripetal SGD step costs beside a plain SGD step: CIFAR ResNet-56, every width to 5/8.

    python tools/bench/csgd_step.py --steps 10

A step is forward, backward and the optimizer's step on a batch of random images. Plain and centripetal steps take
turns; the ratio is the median of the ratios of neighbours, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cifar import CifarResNet
from common.side_by_side import side_by_side
from torch import nn
from torch.optim import SGD, Optimizer

import graphzip as gz


def stepper(model: nn.Module, optimizer: Optimizer, batch: int, device: str) -> Callable[[], float]:
    """A function that takes one step and tells its seconds."""
    images, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)

    def step() -> float:
        start = time.perf_counter()
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=9, help="blocks a stage: 3 is ResNet-20, 9 ResNet-56")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}
    model = CifarResNet(options.blocks).to(options.device).train()
    plan = gz.Plan([gz.ClusterMerge(keep=0.625)])
    ready = gz.prepare(model, plan, (torch.randn(2, 3, 32, 32, device=options.device),))
    plain = stepper(model, SGD(model.parameters(), **settings), options.batch, options.device)
    pulled = stepper(ready, ready.optimizer(SGD, **settings), options.batch, options.device)
    for step in (plain, pulled) * 2:  # the first steps allocate
        step()
    before, after, ratio = side_by_side(plain, pulled, options.steps)
    found = {
        "device": options.device,
        "batch": options.batch,
        "plain_ms": before,
        "csgd_ms": after,
        "ratio": ratio,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
