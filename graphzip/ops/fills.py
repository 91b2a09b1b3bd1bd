"""Tensors that are filled with one number: whatever they meet, they are as wide as it is."""

from __future__ import annotations

from graphzip.canonical.fills import FILLS
from graphzip.ops.rules import shape_along
from graphzip.ops.site import Site
from graphzip.ops.spec import OpSpec, Result
from graphzip.ops.views import patch_sizes

__all__ = ["SPECS"]


def fill(site: Site) -> Result:
    """Every dimension of a fixed size gets labels of its own; of an operand only dtype and device are taken."""
    held = site.open()
    return tuple(
        site.derive(shape_along(dim, site.shape()))
        for dim, size in enumerate(site.shape())
        if size > 1 and dim not in held
    )


SPECS = (OpSpec(FILLS, fill, patch=patch_sizes("size")),)
