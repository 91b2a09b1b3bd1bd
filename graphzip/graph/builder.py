"""Nodes that take the place of another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphzip.graph.torch_private import FakeTensor, enable_python_dispatcher

__all__ = ["Builder", "rank_of", "shape_of", "size_of"]

aten = torch.ops.aten


@dataclass
class Builder:
    """Makes nodes that stand for `node`, with their fake values."""

    graph: fx.Graph
    node: fx.Node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        made.meta.update(self.node.meta)
        values, options = fx.node.map_arg((args, kwargs), lambda found: found.meta["val"])
        with self._mode(), enable_python_dispatcher():
            made.meta["val"] = target(*values, **options)
        return made

    def _mode(self) -> Any:
        values = (source.meta["val"] for source in self.node.all_input_nodes)
        tensors = (each for value in values for each in (value if isinstance(value, (list, tuple)) else [value]))
        return next(each.fake_mode for each in tensors if isinstance(each, FakeTensor))


def rank_of(value: fx.Node) -> int:
    """How many dimensions a tensor has."""
    return len(value.meta["val"].shape)


def shape_of(build: Builder, value: fx.Node) -> list[Any]:
    """The sizes of a tensor as arguments: numbers, and nodes for those that the inputs decide."""
    return [size_of(build, value, dim) for dim in range(rank_of(value))]


def size_of(build: Builder, value: fx.Node, dim: int) -> Any:
    """One size of a tensor as an argument."""
    size = value.meta["val"].shape[dim]
    return build(aten.sym_size.int, value, dim) if isinstance(size, torch.SymInt) else size
