"""What a pass is: options, and one function from a traced model to an `Outcome`. The same for a user's own.

    class RoundWeights(graphzip.PassOptions):
        kind = "round_weights"
        digits: int = 3

    @graphzip.register_pass(RoundWeights)
    def round_weights(traced, options, context):
        ...
        return graphzip.Outcome(slim, changed=True, details={"layers": names})

It is called when the pass is carried out, on a graph that has the trained weights and tensors of its own; until then
the model is as it was, and is trained like any other. A pass that has something to decide, or to ask of the training,
is registered with `decides=True`. Its function is called when the model is prepared, and gives a `Decision`: the
function to call later, now bound to what was decided, and where there is one the `Constraint` of the training, the
`Stage`s that it has, or the graph and module that are trained in place of the user's.
"""

from __future__ import annotations

import inspect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from numbers import Integral
from typing import Any, Final, TypeVar, overload

import torch
from torch import nn

from graphzip.analysis.groups import Analysed
from graphzip.boundary import public
from graphzip.calibration import Calibration, Trained
from graphzip.errors import GraphZipError, PlanError
from graphzip.graph.batches import Given
from graphzip.graph.traced import Traced
from graphzip.plan.options import PassOptions
from graphzip.plan.passes import PASS_OPTIONS
from graphzip.plan.problems import show
from graphzip.process_groups import ALONE, Processes
from graphzip.report.outcome import Bars, Outcome, Table
from graphzip.rewrite.refresh import refresh
from graphzip_passes.parts.streamed import Workspace
from graphzip_passes.registry import BUILT_IN

__all__ = [
    "PASSES",
    "ByTensor",
    "Constraint",
    "Decision",
    "Pass",
    "PassContext",
    "Stage",
    "Weights",
    "by_tensor",
    "checked_outcome",
    "pass_of",
    "register_pass",
]

_KIND: Final = re.compile(r"[a-z][a-z0-9_]{0,99}")


@dataclass(frozen=True)
class PassContext:
    """What a pass is told beside the graph and its options.

    - `where`: the path of the pass in the plan, for messages: `passes[0].cluster_merge`.
    - `seed`: of everything random.
    - `trained`: the module that is or was trained.
    - `calibration`: the calibration data, or `None`.
    - `known`: the channels of the graph, where it was analysed before.
    - `workspace`: where a graph runs whose weights are read one at a time.
    """

    where: str
    seed: int
    trained: Trained
    calibration: Calibration | None = None
    known: Analysed | None = None
    workspace: Workspace | None = None

    @property
    def processes(self) -> Processes:
        """Those that have shares of the calibration data, in each of which the pass runs."""
        return ALONE if self.calibration is None else self.calibration.processes

    def graph_inputs(self) -> Given:
        """What the graph takes on every batch of the calibration data; nothing where there is none."""
        return [] if self.calibration is None else self.calibration.graph_inputs()

    @property
    def model(self) -> nn.Module:
        """The module that is trained, of which the graph is: both have parameters of the same names."""
        return self.trained.inner


class Constraint(ABC):
    """What the training of a model is held to, so that carrying the pass out changes it less, or not at all.

    `model` is always the module that is trained, whose tensors the graph has under the same names.
    """

    @abstractmethod
    def pull_(self, model: nn.Module, fraction: float) -> None:
        """Move `model` by `fraction` (0 to 1) of the way to what the pass makes of it, keeping its shapes."""

    @abstractmethod
    def deviations(self, model: nn.Module) -> dict[str, float]:
        """How far `model` is from there, by the name of each group that changes: sums of squares."""

    @abstractmethod
    def state(self) -> torch.Tensor:
        """What was decided and has to be in a checkpoint: int64, (n,), of a length n that the plan fixes."""

    @abstractmethod
    def load_state(self, state: torch.Tensor) -> None:
        """Decide as the pass that gave this state did. Raises `WeightsError` where it is of another plan."""

    def progress(self) -> dict[str, torch.Tensor]:
        """What else a checkpoint has to hold so that the training goes on as if there was none: tensors, (...)."""
        return {}

    def load_progress(self, progress: Mapping[str, torch.Tensor]) -> None:
        """Go on from there. Raises `WeightsError` where it is of another plan."""
        return None

    def collapse_(self, model: nn.Module) -> None:
        """Move `model` all of the way."""
        self.pull_(model, 1.0)

    def residual(self, model: nn.Module) -> float:
        """Sum of squares of the kernels that go: a number in squared units of the weights."""
        return 0.0

    def regularizer(self, model: nn.Module) -> torch.Tensor | None:
        """A term of the loss, a scalar, or nothing."""
        return None

    def bind(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, steps: int | None) -> None:
        """Make `optimizer`, which trains `model` for `steps` steps, bring it there; by default it trains as it does."""
        return None


