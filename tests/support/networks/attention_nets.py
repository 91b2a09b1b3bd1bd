"""Small networks around attention and normalisation, one factory each, in the registry `ATTENTION_NETS`.

As in `nets`, a factory takes nothing and returns `(module, example inputs)`. Unless it says otherwise a network has
`HEADS` heads of `WIDTH` channels on a residual stream of `STREAM` channels, so that heads, widths and the stream can
be told apart by their sizes.
"""

from __future__ import annotations

import attention_heads  # each of them fills the registry
import attention_kinds
import attention_norms
import attention_shared
from attention_parts import ATTENTION_NETS, HEADS, INNER, STREAM, WIDTH

__all__ = [
    "ATTENTION_NETS",
    "HEADS",
    "INNER",
    "STREAM",
    "WIDTH",
    "attention_heads",
    "attention_kinds",
    "attention_norms",
    "attention_shared",
]
