"""Operators that copy positions: all along a dimension of size one, or whole runs of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graphzip.graph.inputs import concrete_shape
from graphzip.labels import IntArray
from graphzip.ops.rules import mixing, moved, pointwise, shape_along
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, OpSpec, Patch, Result
from graphzip.ops.views import patch_sizes

__all__ = ["REPEATS", "SPECS"]

aten = torch.ops.aten


def expand(site: Site) -> Result:
    """Spread dimensions get labels of their own: all positions along them are alike."""
    source, after = site.tensors()[0], site.shape()
    before = (1,) * (len(after) - len(site.shape(source))) + site.shape(source)
    axes = moved(site, site.axes(source), lambda array: array.reshape((1,) * (len(after) - array.ndim) + array.shape))
    return axes + _spread(site, before, after)


def expand_as(site: Site) -> Result:
    """The size comes from another tensor: its channels, along which the copies lie, come and go together with them."""
    return pointwise(site)


def _spread(site: Site, before: Sequence[int], after: Sequence[int]) -> Axes:
    dims = [dim for dim in range(1, len(after)) if before[dim] == 1 and after[dim] > 1]
    return tuple(site.derive(shape_along(dim, after)) for dim in dims)


def repeat(site: Site) -> Result:
    source, after = site.args["self"], site.shape()
    before = (1,) * (len(after) - len(site.shape(source))) + site.shape(source)
    given = site.args["repeats" if "repeats" in site.args else "dims"]
    times = [1] * (len(after) - len(given)) + [site.size(count) for count in given]

    def run(array: IntArray) -> IntArray:
        array = array.reshape((1,) * (len(after) - array.ndim) + array.shape)
        return np.tile(array, [count if array.shape[dim] > 1 else 1 for dim, count in enumerate(times)])

    return moved(site, site.axes(source), run) + _spread(site, before, after)


def patch_repeat(patch: Patch) -> None:
    """A dimension that was copied is copied as often as its copies stay."""
    rank = len(patch.node.meta["val"].shape)
    shape = concrete_shape(patch.args["self"].meta["val"])
    before = (1,) * (rank - len(shape)) + shape
    name = "repeats" if "repeats" in patch.args else "dims"
    times = list(patch.args[name])
    offset = rank - len(times)
    for dim in range(max(1, offset), rank):
        if before[dim] == 1 and patch.shrinks(patch.node, dim):
            times[dim - offset] = patch.size(patch.node, dim)
    patch.set(name, times)


def repeat_interleave(site: Site) -> Result:
    """Every position along `dim` several times in a row (heads of grouped queries)."""
    source, times = site.args["self"], site.args["repeats"]
    if site.args["dim"] is None:
        return mixing(site, site.axes(source), range(len(site.shape(source))), "repeats positions unevenly")
    dim = site.dim(site.args["dim"])
    return moved(
        site,
        site.axes(source),
        lambda array: np.repeat(array, site.size(times), axis=dim) if array.shape[dim] > 1 else array,
    )


REPEATS = (
    OpSpec((aten.repeat.default, aten.tile.default), repeat, patch=patch_repeat),
    OpSpec((aten.repeat_interleave.self_int,), repeat_interleave),
)

SPECS = (
    *REPEATS,
    OpSpec((aten.expand.default,), expand, patch=patch_sizes("size")),
    OpSpec((aten.expand_as.default,), expand_as),
)
