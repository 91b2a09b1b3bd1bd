"""Walk the graph once and let every operator say what it knows about the labels that reach it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from graphzip.canonical.squeezes import ranks_open, squeezed
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.meta import meta_of
from graphzip.graph.operators import arguments_of
from graphzip.graph.randomness import is_random
from graphzip.labels import IntArray, Reason
from graphzip.ops import MOVES, OPS
from graphzip.ops.conv import grouped_weights
from graphzip.ops.randomness import hold_draws
from graphzip.ops.rules import followed, opaque
from graphzip.ops.site import Move, Site, Space, describe
from graphzip.ops.spec import OpSpec

__all__ = ["ParamAxis", "Propagation", "propagate"]

aten = torch.ops.aten

_SHAPE_QUERIES = {aten.sym_size.int, aten.sym_size.default, aten.sym_numel.default, aten.sym_stride.int}


@dataclass(frozen=True)
class ParamAxis:
    """Labels of one dimension of a parameter or buffer.

    `labels` has shape `(size,)`; for the input dimension of a grouped convolution `(groups, size)`, because every
    group of rows has labels of its own there.
    """

    param: str
    dim: int
    labels: IntArray


@dataclass
class Propagation:
    """Everything the rules said, node by node.

    Where parameters are joined, the result has the labels of one of them: `joined` are those that are used alike
    because of it. `numbered` are the labels that whole numbers in a node, or in one of its outputs, are the places of.
    `summable` are labels whose slices can be added up: numbers of a parameter, or zeros.
    """

    graph: fx.Graph | None = None
    axes: dict[fx.Node, Any] = field(default_factory=dict)
    params: list[ParamAxis] = field(default_factory=list)
    moves: list[tuple[int, Move]] = field(default_factory=list)
    blocks: list[tuple[Reason, IntArray]] = field(default_factory=list)
    normed: list[IntArray] = field(default_factory=list)
    consumed: list[IntArray] = field(default_factory=list)
    produced: list[IntArray] = field(default_factory=list)
    pointwise: list[IntArray] = field(default_factory=list)
    joined: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    summable: list[IntArray] = field(default_factory=list)
    unknown: list[fx.Node] = field(default_factory=list)
    numbered: dict[fx.Node, dict[int, IntArray]] = field(default_factory=dict)
    raw: set[fx.Node] = field(default_factory=set)

    def of_copy(self, graph: fx.Graph) -> Propagation:
        """The same of a copy of the graph."""
        assert self.graph is not None
        twins = dict(zip(self.graph.nodes, graph.nodes, strict=True))
        return replace(
            self,
            graph=graph,
            axes={twins[node]: axes for node, axes in self.axes.items()},
            unknown=[twins[node] for node in self.unknown],
            numbered={twins[node]: found for node, found in self.numbered.items()},
            raw={twins[node] for node in self.raw},
        )

    def named_moves(self) -> Iterator[tuple[Reason, Move]]:
        """Every data movement with the operator that made it, as a reason begins."""
        nodes = list(self.graph.nodes) if self.graph is not None else []
        for position, move in self.moves:
            yield _subject(nodes[position]), move


def propagate(
    graph: fx.Graph, space: Space, survivors: Mapping[tuple[str, int], IntArray] | None = None
) -> Propagation:
    """Run every rule in execution order. `survivors` are the labels that dimensions of parameters have already."""
    walk = _Walk(graph, space, survivors or {})
    for position, node in enumerate(graph.nodes):
        walk.visit(position, node)
    return walk.result


class _Walk:
    def __init__(self, graph: fx.Graph, space: Space, survivors: Mapping[tuple[str, int], IntArray]) -> None:
        self.space = space
        self.survivors = survivors
        self.result = Propagation(graph)
        self.raw = self.result.raw
        self.groups = grouped_weights(graph)
        self.rank_open = ranks_open(graph)
        self.grouped: dict[fx.Node, IntArray] = {}
        self.derived: set[int] = set()
        self.numbered = self.result.numbered

    def visit(self, position: int, node: fx.Node) -> None:
        axes = self.result.axes
        if node.op == "get_attr":
            self._parameter(node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                for axis in (*_flat(axes.get(source, ())), *self.numbered.get(source, {}).values()):
                    self.space.pin(axis, Reason(node.name, "is an output of the model"))
        elif node.target is operator.getitem:
            parts, index = node.args
            found = axes.get(parts, ()) if isinstance(parts, fx.Node) else ()
            axes[node] = found[index] if isinstance(found, list) and isinstance(index, int) else ()
            if isinstance(parts, fx.Node) and isinstance(index, int) and index in self.numbered.get(parts, {}):
                self.numbered[node] = {0: self.numbered[parts][index]}
            if parts in self.raw:
                self.raw.add(node)
        elif node.op == "call_function" and node.target not in _SHAPE_QUERIES and _has_labels(node):
            self._call(position, node)

    def _parameter(self, node: fx.Node) -> None:
        self.raw.add(node)
        shape = concrete_shape(node.meta["val"])
        found: list[IntArray] = []
        for dim, size in enumerate(shape):
            groups = self.groups.get(node, 1) if dim == 1 else 1
            labels = self._labels_of(str(node.target), dim, size, groups)
            if labels is None:
                continue
            if _is_fractional(node.meta["val"]):
                self.result.summable.append(labels)
            if groups > 1:
                labels = labels.reshape(groups, size)
                self.grouped[node] = labels
            else:
                found.append(labels.reshape([-1 if d == dim else 1 for d in range(len(shape))]))
            self.result.params.append(ParamAxis(str(node.target), dim, labels))
        self.result.axes[node] = tuple(found)

    def _labels_of(self, param: str, dim: int, size: int, groups: int) -> IntArray | None:
        """Labels of dimension `dim` (of `size`, in `groups` blocks): those that survived, or fresh ones."""
        known = self.survivors.get((param, dim))
        if known is not None and known.size == size * groups and (size > 1 or known.ndim == 2):
            return known.ravel()
        return self.space.fresh(size * groups) if size > 1 else None

    def _call(self, position: int, node: fx.Node) -> None:
        spec = OPS.get(node.target)
        args = arguments_of(node) if hasattr(node.target, "_schema") else {}
        site = Site(
            node, args, self.space, self.result.axes, self.raw, self.grouped, self.derived, numbered=self.numbered
        )
        operands = site.tensors()
        random = is_random(node) and not meta_of(node).get("follows_mode")
        if random:
            hold_draws(site)
        if spec is None and random:
            self.result.axes[node] = ()
        elif spec is None:
            self.result.unknown.append(node)
            self.result.axes[node] = opaque(site)
            for operand in operands:
                if operand in self.grouped:
                    site.pin(self.grouped[operand], "is not understood")
        else:
            if node in self.rank_open:
                self._pin_patched(site, spec)
            self.result.axes[node] = followed(site, spec.propagate(site))
        self._hold_numbers(site, operands)
        if operands and all(operand in self.raw for operand in operands) and _only_rearranges(node, args, operands):
            self.raw.add(node)
            self.result.joined.extend(site.met)
            self.result.summable.extend(site.holes)
        else:
            self._roles(site, operands)
        self.result.moves.extend((position, move) for move in site.moves)
        self.result.blocks.extend((_subject(node), block) for block in site.blocks)
        self.result.normed.extend(site.normed)

    def _hold_numbers(self, site: Site, operands: Sequence[fx.Node]) -> None:
        """Labels whose places are told by numbers stay as they are where a rule does not know what becomes of these."""
        if site.numbers:
            self.numbered[site.node] = site.numbers
        for operand in operands:
            if operand not in site.followed:
                for labels in self.numbered.get(operand, {}).values():
                    site.pin(labels, "reads the places of channels as numbers")

    def _pin_patched(self, site: Site, spec: OpSpec) -> None:
        """A patch counts dimensions; behind a squeeze of the batch there is one less where the batch is one."""
        plain = site.node.target is aten.linear.default and site.is_raw(site.args["weight"])
        if spec.patch is not None and not plain and not squeezed(site.node):
            for operand in site.tensors():
                for axis in site.axes(operand):
                    site.pin(axis, "stands behind a squeeze that drops the batch where it is one")

    def _roles(self, site: Site, operands: list[fx.Node]) -> None:
        """Labels of parameters that enter as values, neither summed over nor making channels, are pointwise."""
        self.result.consumed.extend(site.consumed)
        self.result.produced.extend(site.produced)
        named = [labels.ravel() for labels in (*site.consumed, *site.produced)]
        known = np.concatenate(named) if named else np.empty(0, np.int64)
        for operand in operands:
            if operand in self.raw:
                for axis in site.axes(operand):
                    self.result.pointwise.append(np.setdiff1d(axis.ravel(), known) if known.size else axis.ravel())


def _subject(node: fx.Node) -> Reason:
    return Reason(node.name, describe(node))


def _only_rearranges(node: fx.Node, args: Mapping[str, Any], operands: Sequence[fx.Node]) -> bool:
    """Whether every number of the result is one of an operand or zero, so that slices may be added up before it."""
    if node.target not in MOVES or args.get("value"):  # what is padded with
        return False
    results = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
    return all(map(_is_fractional, results)) or not any(_is_fractional(operand.meta["val"]) for operand in operands)


def _is_fractional(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _flat(found: Any) -> list[IntArray]:
    if isinstance(found, list):
        return [axis for axes in found for axis in axes]
    return list(found)


def _has_labels(node: fx.Node) -> bool:
    """Whether an operator is given tensors, or makes labels itself."""
    return node.target in OPS or any(
        isinstance(source.meta.get("val"), torch.Tensor | list | tuple) for source in node.all_input_nodes
    )
