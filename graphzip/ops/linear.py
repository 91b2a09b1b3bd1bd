"""Linear layers, matrix products, einsum and embeddings: sums over channels, and the channels they make.

Every product is one case of the same rule (`contraction`): operands name their dimensions by letters, equal letters
hold equal labels, letters that are not in the result are summed over. Where one operand is a weight, the slices of
merged channels are added up; where both are activations, one of them is scaled by how many channels each one left
stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from graphzip.labels import IntArray, support
from graphzip.numeric.grouped_mm import grouped_mm
from graphzip.ops.rules import after_sum, align, meet, mixing
from graphzip.ops.site import Site
from graphzip.ops.spec import Axes, OpSpec, Patch, Result

__all__ = ["SPECS", "between", "contraction", "scale_activation"]

aten = torch.ops.aten

Term = tuple[Any, str]
"""An operand and one letter per dimension of it."""


def contraction(site: Site, terms: Sequence[Term], out: str) -> Axes:
    """Multiply operands, sum over the letters that `out` lacks, and give the axes of the result."""
    letters = out + "".join(dict.fromkeys(letter for _, names in terms for letter in names if letter not in out))
    summed = [place for place, letter in enumerate(letters) if letter not in out]
    weights = [value for value, _ in terms if site.is_raw(value)]
    weight = weights[-1] if len(weights) == 1 and len(terms) > 1 else None
    operands = []
    for value, names in terms:
        axes = tuple(_spread(axis, names, letters) for axis in site.axes(value))
        if value is weight:
            for axis in axes:
                along = set(support(axis))
                if along and along <= set(summed):
                    site.consume(axis)
                elif along and not along & set(summed):
                    site.produce(axis)
        sizes = dict(zip(names, site.extent(value), strict=True))
        operands.append((axes, tuple(sizes.get(letter, 1) for letter in letters)))
    held = frozenset(letters.index(names[dim]) for value, names in terms for dim in site.open(value))
    met = after_sum(site, meet(site, operands), summed, held)
    kept = tuple(slice(None) if place not in summed else 0 for place in range(len(letters)))
    result = tuple(axis[kept] for axis in met)
    return tuple(axis for axis in result if support(axis))


def _spread(axis: IntArray, names: str, letters: str) -> IntArray:
    """The axis with one dimension per letter."""
    order = sorted(range(len(names)), key=lambda dim: letters.index(names[dim]))
    moved: IntArray = axis.transpose(order)
    shape = [1] * len(letters)
    for dim in order:
        shape[letters.index(names[dim])] = axis.shape[dim]
    spread: IntArray = moved.reshape(shape)
    return spread


def scale_activation(patch: Patch, name: str, dims: Sequence[int]) -> None:
    """Scale an operand by how many channels each of its channels stands for, so that a sum over `dims` stays right."""
    value = patch.args[name]
    rank = len(value.meta["val"].shape)
    counts = patch.multiplicity(value, [dim % rank for dim in dims])
    if counts is not None:
        patch.set_node(name, patch.call(aten.mul.Tensor, patch.operand(name), patch.values(counts, value)))


_LETTERS = "abcdefghijklmnop"


def linear(site: Site) -> Result:
    """`x (.., I), weight (O, I), bias (O,) -> (.., O)`."""
    source, weight, bias = site.args["input"], site.args["weight"], site.args["bias"]
    lead = _LETTERS[: len(site.shape(source)) - 1]
    if len(site.shape(weight)) == 1:
        return contraction(site, [(source, lead + "z"), (weight, "z")], lead)
    made = contraction(site, [(source, lead + "z"), (weight, "yz")], lead + "y")
    return _plus(site, made, bias)


def _plus(site: Site, made: Axes, bias: Any) -> Axes:
    if bias is None:
        return made
    rank = len(site.shape())
    given = site.extent(bias)
    spread = tuple(align(axis, rank) for axis in site.axes(bias))
    return meet(site, [(made, site.extent()), (spread, (1,) * (rank - len(given)) + given)])


def patch_linear(patch: Patch) -> None:
    if not patch.consumes(patch.args["weight"], -1):
        scale_activation(patch, "input", [-1])


def linear_macs(site: Site) -> int:
    return math.prod(site.shape()) * site.shape(site.args["weight"])[-1]


def addmm(site: Site) -> Result:
    """`bias + x (N, I) @ weight (I, O)`."""
    product = contraction(site, [(site.args["mat1"], "az"), (site.args["mat2"], "zy")], "ay")
    return _plus(site, product, site.args["self"])


def baddbmm(site: Site) -> Result:
    """`bias + x (B, N, I) @ y (B, I, O)`."""
    product = contraction(site, [(site.args["batch1"], "baz"), (site.args["batch2"], "bzy")], "bay")
    return _plus(site, product, site.args["self"])


def matmul(site: Site) -> Result:
    """`(.., M, K) @ (.., K, N)`, vectors and broadcasting included."""
    (_, left), (_, right) = _factors(site.args)
    lead = max(len(site.shape(left)), len(site.shape(right)), 2) - 2
    names = _LETTERS[:lead]
    left_names = _matrix_names(len(site.shape(left)), names, "yz", "z")
    right_names = _matrix_names(len(site.shape(right)), names, "zx", "z")
    out = names + ("y" if "y" in left_names else "") + ("x" if "x" in right_names else "")
    return contraction(site, [(left, left_names), (right, right_names)], out)


def _matrix_names(rank: int, lead: str, matrix: str, vector: str) -> str:
    return vector if rank == 1 else lead[len(lead) - (rank - 2) :] + matrix


def _factors(args: Any) -> list[tuple[str, Any]]:
    """Names and values of the two matrices; `self` is the bias where there are others."""
    names = [name for name in args if name in _MATRICES]
    return [(name, args[name]) for name in names[-2:]]


_MATRICES = {"self", "input", "other", "mat1", "mat2", "batch1", "batch2", "vec", "tensor"}


def patch_matmul(patch: Patch) -> None:
    """Scale one activation unless the other operand is a weight whose slices have been added up."""
    (left_name, left), (right_name, right) = _factors(patch.args)
    if patch.consumes(right, -2 if len(right.meta["val"].shape) > 1 else -1):
        return
    if patch.consumes(left, -1):
        return
    if patch.is_raw(left):
        scale_activation(patch, right_name, [-2 if len(right.meta["val"].shape) > 1 else -1])
    else:
        scale_activation(patch, left_name, [-1])


def matmul_macs(site: Site) -> int:
    sides = [
        value for name, value in _factors(site.args) if not (name == "self" and ({"mat1", "batch1"} & set(site.args)))
    ]
    return math.prod(site.shape()) * site.shape(sides[0])[-1]


def sorted_rows(site: Site) -> Result:
    """`input (S, I), weight (E, I, O), offs (E,) -> (S, O)`: the data decide which of the E matrices a row gets."""
    made = contraction(site, [(site.args["input"], "az"), (site.args["weight"], "ezy")], "eay")
    ends, matrices = site.axes(site.args["offs"]), [axis for axis in made if support(axis) == (0,)]
    if ends and matrices:  # both are what is left of experts that a router picks
        site.unify(ends[0], matrices[0].ravel())
        made = tuple(axis for axis in made if axis is not matrices[0])
    else:
        for axis in ends:
            site.pin(axis, "counts rows by it")
    return tuple(axis[0] for axis in mixing(site, made, [0], "chooses one of them by the data"))


def sorted_rows_macs(site: Site) -> int:
    return math.prod(site.shape(site.args["input"])) * site.shape()[-1]


def patch_sorted_rows(patch: Patch) -> None:
    if not patch.consumes(patch.args["weight"], 1):
        scale_activation(patch, "input", [1])


def _einsum_terms(site: Site) -> tuple[list[Term], str] | None:
    """Operands with one letter per dimension, `...` spelled out; nothing where a letter repeats in an operand."""
    equation = str(site.args["equation"]).replace(" ", "")
    left, arrow, out = equation.partition("->")
    values = list(site.args["tensors"])
    given = left.split(",")
    spare = [letter for letter in _EVERY_LETTER if letter not in equation]
    ranks = [len(site.shape(value)) - len(names.replace("...", "")) for value, names in zip(values, given, strict=True)]
    wide = max([rank for rank, names in zip(ranks, given, strict=True) if "..." in names], default=0)
    dots = "".join(spare[:wide])
    spelled = [names.replace("...", dots[wide - rank :]) for names, rank in zip(given, ranks, strict=True)]
    if any(len(set(names)) < len(names) for names in spelled):
        return None
    if not arrow:
        joined = "".join(spelled)
        out = dots + "".join(
            sorted(letter for letter in set(joined) if joined.count(letter) == 1 and letter not in dots)
        )
    return list(zip(values, spelled, strict=True)), out.replace("...", dots)


_EVERY_LETTER = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def einsum(site: Site) -> Result:
    found = _einsum_terms(site)
    if found is None:
        for value in site.args["tensors"]:
            for axis in site.axes(value):
                site.pin(axis, "takes a diagonal")
        return ()
    return contraction(site, *found)


def patch_einsum(patch: Patch) -> None:
    found = _einsum_terms(Site.of(patch.node, patch.args))
    if found is None:
        return
    scaled = dict(scaled_operands(patch, *found))
    if scaled:
        tensors = [scaled[place] if place in scaled else patch.copied(each) for place, (each, _) in enumerate(found[0])]
        patch.set_node("tensors", tensors)


def scaled_operands(patch: Patch, terms: Sequence[Term], out: str) -> Iterator[tuple[int, fx.Node]]:
    """Operands, by their places, that take up how many channels each one left stands for along what is summed over.

    A weight whose slices were added up has done so; of the others activations come before weights.
    """
    left = {letter for _, names in terms for letter in names} - set(out)
    for value, names in terms:
        left -= {letter for dim, letter in enumerate(names) if patch.consumes(value, dim)}
    while left:
        place = min(range(len(terms)), key=lambda k: (-len(left & set(terms[k][1])), patch.is_raw(terms[k][0])))
        value, names = terms[place]
        counts = patch.multiplicity(value, [names.index(letter) for letter in names if letter in left])
        if counts is not None:
            yield place, patch.call(aten.mul.Tensor, patch.copied(value), patch.values(counts, value))
        left -= set(names)


def bilinear(site: Site) -> Result:
    """`x (.., I), y (.., J), weight (O, I, J), bias (O,) -> (.., O)`."""
    return _plus(site, contraction(site, *_bilinear_terms(site.args)), site.args["bias"])


def _bilinear_terms(args: Any) -> tuple[list[Term], str]:
    lead = _LETTERS[: len(args["input1"].meta["val"].shape) - 1]
    return [(args["input1"], lead + "y"), (args["input2"], lead + "z"), (args["weight"], "xyz")], lead + "x"


def patch_bilinear(patch: Patch) -> None:
    names = ("input1", "input2", "weight")
    for place, scaled in scaled_operands(patch, *_bilinear_terms(patch.args)):
        patch.set_node(names[place], scaled)


def bilinear_macs(site: Site) -> int:
    return math.prod(site.shape()[:-1]) * math.prod(site.shape(site.args["weight"]))


def einsum_macs(site: Site) -> int:
    found = _einsum_terms(site)
    if found is None:
        return 0
    sizes = {letter: size for value, names in found[0] for letter, size in zip(names, site.shape(value), strict=True)}
    return math.prod(sizes.values())


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


def embedding_bag(site: Site) -> Result:
    """`weight (V, D), indices (..), weights of samples (..) -> (B, D), bags, sizes, places of maxima`: rows are added
    up, or the largest taken, column by column.
    """
    weight = site.args["weight"]
    sums: Axes = ()
    others = any(user.args[1] != 0 and user.users for user in site.node.users)
    for axis in site.axes(weight):
        if support(axis) == (1,) and not others:
            site.produce(axis)
            sums = (axis,)
        else:
            site.pin(axis, "is indexed by the data" if support(axis) == (0,) else "picks places by it")
    for name in ("indices", "offsets", "per_sample_weights"):
        for axis in site.axes(site.args[name]) if isinstance(site.args[name], fx.Node) else ():
            site.pin(axis, "uses it as an index")
    return [sums, (), (), ()]


def attention(site: Site) -> Result:
    """`query (.., L, E), key (.., S, E), value (.., S, V), mask (.., L, S) -> (.., L, V)`; softmax runs over S."""
    query, key, value = (site.args[name] for name in ("query", "key", "value"))
    rank = len(site.shape())
    lead = _LETTERS[: rank - 2]
    repeat = site.shape(query)[-3] // site.shape(key)[-3] if site.args.get("enable_gqa") else 1
    keys, values = (_repeated(site, operand, repeat) for operand in (key, value))
    named = ((query, lead + "lz"), (key, lead + "sz"), (value, lead + "sv"))
    held = {names[dim] for operand, names in named for dim in site.open(operand)}
    scores = between(site, site.axes(query), site.extent(query), lead + "lz", keys, lead + "sz", lead + "ls", held)
    mask = site.args.get("attn_mask")
    full = (*site.extent(query)[:-1], site.extent(key)[-2])
    if mask is not None:
        given = site.extent(mask)
        spread = tuple(align(axis, rank) for axis in site.axes(mask))
        scores = meet(site, [(scores, full), (spread, (1,) * (rank - len(given)) + given)])
    for axis in scores:
        if set(support(axis)) & {rank - 2, rank - 1}:
            site.pin(axis, "attends along it")
    scores = tuple(axis for axis in scores if not set(support(axis)) & {rank - 2, rank - 1})
    return between(site, scores, full, lead + "ls", values, lead + "sv", lead + "lv", held)


Held = tuple[Axes, tuple[int, ...]]


def _repeated(site: Site, value: Any, times: int) -> Held:
    """Axes and shape of keys or values, each head standing for `times` query heads."""
    axes, shape = site.axes(value), site.extent(value)
    if times == 1:
        return axes, shape
    wide = tuple(
        site.move([axis], lambda a: np.repeat(a[0], times, axis=-3) if a[0].shape[-3] > 1 else a[0]) for axis in axes
    )
    return wide, (*shape[:-3], shape[-3] * times, *shape[-2:])


def between(
    site: Site, axes: Axes, shape: tuple[int, ...], names: str, other: Held, other_names: str, out: str, held: set[str]
) -> Axes:
    """The product of two activations, given by their axes; the inputs decide the sizes of `held`."""
    letters = out + "".join(letter for letter in names if letter not in out)
    sizes = [dict(zip(n, s, strict=True)) for n, s in ((names, shape), (other_names, other[1]))]
    operands = [
        (tuple(_spread(axis, n, letters) for axis in found), tuple(size.get(letter, 1) for letter in letters))
        for found, n, size in ((axes, names, sizes[0]), (other[0], other_names, sizes[1]))
    ]
    summed = [place for place, letter in enumerate(letters) if letter not in out]
    met = after_sum(site, meet(site, operands), summed, frozenset(map(letters.index, held.intersection(letters))))
    kept = tuple(slice(None) if place not in summed else 0 for place in range(len(letters)))
    return tuple(axis[kept] for axis in met if support(axis[kept]))


def patch_attention(patch: Patch) -> None:
    """The default scale depends on the width of the heads: write the one of the original out.

    It takes up how many channels each one stands for, where that is the same number for all.
    """
    query, scale = patch.args["query"], patch.args.get("scale")
    last = len(query.meta["val"].shape) - 1
    counts = patch.multiplicity(query, [last])
    if scale is None and (patch.shrinks(query, last) or counts is not None):
        scale = 1.0 / math.sqrt(patch.before(query, last))
    if counts is None or np.ptp(counts) or not isinstance(scale, float):
        scale_activation(patch, "query", [last])
    else:
        scale *= float(counts.flat[0])
    patch.set("scale", scale)


def attention_macs(site: Site) -> int:
    query, key, value = (site.shape(site.args[name]) for name in ("query", "key", "value"))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


SPECS = (
    OpSpec((aten.linear.default,), linear, macs=linear_macs, patch=patch_linear),
    OpSpec((aten.addmm.default,), addmm, macs=matmul_macs, patch=patch_matmul),
    OpSpec((aten.baddbmm.default,), baddbmm, macs=matmul_macs, patch=patch_matmul),
    OpSpec(
        (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.vdot.default),
        matmul,
        macs=matmul_macs,
        patch=patch_matmul,
    ),
    OpSpec((grouped_mm,), sorted_rows, macs=sorted_rows_macs, patch=patch_sorted_rows),
    OpSpec((aten.einsum.default,), einsum, macs=einsum_macs, patch=patch_einsum),
    OpSpec((aten.bilinear.default,), bilinear, macs=bilinear_macs, patch=patch_bilinear),
    OpSpec((aten.embedding.default,), embedding),
    OpSpec((aten.embedding_bag.padding_idx,), embedding_bag),
    OpSpec((aten.scaled_dot_product_attention.default,), attention, macs=attention_macs, patch=patch_attention),
)
