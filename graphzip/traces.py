"""A model that is traced once: accepted wherever a model is, it saves tracing and analysing it again and again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphzip.analysis.groups import Analysed
from graphzip.arguments import check_traceable
from graphzip.boundary import public
from graphzip.calls import Call, call_of, example_of
from graphzip.errors import ExampleInputError, TraceError
from graphzip.graph.copies import (
    aliased_copy,
    flags_kept,
    in_mode,
    share_copy,
    switches_by_itself,
    why_not_copied,
)
from graphzip.graph.state import attach, is_persistent, named_state
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.rewrite.join_modes import trace_in
from graphzip.tracing.fingerprint import Fingerprint, difference, fingerprint
from graphzip.tracing.program import separate
from graphzip.tracing.results import Outputs

__all__ = ["Trace", "check_own", "of_trace", "of_traces", "trace"]

logger = logging.getLogger(__name__)


class Trace:
    """A model that `trace` traced, to be given in place of it; what was found out about it is kept.

    - `model`: the traced model itself. Its weights count as they are when the trace is used.
    - `example_inputs`: copies of those that it was traced with; `call` has them as they are given to the model.
    - `view`: `scope`, `dynamic_shapes`, `outputs` and `mode`, as they were given.

    Nothing that uses a trace changes it. Where the model has become another one since (a layer was replaced, an option
    of a layer, a table of indices, a dtype), it is traced anew when it is used the next time.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, view: Mapping[str, Any]) -> None:
        check_traceable(model)
        self.model: nn.Module = model
        self.call: Call = separate(call_of(model, example_inputs))
        self.view = dict(view)
        self._made = self._trace()

    @property
    def example_inputs(self) -> Any:
        """Copies of the inputs: a tuple, or a mapping by name where not all of them have positions."""
        return example_of(self.model, self.call)

    def __repr__(self) -> str:
        inputs = [leaf for leaf in pytree.tree_leaves(self.call) if isinstance(leaf, torch.Tensor)]
        shapes = ", ".join("x".join(map(str, leaf.shape)) for leaf in inputs)
        view = "".join(f", {name}={value!r}" for name, value in self.view.items() if value is not None)
        return f"Trace({type(self.model).__name__}, {shapes or 'no tensors'}{view})"

    def _trace(self) -> _Made:
        """Trace a copy that has tensors of its own where the model has, in the same memory.

        So it shows where the copy computes with the model's tensors all the same; such a model is traced as it is.
        """
        before = fingerprint(self.model)
        try:
            twin = aliased_copy(self.model)
        except Exception as error:
            raise TraceError(why_not_copied(type(self.model).__name__, error)) from error
        traced = trace_in(model=twin, example_inputs=self.call, compare=True, **self.view)
        own = _reads_own(self.model, traced, held=twin.get_submodule(traced.scope))
        if own is not None:
            same = share_copy(self.model)
            traced = trace_in(model=same, example_inputs=self.call, compare=True, **self.view)
        return _Made(traced, before, own)

    def current(self) -> Traced:
        """The graph, with the tensors that the model has now; it is not to be changed."""
        changed = difference(self._made.before, fingerprint(self.model))
        if changed is not None:
            logger.warning("%s is traced anew: %s has changed", type(self.model).__name__, changed)
            self._made = self._trace()
        _adopt(self._made.traced, self.model)
        return self._made.traced

    def analysed(self) -> Analysed:
        """What is known of the channels of `current()`."""
        traced = self.current()
        if self._made.analysed is None:
            self._made.analysed = Analysed.of(traced)
        return self._made.analysed

    def for_copy(self, module: nn.Module, *, borrowed: bool = False) -> tuple[Traced, Analysed]:
        """A graph to work on with the tensors of `module`, and what is known of it.

        The module is a copy of the model, with the model's own parameters where these are `borrowed`.
        """
        known, traced = self.analysed(), self._made.traced.copy(compiled=False)
        if self._made.reads_own is not None and not borrowed:
            raise _holds_model(self.model, self._made.reads_own)
        own = _adopt(traced, module)
        for name, value in list(named_state(traced.module)):
            if name not in own:  # a constant in the model's code
                attach(traced.module, name, value.detach().clone(), persistent=is_persistent(traced.module, name))
        return traced, known.of_copy(traced)


