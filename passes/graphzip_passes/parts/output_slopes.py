"""Derivatives of a graph's outputs, in random directions, by what some of its nodes give."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx

from graphzip.analysis.cost import batch_of
from graphzip.graph.batches import Batches, samples_in
from graphzip.graph.dual_mode import returned
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.interpreter import stream
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced

__all__ = ["Slopes", "drawn_alike", "output_slopes", "parts_of"]

_MOST: Final = 1 << 28  # numbers of slopes that are held at once, where samples can be parted
_LEAST: Final = 4  # samples of a part: what is seen of them is taken relative to their mean


@dataclass
class Slopes:
    """Of one batch: what some nodes give, and for every direction the derivative by each of the others.

    `outputs` has those that can be differentiated, flat, and `ends` their shapes. A node that they do not depend on has
    no slopes.
    """

    values: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    along: dict[fx.Node, list[torch.Tensor]] = field(default_factory=dict)
    outputs: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    ends: list[torch.Size] = field(default_factory=list)


def output_slopes(
    traced: Traced,
    by: Collection[fx.Node],
    batch: tuple[Any, ...],
    generator: torch.Generator,
    *,
    directions: int = 1,
    keep: Collection[fx.Node] = (),
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> Slopes:
    """Run the graph on a batch; `keep` names the nodes whose values are wanted. Directions are standard normal.

    With a `loss` of what the model returns, it is the loss that is differentiated, once.
    """
    inputs, (end,) = traced.graph.find_nodes(op="placeholder"), traced.graph.find_nodes(op="output")
    order = [node for node in traced.graph.nodes if node.op in ("get_attr", "call_function")]
    values, reached, found = dict(zip(inputs, batch, strict=True)), dict[fx.Node, torch.Tensor](), Slopes()
    found.values = {node: value for node, value in values.items() if node in keep}

    def watch(node: fx.Node, value: Any) -> Any:
        if node in by:
            reached[node] = value = value if value.requires_grad else value.detach().requires_grad_()
        if node in keep:
            found.values[node] = value.detach()
        return value

    with torch.enable_grad():
        for _ in stream(traced.module, order, values, live=end.all_input_nodes, seen=watch):
            pass
        leaves = pytree.tree_leaves(fx.node.map_arg(end.args[0], values.__getitem__))
        ends = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        goal = None if loss is None else [loss(returned(traced.graph, leaves, traced.forms))]
        for number in range(directions if ends else 0):
            along = None if goal else [torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in ends]
            more = number + 1 < directions
            slopes = torch.autograd.grad(goal or ends, [*reached.values()], along, retain_graph=more, allow_unused=True)
            for node, slope in zip(reached, slopes, strict=True):
                if slope is not None:
                    found.along.setdefault(node, []).append(slope)
    found.ends = [leaf.shape for leaf in ends]
    if ends:
        found.outputs = torch.cat([leaf.detach().flatten() for leaf in ends])
    return found


def parts_of(
    traced: Traced, by: Collection[fx.Node], batch: tuple[Any, ...], directions: int = 1
) -> Iterator[tuple[Any, ...]]:
    """The batch in parts whose slopes do not take too much memory; as it is where the graph's batch is not open."""
    shapes = [concrete_shape(node.meta["val"]) for node in by]
    each = directions * sum(map(math.prod, shapes)) // batch_of(traced)
    most, count = max(_MOST // max(each, 1), _LEAST), samples_in(batch)
    if not traced.batch_dynamic or count <= most:
        yield batch
        return
    is_open = [spec.dtype is not None and spec.shape[:1] == (None,) for spec in traced.inputs]
    for start in range(0, count, most):
        yield tuple(leaf[start : start + most] if parted else leaf for leaf, parted in zip(batch, is_open, strict=True))


def drawn_alike(
    traced: Traced, by: Collection[fx.Node], batches: Batches
) -> Iterator[tuple[tuple[Any, ...], torch.Generator]]:
    """The batches that are here, in parts, each with the generator that one process which has them all would come to it
    with.

    The directions of batches that are elsewhere are drawn and left.
    """
    generator = torch.Generator().manual_seed(0)
    if batches.processes.size == 1:
        yield from ((part, generator) for batch in batches.here for part in parts_of(traced, by, batch))
        return
    known: dict[Any, list[torch.Size]] = {}
    for batch in batches.here:
        for part in parts_of(traced, by, batch):
            if _shapes(part) not in known:
                known[_shapes(part)] = output_slopes(traced, by, part, generator, directions=0).ends
    ends_of = [[known[_shapes(part)] for part in parts_of(traced, by, batch)] for batch in batches.here]
    for every, here in batches.sizes(ends_of):
        if here is not None:
            yield from ((part, generator) for part in parts_of(traced, by, batches.here[here]))
        else:
            for shape in (shape for ends in every for shape in ends):
                torch.randn(shape, generator=generator)


def _shapes(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in batch)
