"""One process of the data-parallel test: trains on its half of every batch and saves what it ends with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import graphzip as gz

STEPS, BATCH = 4, 8


def network(seed: int) -> nn.Module:
    """In eval mode, so that the gradient of a batch is the mean of those of its halves."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 3)
    return nn.Sequential(*layers).double().eval()


def batches() -> Tensor:
    """Inputs (steps, batch, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, BATCH, 3, 8, 8, dtype=torch.float64, generator=generator)


def train(prepared: gz.Prepared, model: nn.Module, rank: int = 0, world: int = 1) -> None:
    """A plain training loop; `model` is what is called."""
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    for batch in batches():
        loss = (model(batch.chunk(world)[rank]) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def prepared(seed: int) -> gz.Prepared:
    """Clusters depend on the weights, and so on the seed."""
    return gz.prepare(network(seed), gz.Plan([gz.ClusterMerge(keep=0.5, strength=2.0)]), (batches()[0],))


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    ready = prepared(seed=rank)
    train(ready, DistributedDataParallel(ready), rank, world)
    torch.save({"state": ready.state_dict(), "deviation": ready.deviation()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
