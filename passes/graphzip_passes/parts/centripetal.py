"""Centripetal SGD: an optimizer that draws the slices of a cluster together while it trains.

For every producer and pointwise slice `F` of a clustered channel, with `H` its cluster, C-SGD's update is (Eq. 6)

    F_j <- F_j - lr * (mean_H(dL/dF) + weight_decay * F_j + strength * (F_j - mean_H(F))).

Split into the centre of the cluster, `m = mean_H(F)`, and the deviation from it, `d_j = F_j - m`, this is the same as

    m   <- m - lr * (mean_H(dL/dF) + weight_decay * m)            what the optimizer does to m alone,
    d_j <- (1 - lr * (weight_decay + strength)) * d_j             a number times d_j,

and that is how a step is taken: the optimizer, whichever it is, sees every member at the centre with the averaged
gradient, and the shrunken deviations are put back after it. So for `torch.optim.SGD` without momentum Eq. 6 holds as it
stands. With momentum, Nesterov, Adam, AdamW and others the second line holds to the letter, which makes the squared
deviation fall by (1 - lr * (weight_decay + strength))^2 a step; the first line is the optimizer's own rule, applied to
the centre. Members see the same gradients and weights, so their moments are equal and never drive them apart.

With the pull `"gradient"` the term `strength * (F_j - mean_H(F))` is part of the gradient that the optimizer is given,
as in the authors' code: with a momentum of 0.9 it builds up and is ten times as strong, and Adam divides it by the size
of the gradient. What it leaves of a deviation is then not known beforehand, so that it is not the default.

Source: Ding et al., "Manipulating Identical Filter Redundancy for Efficient Pruning on Deep and Complicated CNN",
sections 3.2 to 3.4, Eq. 6 and 18 to 20.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor

from graphzip.errors import GraphZipError, PlanError
from graphzip.graph.torch_private import foreach_add_, foreach_copy_
from graphzip.numeric.sharded import local
from graphzip_passes.parts.tied_slices import Place, Rows, rows_of

__all__ = ["AUTO_LEFT", "AUTO_SHARE", "TIED", "attach", "auto_contraction"]

logger = logging.getLogger(__name__)

AUTO_LEFT: Final = 1e-8
"""What `strength="auto"` leaves of a deviation: less than the rounding of float32 against weights of its size."""

AUTO_SHARE: Final = 0.75
"""The share of the planned steps in which it does so; in the rest the clusters train as the narrow model."""

TIED: Final = "tied"
"""The strength that leaves nothing of a deviation: members of a cluster are equal after every step."""

_UNTRAINED: Final = -1
_APART: Final = 1e-3  # of a deviation: what is left of it in the end costs accuracy
_LARGEST_FLOOR: Final = 1e-3  # of a weight: bfloat16 rounds more coarsely, but is no reason to merge at once

Number = float | Tensor


def auto_contraction(steps: int) -> float:
    """What one of `steps` planned steps leaves of a deviation under `strength="auto"`, a number in (0, 1).

    It is the same at every step, so that the deviation falls in a straight line on a log axis whatever the learning
    rate does: the strength is `(1 - contraction) / lr - weight_decay` at the learning rate of the step.
    """
    return math.exp(math.log(AUTO_LEFT) / max(1.0, AUTO_SHARE * steps))


@dataclass
class _Matrix:
    """Rows with what a step needs to know: the parameter group that they follow, and whether they have gradients."""

    rows: Rows
    group: int
    trained: bool


class _Centripetal:
    """What is done before and after a step of one optimizer."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, places: Callable[[], Sequence[Place]], *, in_gradient: bool
    ) -> None:
        self.optimizer = optimizer
        self.places = places
        self.in_gradient = in_gradient
        self._made: list[_Matrix] = []
        self._made_for: Sequence[Place] | None = None
        self._counts: tuple[int, ...] = ()

    @torch.no_grad()
    def step(self, plain: Callable[[], Any]) -> None:
        """Average the gradients, let the optimizer move the centres, put the shrunken deviations back."""
        apart = []
        skipped = getattr(self.optimizer, "found_inf", None)
        for matrix in self._matrices():
            if self.in_gradient and matrix.trained:
                self._pull_by_gradient(matrix)
                continue
            left = self._left(matrix, skipped)
            tensors = matrix.rows.tensors()
            rows = matrix.rows.gather(tensors)
            centres = matrix.rows.means(rows)
            _copy(tensors, matrix.rows.parts(centres, tensors))
            apart.append((matrix, tensors, _without_rounding(rows.sub_(centres), centres, left).mul_(left)))
            if matrix.trained:
                _average_gradients(matrix.rows, tensors)
        try:
            plain()
        finally:
            for matrix, tensors, deviation in reversed(apart):
                foreach_add_(tensors, matrix.rows.parts(deviation, tensors))

    def _pull_by_gradient(self, matrix: _Matrix) -> None:
        """Give every member the averaged gradient and its pull towards the centre; the optimizer does the rest."""
        tensors = matrix.rows.tensors()
        rows = matrix.rows.gather(tensors)
        group = {**self.optimizer.defaults, **self.optimizer.param_groups[matrix.group]}
        pull = rows.sub_(matrix.rows.means(rows)).mul_(group["strength"])
        _average_gradients(matrix.rows, tensors)
        for place, part in zip(matrix.rows.places, matrix.rows.parts(pull, tensors), strict=True):
            if place.tensor.grad is not None:
                local(place.tensor.grad).add_(part)

    def _left(self, matrix: _Matrix, skipped: Tensor | None) -> Number:
        """What the step leaves of a deviation; all of it where a gradient scaler makes a fused optimizer skip it."""
        group = {**self.optimizer.defaults, **self.optimizer.param_groups[max(matrix.group, 0)]}
        if group["strength"] in ("auto", TIED):
            left: Number = group["contraction"]
        else:
            decay = (group.get("weight_decay") or 0.0) if matrix.trained else 0.0
            left = 1.0 - group["lr"] * (decay + group["strength"])
            left = left.clamp(min=0.0).to(matrix.rows.order.device) if isinstance(left, Tensor) else max(left, 0.0)
        return left if skipped is None else 1.0 - (1.0 - left) * (1.0 - skipped)

    def _matrices(self) -> list[_Matrix]:
        places = self.places()
        counts = tuple(len(group["params"]) for group in self.optimizer.param_groups)
        known = places is self._made_for and counts == self._counts
        if not known or not all(matrix.rows.fits() for matrix in self._made):
            self._made, self._made_for, self._counts = self._make(places), places, counts
        return self._made

    def _make(self, places: Sequence[Place]) -> list[_Matrix]:
        """One matrix per parameter group and slice length; what is not trained follows the first group."""
        number = {id(p): at for at, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        found = rows_of((place, number.get(id(place.holder[place.leaf]), _UNTRAINED)) for place in places)
        return [_Matrix(rows, group, group != _UNTRAINED) for group, rows in found]


def _without_rounding(deviation: Tensor, centres: Tensor, left: Number) -> Tensor:
    """Zero where the deviation has come down to the rounding of its centre; multiplying takes it no further.

    Every step rounds anew and takes `1 - left` away, which balances at about `(1 - left)^-0.5` roundings.
    """
    floor = 1.5 * torch.finfo(centres.dtype).eps
    if isinstance(left, Tensor):
        floors = (floor * (1.0 - left).clamp(min=1e-12).rsqrt()).clamp(2 * floor, _LARGEST_FLOOR) * (left < 1.0)
        return deviation.mul_(deviation.abs() > centres.abs().mul_(floors))
    if left >= 1.0:
        return deviation
    floor *= max(2.0, (1.0 - left) ** -0.5)
    return deviation.mul_(deviation.abs() > centres.abs().mul_(min(floor, _LARGEST_FLOOR)))


def _average_gradients(rows: Rows, tensors: Sequence[Tensor]) -> None:
    gradients = [None if place.tensor.grad is None else local(place.tensor.grad) for place in rows.places]
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return
    for place, gradient in zip(rows.places, gradients, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            raise GraphZipError(
                f"{place.slices.name} has a sparse gradient, which cannot be averaged over a cluster; make the "
                "embedding with sparse=False"
            )
    whole = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tensors, strict=True)]
    parts = rows.parts(rows.means(rows.gather(whole)), tensors)
    _copy(present, [part for part, gradient in zip(parts, gradients, strict=True) if gradient is not None])
    for place, part, gradient in zip(rows.places, parts, gradients, strict=True):
        if gradient is None and place.slices.pool:
            place.tensor.grad = torch.zeros_like(place.tensor)  # it moves with those it is tied to
            local(place.tensor.grad).copy_(part)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    foreach_copy_(list(targets), list(sources))


