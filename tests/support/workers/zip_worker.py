"""One process of the data-parallel test of zipping: calibrates on its half of the data and saves what it ends with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphzip as gz


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    first = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)).double().eval()


def batches() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 16, 3, 8, 8, dtype=torch.float64, generator=generator)


def zipped(rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The joint weights; all places of an image count, so that the parts make the whole."""
    data = [batch.chunk(world)[rank] for batch in batches()]
    plan = gz.Plan([gz.Zip(places=36)])
    nets = {"a": network(0), "b": network(1)}
    inputs = dict.fromkeys(nets, (batches()[0, :2],))
    return dict(gz.compile(nets, plan, inputs, calibration=dict.fromkeys(nets, data)).module.state_dict())


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(zipped(rank, dist.get_world_size()), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
