"""Between channels and positions: pixel shuffles, and sliding windows as columns."""

from __future__ import annotations

import math

import numpy as np
import torch

from graphzip.labels import IntArray, support
from graphzip.ops.rules import mixing, moved, split_axes, uncut
from graphzip.ops.site import Site
from graphzip.ops.spec import OpSpec, Result

__all__ = ["SHUFFLES", "SPECS"]

aten = torch.ops.aten


def pixel_shuffle(site: Site) -> Result:
    """`(.., C r r, H, W) -> (.., C, H r, W r)`: the places that become one channel go together."""
    source, r = site.args["self"], int(site.args["upscale_factor"])
    place = len(site.shape(source)) - 3
    touching, rest = split_axes(uncut(site, site.axes(source), [place]), [place])
    others = mixing(site, tuple(rest), [place + 1, place + 2], "moves positions")
    made = []
    for axis in touching:
        flat = site.tie(axis, [dim for dim in support(axis) if dim != place])
        site.tie(flat.reshape(-1, r * r), [1])
        step = (slice(None),) * place + (slice(0, None, r * r),)
        made.append(site.move([flat], lambda arrays, step=step: arrays[0][step]))  # type: ignore[misc]
    return (*others, *(axis for axis in made if support(axis)))


def pixel_unshuffle(site: Site) -> Result:
    """`(.., C, H r, W r) -> (.., C r r, H, W)`."""
    source, r = site.args["self"], int(site.args["downscale_factor"])
    *lead, channels, height, width = site.shape(source)
    k = len(lead)

    def run(array: IntArray) -> IntArray:
        if all(array.shape[d] == 1 for d in (k, k + 1, k + 2)):
            return array
        whole = np.broadcast_to(array, (*array.shape[:k], channels, height, width))
        cells = whole.reshape(*array.shape[:k], channels, height // r, r, width // r, r)
        order = [*range(k), k, k + 2, k + 4, k + 1, k + 3]
        shuffled: IntArray = cells.transpose(order).reshape(*array.shape[:k], channels * r * r, height // r, width // r)
        return shuffled

    return moved(site, uncut(site, site.axes(source), [k, k + 1, k + 2]), run)


def columns_of_windows(site: Site) -> Result:
    """`F.unfold`, `(B, C, H, W) -> (B, C k k, L)`: every channel becomes the `k k` places of a window."""
    source = site.args["self"]
    lead = len(site.shape(source)) - 3
    touching, rest = split_axes(site.axes(source), [lead])
    others = mixing(site, tuple(rest), [lead + 1, lead + 2], "lays overlapping windows side by side")
    places = math.prod(site.args["kernel_size"])

    def run(array: IntArray) -> IntArray:
        flat = array.reshape(array.shape[: lead + 1])
        return np.repeat(flat, places, axis=lead)[..., None]

    return others + moved(site, tuple(_of_channels(site, axis, lead) for axis in touching), run)


def windows_of_columns(site: Site) -> Result:
    """`F.fold`, `(B, C k k, L) -> (B, C, H, W)`: the places that are added up to one channel go together."""
    source = site.args["self"]
    lead = len(site.shape(source)) - 2
    touching, rest = split_axes(uncut(site, site.axes(source), [lead]), [lead])
    others = mixing(site, tuple(rest), [lead + 1], "adds up overlapping windows")
    places = math.prod(site.args["kernel_size"])
    for axis in others:
        site.pin(axis, "adds up overlapping windows")
    made = []
    for axis in touching:
        flat = _of_channels(site, axis, lead)
        site.tie(flat.reshape(-1, places), [1])
        step = (slice(None),) * lead + (slice(0, None, places),)
        made.append(site.move([flat], lambda arrays, step=step: arrays[0][step][..., None]))  # type: ignore[misc]
    return tuple(axis for axis in made if support(axis))


def _of_channels(site: Site, axis: IntArray, place: int) -> IntArray:
    """The axis without the dimensions along which it extends besides the channels."""
    return site.tie(axis, [dim for dim in support(axis) if dim != place])


def windows(site: Site) -> Result:
    """`Tensor.unfold`: the windows along one dimension, their places in a new last one."""
    source = site.args["self"]
    dim = site.dim(site.args["dimension"], len(site.shape(source)))
    axes = mixing(site, site.axes(source), [dim], "lays overlapping windows side by side")
    return moved(site, axes, lambda array: array[..., None])


SHUFFLES = (
    OpSpec((aten.pixel_shuffle.default,), pixel_shuffle),
    OpSpec((aten.pixel_unshuffle.default,), pixel_unshuffle),
)

SPECS = (
    *SHUFFLES,
    OpSpec((aten.im2col.default,), columns_of_windows),
    OpSpec((aten.col2im.default,), windows_of_columns),
    OpSpec((aten.unfold.default,), windows),
)
