"""What every pass can do between `prepare` and `convert`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from graphzip.graph.trace import Traced

__all__ = ["Calibrated", "Feeds", "FreeTraining", "Pass", "Restructuring", "Staged", "Stepwise"]

Feeds = Mapping[str, Callable[[], Iterable[tuple[Any, ...]]]]
"""For each task what gives its calibration batches from the start, as positional inputs."""


class Pass(Protocol):
    """One pass of a plan, bound to a model.

    It decides when it is made. Until `convert` the model computes what it did, and may be trained.
    """

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that are left."""

    def convert(self, traced: Traced) -> Traced:
        """Carry the decision out on the graph, which holds the trained weights."""

    def collapse_(self, model: nn.Module) -> None:
        """Bring `model`, whose tensors the graph has, into the state that `convert` gives it, keeping its shapes."""

    def pull_(self, model: nn.Module, fraction: float) -> None:
        """Move `model` a part of the way that `collapse_` goes."""

    def deviation(self, model: nn.Module) -> float:
        """How far `model` is from that state."""

    def deviations(self, model: nn.Module) -> dict[str, float]:
        """The same by the name of each group that changes."""

    def residual(self, model: nn.Module) -> float:
        """Sum of squares of the kernels that go."""

    def regularizer(self, model: nn.Module) -> torch.Tensor | None:
        """A term of the loss, or nothing."""

    def bind(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, steps: int | None) -> None:
        """Make `optimizer`, which trains `model` for `steps` steps, bring it into that state."""

    def state(self) -> torch.Tensor:
        """What was decided and has to be in a checkpoint: int64, one dimension, of a length that the plan fixes."""

    def load_state(self, state: torch.Tensor) -> None:
        """Decide as the pass that gave this state did."""

    def widths(self) -> dict[str, tuple[int, int]]:
        """Channels before and after, by the name of each group that changes."""

    def summary(self) -> dict[str, Any]:
        """What was decided, JSON-ready."""


class FreeTraining:
    """What a pass is like that puts no constraint on training and has decided nothing that a checkpoint must keep."""

    def collapse_(self, model: nn.Module) -> None:
        """`convert` alone changes the model."""

    def pull_(self, model: nn.Module, fraction: float) -> None:
        """There is nothing to move."""

    def deviation(self, model: nn.Module) -> float:
        return 0.0

    def deviations(self, model: nn.Module) -> dict[str, float]:
        return {}

    def residual(self, model: nn.Module) -> float:
        return 0.0

    def regularizer(self, model: nn.Module) -> torch.Tensor | None:
        return None

    def bind(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, steps: int | None) -> None:
        """Training goes on as it is."""

    def state(self) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def load_state(self, state: torch.Tensor) -> None:
        """There is nothing to decide."""

    def widths(self) -> dict[str, tuple[int, int]]:
        return {}


@runtime_checkable
class Restructuring(Protocol):
    """A pass that changes what is trained: from its beginning the model has other parameters."""

    def restructure(self, traced: Traced, model: nn.Module, run: Callable[[], None] | None) -> tuple[Traced, nn.Module]:
        """A graph and a module with the new parameters, the same ones in both.

        `model` is there to be changed, `traced` is not. `run` feeds the calibration data, where there is any.
        """


@runtime_checkable
class Staged(Protocol):
    """A pass of several stages that does something to the model that is trained after some of them."""

    def end_stage(self, stage: str, model: nn.Module) -> None:
        """Change the values that `model` holds, and what was decided."""


@runtime_checkable
class Calibrated(Protocol):
    """A pass that may decide on calibration data."""

    @property
    def wants_data(self) -> bool:
        """Whether it does."""

    def calibrate(self, batches: Sequence[tuple[Any, ...]]) -> None:
        """Decide. `batches` has one entry per batch, with one value per input of the graph; none without data."""


@runtime_checkable
class Stepwise(Protocol):
    """A pass that changes the model at the beginning of each of its stages, and lets it be trained after each."""

    stages: tuple[str, ...]

    def enter(self, stage: str, traced: Traced, feeds: Feeds) -> Traced:
        """The graph after the change, with tensors of its own where they changed; `traced` stays as it is.

        `feeds` is empty where there is no calibration data.
        """
