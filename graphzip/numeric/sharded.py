"""Tensors of which every process holds a part (`DTensor`, what `fully_shard` makes of parameters).

A computation on parts is right where it says what it needs of the others: sums over all parts are added up over the
processes (`Part.added_up`), a whole tensor is fetched (`whole`) and written back in parts (`put`). These are
collectives: every process comes here, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from graphzip.errors import GraphZipError

__all__ = [
    "Part",
    "agreed",
    "check_whole",
    "is_sharded",
    "layout_of",
    "local",
    "part_of",
    "put",
    "reshard",
    "whole",
]

_DTensor: Any = ()
_FSDPModule: Any = ()
_Shard: Any = None
if dist.is_available():
    from torch.distributed.fsdp import FSDPModule as _FSDPModule
    from torch.distributed.tensor import DTensor as _DTensor
    from torch.distributed.tensor import Shard as _Shard


@dataclass(frozen=True)
class Part:
    """What this process holds of a tensor cut along `dim`: indices `start` to `stop`; the `group` has the rest."""

    dim: int
    start: int
    stop: int
    group: Any

    def added_up(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, whose gradient is that of each process's own summand."""
        found: torch.Tensor = _AddedUp.apply(value, self.group)
        return found


class _AddedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: Any) -> torch.Tensor:
        total = value.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def is_sharded(value: torch.Tensor | nn.Module) -> bool:
    """Whether a tensor, or a parameter of a module, is not all in this process, or not always."""
    if isinstance(value, torch.Tensor):
        return isinstance(value, _DTensor)
    fsdp = any(isinstance(each, _FSDPModule) for each in value.modules())
    return fsdp or any(isinstance(each, _DTensor) for each in value.parameters())


def check_whole(model: nn.Module) -> None:
    """Raises `GraphZipError` for a model of which every process has a part, where it is to be written to a file."""
    if is_sharded(model):
        raise GraphZipError(
            "the module is spread over processes (fully_shard), and a file has all of it; load "
            "get_model_state_dict(compiled.module, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict into the module of a result that was not sharded, such as "
            "graphzip.load of one that was saved before"
        )


def layout_of(tensor: torch.Tensor) -> Any:
    """How a tensor is spread over processes: equal, and hashable, for those that are spread alike; `None` for none."""
    if not isinstance(tensor, _DTensor):
        return None
    spread: Any = tensor
    return spread.device_mesh, tuple(spread.placements)


def part_of(tensor: torch.Tensor, name: str) -> Part | None:
    """What this process holds of a tensor; `None` where that is all of it.

    Raises `GraphZipError` for a tensor that is cut in more ways than one.
    """
    if not isinstance(tensor, _DTensor):
        return None
    spread: Any = tensor
    mesh = spread.device_mesh
    cuts = [(number, each) for number, each in enumerate(spread.placements) if not each.is_replicate()]
    if not cuts:
        return None
    number, cut = cuts[0]
    if len(cuts) == 1 and type(cut) is _Shard:
        size, count = tensor.shape[cut.dim], mesh.size(number)
        length = -(-size // count)
        start = min(mesh.get_local_rank(number) * length, size)
        stop = min(start + length, size)
        if local(tensor).shape[cut.dim] == stop - start:
            return Part(cut.dim, start, stop, mesh.get_group(number))
    raise GraphZipError(
        f"{name} is spread over processes as {tuple(spread.placements)}; its channels can be tied where a parameter is "
        "cut along one dimension of the mesh in equal parts, as torch.distributed.fsdp.fully_shard does, with replicas "
        "or without; leave out the other ways to cut it"
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part that this process holds, in the same memory and of the same graph of autograd."""
    return tensor.to_local() if isinstance(tensor, _DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, of the same graph of autograd."""
    return tensor.full_tensor() if isinstance(tensor, _DTensor) else tensor


@torch.no_grad()
def put(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write `value`, the same whole tensor in every process, into `tensor`."""
    part = part_of(tensor, "a parameter")
    if part is not None:
        value = value.narrow(part.dim, part.start, part.stop - part.start)
    local(tensor.detach()).copy_(value)


def reshard(model: nn.Module) -> None:
    """Let the parameters of `model` be the parts that an optimizer trains: after it ran without a backward pass some
    are whole copies, of which nothing comes back.
    """
    for module in model.modules():
        if isinstance(module, _FSDPModule):
            each: Any = module
            each.reshard()


def agreed(flag: bool, tensors: list[torch.Tensor]) -> bool:
    """Whether `flag` holds in all processes that have parts of `tensors`; `flag` itself where nobody else has one."""
    for mesh in dict.fromkeys(layout[0] for layout in map(layout_of, tensors) if layout is not None):
        found = torch.tensor(int(flag), device=mesh.device_type)
        for number in range(mesh.ndim):
            dist.all_reduce(found, dist.ReduceOp.MIN, group=mesh.get_group(number))
        flag = bool(found)
    return flag
