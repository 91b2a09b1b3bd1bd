"""What is wrong with a plan, in sentences: from pydantic's errors to the path of a key, its value, and what to write.

The types of `values` say what stands behind the value (`says`); everything else is told from the kind of pydantic's
error here, and nowhere else.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Final

from pydantic import ValidationError, WrapValidator

from graphzip.errors import PlanError
from graphzip.limits import LONGEST_NAME, SIZES
from graphzip.report.tables import closest

__all__ = ["LISTED", "TAG", "Sentence", "key_text", "plan_error", "problems_of", "says", "show"]

LISTED: Final = 10
"""Problems or names that one message lists before it only counts the rest."""

TAG: Final = "\0"
"""How the tags of unions begin, which are no names on the path to a value."""


def show(value: object) -> str:
    """A value in a message: short, whatever it is."""
    try:
        return reprlib.repr(value)
    except Exception:  # an int that is too long to be written, an object of somebody else's
        return f"a {type(value).__name__}"


def key_text(key: object) -> str:
    """A key of a mapping in a message."""
    return key if isinstance(key, str) and len(key) <= LONGEST_NAME else show(key)


def plan_error(problems: Sequence[str], source: str = "") -> PlanError:
    """One `PlanError` for one or several problems; `source` (a file) goes before them."""
    if len(problems) == 1:
        return PlanError(f"{source}: {problems[0]}" if source else problems[0])
    listed = list(problems[:LISTED])
    if len(problems) > LISTED:
        listed.append(f"and {len(problems) - LISTED} more")
    head = f"{source or 'the plan'}: {len(problems)} problems"
    return PlanError("\n  - ".join([head, *listed]))


class Sentence(ValueError):
    """What a validator raises that says it all, the value included."""


def says(text: str, *, whole: str = "", real: str = "") -> WrapValidator:
    """What is said of a value that does not fit a type, behind the value: `is not a strength; write ...`.

    `whole` and `real` are said of ints and of other numbers instead.
    """

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            details = error.errors(include_url=False)
            if any(_says_itself(detail) for detail in details):
                raise
            kinds = text, whole or text, real or text
            raise Sentence(f"{show(value)} {_fitting(value, details, *kinds)}") from None

    return WrapValidator(check)


def _fitting(value: Any, details: Sequence[Mapping[str, Any]], text: str, whole: str, real: str) -> str:
    if isinstance(value, bool) or not isinstance(value, Real):
        return text
    if not isinstance(value, Integral):
        return real
    too_large = any(detail.get("ctx", {}).get("lt") == SIZES for detail in details)
    return f"{whole} and below {SIZES}" if too_large else whole


def problems_of(error: ValidationError, where: str, options: Collection[str]) -> list[str]:
    """One sentence for each of pydantic's errors, behind the path of its option and its names below `where`.

    `options` are the names that could have been given. Positions in lists are left out: a sentence shows its value.
    """
    problems = []
    for detail in error.errors(include_url=False):
        if not detail["loc"]:  # of a validator of the whole class, which a user's pass may have
            problems.append(f"{where}: {detail['msg']}")
            continue
        name, *below = detail["loc"]
        if detail["type"] == "default_factory_not_called":  # follows from a problem of another option
            continue
        if detail["type"] == "extra_forbidden":
            hint = closest(str(name), options) if options else f"{where} has no options"
            problems.append(f"{where}.{name}: unknown option; {hint}")
        else:
            problems.append(f"{where}.{name}{_names(below, detail['input'])}: {_sentence(detail)}")
    return problems


def _sentence(detail: Mapping[str, Any]) -> str:
    """What one of pydantic's errors says, in words that tell what to write instead."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if isinstance(context.get("error"), Sentence):
        return str(context["error"])
    if kind == "string_too_long":
        return f"{show(value)} has {len(value):,} characters; no name has more than {context['max_length']:,}"
    if kind == "string_type" and _is_key(detail):
        return "a name must be text; put it in quotes"
    if kind == "literal_error":
        choices = context["expected"].replace(" or ", ", ").replace("None", "null (None)")
        return f"{show(value)} is not one of {choices}"
    if kind == "bool_type":
        return f"{show(value)} is neither true nor false"
    return f"{show(value)}: {detail['msg']}"


def _is_key(detail: Mapping[str, Any]) -> bool:
    return bool(detail["loc"]) and detail["loc"][-1] == "[key]"


def _says_itself(detail: Mapping[str, Any]) -> bool:
    """Whether an error is told better by itself than by the type around it."""
    is_sentence = isinstance(detail.get("ctx", {}).get("error"), Sentence)
    return is_sentence or detail["type"] == "string_too_long" or _is_key(detail)


def _names(below: Sequence[str | int], value: Any) -> str:
    """The names on the way to a value, each in brackets; a name that is wrong itself is the `value`."""
    is_key = list(below[-1:]) == ["[key]"]
    names = [part for part in below[: -2 if is_key else None] if isinstance(part, str) and not part.startswith(TAG)]
    shown = [repr(name) for name in names]
    if is_key and not (isinstance(value, str) and len(value) > LONGEST_NAME):
        shown.append(show(value))
    return "".join(f"[{each}]" for each in shown)
