"""What a score of the user's says of a model."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn

from graphzip.boundary import call_user
from graphzip.errors import PlanError

__all__ = ["score_of"]


def score_of(evaluate: Callable[[nn.Module], float], module: nn.Module) -> float:
    """What `evaluate(module)` gives, the higher the better. Raises `PlanError` where that is no finite number."""
    found: Any = call_user(evaluate, module)
    if isinstance(found, torch.Tensor | np.ndarray) and math.prod(found.shape) == 1:
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, Real):
        raise PlanError(f"evaluate gave {reprlib.repr(found)}, which is no number; give a score, the higher the better")
    score = float(found)
    if not math.isfinite(score):
        raise PlanError(f"evaluate gave {score}; give a finite score, the higher the better")
    return score