@dataclass(frozen=True)
class Stage:
    """A part of the training with a `name` of its own, and what is done to the model when it begins, if anything.

    Either the graph is changed (`rewrite`), with tensors of its own where they change, and what is trained from then on
    is the module of that graph; or values of the module that is trained are changed in place (`adjust`).
    """

    name: str
    rewrite: Callable[[Traced, PassContext], Traced] | None = None
    adjust: Callable[[PassContext], None] | None = None


@dataclass(frozen=True)
class Decision:
    """What a pass decided when the model was prepared.

    - `finish`: carries it out on the graph, which has the trained weights and tensors of its own.
    - `constraint`: what the training is held to.
    - `stages`: gives the stages that are left; by default there is one, which has the name of the pass.
    - `trained`: a graph and a module with other parameters, the same ones in both, which are trained instead.

    It is pickled and copied with the prepared model, so functions are those of a module, or methods.
    """

    finish: Callable[[Traced, PassContext], Outcome]
    constraint: Constraint | None = None
    stages: Callable[[], tuple[Stage, ...]] | None = None
    trained: tuple[Traced, nn.Module] | None = None


Weights = Callable[[str], torch.Tensor]
"""Gives the tensor that a model has under a name, read anew whenever it is called; the caller may not change it."""


@dataclass(frozen=True)
class ByTensor:
    """What a pass made of a model whose weights are never all in memory: its `outcome`, whose graph is on the meta
    device, and what gives the `weights` of that.
    """

    outcome: Outcome
    weights: Weights


@dataclass(frozen=True)
class Pass:
    """A registered pass: the class of its options and its function, and how that is called.

    `by_tensor` carries it out on a graph that is on the meta device, with its weights read one at a time; `None` where
    the pass has to see them together. `other_layers`: what it makes has other layers than the class of the model.
    """

    options: type[PassOptions]
    function: Callable[[Traced, Any, PassContext], Any]
    decides: bool
    only_reads: bool
    by_tensor: Callable[[Traced, Any, PassContext, Weights], ByTensor] | None = None
    other_layers: bool = False

    def decide(self, traced: Traced, options: PassOptions, context: PassContext) -> Decision:
        """What it decides on a model. Raises `GraphZipError` where the function gives something else."""
        if not self.decides:
            return Decision(_Later(options))
        found = self.function(traced, options, context)
        if not isinstance(found, Decision):
            raise GraphZipError(f"{context.where}: its function gave {show(found)}; return a graphzip.Decision")
        return found


@dataclass(frozen=True)
class _Later:
    """Carries out a pass that decides nothing before."""

    options: PassOptions

    def __call__(self, traced: Traced, context: PassContext) -> Outcome:
        found: Outcome = pass_of(self.options, context.where).function(traced, self.options, context)
        return found


