"""Linear layers, matrix products and embeddings: sums over channels, and the channels they make."""

from __future__ import annotations

import math

import torch

from graphzip.labels import IntArray, support
from graphzip.ops.rules import align, merge, split_axes
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, OpSpec, Result

__all__ = ["SPECS"]

aten = torch.ops.aten


def contract(site: Site, axes: Axes, dim: int, incoming: IntArray | None, size: int) -> Axes:
    """Sum over dimension `dim` of an activation against labels `incoming` of a weight; the axes that are left."""
    touching, rest = split_axes(axes, [dim])
    if incoming is None:
        for axis in touching:
            site.pin(axis, "sums over a weight that is computed")
    elif not touching:
        if size > 1:
            site.pin(incoming, "reads channels that are fixed")
    else:
        shape = [1] * touching[0].ndim
        shape[dim] = -1
        site.unify(touching[0], incoming.reshape(shape))
    return tuple(rest)


def linear(site: Site) -> Result:
    """`x (.., I), weight (O, I), bias (O,) -> (.., O)`."""
    source, weight, bias = site.args["input"], site.args["weight"], site.args["bias"]
    rank = len(site.shape())
    rows, columns, other = _sides(site, weight, 0, 1)
    for axis in other:
        site.pin(axis, "has a weight with mixed dimensions")
    inner = len(site.shape(source)) - 1
    incoming = columns if site.is_raw(weight) else None
    if columns is not None and incoming is None:
        site.pin(columns, "sums over a computed weight")
    rest = contract(site, site.axes(source), inner, incoming, site.shape(weight)[-1])
    if incoming is not None:
        site.consume(incoming)
    if rows is None or len(site.shape(weight)) == 1:
        return rest
    site.produce(rows)
    made = rows.reshape((1,) * (rank - 1) + (-1,))
    if bias is not None:
        size = made.shape
        return (*rest, *merge(site, [((made,), size), (tuple(align(a, rank) for a in site.axes(bias)), size)]))
    return (*rest, made)


def _sides(
    site: Site, weight: object, out: int, inside: int
) -> tuple[IntArray | None, IntArray | None, list[IntArray]]:
    """Labels of the outgoing and incoming dimension of a 2-D weight, and axes that are neither."""
    rows = columns = None
    other = []
    for axis in site.axes(weight):
        if support(axis) == (out,):
            rows = axis.ravel()
        elif support(axis) == (inside,):
            columns = axis.ravel()
        else:
            other.append(axis)
    return rows, columns, other


def linear_macs(site: Site) -> int:
    return math.prod(site.shape()) * site.shape(site.args["weight"])[-1]


def addmm(site: Site) -> Result:
    """`bias + x (N, I) @ weight (I, O)`."""
    product = _matmul(site, site.args["mat1"], site.args["mat2"])
    rank = len(site.shape())
    bias = site.args["self"]
    given = (1,) * (rank - len(site.shape(bias))) + site.shape(bias)
    return merge(site, [(product, site.shape()), (tuple(align(axis, rank) for axis in site.axes(bias)), given)])


def matmul(site: Site) -> Result:
    left, right = (site.args[name] for name in list(site.args)[:2])
    return _matmul(site, left, right)


def _matmul(site: Site, left: object, right: object) -> Axes:
    """`(.., M, K) @ (.., K, N)`: a raw operand is a weight, two activations are contracted as they are."""
    ranks = len(site.shape(left)), len(site.shape(right))
    if site.is_raw(right) and not site.is_raw(left) and ranks[1] == 2:
        return _times_weight(site, left, right, ranks[0] - 1, 0, 1, len(site.shape()) - 1)
    if site.is_raw(left) and not site.is_raw(right) and ranks[0] == 2 and ranks[1] >= 2:
        return _times_weight(site, right, left, ranks[1] - 2, 1, 0, len(site.shape()) - 2)
    return _two_activations(site, left, right)


def _times_weight(site: Site, source: object, weight: object, dim: int, inside: int, out: int, made_at: int) -> Axes:
    rows, columns, other = _sides(site, weight, out, inside)
    for axis in other:
        site.pin(axis, "has a weight with mixed dimensions")
    rest = contract(site, site.axes(source), dim, columns, site.shape(weight)[inside])
    if columns is not None:
        site.consume(columns)
    if rows is None:
        return rest
    site.produce(rows)
    shape = [1] * len(site.shape())
    shape[made_at] = -1
    return (*rest, rows.reshape(shape))


def _two_activations(site: Site, left: object, right: object) -> Axes:
    """Sums over channels of two activations weigh each channel by how often it occurs: they stay."""
    rank = len(site.shape())
    lifted: list[tuple[Axes, tuple[int, ...]]] = []
    for value, summed in ((left, -1), (right, -2)):
        size = len(site.shape(value))
        if size < 2 or rank < 2:
            for axis in site.axes(value):
                site.pin(axis, "sums over the channels of two activations")
            lifted.append(((), (1,) * rank))
            continue
        touching, rest = split_axes(site.axes(value), [size + summed])
        for axis in touching:
            site.pin(axis, "sums over the channels of two activations")
        shape = list((1,) * (rank - size) + site.shape(value))
        shape[summed] = 1
        lifted.append((tuple(align(axis, rank) for axis in rest), tuple(shape)))
    return merge(site, lifted)


def matmul_macs(site: Site) -> int:
    names = [name for name in ("mat1", "batch1") if name in site.args] or list(site.args)[:1]
    return math.prod(site.shape()) * site.shape(site.args[names[0]])[-1]


def embedding(site: Site) -> Result:
    """`weight (V, D), indices (..) -> (.., D)`: rows are picked by the data, columns are channels."""
    weight, rank = site.args["weight"], len(site.shape())
    made: Axes = ()
    for axis in site.axes(weight):
        if support(axis) == (1,):
            site.produce(axis)
            made = (axis.reshape((1,) * (rank - 1) + (-1,)),)
        else:
            site.pin(axis, "is indexed by the data")
    for axis in site.axes(site.args["indices"]):
        site.pin(axis, "uses it as an index")
    return made


SPECS = (
    OpSpec((aten.linear.default,), linear, macs=linear_macs),
    OpSpec((aten.addmm.default,), addmm, macs=matmul_macs),
    OpSpec((aten.matmul.default, aten.mm.default, aten.bmm.default), matmul, macs=matmul_macs),
    OpSpec((aten.embedding.default,), embedding),
)
