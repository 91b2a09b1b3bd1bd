"""Merge channels: shrink parameters, patch shape constants, and prove that the result is consistent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from graphzip.analysis.channels import Analysis
from graphzip.analysis.propagate import propagate
from graphzip.errors import RewriteError
from graphzip.graph.state import attach, get_tensor, is_persistent
from graphzip.graph.trace import Traced
from graphzip.labels import IntArray, Solution, support
from graphzip.ops import OPS
from graphzip.ops.site import bind, describe
from graphzip.rewrite.layout import Layout, Merge
from graphzip.rewrite.params import shrink_parameters
from graphzip.rewrite.patch import NodePatch
from graphzip.rewrite.refresh import refresh

__all__ = ["drop_channels", "merge_channels", "rewritten"]


def merge_channels(
    traced: Traced, analysis: Analysis, merges: Iterable[Merge], *, plain_norms: bool = False
) -> tuple[Traced, list[str]]:
    """Keep the first channel of every part and add up the consumers' slices of the others.

    Returns a new graph, and the norms that no longer compute the same because `plain_norms` lets them count every
    channel once. The given graph and its tensors stay as they are. Raises `RewriteError` where the result would not
    compute the same.
    """
    layout = Layout.of(analysis, merges, plain_norms=plain_norms)
    return _shrunk(traced, layout), layout.left_plain


def drop_channels(traced: Traced, analysis: Analysis, drops: Iterable[Merge]) -> Traced:
    """Keep the first channel of every part and drop the others with all that reads them, which is lossy.

    Returns a new graph. Raises `RewriteError` where what is left does not fit together.
    """
    return _shrunk(traced, Layout.of(analysis, drops, drops=True))


def _shrunk(traced: Traced, layout: Layout) -> Traced:
    if layout.unchanged:
        return traced
    tensors = {axis.param: get_tensor(traced.module, axis.param) for axis in layout.analysis.propagation.params}
    return rewritten(traced, layout, shrink_parameters(layout, tensors))


def rewritten(traced: Traced, layout: Layout, changed: Mapping[str, torch.Tensor]) -> Traced:
    """A copy of the graph with other parameters, its constants patched for the widths that `layout` gives.

    Raises `RewriteError` where an operator does not fit them.
    """
    result = traced.copy(compiled=False)
    _patch(result, traced, layout)
    for name, value in changed.items():
        for alias in [name, *(alias for alias, first in traced.aliases.items() if first == name)]:
            attach(result.module, alias, value, persistent=is_persistent(traced.module, alias))
    result.graph.eliminate_dead_code()
    refresh(result, rewritten=True)
    _prove(result, layout)
    result.module.recompile()
    return result


def _patch(result: Traced, traced: Traced, layout: Layout) -> None:
    to_copy = dict(zip(traced.graph.nodes, list(result.graph.nodes), strict=True))
    for node, copy in list(to_copy.items()):
        spec = OPS.get(node.target) if node.op == "call_function" else None
        if spec is None or spec.patch is None:
            continue
        try:
            spec.patch(NodePatch(node, bind(node), layout, copy, to_copy, result.module))
        except RewriteError as error:
            raise RewriteError(f"{describe(node)}: {error}") from error


class _Proof:
    """Labels of a rewritten graph: wherever the analysis unified labels, the survivors must still meet each other."""

    def __init__(self, solution: Solution, lone: set[int]) -> None:
        self.classes = solution.classes
        self.lone = lone
        self.holders: dict[int, set[int]] = {}
        for outer, inner, _ in solution.containers:
            for channel, holder in zip(inner.tolist(), outer.tolist(), strict=True):
                self.holders.setdefault(channel, {channel}).add(holder)
        self.unknown = 0

    def fresh(self, count: int) -> IntArray:
        self.unknown -= count
        return np.arange(self.unknown, self.unknown + count, dtype=np.int64)

    def unify(self, left: IntArray, right: IntArray) -> None:
        left, right = np.broadcast_arrays(left, right)
        known = (left >= 0) & (right >= 0)
        one, other = self.classes[left[known]], self.classes[right[known]]
        apart = one != other
        for a, b in sorted(set(zip(one[apart].tolist(), other[apart].tolist(), strict=True))):
            held = self.holders.get(a, {a}) & self.holders.get(b, {b})  # a block's last channel stands for the block
            if not held and not {a, b} <= self.lone:
                raise RewriteError("channels that belong together no longer meet; nothing was changed")

    def share(self, one: IntArray, every: IntArray) -> None:
        """Channels that every block has alike are the same in every block that stays."""
        self.unify(one, every)

    def pin(self, labels: IntArray, reason: str) -> None:
        """What was pinned has not been merged."""

    def contain(self, outer: IntArray, inner: IntArray) -> None:
        """A container keeps its blocks."""


def _prove(result: Traced, layout: Layout) -> None:
    survivors = {(axis.param, axis.dim): layout.after(axis.labels) for axis in layout.analysis.propagation.params}
    proof = _Proof(layout.analysis.fine.solution, _last_of_lines(layout))

    def labels_of(param: str, dim: int, size: int, groups: int) -> IntArray | None:
        known = survivors.get((param, dim))
        if known is not None and known.size == size * groups and (size > 1 or known.ndim == 2):
            return known.ravel()
        return proof.fresh(size * groups) if size > 1 else None

    propagate(result.graph, proof, labels_of)


def _last_of_lines(layout: Layout) -> set[int]:
    """Channels that are alone in their line of an array now, so that rules take those of its other dimensions."""
    last: set[int] = set()
    for axes in layout.analysis.propagation.axes.values():
        for axis in (each for found in (axes if isinstance(axes, list) else [axes]) for each in found):
            left = layout.after(axis)
            if len(support(left)) < len(support(axis)):
                last.update(layout.analysis.fine.classes[left].ravel().tolist())
    return last
