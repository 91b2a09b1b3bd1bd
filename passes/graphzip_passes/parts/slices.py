"""The slices of a group's parameters as rows, one for each channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from graphzip.analysis.groups import ChannelGroup, GroupParam
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.ops.spec import FloatArray

__all__ = ["Rows", "duplicates", "own_rows", "rows_by_role", "rows_of"]

Rows = Mapping[str, Tensor]
"""By the name of a parameter a row for each channel of a group, (n, entries of its slices), float64."""


def rows_by_role(
    group: ChannelGroup, traced: Traced, tensor_of: Callable[[str], Tensor]
) -> dict[str, dict[str, Tensor]]:
    """By role and parameter the rows of what `tensor_of` gives for the parameter's name in the graph."""
    found: dict[str, dict[str, Tensor]] = {}
    for param in group.params:
        rows = rows_of(param, group, tensor_of(traced.local(param.param)))
        held = found.setdefault(param.role, {})
        held[param.param] = torch.cat([held[param.param], rows], 1) if param.param in held else rows
    return found


def rows_of(param: GroupParam, group: ChannelGroup, tensor: Tensor) -> Tensor:
    """The slices of a tensor of the shape of the parameter that belong to the channels, (n, entries), float64.

    A consumer of a grouped convolution has the rows of its group alone.
    """
    values = tensor.detach().double().cpu()
    if param.groups > 1:
        parted = values.reshape(param.groups, -1, *values.shape[1:])
        rows = parted.movedim(param.dim + 1, 1).flatten(0, 1).flatten(1)
    else:
        rows = values.movedim(param.dim, 0).reshape(values.shape[param.dim], -1)
    indices = param.indices.reshape(group.size, -1)
    found: Tensor = rows[torch.from_numpy(np.maximum(indices, 0))]
    if (indices < 0).any():
        found *= torch.from_numpy(indices >= 0)[:, :, None]
    return found.flatten(1)


def own_rows(group: ChannelGroup, traced: Traced) -> FloatArray:
    """Everything that makes a channel or acts on it alone, one row per channel, (n, entries)."""
    made = [
        rows_of(param, group, get_tensor(traced.module, traced.local(param.param)))
        for param in group.params
        if param.role != "consumer"
    ]
    found: FloatArray = torch.cat(made, 1).numpy()
    return found


def duplicates(group: ChannelGroup, traced: Traced) -> IntArray:
    """For every channel the number of the set of identical channels, of its block, that it belongs to."""
    blocks = np.zeros((group.size, 1))
    for number, block in enumerate(group.blocks):
        blocks[list(block)] = number
    rows = np.concatenate([blocks, own_rows(group, traced) + 0.0], axis=1)
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
