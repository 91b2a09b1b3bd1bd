"""What the processes of the pickling tests run: nothing of it is imported where results are only loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from saved_cases import CASES, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphzip as gz


def computes(rank: int, module: nn.Module, folder: Path) -> None:
    """What a module that was sent here computes."""
    args, kwargs = CASES["cluster_merge"].inputs()
    torch.save(module.eval()(*args, **kwargs), folder / f"{rank}.pt")


def trains(rank: int, sent: Any, folder: Path) -> None:
    """Trains with the others a copy of what was sent here, and saves what comes out.

    Tensors that are sent lie in memory that all processes share.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sent = copy.deepcopy(sent)
    dist.barrier()
    parallel = DistributedDataParallel(sent)
    case = CASES["cluster_merge"]
    if isinstance(sent, gz.Prepared):
        train(sent, case, parallel)
        sent = sent.convert().module
    else:
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.02)
        for number in range(3):
            args, _ = case.inputs(number)
            parallel(*args).square().mean().backward()
            optimizer.step()
    torch.save(sent.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()
