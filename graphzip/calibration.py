"""Calibration data: batches that the passes and the report feed to a model, and the model that they are fed to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import nn

from graphzip.arguments import re_iterable
from graphzip.calls import Call, Signature, folded
from graphzip.errors import ExampleInputError
from graphzip.graph.batches import check_batches, each_batch, run_batch
from graphzip.graph.copies import deep_copy, eval_copy, flags_kept, switches_by_itself
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.rewrite.join_models import module_of
from graphzip.tracing.results import tensors_by_way

__all__ = [
    "Calibration",
    "Feeds",
    "Trained",
    "as_inputs",
    "check_calibration",
    "drift",
    "place_of",
    "placed",
    "with_submodule",
]

T = TypeVar("T")

Feeds = Mapping[str, Callable[[], Iterator[tuple[Any, ...]]]]
"""For each task what gives its calibration batches from the start, as positional inputs."""


@dataclass(frozen=True)
class Trained:
    """The model that is trained: the whole one, and what the graph `traced` is of, its submodule `traced.scope`.

    While the graph is `ahead` of the module, the model is built from it when somebody asks.
    """

    module: nn.Module
    traced: Traced
    ahead: bool = False

    @cached_property
    def whole(self) -> nn.Module:
        """With everything around the scope."""
        return with_submodule(self.module, self.traced.scope, module_of(self.traced)) if self.ahead else self.module

    @property
    def inner(self) -> nn.Module:
        """What the graph is of: its parameters are those of the graph."""
        return self.whole.get_submodule(self.traced.scope) if self.traced.scope else self.whole


@dataclass(frozen=True)
class Calibration:
    """Calibration data of the user, and the model that it is fed to. Each view begins with the first batch anew.

    `data` has the batches of every task, those of a single model under an empty name, and `signatures` what the task is
    called with. `loss(outputs, *labels)` is of what a batch holds besides.
    """

    data: Mapping[str, Iterable[Any]]
    signatures: Mapping[str, Signature]
    trained: Trained
    loss: Callable[..., Any] | None = None

    @property
    def feeds(self) -> Feeds:
        """The positional inputs of every batch, by task."""
        return {name: partial(self._arguments, name) for name in self.data}

    def _arguments(self, name: str) -> Iterator[tuple[Any, ...]]:
        return (call.args for call in self._calls(name))

    def _calls(self, name: str) -> Iterator[Call]:
        return (self.signatures[name].call(batch) for batch in each_batch(self.data[name]))

    def labels(self) -> list[tuple[Any, ...]]:
        """What every batch holds besides the inputs. Raises `ExampleInputError` where one holds nothing."""
        found = []
        for name, batches in self.data.items():
            for number, batch in enumerate(each_batch(batches)):
                rest = self.signatures[name].rest(batch)
                if not rest:
                    raise ExampleInputError(
                        f"calibration: batch {number} has no labels, which loss= is to be given; yield (inputs, labels)"
                    )
                found.append(rest)
        return found

    @torch.no_grad()
    def run(self) -> None:
        """Run the model in eval mode on all batches: for hooks that watch what its layers read and give."""
        model = self.trained.whole
        root, modes = model.training, {module: module.training for module in model.modules()}
        with flags_kept(model):
            model.eval()
        try:
            for name in self.data:
                module = model.get_submodule(name)
                for call in self._calls(name):
                    run_batch(module, *call)
        finally:
            if switches_by_itself(model):
                model.train(root)
            for module, mode in modes.items():
                module.training = mode

    def graph_inputs(self) -> list[tuple[Any, ...]]:
        """What the graph takes on every batch. Raises `ExampleInputError` where it does not take it."""
        found: list[tuple[Any, ...]] = []
        if not self.trained.traced.scope and not self.trained.traced.tasks:
            found = [as_inputs(pytree.tree_leaves(call), self.trained.traced) for call in self._calls("")]
            check_batches(self.trained.traced.inputs, found)
            return found

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(tuple(pytree.tree_leaves(folded(module, Call(args, kwargs)))))

        hook = self.trained.inner.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            self.run()
        finally:
            hook.remove()
        check_batches(self.trained.traced.inputs, found)
        return found


def as_inputs(leaves: Sequence[Any], traced: Traced) -> tuple[Any, ...]:
    """What a graph is given, on the device and in the floating dtype of its inputs: it may have been moved since.

    One on the meta device says nothing of where its inputs are.
    """
    own = pytree.tree_leaves((traced.example_inputs, traced.example_kwargs))

    def placed(leaf: Any, like: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not isinstance(like, torch.Tensor):
            return leaf
        both = leaf.is_floating_point() and like.is_floating_point()
        return leaf.to(leaf.device if like.is_meta else like.device, like.dtype if both else leaf.dtype)

    return tuple(map(placed, leaves, own)) if len(leaves) == len(own) else tuple(leaves)


def with_submodule(model: nn.Module, scope: str, value: nn.Module) -> nn.Module:
    """A copy of `model` with `value` in place of the submodule `scope`, under each of its names."""
    if not scope:
        return value
    whole = deep_copy(model)
    old = whole.get_submodule(scope)
    for name, inner in list(whole.named_modules(remove_duplicate=False)):
        if inner is old:
            owner, _, leaf = name.rpartition(".")
            setattr(whole.get_submodule(owner), leaf, value)
    return whole


@torch.no_grad()
def drift(before: nn.Module, after: nn.Module, calibration: Iterable[Any], signature: Signature) -> float:
    """Largest difference of outputs relative to the largest output, both in eval mode; of those that `after` gives.

    NaN where an output is not finite; infinity where one has another shape, which only outputs do whose values decide
    how many there are.
    """
    old, new = eval_copy(before), eval_copy(after)
    worst = scale = 0.0
    for batch in each_batch(calibration):
        call = signature.call(batch)
        expected = tensors_by_way(run_batch(old, *call))
        for way, value in tensors_by_way(run_batch(new, *placed(call, place_of(old), place_of(new)))).items():
            left, right = expected[way].double(), value.double()
            if left.shape != right.shape:
                return math.inf
            if left.numel():
                apart, size = float((left - right.to(left.device)).abs().max()), float(left.abs().max())
                if not math.isfinite(apart):
                    return math.nan
                worst, scale = max(worst, apart), max(scale, size)
    return worst / scale if scale else worst


def check_calibration(calibration: Iterable[Any] | None, model: nn.Module, signature: Signature) -> None:
    """Raises `ExampleInputError` unless `calibration` can be gone through again and `model` takes its first batch."""
    if calibration is None:
        return
    for first in each_batch(re_iterable(calibration, "calibration")):
        with torch.no_grad():
            run_batch(eval_copy(model), *signature.call(first))
        return


Place = tuple[torch.dtype, torch.device]


def place_of(model: nn.Module) -> Place | None:
    """The dtype and the device of a model's first floating-point parameter; `None` where it has none."""
    return next(((p.dtype, p.device) for p in model.parameters() if p.is_floating_point()), None)


def placed(values: T, old: Place | None, new: Place | None) -> T:
    """Inputs of a model that was in an old place, on the device and in the dtype of the new one, if they differ."""
    if old is None or new is None or old == new:
        return values

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(new[1], new[0] if value.dtype == old[0] else value.dtype)

    return pytree.tree_map(move, values)  # type: ignore[no-any-return]
