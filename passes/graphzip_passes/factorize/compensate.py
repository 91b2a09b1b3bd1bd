"""What a model is given back after its kernels became factors: batch norms and layers follow, on calibration data.

Layer after layer, in the order in which they run, batch norms behind factored kernels get the statistics of what they
read now, and layers that keep their kernels are fitted to what they gave (`graphzip_passes.parts.compensation`). What
is fitted reads what the layers before it give now.
"""

from __future__ import annotations

from torch import nn

from graphzip.analysis.groups import Analysed
from graphzip.graph.interpreter import Values
from graphzip.graph.state import attach, is_persistent, named_state
from graphzip.graph.traced import Traced
from graphzip.plan.problems import plan_error
from graphzip.rewrite.layout import Layout
from graphzip_passes.base import PassContext
from graphzip_passes.parts.compensation import Narrowed, refit

__all__ = ["compensated"]


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
    nothing = Layout.of((context.known or Analysed.of(given)).analysis, [])
    refit(Values(given, batches), Values(traced, batches), Narrowed(traced, nothing, nothing))
    own = dict(named_state(model))
    for name, tensor in named_state(traced.module):
        if name in own and own[name] is not tensor:
            attach(model, name, tensor, persistent=is_persistent(model, name))
    return traced, model
