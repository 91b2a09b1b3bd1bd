"""Take away the indices of tables that nothing was gained by (see `graphzip/canonical/shared_tables.py`)."""

from __future__ import annotations

import torch
from torch import fx

from graphzip.graph.meta import meta_of
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor, owner_of
from graphzip.graph.traced import Traced
from graphzip.rewrite.edit import Edit

__all__ = ["whole_tables"]


def whole_tables(traced: Traced, *, last: bool = True) -> Traced:
    """A graph whose layers read a whole table as it is, and share one index where they read the same of it.

    Before the `last` pass of a plan it stays as it is, for others may yet tell the layers apart.
    """
    if not last or not _choices(traced):
        return traced
    edit = Edit(traced)
    known: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
    gone: list[fx.Node] = []
    for node in _choices(edit.traced):
        args = arguments_of(node)
        table: fx.Node = args["self"]
        positions = tuple(get_tensor(edit.module, str(args["index"].target)).tolist())
        whole = positions == tuple(range(table.meta["val"].shape[-1]))
        instead = table if whole else known.setdefault((table, positions), node)
        if instead is not node:
            node.replace_all_uses_with(instead)
            edit.graph.erase_node(node)
            gone.append(args["index"])
    if not gone:
        return traced
    for index in gone:
        edit.graph.erase_node(index)
        owner, leaf = owner_of(edit.module, str(index.target))
        delattr(owner, leaf)
    return edit.done()


def _choices(traced: Traced) -> list[fx.Node]:
    calls = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default)
    return [node for node in calls if meta_of(arguments_of(node)["index"]).get("choice")]
