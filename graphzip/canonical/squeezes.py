"""`squeeze` where a size is open: the dimension goes where the size is one, and every later one moves up.

Where inputs of that size are refused, `never_one` in the metadata of the node says so.
"""

from __future__ import annotations

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from graphzip.graph.branches import Branch
from graphzip.graph.meta import meta_of

__all__ = ["SQUEEZES", "open_sizes", "ranks_open", "squeezed", "squeezed_dims"]

aten = torch.ops.aten

SQUEEZES = {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}


def squeezed_dims(node: fx.Node) -> list[int]:
    """The dimensions that go where their size is one."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(source.meta["val"].shape)
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", list(range(rank)))
    listed: list[int] = [given] if isinstance(given, int) else list(given)  # type: ignore[arg-type]
    return sorted(dim % max(rank, 1) for dim in listed)


def _open_dims(node: fx.Node) -> list[int]:
    if node.target not in SQUEEZES or meta_of(node).get("never_one"):
        return []
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    return [
        dim
        for dim in (squeezed_dims(node) if shape else [])
        if isinstance(shape[dim], torch.SymInt) and shape[dim].node.maybe_as_int() is None
    ]


def open_sizes(node: fx.Node) -> list[torch.SymInt]:
    """The sizes on which the rank of a squeeze depends."""
    source = node.args[0] if node.args else None
    return [source.meta["val"].shape[dim] for dim in _open_dims(node)] if isinstance(source, fx.Node) else []


def squeezed(node: fx.Node) -> list[Branch]:
    """What a squeeze asks of open sizes, as comparisons."""
    source = str(node.meta.get("source", ""))
    return [Branch(sympy.Ne(size.node._expr, 1), True, source) for size in open_sizes(node)]


def ranks_open(graph: fx.Graph) -> set[fx.Node]:
    """Operators of which not even the rank is known where an open size is one: what a squeeze leads to."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and (_open_dims(node) or any(each in found for each in node.all_input_nodes)):
            found.add(node)
    return found
