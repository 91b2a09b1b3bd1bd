"""Write operators that are made of others as those others, so that the table of operators needs no row for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphzip.canonical.cells import CELLS
from graphzip.canonical.fills import LIKE, fills_apart
from graphzip.canonical.norms import NORMS
from graphzip.canonical.synonyms import SYNONYMS
from graphzip.graph.builder import Builder, rank_of, shape_of, size_of
from graphzip.graph.operators import arguments_of
from graphzip.numeric.grouped_mm import grouped_mm

__all__ = ["decompose"]

aten = torch.ops.aten


def decompose(graph: fx.Graph) -> None:
    """Replace every operator of the table below; owners and source lines stay. Readers of a fill get one each."""
    for node in list(graph.nodes):
        rule = _RULES.get(node.target, _FOREIGN.get(str(node.target))) if node.op == "call_function" else None
        if rule is not None:
            made = rule(Builder.before(node), *node.args, **node.kwargs)
            if isinstance(made, fx.Node):
                node.replace_all_uses_with(made)
                graph.erase_node(node)
    fills_apart(graph)


def _weight_norm(build: Builder, v: fx.Node, g: fx.Node, dim: int = 0) -> fx.Node:
    """`v * (g / |v|)` with the norm over all dimensions but `dim`, over all of them where `dim` is -1."""
    rank = rank_of(v)
    dims = [other for other in range(rank) if dim == -1 or other != dim % rank]
    if dims or not rank:
        size = build(aten.linalg_vector_norm.default, v, 2, dims, dim != -1)
    else:
        size = build(aten.abs.default, v)
    return build(aten.mul.Tensor, v, build(aten.div.Tensor, g, size))


def _of_all(spread: Any) -> Callable[..., fx.Node]:
    """`var` and `std` of everything."""

    def rule(build: Builder, x: fx.Node, unbiased: bool = True) -> fx.Node:
        return build(spread, x, list(range(rank_of(x))), correction=int(unbiased))

    return rule


def _moments(spread: Any) -> Callable[..., None]:
    """`var_mean` and `std_mean`: each of the two results on its own."""

    def rule(build: Builder, *given: Any, **options: Any) -> None:
        schema = build.place.target._schema.arguments  # type: ignore[union-attr]
        named = dict(zip([argument.name for argument in schema], given, strict=False)) | options
        x, keepdim = named["self"], named.get("keepdim", False)
        dims = list(range(rank_of(x))) if named.get("dim") is None else named["dim"]
        correction = named.get("correction", int(named.get("unbiased", True)))
        for part in list(build.place.users):
            assert part.target is operator.getitem
            if part.args[1] == 0:
                made = build(spread, x, dims, correction=correction, keepdim=keepdim)
            else:
                made = build(aten.mean.dim, x, dims, keepdim)
            part.replace_all_uses_with(made)
            build.graph.erase_node(part)
        build.graph.erase_node(build.place)

    return rule


def _places(build: Builder, mask: fx.Node) -> None:
    """`where(mask)`: the columns of `nonzero`; how many there are keeps its name."""
    values = build.place.meta["val"]
    if not values:
        return
    with values[0].fake_mode:
        together = torch.stack(list(values), 1)
    found = build.known(together, aten.nonzero.default, mask)
    for part in list(build.place.users):
        assert part.target is operator.getitem
        place = part.args[1]
        part.replace_all_uses_with(build.known(part.meta["val"], aten.select.int, found, 1, place))
        build.graph.erase_node(part)
    build.graph.erase_node(build.place)


def _singles(build: Builder, x: fx.Node, *_: Any, **__: Any) -> None:
    """`split` and `chunk` into single positions: each is cut out on its own."""
    dim = arguments_of(build.place)["dim"] % rank_of(x)
    if any(not isinstance(part.shape[dim], int) or part.shape[dim] != 1 for part in build.place.meta["val"]):
        return
    for part in list(build.place.users):
        assert part.target is operator.getitem
        place: Any = part.args[1]
        part.replace_all_uses_with(build.known(part.meta["val"], aten.slice.Tensor, x, dim, place, place + 1))
        build.graph.erase_node(part)
    build.graph.erase_node(build.place)


def _reshape_as(build: Builder, x: fx.Node, other: fx.Node) -> fx.Node:
    return build(aten.reshape.default, x, shape_of(build, other))


def _broadcast_to(build: Builder, x: fx.Node, size: Any) -> fx.Node:
    return build(aten.expand.default, x, size)


def _broadcast_tensors(build: Builder, values: Sequence[fx.Node]) -> None:
    for part in list(build.place.users):
        assert part.target is operator.getitem
        part.replace_all_uses_with(_wide(build, values, int(part.args[1])))  # type: ignore[arg-type]
        build.graph.erase_node(part)
    build.graph.erase_node(build.place)


def _wide(build: Builder, values: Sequence[fx.Node], which: int) -> fx.Node:
    """One of several values, with the shape that all of them have after broadcasting."""
    rank = max(map(rank_of, values))
    holders: list[tuple[fx.Node, int] | None] = [None] * rank
    for value in (values[which], *values):
        for dim, size in enumerate(value.meta["val"].shape):
            place = dim + rank - rank_of(value)
            if holders[place] is None and not _is_one(size):
                holders[place] = value, dim
    own = values[which]
    if rank_of(own) == rank and all(holder is None or holder[0] is own for holder in holders):
        return own
    sizes = [1 if holder is None else size_of(build, *holder) for holder in holders]
    return build(aten.expand.default, own, sizes)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _along(build: Builder, x: fx.Node, index: fx.Node, dim: int | None = None) -> fx.Node | None:
    """`take_along_dim`: `gather` of what both are after broadcasting along all other dimensions."""
    if dim is None:
        return None
    place, sizes = dim % rank_of(x), []
    for each, _ in enumerate(x.meta["val"].shape):
        holder = x if _is_one(index.meta["val"].shape[each]) else index
        sizes.append(-1 if each == place else size_of(build, holder, each))
    spread = [build(aten.expand.default, value, sizes) for value in (x, index)]
    return build(aten.gather.default, spread[0], place, spread[1])


def _cosine_similarity(build: Builder, a: fx.Node, b: fx.Node, dim: int = 1, eps: float = 1e-8) -> fx.Node:
    """`sum(a / max(|a|, eps) * b / max(|b|, eps))` along `dim`, of what both are after broadcasting.

    The operator's gradients are those of `|a|`, as if there were no bound. Only whole numbers are converted first.
    """
    dtype = torch.result_type(a.meta["val"], b.meta["val"])

    def unit(which: int) -> fx.Node:
        x = _wide(build, (a, b), which)
        if not x.meta["val"].is_floating_point():
            x = build(aten.to.dtype, x, dtype)
        size = build(aten.linalg_vector_norm.default, x, 2, [dim], True)
        missing = build(aten.clamp_min.default, build(aten.rsub.Scalar, size, eps), 0)
        return build(aten.div.Tensor, x, build(aten.add.Tensor, size, build(aten.detach.default, missing)))

    return build(aten.sum.dim_IntList, build(aten.mul.Tensor, unit(0), unit(1)), [dim])


def _normalised_weight(build: Builder, x: fx.Node, weight: Any, bias: Any, *more: Any) -> fx.Node | None:
    """Weight standardisation as the batch norm of a weight `(O, ..)` that is viewed as an image `(1, O, -1)`."""
    mean, _, training, _, eps, _ = more
    source: Any = x.args[0] if x.args else None
    if not training or mean is not None or x.target not in _VIEWS or source.op != "get_attr":
        return None
    shape = source.meta["val"].shape
    users = list(build.place.users)
    if x.meta["val"].shape[:2] != (1, shape[0]) or any(
        user.target not in _VIEWS | _LIKE or user.meta["val"].shape != shape for user in users
    ):
        return None
    dims = list(range(1, len(shape)))
    var = build(aten.var.correction, source, dims, correction=0, keepdim=True)
    centred = build(aten.sub.Tensor, source, build(aten.mean.dim, source, dims, True))
    made = build(aten.mul.Tensor, centred, build(aten.rsqrt.default, build(aten.add.Tensor, var, eps)))
    column = [-1, *(1 for _ in dims)]
    if weight is not None:
        made = build(aten.mul.Tensor, made, build(aten.reshape.default, weight, column))
    if bias is not None:
        made = build(aten.add.Tensor, made, build(aten.reshape.default, bias, column))
    for user in users:
        user.replace_all_uses_with(made)
    return made


def _one_layer_each(
    build: Builder,
    x: fx.Node,
    state: Any,
    params: list[fx.Node],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> None:
    """Stacked and bidirectional recurrent layers: one call per layer and direction, each of a width of its own."""
    directions = 2 if bidirectional else 1
    if layers * directions == 1:
        return
    states = list(state) if isinstance(state, (list, tuple)) else [state]
    each, time = len(params) // (layers * directions), 1 if batch_first else 0
    ends: list[fx.Node] = []
    for layer in range(layers):
        found = []
        for direction in range(directions):
            number = layer * directions + direction
            own = [_at(build, value, number) for value in states]
            source = build(aten.flip.default, x, [time]) if direction else x
            weights = params[number * each : (number + 1) * each]
            start = own if len(own) > 1 else own[0]
            target = build.place.target
            end = build(target, source, start, weights, has_biases, 1, 0.0, train, False, batch_first)
            made = build(operator.getitem, end, 0)
            found.append(build(aten.flip.default, made, [time]) if direction else made)
            ends.append(end)
        x = build(aten.cat.default, found, 2) if len(found) > 1 else found[0]
        if train and dropout and layer + 1 < layers:
            x = build(aten.dropout.default, x, dropout, True)
    for part in list(build.place.users):
        position: Any = part.args[1]
        if position:
            _use_ends(build, part, [build(operator.getitem, end, position) for end in ends])
        else:
            part.replace_all_uses_with(x)
        build.graph.erase_node(part)
    build.graph.erase_node(build.place)


def _at(build: Builder, state: fx.Node, number: int) -> fx.Node:
    """The state of one layer and direction."""
    if state.target is aten.zeros.default:
        sizes: Any = state.args[0]
        return build(aten.zeros.default, [1, *sizes[1:]], **state.kwargs)
    return build(aten.slice.Tensor, state, 0, number, number + 1)


def _use_ends(build: Builder, part: fx.Node, ends: list[fx.Node]) -> None:
    """Readers of one layer's last state get that one, others all, one behind the other."""
    for user in list(part.users):
        if user.target is aten.select.int and user.args[1] in (0, -3):
            index: Any = user.args[2]
            user.replace_all_uses_with(build(aten.select.int, ends[index], 0, 0))
            build.graph.erase_node(user)
    if part.users:
        part.replace_all_uses_with(build(aten.cat.default, ends, 0))


