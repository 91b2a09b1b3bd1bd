"""Bounds on what is read and what memory is taken for; each stands here once."""

from __future__ import annotations

from typing import Final

__all__ = ["LONGEST_NAME", "MOST_EXAMPLE_NUMBERS", "MOST_NAMES", "SEEDS", "SIZES"]

SIZES: Final = 1 << 31
"""No size and no count is as large."""

SEEDS: Final = 1 << 32
"""No seed is as large: what numpy takes."""

MOST_EXAMPLE_NUMBERS: Final = 1 << 28
"""Numbers of example inputs that are made up here, for all of them together; for each, in a file."""

MOST_NAMES: Final = 10_000
"""Names and globs in one option of a plan; each is compared with every group or layer."""

LONGEST_NAME: Final = 1_000
"""Characters of a name in a plan."""