class _Made:
    """What tracing gave, and what was found out about it since."""

    def __init__(self, traced: Traced, before: Fingerprint, reads_own: str | None) -> None:
        self.traced, self.before, self.reads_own = traced, before, reads_own
        self.analysed: Analysed | None = None


@public
def trace(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    outputs: Outputs | None = None,
    mode: str = "eval",
) -> Trace:
    """Trace a model once, to give the trace wherever a model is taken: `compile(trace(model, x), plan)`.

    `channel_groups`, `cost`, `plan_for`, `WidthStudy`, `prepare` and `compile` then take no example inputs, and neither
    trace nor analyse the model again. The options are those of `prepare`. The trace follows the model: weights are
    those that it has when the trace is used, and where it became another one, it is traced anew.

    Raises `TraceError` for a model that cannot be traced, `ExampleInputError` for inputs it does not accept,
    `NotFoundError` for outputs that it has not.
    """
    if isinstance(model, Trace):
        raise TraceError("expected a torch.nn.Module, got a Trace of one; use it as it is")
    with torch.inference_mode(False):
        view = {"scope": scope, "dynamic_shapes": dynamic_shapes, "outputs": outputs, "mode": mode}
        return Trace(model, example_inputs, view)


def of_trace(model: Any, **given: Any) -> Trace | None:
    """The trace that was given in place of a model, if it was one.

    Raises `ExampleInputError` or `TraceError` where one of the arguments that belong to a trace is `given` beside it.
    """
    if not isinstance(model, Trace):
        return None
    for name, value in given.items():
        if value is None or (name == "mode" and value in ("eval", model.view["mode"])):
            continue
        kind = ExampleInputError if name == "example_inputs" else TraceError
        raise kind(
            f"{name} is given beside a trace, which was made with its own; leave it out, or trace the model anew: "
            f"graphzip.trace(model, example_inputs{'' if name == 'example_inputs' else f', {name}=...'})"
        )
    return model


def of_traces(models: Mapping[str, Any], **given: Any) -> dict[str, Trace]:
    """The traces that were given in place of several models, if they were: of all tasks or of none.

    Raises `TraceError` where a trace is of something that several models are not joined by, and as `of_trace` does.
    """
    traces = {name: each for name, each in models.items() if of_trace(each, **given) is not None}
    for name, found in traces.items():
        others = [other for other in models if other not in traces]
        if others:
            raise TraceError(
                f"task {name!r} is a trace and task {others[0]!r} is not; give traces of all tasks, or of none"
            )
        scope, mode = found.view["scope"], found.view["mode"]
        if scope is not None or mode != "eval":
            part = f"scope={scope!r}" if scope is not None else f"mode={mode!r}"
            raise TraceError(
                f"task {name!r}: its trace was made with {part}, but several models are joined whole, in their eval "
                "forms; trace it without"
            )
    return traces


def check_own(model: nn.Module, traced: Traced) -> None:
    """Raises `TraceError` where the copy of a model, of which the graph is, computes with tensors of the model."""
    name = _reads_own(model, traced)
    if name is not None:
        raise _holds_model(model, name)


def _reads_own(model: nn.Module, traced: Traced, held: nn.Module | None = None) -> str | None:
    """The tensor of `model` that a graph of its copy reads; names of what the copy holds itself are left out."""
    theirs = {place: name for name, value in named_state(model) if value.numel() and (place := _place(value))}
    own = set() if held is None else {name for name, _ in named_state(held)}
    places = (_place(value) for name, value in named_state(traced.module) if name not in own)
    return next((theirs[place] for place in places if place in theirs), None)


def _place(value: torch.Tensor) -> int:
    """Where a tensor lies in memory; zero for one that lies nowhere."""
    return 0 if value.is_meta or value.layout != torch.strided else value.data_ptr()


def _holds_model(model: nn.Module, name: str) -> TraceError:
    return TraceError(
        f"a copy of {type(model).__name__} reads {name!r} of the model itself: a function that was set on it "
        "(its forward, say) holds the model; write it as a method, or bind it (types.MethodType)"
    )


def _adopt(traced: Traced, model: nn.Module) -> set[str]:
    """Let a graph hold the tensors that a module has; the names of those."""
    inner = model.get_submodule(traced.scope) if traced.scope else model
    if switches_by_itself(inner):
        with flags_kept(inner):
            inner = in_mode(inner, False)
    traced.adopt_state(inner, copies=False)
    return {name for name, _ in named_state(inner)}
