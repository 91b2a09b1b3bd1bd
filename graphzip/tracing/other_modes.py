"""What a model computes where its eval graph does not say: in training, and where gradients are off.

Tracing a model again is as costly as tracing it was, so it is done only where its code asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from graphzip.canonical.inline_subgraphs import inline_subgraphs
from graphzip.graph.copies import borrow, in_mode, switches_by_itself
from graphzip.graph.modes import lost_in_training, spectral_norms
from graphzip.graph.randomness import generators_kept
from graphzip.graph.source import first_line
from graphzip.graph.torch_private import pytree
from graphzip.tracing.compare_modes import Form, differences, form_of, shown
from graphzip.tracing.mode_queries import Asked, asked
from graphzip.tracing.program import Program

__all__ = ["OtherForms"]


class OtherForms:
    """The forms of a model that its eval graph is not, each traced at most once.

    `questions` is what the model asked in eval mode; `export` and `run` do that with a copy on the example inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        questions: Asked,
        export: Callable[[nn.Module], Program],
        run: Callable[[nn.Module], Any],
    ) -> None:
        self.model = model
        self.questions = questions
        self.switches = switches_by_itself(model)
        self._export = export
        self._run = run
        self._twin: nn.Module | None = None
        self._training: Program | Exception | None = None
        self._graph: fx.GraphModule | None = None

    def twin(self) -> nn.Module:
        """A copy in training mode; but spectral norms, whose step is told of and writes to buffers, take none."""
        if self._twin is None:
            self._twin = in_mode(self.model, True)
            for name in spectral_norms(self._twin):
                self._twin.get_submodule(name).training = False
        return self._twin

    @property
    def has_own_weights(self) -> bool:
        """Whether the training mode has other weights than the model: some layers merge them."""
        held = {id(tensor) for tensor in [*self.model.parameters(), *self.model.buffers()]}
        return any(id(tensor) not in held for tensor in [*self.twin().parameters(), *self.twin().buffers()])

    def training(self) -> Program:
        """The exported training mode. Raises what exporting it raises."""
        if self._training is None:
            try:
                with asked():
                    self._training = self._export(self.twin())
            except Exception as error:
                self._training = error
        if isinstance(self._training, Exception):
            raise self._training
        return self._training

    def training_module(self) -> fx.GraphModule:
        """The raw graph of the training mode. Raises what tracing it raises."""
        if self._graph is None:
            self._graph = _opened(self.training())
        return self._graph

    @property
    def asks(self) -> bool:
        """Whether the model may do something else in training that is not `torch.nn`'s."""
        return bool(self.questions.mode) or self.switches

    def eval_form(self, module: fx.GraphModule) -> Form | None:
        """The form of the raw eval graph, where something asks what other forms there are."""
        asks = self.asks or self.questions.grad or lost_in_training(self.model)
        return form_of(module, self.model) if asks else None

    def notes(self, evaluated: Form, told: Iterable[str]) -> Iterator[str]:
        """Sentences on what other forms do that the eval form does not; not on modules that were `told` of."""
        if self.asks:
            try:
                trained = form_of(self.training_module(), self.model, evaluated)
            except Exception as error:
                yield self._untraceable(error)
            else:
                yield from differences(self.model, evaluated, trained, told)
        if self.questions.grad and self._depends_on_gradients(evaluated):
            yield (
                f"{self._name} computes something else where torch.is_grad_enabled() is false "
                f"({self.questions.grad[0]}); the result does what the model does where gradients are on"
            )

    def draws(self) -> Iterator[str]:
        """Sentences on random numbers that the model draws while it is traced and never again."""
        for generator in self.questions.drawn:
            yield (
                f"{self._name} draws numbers from {generator} in eval mode; those drawn while tracing are part of the "
                "result"
            )

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _untraceable(self, error: Exception) -> str:
        """What is known of a training mode that does not trace: what a run of it returns."""
        try:
            trained, evaluated = self._returned(True), self._returned(False)
        except Exception as failure:
            return (
                f"{self._name} cannot be run in training mode on the example inputs ({first_line(failure)}); what it "
                "computes otherwise there is left out"
            )
        asks = f"asks for its mode ({self.questions.mode[0]})" if self.questions.mode else "overrides train()"
        returns = "" if trained == evaluated else f" (it returns {trained}, in eval mode {evaluated})"
        return (
            f"{self._name} {asks}, but its training mode cannot be traced: {first_line(error)}; what it computes "
            f"otherwise there is left out{returns}"
        )

    def _returned(self, training: bool) -> str:
        twin = in_mode(self.model, training, borrow)
        with torch.no_grad(), generators_kept():
            leaves, spec = pytree.tree_flatten(self._run(twin))
        return shown(spec, leaves)

    def _depends_on_gradients(self, evaluated: Form) -> bool:
        """Whether the answer to `torch.is_grad_enabled()` makes a difference, or may make one."""
        try:
            with asked(grad=False):
                found = form_of(_opened(self._export(self.model)), self.model)
        except Exception:
            return True
        return found.computes != evaluated.computes or found.outputs != evaluated.outputs


def _opened(program: Program) -> fx.GraphModule:
    unlifted = program.unlifted()
    inline_subgraphs(unlifted)
    return unlifted