def attach(
    optimizer: torch.optim.Optimizer,
    places: Callable[[], Sequence[Place]],
    *,
    strength: float | str,
    steps: int | None,
    where: str,
    in_gradient: bool = False,
) -> None:
    """Make `optimizer` take centripetal steps. `places` gives the clustered slices, the same list until they change.

    Every parameter group gets a `strength` unless it brings one, which may be changed as the learning rate may. With
    `in_gradient` the pull is part of the gradient that the optimizer is given.
    Raises `PlanError` where `strength` is "auto" and `steps` is missing, `GraphZipError` for an optimizer that
    evaluates the model within its step.
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise GraphZipError(
            f"{type(optimizer).__name__} evaluates the model several times a step, between which clusters cannot be "
            "kept together; use a first-order optimizer such as torch.optim.SGD"
        )
    contraction = 0.0 if strength == TIED else None
    if strength == "auto":
        if steps is None:
            raise PlanError(
                f"{where}.strength: 'auto' depends on how long the training is; tell the number of optimizer steps: "
                "prepared.optimizer(..., steps=epochs * len(loader))"
            )
        contraction = auto_contraction(steps)
    elif steps is not None and isinstance(strength, float):
        _warn_if_short(optimizer, strength, steps, where, in_gradient=in_gradient)
    optimizer.defaults = {**optimizer.defaults, "strength": strength, "contraction": contraction}
    for group in optimizer.param_groups:
        group.setdefault("strength", strength)
        group.setdefault("contraction", contraction)
    centripetal = _Centripetal(optimizer, places, in_gradient=in_gradient)
    progress = None
    if steps is not None and not isinstance(strength, str):
        progress = _Progress(optimizer, strength, steps, where, in_gradient)
    plain = optimizer.step

    def step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if progress is not None:
            progress.count()
        centripetal.step(lambda: plain(**options))
        return loss

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]


def _pull(optimizer: torch.optim.Optimizer, strength: float, *, in_gradient: bool) -> float:
    """The share of a deviation that a step takes away, at the learning rate that the first group has now."""
    group = optimizer.param_groups[0]
    pull = float(group["lr"]) * (strength + float(group.get("weight_decay") or 0.0))
    if in_gradient:
        pull /= 1.0 - min(float(group.get("momentum") or 0.0), 0.999)
    return min(pull, 1.0)


def _warn_if_short(
    optimizer: torch.optim.Optimizer, strength: float, steps: int, where: str, *, in_gradient: bool
) -> None:
    """Say so where even a constant learning rate leaves filters apart at the end of the training."""
    left = (1.0 - _pull(optimizer, strength, in_gradient=in_gradient)) ** steps
    if left > _APART:
        _warn(where, strength, f"{steps} steps at a learning rate of {float(optimizer.param_groups[0]['lr']):g}", left)


def _warn(where: str, strength: float, course: str, left: float) -> None:
    logger.warning(
        "%s.strength: %g is weak for %s: %.0f %% of the distance between filters of a cluster is left at the end, and "
        "merging them costs accuracy; set strength: auto",
        where,
        strength,
        course,
        100 * left,
    )


class _Progress:
    """Looks, half way and later, at how far learning rates as they were have brought filters together.

    The rate of that moment for the rest is what a schedule that falls does not exceed.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, strength: float, steps: int, where: str, in_gradient: bool
    ) -> None:
        self.optimizer, self.strength, self.steps = optimizer, strength, steps
        self.where, self.in_gradient = where, in_gradient
        self.warned = (1.0 - self._pull()) ** steps > _APART
        self.taken, self.left = 0, 1.0

    def count(self) -> None:
        """A step at the learning rate of now."""
        if self.warned or self.taken >= self.steps or isinstance(self.optimizer.param_groups[0]["lr"], Tensor):
            return  # a rate that lies on a device is not asked for at every step
        kept = 1.0 - self._pull()
        self.taken, self.left = self.taken + 1, self.left * kept
        if self.taken in (self.steps // 2, 3 * self.steps // 4, self.steps):
            left = self.left * kept ** (self.steps - self.taken)
            if left > _APART:
                self.warned = True
                _warn(self.where, self.strength, f"{self.steps} steps with this schedule of learning rates", left)

    def _pull(self) -> float:
        return _pull(self.optimizer, self.strength, in_gradient=self.in_gradient)
