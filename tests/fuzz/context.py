"""What a check works with: the model, its inputs, a trace that is made once, and a list of what was run."""

from __future__ import annotations

import contextlib
import copy
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from planting import randomize_
from torch import Tensor, nn

import graphzip as gz
import graphzip.api
from fuzz.compare import NotApplicable, Problem, apart, batches, quiet_dropout, run, same_at
from fuzz.program import Program
from graphzip.graph.traced import Traced
from graphzip.ops import OPS
from graphzip.tracing.trace import trace

__all__ = ["Context", "traced_once"]


class _Once:
    """`trace`, which gives copies of the graph of a model of the same class and inputs with the weights it is given."""

    def __init__(self) -> None:
        self.known: dict[Any, Traced] = {}
        self.targets: set[Any] = set()

    def __call__(self, model: nn.Module, example_inputs: Any, **options: Any) -> Traced:
        options["compare"] = True  # the graph is the same, and its notes are those that a compilation needs
        key = self._key(model, example_inputs, options)
        if key is None or key not in self.known:
            traced = trace(model, example_inputs, **options)
            self.targets |= {node.target for node in traced.graph.nodes if node.target in OPS}
            if key is not None:
                self.known[key] = traced.copy()
            return traced
        traced = self.known[key].copy()
        traced.adopt_state(model, copies=False)
        return traced

    def _key(self, model: nn.Module, inputs: Any, options: dict[str, Any]) -> Any:
        if type(model).__name__ != "Net" or options.get("scope") or not isinstance(inputs, tuple):
            return None
        state = tuple((name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items())
        told = tuple((tuple(x.shape), x.dtype) for x in inputs)
        return type(model), state, told, str(sorted(options.items()))


@contextlib.contextmanager
def traced_once(*, fresh: bool = False) -> Iterator[_Once]:
    """While it lasts, `graphzip` traces a model of one class once; with `fresh`, every time."""
    once = _Once()
    if fresh:
        once._key = lambda *_: None  # type: ignore[method-assign]
    kept = graphzip.api.trace
    graphzip.api.trace = once  # type: ignore[assignment]
    try:
        yield once
    finally:
        graphzip.api.trace = kept


@dataclass
class Context:
    """One case while it is checked."""

    program: Program
    seed: int
    onnx: bool = False
    stage: str = "build"
    merged: int = 0
    unwritten: bool = False

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}")
        self.dtype = torch.float64
        self.model = self.program.build(self.seed)
        self.inputs = self.make(4)
        self.dynamic = self.program.dynamic_shapes()
        try:
            randomize_(self.model, self.seed, self.inputs)
            first = run(self.model, self.inputs)
            again = run(self.model, self.inputs)
        except Exception as error:
            raise NotApplicable(f"the model itself fails: {error}") from error
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(first) if isinstance(leaf, Tensor)]
        if not tensors or not all(leaf.isfinite().all() for leaf in tensors) or apart(first, again):
            raise NotApplicable("the outputs are not finite")

    def make(self, batch: int, seed: int = 0, grown: int = 0) -> tuple[Tensor, ...]:
        found = self.program.make_inputs(batch, seed, grown)
        return tuple(x.to(self.dtype) if x.is_floating_point() else x for x in found)

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """While it lasts, inputs are float32."""
        self.dtype, kept = torch.float32, self.inputs
        self.inputs = self.make(4)
        try:
            yield
        finally:
            self.dtype, self.inputs = torch.float64, kept

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.dynamic is None else {"dynamic_shapes": self.dynamic}

    def places(self) -> list[tuple[int, int]]:
        return list(batches(self.dynamic is not None))

    def told(self, compiled: gz.Compiled) -> tuple[str, ...]:
        """What announces that some sizes are refused."""
        return (*compiled.report.notes, *compiled.traced.conditions)

    def compile(self, model: Any, plan: gz.Plan, **options: Any) -> gz.Compiled:
        return gz.compile(model, plan, self.inputs, **self.options, **options)

    def groups(self, model: nn.Module) -> gz.ChannelGroups:
        self.stage = "groups"
        return gz.channel_groups(model, self.inputs, **self.options)

    def same(self, original: nn.Module, compiled: gz.Compiled, what: str = "", **options: Any) -> None:
        """The result computes what `original` does, at all places."""
        if self.program.random and _is_random(original, self.inputs):  # nothing can be compared
            if not compiled.report.notes:
                raise Problem("note", f"{what}a forward that is random in eval mode has no note")
            return
        same_at(original, compiled.module, self.make, self.places(), self.told(compiled), what=what, **options)

    def trains_alike(self, original: nn.Module, compiled: gz.Compiled, what: str = "") -> None:
        """In training mode outputs are equal too, unless the report says what differs."""
        self.stage = "train"
        if self.program.random:
            return
        one, two = quiet_dropout(original), quiet_dropout(compiled.module)
        try:
            expected = run(one, self.inputs)
            if _is_random(one, self.inputs):
                return
        except Exception:
            return
        try:
            found = run(two, self.inputs)
            off = apart(expected, found)
        except Exception as error:
            if compiled.report.notes:
                return
            kind = error.kind if isinstance(error, Problem) else "wrong"
            raise Problem(kind, f"{what}in training: {type(error).__name__}: {error}") from error
        loose = _control_in_training(one, self.inputs, expected)
        if not off <= loose and not compiled.report.notes:
            raise Problem("wrong", f"{what}in training: off by {off:.2g} (tolerance {loose:.2g})")
        if not off <= loose:
            return
        one.eval()
        two.eval()
        off = apart(run(one, self.inputs), run(two, self.inputs))
        if not off <= 100 * loose and not compiled.report.notes:
            raise Problem("wrong", f"{what}training leaves other statistics behind: off by {off:.2g}")

    def comes_back(self, compiled: gz.Compiled, what: str = "") -> None:
        """Saved and loaded, it computes the same."""
        self.stage = "save"
        if self.program.random:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "saved.gz"
            compiled.save(path)
            self.stage = "load"
            loaded = gz.load(path)
        module = copy.deepcopy(compiled.module).eval()
        inputs = self.inputs if not compiled.tasks else None
        for batch in (4, 3):
            given = self.make(batch)
            try:
                expected = run(module, given) if inputs is not None else _all(module, compiled.tasks, given)
            except gz.GraphZipError:
                continue
            found = run(loaded.module, given) if inputs is not None else _all(loaded.module, compiled.tasks, given)
            if not apart(expected, found) <= 1e-13:
                raise Problem("wrong", f"{what}loaded, at batch {batch}: off by {apart(expected, found):.2g}")


def _all(module: nn.Module, tasks: Sequence[str], inputs: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        given = {task: inputs[0].clone() if len(inputs) == 1 else tuple(x.clone() for x in inputs) for task in tasks}
        return module(**given)


def _is_random(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            found.append(copy.deepcopy(model)(*[x.clone() for x in inputs]))
    return apart(*found) > 0


def _control_in_training(model: nn.Module, inputs: Sequence[Tensor], expected: Any) -> float:
    g = torch.Generator().manual_seed(5)
    moved = [
        x * (1 + 1e-15 * torch.randn(x.shape, generator=g, dtype=x.dtype)) if x.is_floating_point() else x
        for x in inputs
    ]
    return max(1e-8, 1e4 * apart(expected, run(copy.deepcopy(model), moved)))
