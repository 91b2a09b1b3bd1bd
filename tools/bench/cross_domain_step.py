"""What the graph-embedding regulariser of CrossDomainShare costs in a training step: two VGG-16.

    python tools/bench/cross_domain_step.py --steps 5

A step is forward, backward and the optimizer's step of both networks on a batch of random images. Steps of the plain
networks and steps with the regulariser take turns; the ratio is the median of the ratios of neighbours. On a CPU the
time that the processor works is counted, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from common.side_by_side import side_by_side
from torch import Tensor, nn
from torch.optim import SGD

import graphzip as gz

TASKS = ("rgb", "flow")


def stepper(
    call: Callable[..., dict[str, Tensor]],
    parameters: list[nn.Parameter],
    term: Callable[[], Tensor] | None,
    batch: dict[str, Tensor],
    device: str,
) -> Callable[[], float]:
    """A function that takes one step and tells its seconds."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    labels = torch.randint(101, (len(next(iter(batch.values()))),), device=device)
    optimizer = SGD(parameters, lr=1e-4)

    def step() -> float:
        start = clock()
        loss = torch.stack([F.cross_entropy(scores, labels) for scores in call(**batch).values()]).sum()
        if term is not None:
            loss = loss + term()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--clusters", type=float, default=0.25)
    parser.add_argument("--regularizer", choices=("normalized", "plain", "simple"), default="normalized")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models: dict[str, nn.Module] = {name: torchvision.models.vgg16(num_classes=101) for name in TASKS}
    models = {name: model.to(options.device).train() for name, model in models.items()}
    shape = (options.batch, 3, options.size, options.size)
    batch = {name: torch.randn(shape, device=options.device) for name in TASKS}
    plan = gz.Plan([gz.CrossDomainShare(clusters=options.clusters, regularizer=options.regularizer)])
    ready = gz.prepare(models, plan, {name: (each[:2],) for name, each in batch.items()})

    def both(**given: Any) -> dict[str, Tensor]:
        return {name: models[name](x) for name, x in given.items()}

    held = [parameter for model in models.values() for parameter in model.parameters()]
    plain = stepper(both, held, None, batch, options.device)
    regularized = stepper(ready, list(ready.parameters()), ready.regularizer, batch, options.device)
    for step in (plain, regularized):  # the first steps allocate
        step()
    before, after, ratio = side_by_side(plain, regularized, options.steps)
    found = {
        "device": options.device,
        "batch": options.batch,
        "size": options.size,
        "plain_ms": before,
        "regularized_ms": after,
        "ratio": ratio,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