_VIEWS = {aten.view.default, aten.reshape.default}
_LIKE = {aten.view_as.default, aten.reshape_as.default}


def _grouped_mm(
    build: Builder, x: fx.Node, weight: fx.Node, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> fx.Node | None:
    """Rows by the matrix that each is sorted to, in the operator that takes all widths and dtypes."""
    rows = (rank_of(x), rank_of(weight)) == (2, 3) and offs is not None
    plain = bias is None and out_dtype in {None, x.meta["val"].dtype}
    return build(grouped_mm, x, weight, offs) if rows and plain else None


_RULES: dict[Any, Callable[..., fx.Node | None]] = {
    aten._weight_norm.default: _weight_norm,
    aten.var.default: _of_all(aten.var.correction),
    aten.std.default: _of_all(aten.std.correction),
    aten.var_mean.default: _moments(aten.var.correction),
    aten.var_mean.correction: _moments(aten.var.correction),
    aten.var_mean.dim: _moments(aten.var.correction),
    aten.std_mean.default: _moments(aten.std.correction),
    aten.std_mean.correction: _moments(aten.std.correction),
    aten.std_mean.dim: _moments(aten.std.correction),
    aten._grouped_mm.default: _grouped_mm,
    aten.where.default: _places,
    aten.nonzero_numpy.default: _places,
    aten.split.Tensor: _singles,
    aten.split_with_sizes.default: _singles,
    aten.chunk.default: _singles,
    aten.reshape_as.default: _reshape_as,
    aten.view_as.default: _reshape_as,
    aten.broadcast_to.default: _broadcast_to,
    aten.broadcast_tensors.default: _broadcast_tensors,
    aten.cosine_similarity.default: _cosine_similarity,
    aten.take_along_dim.default: _along,
    aten.batch_norm.default: _normalised_weight,
    aten.lstm.input: _one_layer_each,
    aten.gru.input: _one_layer_each,
    aten.rnn_tanh.input: _one_layer_each,
    aten.rnn_relu.input: _one_layer_each,
    **CELLS,
    **LIKE,
    **NORMS,
    **SYNONYMS,
}

_FOREIGN: dict[str, Callable[..., fx.Node | None]] = {"transformers.grouped_mm_fallback.default": _grouped_mm}
"""Operators of packages that need not be installed."""
