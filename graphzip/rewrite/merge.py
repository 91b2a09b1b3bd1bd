"""Merge channels: shrink parameters, patch shape constants, and prove that the result is consistent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from graphzip.analysis.channels import Analysis
from graphzip.analysis.propagate import propagate
from graphzip.errors import RewriteError
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import attach, get_tensor, is_persistent
from graphzip.graph.traced import Traced
from graphzip.labels import Proof, support
from graphzip.ops import OPS
from graphzip.ops.site import describe
from graphzip.rewrite.edit import Edit
from graphzip.rewrite.layout import Layout, Merge
from graphzip.rewrite.node_patch import NodePatch
from graphzip.rewrite.params import shrink_parameters
from graphzip.rewrite.vanish import leave_out

__all__ = ["drop_channels", "merge_channels", "rewritten"]


def merge_channels(
    traced: Traced, analysis: Analysis, merges: Iterable[Merge], *, plain_norms: bool = False, proven: bool = True
) -> tuple[Traced, list[str]]:
    """Keep the first channel of every part and add up the consumers' slices of the others.

    Returns a new graph, and the norms that no longer compute the same because `plain_norms` lets them count every
    channel once. The given graph and its tensors stay as they are. Raises `RewriteError` where the result would not
    compute the same; whether it would is not looked at of what is `proven` later, where it is carried out.
    """
    layout = Layout.of(analysis, merges, plain_norms=plain_norms)
    return _shrunk(traced, layout, proven=proven), layout.left_plain


def drop_channels(traced: Traced, layout: Layout) -> Traced:
    """Keep the first channel of every part and drop the others with all that reads them, which is lossy.

    `layout` is one of drops. Returns a new graph. Raises `RewriteError` where what is left does not fit together.
    """
    return _shrunk(traced, layout)


def _shrunk(traced: Traced, layout: Layout, *, proven: bool = True) -> Traced:
    if layout.unchanged:
        return traced
    tensors = {axis.param: get_tensor(traced.module, axis.param) for axis in layout.analysis.propagation.params}
    return rewritten(traced, layout, shrink_parameters(layout, tensors), proven=proven)


def rewritten(traced: Traced, layout: Layout, changed: Mapping[str, torch.Tensor], *, proven: bool = True) -> Traced:
    """A copy of the graph with other parameters, its constants patched for the widths that `layout` gives.

    Raises `RewriteError` where an operator does not fit them.
    """
    edit = Edit(traced)
    vanished = _patch(edit, layout)
    if vanished:
        leave_out(edit.graph, vanished)
    for name, value in changed.items():
        for alias in [name, *(alias for alias, first in traced.aliases.items() if first == name)]:
            attach(edit.module, alias, value, persistent=is_persistent(traced.module, alias))
    return edit.done(unread=bool(vanished), check=(lambda: _prove(edit.traced, layout)) if proven else None)


def _patch(edit: Edit, layout: Layout) -> list[fx.Node]:
    """Let every operator adapt its constants; the nodes that are zero everywhere now."""
    to_copy, vanished = edit.twins, list[fx.Node]()
    for node, copy in list(to_copy.items()):
        spec = OPS.get(node.target) if node.op == "call_function" else None
        if spec is None or spec.patch is None:
            continue
        try:
            spec.patch(NodePatch(node, arguments_of(node), layout, copy, to_copy, vanished))
        except RewriteError as error:
            raise RewriteError(f"{describe(node)}: {error}") from error
    return vanished


def _prove(result: Traced, layout: Layout) -> None:
    survivors = {(axis.param, axis.dim): layout.after(axis.labels) for axis in layout.analysis.propagation.params}
    proof = Proof(layout.analysis.fine.solution, _last_of_lines(layout))
    propagate(result.graph, proof, survivors)


def _last_of_lines(layout: Layout) -> set[int]:
    """Channels that are alone in their line of an array now, so that rules take those of its other dimensions."""
    last: set[int] = set()
    for axes in layout.analysis.propagation.axes.values():
        for axis in (each for found in (axes if isinstance(axes, list) else [axes]) for each in found):
            left = layout.after(axis)
            if len(support(left)) < len(support(axis)):
                last.update(layout.analysis.fine.classes[left].ravel().tolist())
    return last