PASSES: Final[dict[type[PassOptions], Pass]] = {}
"""The passes that are registered, by the class of their options."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


@overload
def register_pass(
    options: type[PassOptions], function: None = None, *, decides: bool = False, only_reads: bool = False
) -> Callable[[_Function], _Function]: ...


@overload
def register_pass(
    options: type[PassOptions], function: _Function, *, decides: bool = False, only_reads: bool = False
) -> _Function: ...


@public
def register_pass(
    options: type[PassOptions], function: Any = None, *, decides: bool = False, only_reads: bool = False
) -> Any:
    """Make a pass known: `function(traced, options, context) -> Outcome`, for plans with options of this class.

    Without a function it is a decorator for one. From then on plans, plan files, reports and the command line know the
    pass as any other, under `options.kind`. Registering a class again, as a cell of a notebook does when it is run a
    second time, replaces what it was; plans made before keep to theirs.

    With `decides` the function is called when the model is prepared and gives a `Decision`. With `only_reads` it
    changes no tensor of `context.model`, nor of the graph before its turn: a model that is compiled without training
    need not be copied where all passes of the plan promise so.

    Raises `PlanError` for a class that is not one of options, a kind that another pass has, and a function that cannot
    be called with three arguments.
    """
    kind = _checked_kind(options)
    if function is None:
        return lambda own: register_pass(options, own, decides=decides, only_reads=only_reads)
    _check_function(function, kind)
    PASS_OPTIONS[kind] = options
    PASSES[options] = Pass(options, function, decides, only_reads)
    return function


def by_tensor(options: type[PassOptions], *, other_layers: bool = False) -> Callable[[_Function], _Function]:
    """A decorator for the function that carries out a registered pass with its weights read one at a time."""

    def add(function: _Function) -> _Function:
        PASSES[options] = replace(PASSES[options], by_tensor=function, other_layers=other_layers)
        return function

    return add


def _checked_kind(options: Any) -> str:
    if not isinstance(options, type) or not issubclass(options, PassOptions) or options is PassOptions:
        raise PlanError(
            f"register_pass: {show(options)} is not a class of options; write class LowRank(graphzip.PassOptions)"
        )
    kind = getattr(options, "kind", None)
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise PlanError(
            f"register_pass: {options.__name__} has the kind {show(kind)}, by which no plan can name it; write small "
            "letters, digits and '_': kind = 'low_rank', with no type but ClassVar[str]"
        )
    earlier = PASS_OPTIONS.get(kind)
    known = earlier.__module__ if earlier is not None else BUILT_IN.get(kind, options.__module__).partition(":")[0]
    if known != options.__module__ or (earlier is not None and earlier.__qualname__ != options.__qualname__):
        raise PlanError(f"register_pass: {kind!r} is a pass of {known} already; give {options.__name__} another kind")
    missing = [name for name, field in options.model_fields.items() if field.is_required()]
    if missing:
        raise PlanError(
            f"register_pass: {options.__name__}.{missing[0]} has no default; give every option one, for a plan may "
            "name the pass alone"
        )
    return kind


def _check_function(function: Any, kind: str) -> None:
    wanted = "register a function (traced, options, context)"
    if not callable(function):
        raise PlanError(f"register_pass: {kind!r}: {show(function)} cannot be called; {wanted}")
    try:
        inspect.signature(function).bind(None, None, None)
    except ValueError:  # a built-in function, which does not tell
        return
    except TypeError as error:
        raise PlanError(
            f"register_pass: {kind!r}: {show(function)} does not take three arguments ({error}); {wanted}"
        ) from None


def pass_of(options: PassOptions, where: str) -> Pass:
    """The pass whose options these are. Raises `PlanError`, which names `where` it stands in the plan."""
    own = type(options)
    if own not in PASSES and own.kind in BUILT_IN:
        import_module(BUILT_IN[own.kind].partition(":")[0])
    if own not in PASSES:
        raise PlanError(
            f"{where}: {own.__name__} has options and no function; call graphzip.register_pass({own.__name__}, "
            "function) before the plan is carried out"
        )
    return PASSES[own]


def _are(kind: type) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list | tuple) and all(isinstance(each, kind) for each in values)


def _are_widths(widths: Any) -> bool:
    return isinstance(widths, Mapping) and all(
        isinstance(name, str) and _are(Integral)(counts) and len(counts) == 2 for name, counts in widths.items()
    )


_PARTS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "traced": (lambda traced: isinstance(traced, Traced), "the model that it made"),
    "loss": (lambda loss: isinstance(loss, str), "a sentence"),
    "widths": (_are_widths, "channels before and after, by the name of the group: {'conv1': (64, 32)}"),
    "tables": (_are(Table), "a list of graphzip.Table"),
    "bars": (_are(Bars), "a list of graphzip.Bars"),
    "details": (lambda details: isinstance(details, Mapping), "a mapping"),
}
"""What the parts of an outcome have to be, and what to give instead of something else."""


def checked_outcome(found: Any, where: str, *, own: bool = False) -> Outcome:
    """What a pass gave, its details as JSON has them; of a user's `own` pass with the shapes of its graph up to date.

    Raises `GraphZipError` where it is no outcome, its details cannot be written as JSON, or its graph does not run.
    """
    if not isinstance(found, Outcome):
        raise GraphZipError(f"{where}: its function gave {show(found)}; return a graphzip.Outcome")
    for name, (fits, instead) in _PARTS.items():
        if not fits(getattr(found, name)):
            raise GraphZipError(f"{where}: its outcome has {show(getattr(found, name))} as {name}; give {instead}")
    try:
        details = json.loads(json.dumps(dict(found.details)))
    except (TypeError, ValueError) as error:
        raise GraphZipError(
            f"{where}: its details are not JSON ({error}); give lists, dicts, text and numbers"
        ) from None
    if own:
        _refresh(found.traced, where)
    return replace(found, changed=bool(found.changed), lossless=bool(found.lossless), details=details)


def _refresh(traced: Traced, where: str) -> None:
    """Recompute the shapes of a graph that somebody else edited, by which the passes behind go."""
    try:
        traced.graph.lint()
        refresh(traced)
    except Exception as error:
        raise GraphZipError(
            f"{where}: the graph that it gave does not run ({error}); give nodes and tensors that fit each other"
        ) from error
