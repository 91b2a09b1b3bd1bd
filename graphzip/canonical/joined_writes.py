"""Tensors that are written part by part: `out[..., :4] = a; out[..., 4:] = b` is `cat((a, b), -1)`.

What is written over is not read, so that its channels, or those that an empty tensor does not have, tie nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from graphzip.canonical.fills import FILLS
from graphzip.graph.builder import Builder
from graphzip.graph.operators import arguments_of

__all__ = ["join_writes"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Write:
    """A run of positions of one dimension, and what is written there."""

    source: fx.Node
    dim: int
    start: int
    end: int


def join_writes(graph: fx.Graph) -> None:
    """Replace each row of `slice_scatter` by one `cat`, where all positions are written or the others hold a number."""
    for node in list(graph.nodes):
        if _write(node) and not any(_follows(user, node) for user in node.users):
            _join(node)


def _join(last: fx.Node) -> None:
    found = _write(last)
    assert found
    writes, base = [found], last.args[0]
    while isinstance(base, fx.Node) and len(base.users) == 1:
        before = _write(base)
        if before is None or before.dim != found.dim:
            break
        writes.insert(0, before)
        base = base.args[0]
    assert isinstance(base, fx.Node)
    owners = np.full(last.meta["val"].shape[found.dim], -1)
    for number, write in enumerate(writes):
        owners[write.start : write.end] = number
    if base.target not in FILLS and (owners < 0).any():
        return
    build, parts, place = Builder.before(last), [], 0
    for owner, positions in itertools.groupby(owners.tolist()):
        end = place + len(list(positions))
        write = writes[owner] if owner >= 0 else _Write(base, found.dim, 0, len(owners))
        parts.append(_part(build, write, place, end))
        place = end
    joined = build(aten.cat.default, parts, found.dim) if len(parts) > 1 else parts[0]
    last.replace_all_uses_with(joined)
    last.graph.erase_node(last)


def _part(build: Builder, write: _Write, start: int, end: int) -> fx.Node:
    """Positions of the whole that a write brings, cut from it where others are written over."""
    if (start, end) == (write.start, write.end):
        return write.source
    return build(aten.slice.Tensor, write.source, write.dim, start - write.start, end - write.start)


def _follows(user: fx.Node, node: fx.Node) -> bool:
    """Whether a write goes on with what another left, which nothing else reads."""
    after, before = _write(user), _write(node)
    return bool(after and before and after.dim == before.dim) and user.args[0] is node and len(node.users) == 1


def _write(node: fx.Node) -> _Write | None:
    """What a `slice_scatter` writes, if its place is known and without gaps."""
    if node.target is not aten.slice_scatter.default:
        return None
    args = arguments_of(node)
    whole, part = args["self"].meta["val"], args["src"].meta["val"]
    dim = args["dim"] % whole.dim()
    size, start, end = whole.shape[dim], args["start"], args["end"]
    known = isinstance(size, int) and all(each is None or isinstance(each, int) for each in (start, end))
    if args["step"] != 1 or not known or whole.dtype != part.dtype:
        return None
    first, behind, _ = slice(start, end).indices(size)
    return _Write(args["src"], dim, first, behind) if first < behind else None
