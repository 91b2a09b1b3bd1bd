"""Attention over tensors of other ranks than four, as the exporter takes it: over four dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx
from torch.export import ExportedProgram

from graphzip.graph.builder import Builder, rank_of, shape_of
from graphzip.graph.operators import arguments_of

__all__ = ["with_four_dimensions"]

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
