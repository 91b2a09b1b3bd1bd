"""Merge channels: shrink parameters, patch shape constants, and prove that the result is consistent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from graphzip.analysis.channels import Analysis
from graphzip.analysis.propagate import propagate
from graphzip.errors import RewriteError
from graphzip.graph.state import attach, get_tensor, is_persistent
from graphzip.graph.trace import Traced
from graphzip.labels import IntArray
from graphzip.ops import OPS
from graphzip.ops.site import bind, describe
from graphzip.rewrite.layout import Layout
from graphzip.rewrite.params import shrink_parameters

__all__ = ["merge_channels"]


def merge_channels(
    traced: Traced, analysis: Analysis, clusters: Iterable[tuple[IntArray, Sequence[Sequence[int]]]]
) -> Traced:
    """Keep the first channel of every cluster and add up the consumers' slices of the others.

    `clusters` pairs the channels of a group (`ChannelGroup.channels`) with a partition of their positions. Returns a
    new graph; the given one and its tensors stay as they are. Raises `RewriteError` where the result would not compute
    the same.
    """
    layout = Layout.of(analysis, clusters)
    if layout.stays.all():
        return traced
    result = traced.copy()
    tensors = {axis.param: get_tensor(traced.module, axis.param) for axis in analysis.propagation.params}
    changed = shrink_parameters(layout, tensors)
    _patch(result, traced, layout)
    for name, value in changed.items():
        for alias in [name, *(alias for alias, first in traced.aliases.items() if first == name)]:
            attach(result.module, alias, value, persistent=is_persistent(traced.module, alias))
    result.graph.eliminate_dead_code()
    refresh(result)
    _prove(result, layout)
    result.module.recompile()
    return result


@dataclass
class _Patch:
    """`ops.spec.Patch` for one node of the copy; layouts are those of the original graph."""

    node: fx.Node
    args: Mapping[str, Any]
    layout: Layout
    copy: fx.Node
    to_copy: Mapping[fx.Node, fx.Node]
    module: fx.GraphModule

    def size(self, value: Any, dim: int) -> int:
        return self.layout.size(value, dim) if not self._is_blocked(value, dim) else self._blocked_size(value)

    def _is_blocked(self, value: fx.Node, dim: int) -> bool:
        return dim == 1 and value.op == "get_attr" and self._columns(value) is not None

    def _columns(self, value: fx.Node) -> IntArray | None:
        for axis in self.layout.analysis.propagation.params:
            if axis.param == value.target and axis.labels.ndim == 2:
                return axis.labels
        return None

    def _blocked_size(self, value: fx.Node) -> int:
        columns = self._columns(value)
        assert columns is not None
        return int(self.layout.after(columns).shape[1])

    def shrinks(self, value: Any, dim: int) -> bool:
        return self.layout.shrinks(value, dim)

    def kept(self, value: Any, dim: int) -> IntArray:
        return self.layout.kept(value, dim)

    def set(self, name: str, value: Any) -> None:
        schema = self.node.target._schema  # type: ignore[union-attr]
        value = fx.node.map_arg(value, lambda found: self.to_copy.get(found, found))
        for position, argument in enumerate(schema.arguments):
            if argument.name == name and position < len(self.copy.args):
                self.copy.update_arg(position, value)
                return
        self.copy.update_kwarg(name, value)

    def replace(self, target: Any, args: tuple[Any, ...]) -> None:
        self.copy.target = target
        self.copy.args = fx.node.map_arg(args, lambda found: self.to_copy.get(found, found))
        self.copy.kwargs = {}

    def constant(self, value: IntArray) -> fx.Node:
        device = self.node.meta["val"].device
        name = f"{self.copy.name}_positions"
        attach(self.module, name, torch.as_tensor(value, device=device), persistent=False)
        with self.copy.graph.inserting_before(self.copy):
            fetch = self.copy.graph.get_attr(name)
        fetch.meta.update(owner="", source="", numbers=value)
        return fetch


def _patch(result: Traced, traced: Traced, layout: Layout) -> None:
    to_copy = dict(zip(traced.graph.nodes, list(result.graph.nodes), strict=True))
    for node, copy in to_copy.items():
        spec = OPS.get(node.target) if node.op == "call_function" else None
        if spec is None or spec.patch is None:
            continue
        try:
            spec.patch(_Patch(node, bind(node), layout, copy, to_copy, result.module))
        except RewriteError as error:
            raise RewriteError(f"{describe(node)}: {error}") from error


def refresh(traced: Traced) -> None:
    """Recompute every node's fake value, and with it its shape."""
    mode = next(
        node.meta["val"].fake_mode
        for node in traced.graph.nodes
        if isinstance(node.meta.get("val"), torch._subclasses.FakeTensor)
    )
    values: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = node.meta["val"]
        elif node.op == "get_attr":
            values[node] = mode.from_tensor(get_tensor(traced.module, str(node.target)), static_shapes=True)
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            try:
                with mode, enable_python_dispatcher(), torch.enable_grad():
                    values[node] = node.target(*args, **kwargs)
            except Exception as error:
                raise RewriteError(
                    f"{describe(node)} does not fit the shapes after the merge: {str(error).splitlines()[0]}"
                ) from error
        node.meta["val"] = values.get(node)


class _Proof:
    """Labels of a rewritten graph: wherever the analysis unified labels, the survivors must still meet each other."""

    def __init__(self, classes: IntArray) -> None:
        self.classes = classes
        self.unknown = 0
        self.at: fx.Node | None = None

    def fresh(self, count: int) -> IntArray:
        self.unknown -= count
        return np.arange(self.unknown, self.unknown + count, dtype=np.int64)

    def unify(self, left: IntArray, right: IntArray) -> None:
        left, right = np.broadcast_arrays(left, right)
        known = (left >= 0) & (right >= 0)
        if (self.classes[left[known]] != self.classes[right[known]]).any():
            raise RewriteError("channels that belong together no longer meet; nothing was changed")

    def pin(self, labels: IntArray, reason: str) -> None:
        """What was pinned has not been merged."""

    def contain(self, outer: IntArray, inner: IntArray) -> None:
        """A container keeps its blocks."""


def _prove(result: Traced, layout: Layout) -> None:
    survivors = {(axis.param, axis.dim): layout.after(axis.labels) for axis in layout.analysis.propagation.params}
    proof = _Proof(layout.analysis.classes)

    def labels_of(param: str, dim: int, size: int, groups: int) -> IntArray:
        known = survivors.get((param, dim))
        return proof.fresh(size * groups) if known is None or known.size != size * groups else known.ravel()

    propagate(result.graph, proof, labels_of)
