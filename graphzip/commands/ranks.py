"""A command that torchrun starts in several processes: each reads its share of the data, the first speaks and writes.

`torchrun --nproc-per-node 4 -m graphzip compile ...` tells every process its rank in the environment. What goes wrong
in one of them ends the command in all, with the same exit code.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

from graphzip.errors import ProcessesError

__all__ = ["device_here", "joined", "leads", "ranks", "share"]

T = TypeVar("T")

_TOLD: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_START: Final = 300.0  # seconds that processes wait for each other at first


def ranks() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    told = [os.environ.get(name, "") for name in _TOLD]
    if not all(told) or not all(each.isdecimal() for each in told[:2]):
        return 0, 1
    return int(told[0]), int(told[1])


def leads() -> bool:
    """Whether this process speaks and writes."""
    return ranks()[0] == 0


def share(batches: Sequence[T]) -> Sequence[T]:
    """The batches that this process reads."""
    rank, count = ranks()
    return batches[rank::count]


def device_here(device: str | None) -> str | None:
    """The device of an option; among several processes `cuda` is the one that has the number of this process on its
    machine.
    """
    local = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{local}" if device == "cuda" and ranks()[1] > 1 and local.isdecimal() else device


@contextlib.contextmanager
def joined(command: str) -> Iterator[None]:
    """Inside, the processes are connected and do the same. Raises `ProcessesError` where they cannot be."""
    if ranks()[1] == 1:
        yield
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from graphzip.process_groups import ATTEMPT, present, processes

    try:
        # torchrun --max-restarts keeps its store, where torch would find the addresses of processes that are gone
        kept, rank, size = next(rendezvous("env://"))
        store = dist.distributed_c10d.PrefixStore(f"graphzip/{os.environ.get(ATTEMPT, '0')}", kept)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(f"the processes that torchrun started cannot be connected: {error}") from error
    try:
        with processes(timeout=_START), present().together(command):
            yield
    finally:
        dist.destroy_process_group()
