"""The criteria of importance that plans know by name: a registry of plain functions, without the code of any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, overload

from graphzip.boundary import public
from graphzip.errors import PlanError
from graphzip.plan.problems import show

__all__ = ["CRITERIA", "Criterion", "named", "register_criterion"]


@dataclass(frozen=True)
class Criterion:
    """A function `(group: GroupView) -> scores (n,)`, the higher the more a channel is needed.

    Scores that are `comparable` mean the same in every group; others are divided by their mean before groups compete.
    """

    function: Callable[[Any], Any]
    comparable: bool = False
    built_in: bool = False


CRITERIA: Final[dict[str, Criterion]] = {}

_Function = TypeVar("_Function", bound=Callable[..., Any])


@overload
def register_criterion(
    name: str, function: None = None, *, comparable: bool = False
) -> Callable[[_Function], _Function]: ...


@overload
def register_criterion(name: str, function: _Function, *, comparable: bool = False) -> _Function: ...


@public
def register_criterion(name: str, function: Any = None, *, comparable: bool = False) -> Any:
    """Make `function(group: GroupView) -> scores (n,)` available to plans as `criterion: name`; a decorator without it.

    The channels with the highest scores stay. `comparable` says that scores mean the same in every group; where they do
    not, each group's are divided by their mean before groups compete (`ranking="global"`). A later one of the same name
    replaces an earlier one.

    Raises `PlanError` for the name of a criterion that graphzip brings, and for what cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise PlanError(f"{show(name)} is not the name of a criterion; a name is text")
    if name in CRITERIA and CRITERIA[name].built_in:
        raise PlanError(f"criterion {name!r} is built in and cannot be replaced; register under another name")
    if function is None:
        return lambda own: register_criterion(name, own, comparable=comparable)
    if not callable(function):
        raise PlanError(f"criterion {name!r}: {show(function)} cannot be called; register a function (group)")
    CRITERIA[name] = Criterion(function, bool(comparable))
    return function


def named(function: Callable[..., Any]) -> str:
    """The name of a function that was given in place of one; it is registered where it was not yet."""
    plain = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    name, number = plain, 1
    while name in CRITERIA and CRITERIA[name].function is not function:
        number += 1
        name = f"{plain}#{number}"
    CRITERIA.setdefault(name, Criterion(function))
    return name
