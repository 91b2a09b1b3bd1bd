"""Parts of a program in the form that the exporter takes, or that runtimes are fast at; in place.

Attention over tensors of other ranks than four becomes attention over four dimensions. Sums of channels in front of a
convolution become one themselves, with a kernel of zeros and ones,

    y_c = sum of x_i over the channels i of cluster c = sum_i S_ci x_i,

for runtimes keep channels between convolutions in a layout of their own, and an operator on indices leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from graphzip.canonical.squeezes import SQUEEZES, squeezed_dims
from graphzip.graph.builder import Builder, rank_of, shape_of
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.operators import CONVOLUTIONS, argument_of, arguments_of, set_argument
from graphzip.graph.randomness import drop_dead
from graphzip.graph.sizes import is_open, number

__all__ = ["with_four_dimensions", "with_sums_as_convolutions", "without_idle_squeezes"]

aten = torch.ops.aten

_Move = Callable[[fx.Node], fx.Node]


def with_four_dimensions(program: ExportedProgram) -> None:
    """Give queries, keys and values of every attention in a program four dimensions, in place.

    What has fewer gets dimensions of size one in front. Of what has more, the leading ones become one, where these are
    alike and no mask tells them apart; another one stays as it is.
    """
    found = [node for node in program.graph.nodes if node.target is aten.scaled_dot_product_attention.default]
    for node in found:
        build = Builder.before(node)
        moves = _moves(build, node)
        made = None if moves is None else _moved(build, node, *moves)
        if made is not None:
            node.replace_all_uses_with(made)
            program.graph_signature.replace_all_uses(node.name, made.name)
            program.graph.erase_node(node)


def _moves(build: Builder, node: fx.Node) -> tuple[_Move, _Move] | None:
    """From the rank of the queries to four and back; None where they have four, or cannot have them."""
    args = arguments_of(node)
    query, key, value, mask = (args[name] for name in ("query", "key", "value", "attn_mask"))
    rank = rank_of(query)
    if rank == 4 or {rank_of(key), rank_of(value)} != {rank} or (mask is not None and rank_of(mask) > min(rank, 3)):
        return None
    if rank < 4:
        front = [1] * (4 - rank)
        return (
            lambda x: build(aten.reshape.default, x, [*front, *shape_of(build, x)]),
            lambda x: build(aten.reshape.default, x, shape_of(build, x)[len(front) :]),
        )
    if len({tuple(map(str, each.meta["val"].shape[:-3])) for each in (query, key, value)}) > 1:
        return None
    sizes = shape_of(build, query)[:-3]
    return (
        lambda x: build(aten.flatten.using_ints, x, 0, rank - 4),
        lambda x: build(aten.reshape.default, x, [*sizes, *shape_of(build, x)[1:]]),
    )


def _moved(build: Builder, node: fx.Node, there: _Move, back: _Move) -> fx.Node:
    """A mask stays as it is, for it is broadcast."""
    args = arguments_of(node)
    query, key, value = (there(args.pop(name)) for name in ("query", "key", "value"))
    return back(build(node.target, query, key, value, args.pop("attn_mask"), **args))


def without_idle_squeezes(program: ExportedProgram) -> None:
    """Let squeezes name only dimensions that go, in place: ONNX takes one of another size for an error."""
    for node in list(program.graph.nodes):
        if node.target not in SQUEEZES:
            continue
        source = node.args[0]
        sizes = source.meta["val"].shape
        gone = [dim for dim in squeezed_dims(node) if sizes and not is_open(sizes[dim]) and number(sizes[dim]) == 1]
        if gone == squeezed_dims(node) or rank_of(node) != len(sizes) - len(gone):
            continue
        made = Builder.before(node)(aten.squeeze.dims, source, gone) if gone else source
        node.replace_all_uses_with(made)
        program.graph_signature.replace_all_uses(node.name, made.name)
        program.graph.erase_node(node)


def with_sums_as_convolutions(program: ExportedProgram) -> None:
    """Add channels up by a convolution in front of every convolution with a kernel of several places.

    In front of others, and of linear layers, that would take as many multiplications as the layer itself. Channels that
    are always zero make their number a whole multiple of `_WHOLE`.
    """
    for node in list(program.graph.nodes):
        sums = _sums(node)
        if sums is None or not all(_reads_places(user, node) for user in node.users):
            continue
        build, (x, first, others, clusters) = Builder.before(node), sums
        channels, count = concrete_shape(x.meta["val"])[1], concrete_shape(first.meta["val"])[0]
        device = x.meta["val"].device

        def chosen(index: fx.Node, size: int, build: Builder = build, x: fx.Node = x, device: Any = device) -> fx.Node:
            """One row for each index, with a one in its place."""
            places = build(aten.arange.default, size, device=device)
            found = build(aten.eq.Tensor, build(aten.unsqueeze.default, index, 1), places)
            return build(aten.to.dtype, found, x.meta["val"].dtype)

        added = build(aten.matmul.default, build(aten.t.default, chosen(clusters, count)), chosen(others, channels))
        kernel, more = build(aten.add.Tensor, chosen(first, channels), added), -count % _WHOLE
        if more:
            kernel = build(aten.constant_pad_nd.default, kernel, [0, 0, 0, more])
        kernel = build(aten.reshape.default, kernel, [count + more, channels, *[1] * (rank_of(x) - 2)])
        summed = build(_CONVOLUTIONS[rank_of(x)], x, kernel)
        for user in list(node.users):
            set_argument(user, "input", summed)
            if more:
                weight, wider = argument_of(user, "weight"), [0, 0] * (rank_of(x) - 2) + [0, more]
                padded = Builder.before(user)(aten.constant_pad_nd.default, weight, wider)
                set_argument(user, "weight", padded)
    drop_dead(program.graph)


_WHOLE = 4
"""What the number of channels has to be a multiple of, for onnxruntime to keep them in its own layout."""

_CONVOLUTIONS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}


def _sums(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """The channels that a node adds up, the first of every sum, the others, and the sum that each of these goes to."""
    if node.target is not aten.index_add.default:
        return None
    args = arguments_of(node)
    one, two = args["self"], args["source"]
    if any(part.target is not aten.index_select.default for part in (one, two)) or args["alpha"] != 1:
        return None
    (x, dim, first), (same, other_dim, others) = one.args, two.args
    rank = rank_of(x)
    dims = {each % rank for each in (dim, other_dim, args["dim"])}
    constant = all(each.op in ("placeholder", "get_attr") for each in (first, others, args["index"]))
    if x is not same or rank not in _CONVOLUTIONS or dims != {1} or not constant:
        return None
    return x, first, others, args["index"]


def _reads_places(node: fx.Node, x: fx.Node) -> bool:
    """Whether a convolution reads `x` with a kernel of several places."""
    if node.target not in CONVOLUTIONS:
        return False
    args = arguments_of(node)
    return args["input"] is x and math.prod(concrete_shape(args["weight"].meta["val"])[2:]) > 1
