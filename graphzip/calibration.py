"""Calibration data: batches that the passes and the report feed to a model, and the model that they are fed to."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, TypeVar

import torch
from torch import nn

from graphzip.arguments import re_iterable
from graphzip.calls import Call, Signature, folded
from graphzip.errors import ExampleInputError
from graphzip.graph.batches import Batches, check_batches, each_batch, run_batch
from graphzip.graph.copies import deep_copy, eval_copy, flags_kept, switches_by_itself
from graphzip.graph.state import named_state
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.process_groups import ALONE, Processes
from graphzip.rewrite.join_models import module_of
from graphzip.tracing.results import tensors_by_way

__all__ = [
    "Calibration",
    "Feeds",
    "Trained",
    "as_inputs",
    "check_alike",
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
    called with. `loss(outputs, *labels)` is of what a batch holds besides. Of several `processes` each has a share of
    the batches here: what comes of them is added up over all.
    """

    data: Mapping[str, Iterable[Any]]
    signatures: Mapping[str, Signature]
    trained: Trained
    loss: Callable[..., Any] | None = None
    processes: Processes = ALONE

    @property
    def feeds(self) -> Feeds:
        """The positional inputs of every batch, by task."""
        return {name: partial(self._arguments, name) for name in self.data}

    def _arguments(self, name: str) -> Iterator[tuple[Any, ...]]:
        return (call.args for call in self._calls(name))

    def _calls(self, name: str) -> Iterator[Call]:
        return (self.signatures[name].call(batch) for batch in self._each(name))

    def _each(self, name: str) -> Iterator[Any]:
        return each_batch(self.data[name], may_be_empty=self.processes.size > 1)

    def labels(self) -> list[tuple[Any, ...]]:
        """What every batch holds besides the inputs. Raises `ExampleInputError` where one holds nothing."""
        found = []
        for name in self.data:
            for number, batch in enumerate(self._each(name)):
                rest = self.signatures[name].rest(batch)
                if not rest:
                    raise ExampleInputError(
                        f"calibration: batch {number} has no labels, which loss= is to be given; yield (inputs, labels)"
                    )
                found.append(rest)
        return found

    @torch.no_grad()
    def run(self, begun: Callable[[int], None] | None = None, *, enough: Callable[[str], bool] | None = None) -> None:
        """Run the model in eval mode on all batches that are here: for hooks that watch what its layers read and give.

        `begun` is told the number of each among those of all processes. With `enough` all processes run all batches,
        until it says of a task that no more of its are needed.
        """
        model = self.trained.whole
        root, modes = model.training, {module: module.training for module in model.modules()}
        with flags_kept(model):
            model.eval()
        try:
            for name in self.data:
                module = model.get_submodule(name)
                calls = self._numbered(name) if enough is None else self._from_all(name)
                for number, call in calls:
                    if begun is not None:
                        begun(number)
                    run_batch(module, *call)
                    if enough is not None and enough(name):
                        break
        finally:
            if switches_by_itself(model):
                model.train(root)
            for module, mode in modes.items():
                module.training = mode

    def _numbered(self, name: str) -> Iterator[tuple[int, Call]]:
        """The batches that are here."""
        for place, call in enumerate(self._calls(name)):
            yield self.processes.rank + place * self.processes.size, call

    def _from_all(self, name: str) -> Iterator[tuple[int, Call]]:
        """The batches of all processes, which stop at the same one."""
        own, open_, size = self._calls(name), set(range(self.processes.size)), self.processes.size
        for number in itertools.count():
            source = number % size
            if source in open_:
                call = self.processes.agreed(next(own, None) if source == self.processes.rank else None, source)
                if call is not None:
                    yield number, call
                else:
                    open_.discard(source)
            if not open_:
                return

    def graph_inputs(self) -> Batches:
        """What the graph takes on every batch. Raises `ExampleInputError` where it does not take it."""
        found = self._inputs()
        check_batches(self.trained.traced.inputs, found)
        return Batches(found, self.processes)

    def _inputs(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        if self.trained.traced.tasks:
            return self._side_by_side()
        if not self.trained.traced.scope:
            return [as_inputs(pytree.tree_leaves(call), self.trained.traced) for call in self._calls("")]

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(tuple(pytree.tree_leaves(folded(module, Call(args, kwargs)))))

        hook = self.trained.inner.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            self.run()
        finally:
            hook.remove()
        return found

    def _side_by_side(self) -> list[tuple[Any, ...]]:
        """A batch of every task each time; a task that has fewer begins with its first one again."""
        traced = self.trained.traced
        of_tasks = [[pytree.tree_leaves(call.args) for call in self._calls(task.name)] for task in traced.tasks]
        if not all(of_tasks):
            return []
        rounds = ([own[number % len(own)] for own in of_tasks] for number in range(max(map(len, of_tasks))))
        return [as_inputs([leaf for own in each for leaf in own], traced) for each in rounds]


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
def drift(
    before: nn.Module,
    after: nn.Module,
    calibration: Iterable[Any],
    signature: Signature,
    processes: Processes = ALONE,
) -> float | None:
    """Largest difference of outputs relative to the largest output, both in eval mode; of those that `after` gives.

    NaN where an output is not finite; infinity where one has another shape or is another number of tensors, which only
    outputs do whose values decide how many there are; `None` where no tensors come out. Of several `processes` each has
    a share of the data.
    """
    every = processes.gathered(_apart(before, after, calibration, signature, may_be_empty=processes.size > 1))
    found = [each for each in every if each is not None]
    if not found:
        return None
    worst = max((apart for apart, _ in found), key=lambda apart: math.inf if math.isnan(apart) else apart)
    scale = max(size for _, size in found)
    return worst / scale if scale and math.isfinite(worst) else worst


def _apart(
    before: nn.Module, after: nn.Module, calibration: Iterable[Any], signature: Signature, *, may_be_empty: bool
) -> tuple[float, float] | None:
    """The largest difference, NaN or infinity, and the largest output."""
    old, new = eval_copy(before), eval_copy(after)
    worst, scale, compared = 0.0, 0.0, False
    for batch in each_batch(calibration, may_be_empty=may_be_empty):
        call = signature.call(batch)
        expected = tensors_by_way(run_batch(old, *call))
        for way, value in tensors_by_way(run_batch(new, *placed(call, place_of(old), place_of(new)))).items():
            known, compared = expected.get(way), True
            if known is None or known.shape != value.shape:
                return math.inf, scale
            left, right = known.double(), value.double()
            if left.numel():
                apart, size = float((left - right.to(left.device)).abs().max()), float(left.abs().max())
                if not math.isfinite(apart):
                    return math.nan, scale
                worst, scale = max(worst, apart), max(scale, size)
    return (worst, scale) if compared else None


def check_calibration(
    calibration: Iterable[Any] | None, model: nn.Module, signature: Signature, processes: Processes = ALONE
) -> None:
    """Raises `ExampleInputError` unless `calibration` can be gone through again and `model` takes its first batch; of
    several `processes` one at least has such a batch.
    """
    if calibration is None:
        return
    data = re_iterable(calibration, "calibration")
    empty = True
    for first in each_batch(data, may_be_empty=processes.size > 1):
        with torch.no_grad():
            run_batch(eval_copy(model), *signature.call(first))
        empty = False
        break
    if processes.every(empty):
        raise ExampleInputError("calibration yields no batch in any rank; give one of them some at least")


def check_alike(processes: Processes, traced: Traced, *others: Any) -> None:
    """Raises `ProcessesError` unless several processes have the same graph and weights, and the same of anything else.

    Weights are told apart by some of their numbers.
    """
    if processes.size == 1:
        return
    told: list[Any] = [(node.op, node.name, str(node.target), str(node.args)) for node in traced.graph.nodes]
    for name, value in named_state(traced.module):
        flat = value.detach().reshape(-1) if not value.is_meta else value.new_zeros(0)
        some = flat[:: max(flat.numel() // _TOLD, 1)]
        numbers = zlib.crc32(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        told.append((name, value.dtype, tuple(value.shape), numbers))
    processes.check_same("the model", told)
    processes.check_same("the plan, or an option,", others)


_TOLD: Final = 4096  # numbers of a tensor that it is told from another by

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
