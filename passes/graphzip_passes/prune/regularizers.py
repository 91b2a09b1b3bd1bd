"""What draws channels to zero in training, on the slices of their groups.

- `lasso`: `strength * sum over layers and channels j to go of ||K_j||_2` (Wen et al., "Learning Structured Sparsity in
  Deep Neural Networks", 2016), a term of the loss.
- `growing`: at step `t` of `T` all weights of channels to go are multiplied by `1 - lr * strength * t / T`, after what
  the optimizer does (Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021, Eq. 3, decoupled from the
  gradient as in AdamW, so that it is the same for every optimizer).
- `bn_scale`: `strength * sum |gamma|` over the scales of normalisations (Liu et al., "Network Slimming", ICCV 2017, Eq.
  1), a term of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from graphzip.analysis.groups import ChannelGroup
from graphzip.errors import PlanError
from graphzip.graph.traced import Traced
from graphzip.numeric.sharded import local, part_of
from graphzip_passes.parts.evidence import norm_scales_of
from graphzip_passes.parts.tied_slices import Place

__all__ = ["GROWN", "Scales", "attach_growing", "scales_of", "size_of_scales"]

GROWN: Final = "grown"
"""Under this name parameter groups hold how many steps were taken, which checkpoints of the optimizer keep."""

Scales = Sequence[tuple[str, Tensor]]
"""Names of the scales of normalisations in the graph, and which of their entries are meant."""


def scales_of(groups: Iterable[ChannelGroup], traced: Traced) -> Scales:
    """The scales of normalisations that act on channels of these groups."""
    names = norm_scales_of(traced)
    return [
        (traced.local(param.param), torch.from_numpy(np.unique(param.indices[param.indices >= 0])))
        for group in groups
        for param in group.params
        if param.role == "pointwise" and param.param in names
    ]


def size_of_scales(scales: Scales, model: nn.Module) -> Tensor:
    """`sum |gamma|`, a scalar with a gradient."""
    found = []
    for name, entries in scales:
        scale = model.get_parameter(name)
        part = part_of(scale, name)
        if part is None:
            found.append(local(scale)[entries].abs().sum())
        else:
            mine = entries[(entries >= part.start) & (entries < part.stop)] - part.start
            found.append(part.added_up(local(scale)[mine].abs().sum()))
    return torch.stack(found).sum()


def attach_growing(
    optimizer: torch.optim.Optimizer,
    places: Callable[[], Sequence[Place]],
    *,
    strength: float,
    steps: int | None,
    where: str,
) -> None:
    """Make the weights of channels to go decay faster with every step of `optimizer`.

    Raises `PlanError` where the number of steps is missing.
    """
    if steps is None:
        raise PlanError(
            f"{where}.regularizer: 'growing' depends on how long the training is; tell the number of optimizer steps: "
            "prepared.optimizer(..., steps=epochs * len(loader))"
        )
    for group in optimizer.param_groups:
        group.setdefault(GROWN, 0)
    plain = optimizer.step

    def step(self: torch.optim.Optimizer, *args: Any, **given: Any) -> Any:
        result = plain(*args, **given)
        first = self.param_groups[0]
        rate = float(first["lr"]) * strength * min(first[GROWN] / steps, 1.0)
        for group in self.param_groups:
            group[GROWN] += 1
        _decay_(places(), max(1.0 - rate, 0.0))
        return result

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]


@torch.no_grad()
def _decay_(places: Iterable[Place], left: float) -> None:
    for place in places:
        tensor = place.tensor
        if isinstance(tensor, nn.Parameter):
            goes = torch.from_numpy((place.slices.owner >= 0)[place.mine]).to(tensor.device)
            factor = torch.where(goes, left, 1.0).to(tensor.dtype)
            shape = [-1 if dim == place.slices.dim else 1 for dim in range(tensor.dim())]
            local(tensor.detach()).mul_(factor.reshape(shape))
