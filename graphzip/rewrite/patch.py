"""What an operator's row may do to its node when channels have gone: `ops.spec.Patch` on a copy of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphzip.graph.state import attach
from graphzip.labels import IntArray
from graphzip.ops.site import describe
from graphzip.ops.spec import FloatArray
from graphzip.rewrite.layout import Layout

__all__ = ["NodePatch"]


@dataclass
class NodePatch:
    """One node of the copy; `node` and `args` are those of the original graph, and so are layouts."""

    node: fx.Node
    args: Mapping[str, Any]
    layout: Layout
    copy: fx.Node
    to_copy: dict[fx.Node, fx.Node]
    module: fx.GraphModule
    _made: int = field(default=0)

    def size(self, value: Any, dim: int) -> int:
        return self.layout.size(value, dim)

    def shrinks(self, value: Any, dim: int) -> bool:
        return self.layout.shrinks(value, dim)

    def kept(self, value: Any, dim: int) -> IntArray:
        return self.layout.kept(value, dim)

    def multiplicity(self, value: Any, dims: Sequence[int], blocks: int = 1) -> FloatArray | None:
        return self.layout.multiplicity(value, dims, blocks)

    def may_stay_plain(self) -> bool:
        if self.layout.plain_norms:
            self.layout.left_plain.append(describe(self.node))
        return self.layout.plain_norms

    def consumes(self, value: Any, dim: int) -> bool:
        return self.layout.consumes(value, dim % len(value.meta["val"].shape))

    def is_raw(self, value: Any) -> bool:
        return value in self.layout.analysis.propagation.raw

    def operand(self, name: str) -> Any:
        names = [argument.name for argument in self.node.target._schema.arguments]  # type: ignore[union-attr]
        place = names.index(name)
        return self.copy.args[place] if place < len(self.copy.args) else self.copy.kwargs.get(name)

    def copied(self, value: Any) -> fx.Node:
        return self.to_copy[value]

    def set(self, name: str, value: Any) -> None:
        self.set_node(name, fx.node.map_arg(value, lambda found: self.to_copy.get(found, found)))

    def set_node(self, name: str, value: Any) -> None:
        names = [argument.name for argument in self.node.target._schema.arguments]  # type: ignore[union-attr]
        place = names.index(name)
        if place < len(self.copy.args):
            self.copy.update_arg(place, value)
        else:
            self.copy.update_kwarg(name, value)

    def replace(self, target: Any, args: tuple[Any, ...]) -> None:
        self.copy.target = target
        self.copy.args = fx.node.map_arg(args, lambda found: self.to_copy.get(found, found))
        self.copy.kwargs = {}

    def call(self, target: Any, *args: Any) -> fx.Node:
        with self.copy.graph.inserting_before(self.copy):
            return self._owned(self.copy.graph.call_function(target, args))

    def then(self, target: Any, *args: Any) -> fx.Node:
        with self.copy.graph.inserting_after(self.copy):
            made = self._owned(self.copy.graph.call_function(target, (self.copy, *args)))
        self.copy.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        self.to_copy[self.node] = made
        return made

    def become(self, value: fx.Node) -> None:
        self.copy.replace_all_uses_with(value)
        self.to_copy[self.node] = value
        self.copy.graph.erase_node(self.copy)

    def values(self, value: FloatArray, like: Any) -> fx.Node:
        fake = like.meta["val"]
        tensor = torch.as_tensor(value, dtype=fake.dtype, device=fake.device)
        if sum(size > 1 for size in value.shape) < 2:
            return self._fetch("multiplicity", tensor)
        flat = self._fetch("multiplicity", tensor.flatten())  # channels of their own in every line, not the same in all
        return self.call(torch.ops.aten.view.default, flat, list(value.shape))

    def constant(self, value: IntArray) -> fx.Node:
        found = self.node.meta["val"]
        device = (found[0] if isinstance(found, (tuple, list)) else found).device
        fetch = self._fetch("positions", torch.as_tensor(value, device=device))
        fetch.meta["numbers"] = value
        return fetch

    def _fetch(self, kind: str, value: torch.Tensor) -> fx.Node:
        name = f"{self.node.name}_{kind}{self._made or ''}"
        self._made += 1
        while hasattr(self.module, name):
            name += "_"
        attach(self.module, name, value, persistent=False)
        with self.copy.graph.inserting_before(self.copy):
            return self._owned(self.copy.graph.get_attr(name))

    def _owned(self, made: fx.Node) -> fx.Node:
        made.meta.update(owner=self.copy.meta.get("owner", ""), source=self.copy.meta.get("source", ""))
        return made
