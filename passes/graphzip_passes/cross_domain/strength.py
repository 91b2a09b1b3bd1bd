"""How strongly a regulariser pulls: by the share that its gradient has of the loss's.

The terms of one kind are a thousand times as steep as those of another, and all change with the network and with the
training. So the factor `f` of a term `R` is found by what it does to the parameters `w`: with a share `s`,

    f = s || dL/dw || / || dR/dw ||,

measured anew every few steps. The gradient of the loss is what comes in the backward pass, less what the term itself
brings. The first step is one without a regulariser: nothing is known of the loss before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["Share"]

_EVERY: Final = 10  # steps from one measurement to the next: it costs a backward pass of the term
_KEPT: Final = 0.5  # of the factor that was known, where another one is measured


class Share:
    """Weighs a term so that its gradient is this `share` of the loss's."""

    def __init__(self, share: float) -> None:
        self.share, self.factor, self._calls = share, 0.0, 0
        self._measured: _Measured | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._take_in()
        return vars(self)

    def weighed(self, term: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        """`f R`, for one step. The parameters are those that the loss trains."""
        self._take_in()
        if self._calls % _EVERY == 0 or not self.factor:
            self._measured = _Measured.of(term, [each for each in parameters if each.requires_grad], self.factor)
        self._calls += 1
        weighed = self.factor * term
        if self._measured is not None:
            self._measured.watch(weighed)
        return weighed

    def state(self) -> dict[str, Tensor]:
        """What goes on after a checkpoint as if there had been none."""
        self._take_in()
        return {"factor": torch.tensor(self.factor, dtype=torch.float64), "calls": torch.tensor(self._calls)}

    def load(self, state: dict[str, Tensor]) -> None:
        self._measured = None
        self.factor, self._calls = float(state["factor"]), int(state["calls"])

    def _take_in(self) -> None:
        """Use what the last step measured."""
        measured, self._measured = self._measured, None
        ratio = None if measured is None else measured.ratio()
        if ratio is not None:
            found = self.share * ratio
            self.factor = _KEPT * self.factor + (1.0 - _KEPT) * found if self.factor else found


@dataclass
class _Measured:
    """A step in which gradients are looked at: the term's own, and the loss's on their way to the parameters."""

    own: Sequence[Tensor | None]
    factor: float
    reached: float | None = None
    """By what a gradient scaler or the user multiplies the term, once the backward pass came through it."""

    squares: dict[int, Tensor] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, term: Tensor, parameters: Sequence[Tensor], factor: float) -> _Measured:
        own = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        made = cls(own, factor)
        for number, parameter in enumerate(parameters):
            hook = partial(made._see, number)
            made.handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]
        return made

    def watch(self, weighed: Tensor) -> None:
        weighed.register_hook(self._come_through)  # type: ignore[no-untyped-call]

    def _come_through(self, gradient: Tensor) -> None:
        self.reached = float(gradient)

    def _see(self, number: int, gradient: Tensor) -> None:
        own = self.own[number]
        if own is not None and self.reached is not None:
            gradient = gradient - self.reached * self.factor * own
        self.squares[number] = gradient.detach().double().square().sum()

    def ratio(self) -> float | None:
        """`|| dL/dw || / || dR/dw ||`; nothing where there was no backward pass, or it is zero or not finite."""
        for handle in self.handles:
            handle.remove()
        own = [each.double().square().sum() for each in self.own if each is not None]
        if not self.reached or not self.squares or not own:
            return None
        loss = torch.stack([each.to(own[0].device) for each in self.squares.values()]).sum().sqrt() / abs(self.reached)
        found = float(loss / torch.stack([each.to(own[0].device) for each in own]).sum().sqrt())
        return found if 0.0 < found < float("inf") else None
