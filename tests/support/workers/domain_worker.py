"""One process of the data-parallel test of shared weights: trains both stages and saves what it ends with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from domain_pairs import CLUSTERS, DATA, EXAMPLE, models
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphzip as gz


def train(prepared: gz.Prepared, model: nn.Module, rank: int) -> None:
    """A plain training loop on a half of every batch; `model` is what is called."""
    optimizer = prepared.optimizer(torch.optim.Adam, lr=1e-2)
    for number in range(3):
        out = model(**{name: each[number].chunk(2)[rank] for name, each in DATA.items()})
        loss = torch.stack([(each - 1).square().mean() for each in out.values()]).sum() + prepared.regularizer()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(folder: Path, fitted: bool) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    plan = gz.Plan([gz.CrossDomainShare(clusters=CLUSTERS)])
    own = {name: [batch.chunk(2)[rank] for batch in each] for name, each in DATA.items()}
    prepared = gz.prepare(models(), plan, EXAMPLE, calibration=own if fitted else None)
    found: dict[str, Any] = {}
    for stage in prepared.steps():
        train(prepared, DistributedDataParallel(prepared), rank)
        if stage == "finetune":
            found = {"clusters": prepared.clusters.tolist(), "deviation": prepared.deviation()}
    found["parameters"] = dict(prepared.convert().module.named_parameters())
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "fitted")
