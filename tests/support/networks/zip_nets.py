"""Networks to zip: copies whose channels stand in another order, and what a task of a result has alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip.analysis.channels import analyse
from graphzip.analysis.groups import GroupParam, channel_groups_of
from graphzip.tracing.trace import trace

__all__ = ["own_parameters", "permuted", "randomized"]


def randomized(net: nn.Module) -> nn.Module:
    """In float64 and eval mode, with batch norms that are not the identity."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return net.double().eval()


def permuted(net: nn.Module, inputs: tuple[Tensor, ...], seed: int = 0) -> nn.Module:
    """A copy with the channels of every group in another order, inside blocks (heads), and heads in another order."""
    rng = np.random.default_rng(seed)
    traced = trace(net, inputs)
    other = copy.deepcopy(net)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}

    def move(param: GroupParam, order: Any) -> None:
        tensor = state[param.param].data
        source = np.arange(tensor.shape[param.dim] * param.groups)
        held = param.indices >= 0
        source[param.indices[held]] = param.indices[order][held]
        moves = torch.from_numpy(source.reshape(param.groups, -1)) % tensor.shape[param.dim]
        parts = zip(tensor.chunk(param.groups), moves, strict=True)
        tensor.copy_(torch.cat([part.index_select(param.dim, move) for part, move in parts]))

    for group in channel_groups_of(traced, analyse(traced.graph)):
        if group.mergeable:
            order = np.arange(group.size)
            for block in group.blocks:
                order[list(block)] = rng.permutation(block)
            for param in group.params:
                if param.groups == 1 or param.size > 1:
                    move(param, order)
    return other


def own_parameters(compiled: gz.Compiled, task: str) -> set[str]:
    """Parameters that no other task has."""
    others = {id(p) for name in compiled.tasks if name != task for p in compiled.task(name).parameters()}
    return {name.rpartition(".")[0] for name, p in compiled.task(task).named_parameters() if id(p) not in others}
