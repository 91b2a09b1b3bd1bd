"""Recognise channel shuffles.

`view -> transpose -> view` permutes the channels without needing them to form a rectangle. As one `index_select` the
permutation can follow any choice of channels, so nothing is coupled by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from graphzip.graph.builder import Builder
from graphzip.graph.operators import COPIES
from graphzip.graph.sizes import number, open_dims, same_size, small_sizes
from graphzip.graph.state import get_tensor

__all__ = ["fuse_shuffles"]

aten = torch.ops.aten

_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten._unsafe_view.default,
}
_MOVES = {aten.permute.default, aten.transpose.int}
_LARGEST = 1 << 26


def fuse_shuffles(module: fx.GraphModule) -> None:
    """Replace each chain that only permutes one dimension by `index_select` with a constant index."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is aten.index.Tensor:
            _select_instead(module, node)
            continue
        if node.target in {aten.channel_shuffle.default, aten.native_channel_shuffle.default}:
            chain = [node]
        elif node.target in _RESHAPES:
            chain = _chain_ending_at(node)
        else:
            continue
        if chain:
            _fuse(module, chain)


def _chain_ending_at(last: fx.Node) -> list[fx.Node]:
    """`[view, transpose, (contiguous,) view]` with no other reader in between, or nothing."""
    chain = [last]
    while True:
        before = chain[0].args[0]
        if (
            not isinstance(before, fx.Node)
            or before.target not in (_MOVES | _RESHAPES).union(COPIES)
            or len(before.users) != 1
        ):
            return []
        chain.insert(0, before)
        if before.target in _RESHAPES:
            return chain if any(node.target in _MOVES for node in chain) else []


def _select_instead(module: fx.GraphModule, node: fx.Node) -> None:
    """`x[:, order]` with one constant array of positions is an `index_select` (and a view for several dimensions)."""
    source, indices = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(indices, list | tuple)
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].op != "get_attr":
        return
    dim, fetch = given[0]
    if dim in open_dims(source.meta["val"]):
        return
    index = get_tensor(module, str(fetch.target))
    if index.is_meta or index.dim() == 0 or index.dtype not in {torch.int32, torch.int64}:
        return
    positions = index.detach().cpu().long().flatten() % number(source.meta["val"].shape[dim])
    if index.dim() > 1:
        node.args = (source, dim, list(index.shape))
        node.target = aten.unflatten.int
        flat = Builder.before(node).known(
            node.meta["val"].flatten(dim, dim + index.dim() - 1), aten.clone.default, source
        )
        node.replace_input_with(source, flat)
        node = flat
    _replace(node, source, dim, positions)


def _fuse(module: fx.GraphModule, chain: list[fx.Node]) -> None:
    source, last = chain[0].args[0], chain[-1]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"].shape, last.meta["val"].shape
    if len(before) != len(after) or not all(map(same_size, before, after)):
        return
    found = _found_alike(source, chain)
    if found is None:
        return
    _replace(last, source, *found)
    for node in reversed(chain[:-1]):
        module.graph.erase_node(node)


def _found_alike(source: fx.Node, chain: list[fx.Node]) -> tuple[int, torch.Tensor] | None:
    """Which dimension is permuted, and how; the same whatever the sizes are that the inputs decide."""
    found = None
    for shapes in small_sizes([source.meta["val"].shape, *(node.meta["val"].shape for node in chain)]):
        again = _permuted_dim(shapes[0], chain, shapes[1:])
        if again is None or (found is not None and (found[0] != again[0] or not torch.equal(found[1], again[1]))):
            return None
        found = again
    return found


def _replace(last: fx.Node, source: fx.Node, dim: int, index: torch.Tensor) -> None:
    value, build = last.meta["val"], Builder.before(last)
    fetch = build.index(f"{last.name}_index", index, value.device)
    last.replace_all_uses_with(build.known(value, aten.index_select.default, source, dim, fetch))
    last.graph.erase_node(last)


def _permuted_dim(
    shape: tuple[int, ...], chain: list[fx.Node], shapes: Sequence[tuple[int, ...]]
) -> tuple[int, torch.Tensor] | None:
    """Run the chain on numbered positions: which single dimension does it permute, and how?"""
    count = math.prod(shape)
    if not 0 < count <= _LARGEST or len(shape) < 2 or any(math.prod(each) != count for each in shapes):
        return None
    numbered = torch.arange(count, dtype=torch.int32).reshape(shape)
    moved = numbered
    for node, after in zip(chain, shapes, strict=True):
        moved = _run(node, moved, after)
    for dim in range(1, len(shape)):
        line = moved.movedim(dim, 0).reshape(shape[dim], -1)[:, 0]
        start = numbered.movedim(dim, 0).reshape(shape[dim], -1)[:, 0]
        index = torch.searchsorted(start.contiguous(), line.contiguous())
        found = bool((index < shape[dim]).all()) and torch.equal(start[index], line)
        if found and torch.equal(numbered.index_select(dim, index), moved) and not torch.equal(numbered, moved):
            return dim, index
    return None


def _run(node: fx.Node, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if node.target in _RESHAPES:
        return value.reshape(shape)
    result: torch.Tensor = node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return result
