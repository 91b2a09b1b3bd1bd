"""Tables that several layers read: each layer reads its own positions of them.

The cosines and sines of rotary embeddings (Su et al., 2021) are computed once from a buffer of frequencies, so their
channels would be those of all layers at once. An index between the table and a layer gives every layer channels of its
own, whose places in the table it tells. What of that was not needed goes again (`graphzip/rewrite/whole_tables.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from graphzip.graph.builder import Builder
from graphzip.graph.meta import meta_of, owner_name
from graphzip.graph.state import get_tensor

__all__ = ["tables_apart"]

aten = torch.ops.aten


def tables_apart(module: fx.GraphModule) -> None:
    """Put an index between every table that several modules read and each of these modules."""
    tables = _Tables(module)
    for node in tables.found:
        if node.target is aten.index_select.default:
            _mark(module, node, tables)
    for table in tables.found:
        for readers in tables.read_apart(table):
            build = Builder.before(readers[0])
            width = table.meta["val"].shape[-1]
            choice = build.constant(_free(module, f"{table.name}_channels"), torch.arange(width, device=_place(table)))
            meta_of(choice)["choice"] = True
            own = build(aten.index_select.default, table, -1, choice)
            for reader in readers:
                reader.replace_input_with(table, own)


class _Tables:
    """What is computed from buffers and whole numbers alone, and which modules read it in the end."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.widths: dict[fx.Node, frozenset[int]] = {}
        """For every such node the sizes of the buffers of fractions that it is made of."""
        for node in module.graph.nodes:
            found = self._widths_of(module, node)
            if found is not None:
                self.widths[node] = found
        self.readers: dict[fx.Node, frozenset[str]] = {}
        for node in reversed(self.widths):
            self.readers[node] = frozenset[str]().union(*(self._reached(user) for user in node.users))
        self.found = [node for node in self.widths if self._is_table(node)]

    def _widths_of(self, module: fx.GraphModule, node: fx.Node) -> frozenset[int] | None:
        value = node.meta.get("val")
        if node.op == "get_attr":
            tensor = get_tensor(module, str(node.target))
            if isinstance(tensor, nn.Parameter):
                return None
            return frozenset(size for size in tensor.shape if size > 1) if _is_fractional(tensor) else frozenset()
        if node.op == "placeholder":
            return None if isinstance(value, torch.Tensor) and _is_fractional(value) else frozenset()
        if node.op != "call_function" or not all(source in self.widths for source in node.all_input_nodes):
            return None
        return frozenset[int]().union(*(self.widths[source] for source in node.all_input_nodes))

    def _reached(self, reader: fx.Node) -> frozenset[str]:
        return self.readers[reader] if reader in self.widths else frozenset([owner_name(reader)])

    def _is_table(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not _is_fractional(value) or not value.dim():
            return False
        width = value.shape[-1]
        return isinstance(width, int) and width > 1 and any(width % size == 0 for size in self.widths[node])

    def read_apart(self, table: fx.Node) -> Iterator[list[fx.Node]]:
        """The readers of a table that lead to one module each, module by module, where there are several modules."""
        chosen = {reader for reader in table.users if meta_of(_index_of(reader)).get("choice")}
        if len(self.readers[table]) < 2 and not chosen:
            return
        alone: dict[frozenset[str], list[fx.Node]] = {}
        for reader in table.users:
            reached = self._reached(reader)
            if len(reached) == 1 and reader not in chosen:
                alone.setdefault(reached, []).append(reader)
        yield from alone.values()


def _mark(module: fx.GraphModule, node: fx.Node, tables: _Tables) -> None:
    """An index of that kind that a model brings along, for it has been compiled before."""
    table, dim, index = node.args
    assert isinstance(table, fx.Node)
    assert isinstance(dim, int)
    if not isinstance(index, fx.Node) or index.op != "get_attr" or "numbers" in meta_of(index):
        return
    last = dim in {-1, table.meta["val"].dim() - 1}
    if last and tables._is_table(table) and len(index.users) == 1 and get_tensor(module, str(index.target)).dim() == 1:
        meta_of(index)["choice"] = True


def _index_of(reader: fx.Node) -> fx.Node:
    index = reader.args[2] if reader.target is aten.index_select.default else reader
    return index if isinstance(index, fx.Node) else reader


def _is_fractional(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _place(table: fx.Node) -> torch.device:
    device: torch.device = table.meta["val"].device
    return device


def _free(module: fx.GraphModule, name: str) -> str:
    while hasattr(module, name):
        name += "_"
    return name
