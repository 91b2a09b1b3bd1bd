"""What several processes send each other, as the code does it: calls and bytes of a plan and of a compilation.

    python tools/bench/cost/messages.py --net resnet18 llama --processes 2

Networks and data are random. Short messages are the three numbers, 24 bytes, that go before each other message and tell
what a process is about; sums are moments and gradients; the rest is what one process found out for all. Bytes are those
that one process has to pass on, whatever way the group takes. `docs/how-to/processes.md` makes a model of them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import llama
from rich.console import Console
from rich.table import Table
from torch import nn

import graphzip as gz
from graphzip.process_groups import Processes

NETS = "resnet18", "llama"
SHORT = 24  # bytes
BATCHES = 4


class Counted:
    """A connection that counts what is sent through it, by what is done at the time."""

    def __init__(self, link: Any) -> None:
        self.link, self.now = link, ""
        self.calls, self.bytes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()

    def _note(self, kind: str, tensors: list[torch.Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors)
        kind = "short" if kind == "allgather" and size == SHORT else "sums" if kind == "allreduce" else "found"
        self.calls[self.now, kind] += 1
        self.bytes[self.now, kind] += size

    def allgather(self, found: Any, sent: list[torch.Tensor]) -> Any:
        self._note("allgather", sent)
        return self.link.allgather(found, sent)

    def allreduce(self, tensors: list[torch.Tensor]) -> Any:
        self._note("allreduce", tensors)
        return self.link.allreduce(tensors)

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Any:
        self._note("broadcast", tensors)
        return self.link.broadcast(tensors, options)


def subject_of(net: str) -> tuple[nn.Module, list[torch.Tensor]]:
    """A network and its batches."""
    torch.manual_seed(0)
    if net == "llama":
        return (subject := llama(16 * BATCHES)).model, list(subject.batches[0].split(16))
    from torchvision import models

    return models.resnet18(weights=None).eval(), list(torch.randn(16 * BATCHES, 3, 64, 64).split(16))


def work(rank: int, count: int, net: str, folder: str) -> None:
    """One of the processes; the first one saves what it counted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    found: list[Counted] = []
    meet = Processes._meet

    def met(self: Processes, what: str) -> None:
        meet(self, what)
        if not isinstance(self._link, Counted):
            found.append(Counted(self._link))
            self._link = found[-1]

    Processes._meet = met  # type: ignore[method-assign]
    model, batches = subject_of(net)
    share, example = batches[rank::count], (batches[0][:2],)
    with gz.processes(timeout=600.0):
        gz.compile(model, gz.Plan([gz.PruneChannels(keep=1.0)]), example, calibration=share)  # connects them
        found[0].calls.clear()
        found[0].bytes.clear()
        found[0].now = "compile"
        options = gz.ClusterMerge(keep=0.5, compensate="data")
        compiled = gz.compile(model, gz.Plan([options]), example, calibration=share)
        found[0].now = "plan"
        gz.plan_for(model, example, macs=0.6, calibration=share, effort="fast")
    if rank == 0:
        layers = [each for each in compiled.module.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
        squares = sum(each.weight[0].numel() ** 2 for each in layers) * 8
        both = {"calls": dict(found[0].calls), "bytes": dict(found[0].bytes)}
        torch.save(both | {"layers": len(layers), "squares": squares}, f"{folder}/found.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=NETS, default=NETS)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for net in options.net:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (options.processes, net, folder), options.processes)
            found = torch.load(f"{folder}/found.pt", weights_only=False)
        title = f"{net}: {found['layers']} layers, C^2 of all of them {found['squares'] / 1e6:.1f} MB"
        table = Table("what", "short", "sums", "MB of sums", "found", "MB of found", title=title)
        for what in ("compile", "plan"):
            calls, sizes = ({kind: each.get((what, kind), 0) for kind in ("short", "sums", "found")} for each in
                            (found["calls"], found["bytes"]))  # fmt: skip
            cells = (calls["short"], calls["sums"], f"{sizes['sums'] / 1e6:.1f}", calls["found"])
            table.add_row(what, *map(str, cells), f"{sizes['found'] / 1e6:.1f}")
        Console().print(table)


if __name__ == "__main__":
    main()
