"""Small networks that real architectures are made of, one factory each, in the registry `NETS`.

A factory takes nothing and returns `(module, example inputs)`; it draws its weights from seed 0, images are 8 x 8 and
the batch is 2. `REFUSABLE` names the networks whose writes into views may be refused with a typed error.
"""

from __future__ import annotations

import nets_moves  # it fills the registry
from net_parts import NETS, REFUSABLE, Example, Net, between, conv, head, image, unit
from nets_convs import CifarResNet
from nets_structure import CHANGES

__all__ = [
    "CHANGES",
    "NETS",
    "REFUSABLE",
    "CifarResNet",
    "Example",
    "Net",
    "between",
    "conv",
    "head",
    "image",
    "nets_moves",
    "unit",
]
