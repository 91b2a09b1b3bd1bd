"""Operators that draw random numbers: channels that get draws of their own stay apart."""

from __future__ import annotations

import numpy as np

from graphzip.graph.randomness import shared_dims
from graphzip.labels import IntArray, support
from graphzip.ops.site import Site

__all__ = ["hold_draws"]

_WHY = "draws random numbers for every channel on its own: merged channels would share them"


def hold_draws(site: Site) -> None:
    """Pin what gets draws of its own: one channel in place of two with the same weights is distributed differently.

    An axis that extends along dimensions that share their draws, too, keeps its blocks and may lose channels in them.
    """
    for operand in site.tensors():
        shared = shared_dims(site.node, len(site.shape(operand)))
        for axis in site.axes(operand):
            inside = [dim for dim in support(axis) if dim in shared]
            if len(inside) < len(support(axis)):
                site.pin(_blocks(site, axis, inside), _WHY)
        if operand in site.grouped:
            site.pin(site.grouped[operand], _WHY)


def _blocks(site: Site, axis: IntArray, inside: list[int]) -> IntArray:
    """The axis itself, or labels of blocks that contain it where it extends along the dimensions `inside`."""
    if not inside:
        return axis
    outer = axis
    for dim in inside:
        outer = np.take(outer, [0], axis=dim)
    held = site.fresh(outer.shape)
    site.contain(held, axis)
    return held
