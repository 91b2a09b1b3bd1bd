"""What is looked after where the model that is trained is spread over processes, as `fully_shard` of FSDP2 does."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from graphzip.errors import GraphZipError
from graphzip.numeric.sharded import agreed, is_sharded, layout_of, local

__all__ = ["check_decisions", "check_gatherable", "check_optimizer", "check_sharded_again", "only_makes_state"]


def check_sharded_again(prepared: nn.Module, model: nn.Module, *, before: bool) -> None:
    """Raises `GraphZipError` where a model that was spread over processes `before` it was rewritten is whole again.

    Processes would train it each for itself.
    """
    if not before or is_sharded(model):
        return
    where = "prepared.model, not on prepared," if is_sharded(prepared) else "prepared.model"
    raise GraphZipError(
        "the model was spread over processes and is whole again, for a stage of the plan has rewritten it; call "
        f"fully_shard on {where} at the beginning of every stage, and then prepared.optimizer(...)"
    )


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Raises `GraphZipError` for an optimizer that has the parameters of before the model was spread over processes."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if is_sharded(model) and not any(map(is_sharded, own)):
        raise GraphZipError(
            "this optimizer was made before fully_shard, and would train nothing; make it with prepared.optimizer(...) "
            "after that"
        )


def check_decisions(state: torch.Tensor, model: nn.Module) -> None:
    """Raises `GraphZipError` where processes that share `model` decided different things; `state` is what this one did.

    `fully_shard` takes a part of each process's weights, and tells nobody those of the first.
    """
    meshes = dict.fromkeys(layout[0] for layout in map(layout_of, model.parameters()) if layout is not None)
    for mesh in meshes:
        own = state.to(mesh.device_type)
        for number in range(mesh.ndim):
            for operation in (dist.ReduceOp.MIN, dist.ReduceOp.MAX):
                found = own.clone()
                dist.all_reduce(found, operation, group=mesh.get_group(number))
                if not agreed(torch.equal(found, own), list(model.parameters())):
                    raise GraphZipError(
                        "the processes decided different things, for their weights or calibration data differ; give "
                        "all of them the same before graphzip.prepare (load one checkpoint, or broadcast the state of "
                        "the first process)"
                    )


def check_gatherable(prepared_model: nn.Module, scope: str, *, switches: bool) -> None:
    """Raises `GraphZipError` for a model whose whole form is not made of its graph alone."""
    if scope or switches:
        what = f"scope={scope!r} is a part of the model" if scope else "the model overrides train or eval"
        raise GraphZipError(
            f"{type(prepared_model).__name__} is spread over processes, and {what}, so it is not rewritten there; load "
            "get_model_state_dict(prepared, options=StateDictOptions(full_state_dict=True)) into what "
            "graphzip.prepare gives for the same model and plan, and convert that"
        )


def only_makes_state(optimizer: Optimizer) -> bool:
    """Whether a step is the one that `torch.distributed.checkpoint` takes so that an optimizer has a state to load.

    It has no gradient and no learning rate, and must leave the model as it is.
    """
    if optimizer.state or any(_moves(group.get("lr", 1.0)) for group in optimizer.param_groups):
        return False
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    given = [parameter.grad for parameter in own if parameter.grad is not None]
    return agreed(not any(bool(local(gradient).any()) for gradient in given), own)


def _moves(rate: Any) -> bool:
    if isinstance(rate, torch.Tensor):
        return rate.device.type != "cpu" or bool(rate)  # one on a device is not asked for at every step
    return bool(rate != 0)
