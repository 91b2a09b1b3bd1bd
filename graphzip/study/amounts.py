"""What a budget asks for: kinds and amounts, as users write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from graphzip.errors import PlanError

__all__ = ["LATENCY", "absolute", "checked", "given", "shown"]

LATENCY: Final = "latency"

_KINDS: Final = ("macs", "params", "bytes", LATENCY)


def given(**budgets: float | None) -> dict[str, float]:
    """Those that are given. Raises `PlanError` as `checked` does."""
    return checked({what: amount for what, amount in budgets.items() if amount is not None})


def checked(budgets: Mapping[str, float]) -> dict[str, float]:
    """One budget, or several that are to be met together.

    Raises `PlanError` where there is none, a kind is unknown, an amount is no budget, or one of a latency is not alone.
    """
    if not budgets:
        raise PlanError("give a budget of macs, params, bytes or latency; got none")
    for what, amount in budgets.items():
        if what not in _KINDS:
            raise PlanError(f"{what} is no budget; give one of {', '.join(_KINDS)}")
        number = isinstance(amount, int | float) and not isinstance(amount, bool)
        if not number or not amount > 0 or not math.isfinite(amount):
            raise PlanError(f"{what}: {amount!r} is not a budget; write a share such as 0.5, or an amount above 1")
    others = [what for what in budgets if what != LATENCY]
    if LATENCY in budgets and others:
        raise PlanError(f"{LATENCY} is met by measuring, alone; leave it out, or leave out {' and '.join(others)}")
    return dict(budgets)


def absolute(amount: float, whole: float) -> float:
    """A float of at most 1 is a share of what the model has."""
    return amount * whole if isinstance(amount, float) and amount <= 1.0 else float(amount)


def shown(amount: float, what: str) -> str:
    """An amount as it is written in messages."""
    if isinstance(amount, float) and amount <= 1.0:
        return f"{amount:.3g}"
    return f"{amount:.3f} ms" if what == LATENCY else f"{amount:,.0f} {what}"
