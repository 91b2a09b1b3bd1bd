"""All operator cases, by name."""

from __future__ import annotations

import op_cases_linear
import op_cases_movement
import op_cases_norm
import op_cases_picking
import op_cases_pointwise
import op_cases_positions
import op_cases_recurrent
import op_cases_spectral
import op_cases_uneven
from op_cases import Case

__all__ = ["CASES", "FAMILIES"]

FAMILIES = (
    op_cases_pointwise,
    op_cases_movement,
    op_cases_picking,
    op_cases_linear,
    op_cases_norm,
    op_cases_positions,
    op_cases_recurrent,
    op_cases_spectral,
    op_cases_uneven,
)
CASES: dict[str, Case] = {name: case for family in FAMILIES for name, case in family.CASES.items()}
