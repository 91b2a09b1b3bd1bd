"""Operators that treat channels alike and mix other positions: pooling, resampling, reductions, softmax."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from graphzip.labels import IntArray
from graphzip.ops.rules import mixing, moved
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, OpSpec, Result

__all__ = ["SPECS"]

aten = torch.ops.aten


def window(spatial: int) -> Callable[[Site], Result]:
    """Pooling and resampling over the last `spatial` dimensions."""

    def rule(site: Site) -> Result:
        source = site.tensors()[0]
        rank = len(site.shape(source))
        axes = mixing(site, site.axes(source), range(rank - spatial, rank), "mixes positions")
        value = site.node.meta["val"]
        return [axes for _ in value] if isinstance(value, tuple | list) else axes

    return rule


def reduction(site: Site) -> Result:
    """`mean`, `sum`, `amax` ... over `dim`; over everything where none is given."""
    source = site.tensors()[0]
    rank = len(site.shape(source))
    given = site.args.get("dim")
    listed = [given] if isinstance(given, int) else list(given or range(rank))
    dims = sorted(dim % max(rank, 1) for dim in listed)
    axes = mixing(site, site.axes(source), dims, "reduces over channels")
    if not site.args.get("keepdim", False):
        axes = _drop(site, axes, dims)
    value = site.node.meta["val"]
    return [axes for _ in value] if isinstance(value, tuple | list) else axes


def _drop(site: Site, axes: Axes, dims: list[int]) -> Axes:
    def without(array: IntArray) -> IntArray:
        return np.squeeze(array, axis=tuple(dims))

    return moved(site, axes, without)


def along_dim(site: Site) -> Result:
    """`softmax`, `cumsum`, `sort` ...: positions along `dim` are treated unevenly."""
    source = site.tensors()[0]
    rank = len(site.shape(source))
    axes = mixing(site, site.axes(source), [int(site.args["dim"]) % max(rank, 1)], "compares or adds up channels")
    value = site.node.meta["val"]
    return [axes for _ in value] if isinstance(value, tuple | list) else axes


SPECS = (
    OpSpec(
        (
            aten.max_pool1d.default,
            aten.avg_pool1d.default,
            aten.adaptive_avg_pool1d.default,
            aten.adaptive_max_pool1d.default,
            aten.upsample_nearest1d.vec,
            aten.upsample_linear1d.vec,
        ),
        window(1),
    ),
    OpSpec(
        (
            aten.max_pool2d.default,
            aten.max_pool2d_with_indices.default,
            aten.avg_pool2d.default,
            aten.adaptive_avg_pool2d.default,
            aten.adaptive_max_pool2d.default,
            aten.upsample_nearest2d.vec,
            aten.upsample_bilinear2d.vec,
            aten.upsample_bicubic2d.vec,
            aten._upsample_nearest_exact2d.vec,
            aten._upsample_bilinear2d_aa.vec,
            aten._upsample_bicubic2d_aa.vec,
        ),
        window(2),
    ),
    OpSpec(
        (
            aten.max_pool3d.default,
            aten.avg_pool3d.default,
            aten.adaptive_avg_pool3d.default,
            aten.adaptive_max_pool3d.default,
            aten.upsample_nearest3d.vec,
            aten.upsample_trilinear3d.vec,
        ),
        window(3),
    ),
    OpSpec(
        (
            aten.mean.dim,
            aten.mean.default,
            aten.sum.dim_IntList,
            aten.sum.default,
            aten.amax.default,
            aten.amin.default,
            aten.max.dim,
            aten.min.dim,
            aten.max.default,
            aten.min.default,
            aten.var.correction,
            aten.var.dim,
            aten.std.correction,
            aten.std.dim,
            aten.logsumexp.default,
            aten.prod.dim_int,
            aten.argmax.default,
            aten.argmin.default,
            aten.any.dim,
            aten.all.dim,
            aten.linalg_vector_norm.default,
            aten.norm.ScalarOpt_dim,
        ),
        reduction,
    ),
    OpSpec(
        (
            aten.softmax.int,
            aten.log_softmax.int,
            aten.cumsum.default,
            aten.cumprod.default,
            aten.sort.default,
            aten.topk.default,
            aten.argsort.default,
        ),
        along_dim,
    ),
)
