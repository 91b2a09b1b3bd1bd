"""The table of layers whose kernels are stored as factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphzip.report.outcome import Table

__all__ = ["error_table"]


def error_table(errors: Mapping[str, float], shared: Sequence[Sequence[str]], note: str = "") -> tuple[Table, ...]:
    """With how many others each layer shares, and the error of its fit; no table where nothing was fitted."""
    mates = {name: len(names) - 1 for names in shared for name in names}
    rows = tuple((name, f"{mates.get(name, 0)} layers", f"{100 * error:.2f} %") for name, error in errors.items())
    return (Table(("layer", "shares with", "error of the kernel"), rows, note=note),) if rows else ()
