"""A model between `prepare` and `convert`: it computes what it did, and may be trained under the plan's constraints."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphzip.analysis.cost import Cost, cost_of
from graphzip.compiled import Compiled
from graphzip.errors import GraphZipError
from graphzip.graph.modules import to_module
from graphzip.graph.trace import Traced
from graphzip.plan import Plan
from graphzip.results import GroupChange, Report
from passes.base import Pass
from passes.table import PASSES

__all__ = ["Prepared"]

logger = logging.getLogger(__name__)


@dataclass
class _Progress:
    """Where in the plan a prepared model stands."""

    traced: Traced
    seed: int
    position: int = 0
    active: Pass | None = None


class Prepared(nn.Module):
    """The model to train before `convert`.

    Calling it runs `model`: a deep copy of the user's module until the first pass has been carried out, the rewritten
    module after that.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Traced,
        plan: Plan,
        *,
        original: nn.Module,
        example_inputs: tuple[Any, ...],
        calibration: Iterable[Any] | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.seed = seed
        self._hidden: dict[str, Any] = {"original": original, "calibration": calibration, "inputs": example_inputs}
        self._progress = _Progress(traced, seed)
        self._before: Cost = cost_of(traced)
        self._changes: list[Pass] = []
        self._begin()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.model(*args, **kwargs)

    def steps(self) -> Iterator[str]:
        """Stages of the plan that are left, by name. Train in the body of the loop; the next turn carries it out."""
        while (active := self._progress.active) is not None:
            yield from active.stages
            if self._progress.active is active:
                self._finish()

    def collapse_(self) -> None:
        """Set every cluster of the current pass to its centre at once."""
        if self._progress.active is not None:
            self._progress.active.collapse_(self._inner())

    def pull_(self, fraction: float) -> None:
        """Move every clustered slice by `fraction` (0 to 1) of the way to the centre of its cluster."""
        if not 0.0 <= fraction <= 1.0:
            raise GraphZipError(f"pull_ takes a fraction between 0 and 1, got {fraction}")
        if self._progress.active is not None:
            self._progress.active.pull_(self._inner(), fraction)

    def deviation(self) -> float:
        """Sum of squared kernel deviations from the cluster centres (C-SGD, Eq. 7); kernels only."""
        active = self._progress.active
        return 0.0 if active is None else active.deviation(self._inner())

    def regularizer(self) -> torch.Tensor:
        """A term to add to the loss; zero where the plan's passes have none."""
        parameter = next(self.model.parameters(), None)
        return torch.zeros(()) if parameter is None else parameter.new_zeros(())

    def convert(self) -> Compiled:
        """Carry out every pass that is left and give the slimmer model. The prepared model can be thrown away."""
        for _ in self.steps():
            pass
        traced = self._progress.traced
        original: nn.Module = self._hidden["original"]
        slim = to_module(traced)
        _follow_modes(slim, _inside(original, traced.scope))
        module = _with_submodule(original, traced.scope, slim)
        compiled = Compiled(module, self._report(module), traced, self._hidden["inputs"])
        logger.info("%s", compiled.report)
        return compiled

    def _inner(self) -> nn.Module:
        return _inside(self.model, self._progress.traced.scope)

    def _begin(self) -> None:
        progress = self._progress
        if progress.position < len(self.plan.passes):
            options = self.plan.passes[progress.position]
            where = f"passes[{progress.position}].{options.kind}"
            progress.active = PASSES[type(options)](options, progress.traced, seed=self.seed, where=where)
        else:
            progress.active = None

    def _finish(self) -> None:
        """Carry out the current pass on the trained weights and begin the next one."""
        progress = self._progress
        assert progress.active is not None
        progress.traced.adopt_state(self._inner())
        progress.traced = progress.active.convert(progress.traced)
        self._changes.append(progress.active)
        progress.position += 1
        if progress.position < len(self.plan.passes):
            slim = to_module(progress.traced)
            _follow_modes(slim, self._inner())
            self.model = _with_submodule(self.model, progress.traced.scope, slim)
        self._begin()

    def _report(self, module: nn.Module) -> Report:
        traced = self._progress.traced
        widths = [item for change in self._changes for item in change.widths().items()]
        after = cost_of(traced)
        summaries = tuple(
            {options.kind: change.summary()} for options, change in zip(self.plan.passes, self._changes, strict=True)
        )
        changed = bool(widths) or any(summary.get("fold_batch_norm", {}).get("folded") for summary in summaries)
        return Report(
            before=self._before,
            after=after,
            groups=tuple(GroupChange(name, before, now) for name, (before, now) in widths),
            changed=changed,
            drift=_drift(self._hidden["original"], module, self._hidden["calibration"], len(self._hidden["inputs"])),
            notes=traced.training_only,
            passes=summaries,
        )


def _inside(model: nn.Module, scope: str) -> nn.Module:
    return model.get_submodule(scope) if scope else model


def _with_submodule(model: nn.Module, scope: str, value: nn.Module) -> nn.Module:
    if not scope:
        return value
    whole = copy.deepcopy(model)
    owner, _, leaf = scope.rpartition(".")
    setattr(whole.get_submodule(owner), leaf, value)
    return whole


def _follow_modes(module: nn.Module, source: nn.Module) -> None:
    """Give every submodule the training mode of the one with the same name, and of the whole where there is none."""
    modes = {name: inner.training for name, inner in source.named_modules()}
    for name, inner in module.named_modules():
        inner.training = modes.get(name, source.training)


@torch.no_grad()
def _drift(before: nn.Module, after: nn.Module, calibration: Iterable[Any] | None, inputs: int) -> float | None:
    """Largest difference of outputs relative to the largest output, both in eval mode."""
    if calibration is None:
        return None
    old, new = copy.deepcopy(before).eval(), copy.deepcopy(after).eval()
    worst = scale = 0.0
    for batch in calibration:
        args = batch_arguments(batch, inputs)
        for left, right in zip(_leaves(old(*args)), _leaves(new(*args)), strict=True):
            worst = max(worst, float((left - right).abs().max()))
            scale = max(scale, float(left.abs().max()))
    return worst / scale if scale else worst


def _leaves(output: Any) -> list[torch.Tensor]:
    return [leaf.double() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def batch_arguments(batch: Any, inputs: int) -> tuple[Any, ...]:
    """The positional inputs of one calibration batch; what a loader yields beyond them (labels) is left out."""
    if isinstance(batch, Mapping):
        raise GraphZipError("calibration yields a mapping; make it yield a tensor or a tuple of positional inputs")
    args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if len(args) > inputs:
        logger.info("calibration batches have %d entries, the model takes %d: the rest is left out", len(args), inputs)
    return args[:inputs]
