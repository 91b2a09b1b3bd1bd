"""What narrowing does to the outputs, measured: of one group alone, layers behind it being re-fitted, or of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any, Final

import torch
from torch import nn

from graphzip.analysis.layers import own_layers
from graphzip.errors import WeightsError
from graphzip.graph.batches import Batches, leading, samples_in, shared
from graphzip.graph.interpreter import Values
from graphzip.graph.restore_modules import to_module
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.numeric.solvers import all_finite
from graphzip.process_groups import ALONE, Processes
from graphzip.scores import score_of
from graphzip.study.narrowing import Narrowing
from graphzip_passes.parts.compensation import Effort, refit

__all__ = ["CONSTANTS", "Laboratory"]

_FITTED: Final = 0.7  # of the samples for fits; outputs are judged on the others
_FOLLOWING: Final = 8  # layers that are fitted from the first on that reads a group, for a measurement
_QUICK: Final = Effort(rows=1 << 14, rounds=1)
_JUDGED: Final = 512  # samples, at most, that outputs are judged on where all groups are narrowed
_WORST: Final = 1e12  # a loss that no plan would take

CONSTANTS: Final = (_FITTED, _FOLLOWING, _QUICK.rows, _QUICK.rounds, _JUDGED)
"""What else decides a measurement."""


class Laboratory:
    """Narrows one group at a time and compares. Groups come in the order in which they run."""

    def __init__(
        self,
        narrowing: Narrowing,
        batches: Batches,
        *,
        original: Traced,
        evaluate: Callable[[nn.Module], float] | None,
        samples: int,
    ) -> None:
        self.traced, self.original, self.narrowing = narrowing.traced, original, narrowing
        self.batches, self.evaluate, self.samples = batches, evaluate, samples
        self.score = self._scored(self.traced) if evaluate is not None else 0.0
        self.layers = [layer.name for layer in own_layers(self.traced).values()]
        fitted, judged = _parts(batches, samples)
        self.fitting, self.judging = Values(self.traced, fitted), Values(self.traced, judged)
        if evaluate is None:
            self.wanted = _flat(Values(self.traced, judged).outputs())
            if not all_finite(self.wanted):
                raise WeightsError(
                    "the model's outputs are NaN or infinite on the data that widths are judged by; check the data and "
                    "the model's weights"
                )

    @cached_property
    def by_itself(self) -> bool:
        """Whether a process measures a loss for itself; else all of them do it together. All of them ask."""
        return self.evaluate is None and self.narrowing.ready()

    def loss(self, name: str, width: int) -> float:
        """With all groups but this one as they are."""
        if self.evaluate is not None:
            return self._lost({name: width})
        merged = self.narrowing.narrowed({name: width})
        start = self._first_node(name, merged.traced)
        if self.narrowing.refits:
            self.fitting = _just_before(start, self.fitting)
            old, new = self.fitting.fork(self.traced), self.fitting.fork(merged.traced)
            refit(old, new, merged, only=self._nearby(name), effort=_QUICK)
        self.judging = _just_before(start, self.judging)
        return _relative(self.wanted, _flat(self.judging.fork(merged.traced).outputs()))

    def loss_together(self, widths: Mapping[str, int]) -> float:
        """With all groups narrowed at once, and all layers re-fitted on some samples; others are judged, if any."""
        if self.evaluate is not None:
            return self._lost(widths)
        merged = self.narrowing.fitted(widths, self._together[0], _QUICK)
        return _relative(self._wanted_together, self._outputs_together(merged), self._together[1].processes)

    @cached_property
    def _together(self) -> tuple[Batches, Batches]:
        """Every process has its share of these."""
        fitted, judged = self.batches.cut(self.samples), self.batches.cut(_JUDGED, behind=self.samples)
        if judged:
            return fitted, judged
        some, others = _parts(self.batches, self.samples)
        return shared(some), shared(others)

    @cached_property
    def _wanted_together(self) -> torch.Tensor:
        return self._outputs_together(self.original)

    def _outputs_together(self, traced: Traced) -> torch.Tensor:
        found = [_flat(Values(traced, [batch]).outputs()) for batch in self._together[1].here]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *found])

    def _lost(self, widths: Mapping[str, int]) -> float:
        """Of the user's score."""
        return max(self.score - self._scored(self.narrowing.carried_out(widths)), 0.0)

    def _scored(self, traced: Traced) -> float:
        """What `evaluate` says of a model. Raises `PlanError` where that is no score."""
        assert self.evaluate is not None
        return self.batches.processes.agreed(score_of(self.evaluate, _module(traced)))

    def _first_node(self, name: str, slim: Traced) -> torch.fx.Node:
        """The first operator that a change of the group can touch: by its parameters, or by its size in `slim`."""
        params = self.narrowing.params(name, "producer", "pointwise", "consumer")
        users = [
            user
            for node in self.traced.graph.nodes
            if node.op == "get_attr" and str(node.target) in params
            for user in node.users
        ]
        sizes = {node.name: _sizes(node) for node in slim.graph.nodes}
        resized = [
            node
            for node in self.traced.graph.nodes
            if node.op == "call_function" and sizes.get(node.name) != _sizes(node)
        ]
        first: torch.fx.Node = min([*users, *resized], key=self.judging.place.__getitem__)
        return first

    def _nearby(self, name: str) -> set[str]:
        """The layers that read the group, those that make it after that, and the first ones that follow; where no layer
        reads it, those that make it and what follows them.
        """
        readers = self.narrowing.params(name, "consumer")
        begins = readers or self.narrowing.params(name, "producer")
        first = min((number for number, layer in enumerate(self.layers) if layer in begins), default=0)
        return {*self.layers[first : first + _FOLLOWING], *readers, *self.narrowing.params(name, "producer")}


def _sizes(node: torch.fx.Node) -> tuple[str, ...]:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else ()


def _parts(batches: Batches, samples: int) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Batches that layers are fitted on for a measurement, and those that outputs are judged on: others, if any."""
    found = leading(batches, samples)
    fitted = sum(count <= _FITTED * samples for count in accumulate(map(samples_in, found)))
    fitted = min(fitted or 1, max(len(found) - 1, 1))
    return found[:fitted], found[fitted:] or found


def _just_before(node: torch.fx.Node, values: Values) -> Values:
    """The values of the same graph where all before the node has run and nothing else has."""
    found = values if values.done <= values.place[node] else Values(values.traced, values.shared)
    found.run_before(node)
    return found


def _flat(outputs: Any) -> torch.Tensor:
    """All floating-point outputs on all batches."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return torch.cat([leaf.detach().double().flatten() for leaf in leaves if leaf.is_floating_point()])


def _relative(wanted: torch.Tensor, given: torch.Tensor, processes: Processes = ALONE) -> float:
    """The mean square of a change relative to the variance, of outputs that lie in several processes where there are.

    At most `_WORST`, which stands for outputs that are not finite too.
    """
    count, total = processes.summed(torch.tensor(float(wanted.numel()), dtype=torch.float64), wanted.sum())
    about = (wanted - (total / count).to(wanted.device)).square().sum()
    spread, apart = processes.summed(about, (wanted - given).square().sum())
    found = float(apart / spread.clamp(min=float(count) * torch.finfo(wanted.dtype).tiny))
    return min(found, _WORST) if math.isfinite(found) else _WORST


def _module(traced: Traced) -> nn.Module:
    return to_module(traced).eval()
