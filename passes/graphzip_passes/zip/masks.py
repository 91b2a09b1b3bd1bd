"""Weights that are zero stay so while the models are trained between layers (MTZ, section 3.6).

Sparse networks are zipped with their masks: of two rows that become one the mask with more ones counts. An optimizer
knows no masks, so after its step what was zero when it was made is zero again.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

from graphzip_passes.base import Constraint

__all__ = ["KeptZeros"]

_SPARSE: Final = 0.05  # of a weight: fewer zeros are none that somebody put there


class KeptZeros(Constraint):
    """Keeps zeros of sparse weights in training; nothing else is asked of it."""

    def pull_(self, model: nn.Module, fraction: float) -> None:
        return None

    def deviations(self, model: nn.Module) -> dict[str, float]:
        return {}

    def state(self) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def load_state(self, state: Tensor) -> None:
        return None

    def bind(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, steps: int | None) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        sparse = [each for each in model.parameters() if id(each) in held and _is_sparse(each)]
        masks = [(parameter, parameter.detach() != 0) for parameter in sparse]
        if not masks:
            return
        plain = optimizer.step

        def step(_: torch.optim.Optimizer, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
            loss = plain(**options) if closure is None else plain(closure, **options)
            with torch.no_grad():
                for parameter, mask in masks:
                    parameter.mul_(mask)
            return loss

        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]


def _is_sparse(weight: Tensor) -> bool:
    """Whether a weight has been pruned: some of it is zero, and not all, as of a layer that begins at nothing."""
    if weight.dim() < 2 or not weight.is_floating_point() or weight.is_meta:
        return False
    zeros = int((weight.detach() == 0).sum())
    return _SPARSE * weight.numel() <= zeros < weight.numel()
