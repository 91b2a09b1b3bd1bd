"""What a model is given back after its kernels became factors: factors and layers are fitted in order, on data.

At first, layer after layer in the order in which they run, batch norms behind factored kernels get the statistics of
what they read now, and layers that keep their kernels are fitted to what they gave
(`graphzip_passes.parts.compensation`). Then factors have their turn, too: each layer's are fitted to what it reads by
then (`graphzip_passes.factorize.ordered_fit`). Where layers share factors, these are fitted to all of them, and turns
go on as long as the outputs of the model come nearer to what they were. The best of all turns stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from graphzip.analysis.groups import Analysed
from graphzip.graph.interpreter import Values
from graphzip.graph.state import attach, is_persistent, named_state
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.plan.problems import plan_error
from graphzip.rewrite.layout import Layout
from graphzip_passes.base import PassContext
from graphzip_passes.factorize.ordered_fit import FactoredKernels
from graphzip_passes.parts.compensation import Effort, Narrowed, refit

__all__ = ["compensated"]

_TURNS: Final = 5
_ROWS: Final = 1 << 14  # of what a layer reads and gives that its factors are fitted on
_ENOUGH: Final = 0.98  # of what outputs were off by before: a turn that leaves more is the last one
_EXACT: Final = 1e-10  # of the squared outputs: what is off by less is rounding


def compensated(
    given: Traced, made: tuple[Traced, nn.Module], how: str, context: PassContext
) -> tuple[Traced, nn.Module]:
    """The graph and the module `made` of `given`, which hold the same tensors, with what was fitted in both.

    `how` is `"auto"` (where there is data), `"data"` or `"none"`. Raises `PlanError` where data is asked for and there
    is none.
    """
    if how == "data" and context.calibration is None:
        text = "'data' needs calibration data; pass calibration=, a list of batches, or write compensate: auto"
        raise plan_error([f"{context.where}.compensate: {text}"])
    if how == "none" or context.calibration is None:
        return made
    traced, model = made
    batches = context.calibration.graph_inputs()
    if not batches:
        return made
    _fitted(given, traced, FactoredKernels(given, traced, model, context.processes), batches, context)
    own = dict(named_state(model))
    for name, tensor in named_state(traced.module):
        if name in own and own[name] is not tensor:
            attach(model, name, tensor, persistent=is_persistent(model, name))
    return traced, model


def _fitted(given: Traced, traced: Traced, kernels: FactoredKernels, batches: Any, context: PassContext) -> None:
    """Fit what `traced` holds, in place, to what `given` gives."""
    nothing = Layout.of((context.known or Analysed.of(given)).analysis, [])
    least, best = float("inf"), _state(traced, kernels)
    start = best[0]
    for turn in range(1 + _TURNS):
        _attach(traced, start)  # statistics are estimated from those that were given
        old, new = Values(given, batches), Values(traced, batches)
        effort = Effort(rows=_ROWS) if turn else None
        refit(old, new, Narrowed(traced, nothing, nothing), effort=effort, kernels=kernels if turn else None)
        lost, last = _off_by(old, new), least
        if lost < least:
            least, best = lost, _state(traced, kernels)
        if lost <= _EXACT or (turn and not kernels.shared) or (turn > 1 and lost > _ENOUGH * last):
            break
        if turn:
            kernels.fit_shared()
    tensors, factors = best
    kernels.restore(factors)
    _attach(traced, tensors)


def _attach(traced: Traced, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        attach(traced.module, name, tensor, persistent=is_persistent(traced.module, name))


def _state(traced: Traced, kernels: FactoredKernels) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
    """All tensors of the graph, none of which is changed in place but for the factors, and copies of these."""
    return dict(named_state(traced.module)), kernels.values()


def _off_by(old: Values, new: Values) -> float:
    """By how much outputs differ on all batches: the squared difference as a share of the squares, added up."""
    total = 0.0
    here = new.shared.counted
    for one, other in zip(*(_leaves(values.outputs()) for values in (old, new)), strict=True):
        pairs = list(zip(here(one), here(other), strict=True))
        apart = sum(((a.double() - b.double()).square().sum().cpu() for a, b in pairs), _ZERO)
        whole = sum((a.double().square().sum().cpu() for a, _ in pairs), _ZERO)
        apart, whole = new.shared.processes.summed(apart, whole)
        total += float(apart / whole) if whole > 0.0 else float(apart)
    return total


_ZERO: Final = torch.zeros((), dtype=torch.float64)


def _leaves(outputs: Sequence[Any]) -> list[list[Tensor]]:
    """The tensors of real numbers among outputs, each with its values on all batches."""
    batches = [pytree.tree_leaves(each) for each in outputs]
    return [
        list(values)
        for values in zip(*batches, strict=True)
        if isinstance(values[0], Tensor) and values[0].is_floating_point()
    ]
