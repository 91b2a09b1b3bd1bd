"""Keep and add up slices of parameters, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from graphzip.analysis.channels import CONSUMER
from graphzip.analysis.propagate import ParamAxis
from graphzip.errors import RewriteError
from graphzip.graph.state import like
from graphzip.labels import IntArray
from graphzip.rewrite.layout import Layout

__all__ = ["check_roles", "shrink_parameter", "shrink_parameters", "shrinking_axes", "spread_parameters"]


def shrink_parameters(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New values of the parameters and buffers that lose slices; `tensors` has the old ones by name.

    Consumer slices of a merged channel are added to those of the channel that stays, all others are dropped.
    """
    return {name: shrink_parameter(layout, axes, tensors[name]) for name, axes in shrinking_axes(layout).items()}


def shrinking_axes(layout: Layout) -> dict[str, list[ParamAxis]]:
    """By the name of the parameter or buffer the axes that lose slices, in the order in which they do."""
    found: dict[str, list[ParamAxis]] = {}
    for axis in _shrinking(layout):
        found.setdefault(axis.param, []).append(axis)
    return found


def shrink_parameter(layout: Layout, axes: Sequence[ParamAxis], tensor: torch.Tensor) -> torch.Tensor:
    """The new value of a parameter or buffer whose `axes` lose slices."""
    value = tensor.detach()
    for axis in axes:
        value = _shrink(layout, axis, value)
    return like(value.contiguous(), tensor)


def spread_parameters(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values of the original widths that compute what the slim `tensors` do, and that a merge takes back to them.

    Every channel of a cluster gets a copy of the one that stayed, and an equal share of its consumer slices. What did
    not lose slices is given as it is.
    """
    made = {name: value.detach() for name, value in tensors.items()}
    for axis in reversed(_shrinking(layout)):
        if axis.param in made:
            made[axis.param] = _spread(layout, axis, made[axis.param])
    return made


def _shrinking(layout: Layout) -> list[ParamAxis]:
    """Those axes that lose slices: inputs of grouped kernels first, while the groups are all there."""
    found = [axis for axis in layout.analysis.propagation.params if not layout.mask(axis.labels).all()]
    for axis in found:
        check_roles(layout, axis, ~layout.mask(axis.labels))
    return sorted(found, key=lambda axis: axis.labels.ndim, reverse=True)


def check_roles(layout: Layout, axis: ParamAxis, changed: NDArray[np.bool_]) -> None:
    """Raises `RewriteError` where a slice would change of which nothing says what the model does with it."""
    if (layout.analysis.roles[axis.labels[changed]] == 0).any():
        raise RewriteError(
            f"{axis.param}: slices along dimension {axis.dim} would change, but the analysis found no use of them; "
            "this is a mistake in graphzip: please report it, and exclude the group"
        )


def _shrink(layout: Layout, axis: ParamAxis, value: torch.Tensor) -> torch.Tensor:
    if axis.labels.ndim == 1:
        return _merge_dim(layout, axis.labels, layout.mask(axis.labels), value, axis.dim)
    groups, size = axis.labels.shape
    mask = layout.mask(axis.labels)
    left = int(mask.sum(axis=1).max())
    mask[~mask.any(axis=1), :left] = True  # a group that goes as a whole: its rows are dropped with dimension 0
    rows, _, *kernel = value.shape
    spread = value.reshape(groups, rows // groups, size, *kernel).transpose(1, 2).reshape(groups * size, -1)
    merged = _merge_dim(layout, axis.labels.ravel(), mask.ravel(), spread, 0, line=size)
    return merged.reshape(groups, left, rows // groups, *kernel).transpose(1, 2).reshape(rows, left, *kernel)


def _spread(layout: Layout, axis: ParamAxis, value: torch.Tensor) -> torch.Tensor:
    labels = np.atleast_2d(axis.labels)
    groups, size = labels.shape
    slot = np.cumsum(layout.mask(labels), axis=1).ravel() - 1
    source = slot[layout.heirs(labels.ravel())].reshape(groups, size)
    times = np.stack([np.bincount(row)[row] for row in source])
    share = np.where(layout.analysis.roles[labels] & CONSUMER > 0, 1.0 / times, 1.0)
    parts = []
    for group, part in enumerate(value.chunk(groups) if axis.labels.ndim > 1 else [value]):
        factor = torch.as_tensor(share[group], dtype=value.dtype, device=value.device)
        spread = part.index_select(axis.dim, _index(source[group], value))
        parts.append(spread * factor.reshape([-1 if dim == axis.dim else 1 for dim in range(value.dim())]))
    return torch.cat(parts)


def _merge_dim(
    layout: Layout, labels: IntArray, mask: NDArray[np.bool_], value: torch.Tensor, dim: int, line: int | None = None
) -> torch.Tensor:
    """Keep the slices in `mask`; consumer slices of the others are added to their heirs (of the same `line`)."""
    kept = np.flatnonzero(mask)
    result = value.index_select(dim, _index(kept, value))
    gone = np.flatnonzero(~mask & (layout.analysis.roles[labels] & CONSUMER > 0))
    if gone.size and not layout.drops:
        heirs = layout.heirs(labels)[gone]
        if line is not None:
            within = heirs // line == gone // line
            gone, heirs = gone[within], heirs[within]
        place = np.full(labels.size, -1, dtype=np.int64)
        place[kept] = np.arange(kept.size)
        wide = result.float() if result.dtype in {torch.float16, torch.bfloat16} else result
        added = value.index_select(dim, _index(gone, value)).to(wide.dtype)
        result = wide.index_add(dim, _index(place[heirs], value), added)
    return result


def _index(positions: IntArray, value: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(positions, dtype=torch.int64, device=value.device)
