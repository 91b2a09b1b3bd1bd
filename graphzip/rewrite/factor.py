"""Store a convolution's kernel as factors: in the graph, and in the module that is trained.

The graph gets the operators that build the kernel, the module gets the layers of `graphzip.graph.factored`; both hold
the same parameters under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphzip.analysis.convs import ConvLayer
from graphzip.graph.clean import fetch_once
from graphzip.graph.factored import AtomConv, FactoredConv, SliceConv, slice_grid
from graphzip.graph.state import attach, drop_unread, find_aliases
from graphzip.graph.trace import Traced
from graphzip.ops.site import bind
from graphzip.rewrite.refresh import refresh

__all__ = ["Emitter", "factor", "set_argument"]

aten = torch.ops.aten


def factor(
    traced: Traced, model: nn.Module, layers: Sequence[ConvLayer], made: Mapping[str, FactoredConv]
) -> tuple[Traced, nn.Module]:
    """Put the factored convolutions `made`, one for each holder of each of `layers`, in place of these.

    Returns a new graph, and `model` with its submodules replaced (`made[""]` itself where the model is a convolution).
    `traced` stays as it is.
    """
    result = traced.copy(compiled=False)
    result.module_types = dict(traced.module_types)
    counterpart = dict(zip(traced.graph.nodes, result.graph.nodes, strict=True))
    for layer in layers:
        stored: Any = bind(counterpart[layer.nodes[0]])["weight"]
        for holder in layer.holders:
            new = made[holder]
            _hold(result.module, holder, new)
            result.module_types[holder] = type(new).__name__
            nodes = [counterpart[node] for node in layer.calls_of(holder)]
            if nodes:
                kernel = Emitter.before(nodes[0], holder)
                weight = kernel.atoms(new) if isinstance(new, AtomConv) else kernel.slices(new)
            for node in nodes:
                _use(node, weight, new)
        result.graph.erase_node(stored)
    result.aliases = find_aliases(result.module)
    fetch_once(result.graph, result.aliases)
    drop_unread(result.module, result.graph)
    refresh(result, rewritten=True)
    result.module.recompile()
    return result, _replace(model, layers, made)


def _hold(root: nn.Module, name: str, layer: FactoredConv) -> None:
    """The tensors of the layer in place of those of the convolution."""
    owner = root.get_submodule(name)
    for leaf in ("weight", "bias"):
        if owner._parameters.get(leaf) is not None:
            delattr(owner, leaf)
    for leaf, tensor in (layer._parameters | layer._buffers).items():
        if tensor is not None:
            attach(root, f"{name}.{leaf}" if name else leaf, tensor)


def _replace(model: nn.Module, layers: Sequence[ConvLayer], made: Mapping[str, FactoredConv]) -> nn.Module:
    for name in (holder for layer in layers for holder in layer.holders):
        if not name:
            return made[""]
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[name])
    return model


def _use(node: fx.Node, weight: fx.Node, layer: FactoredConv) -> None:
    """Let a convolution read the computed kernel, and shuffle its output where its filters are grouped."""
    set_argument(node, "weight", weight)
    set_argument(node, "groups", layer.groups)
    if isinstance(layer, AtomConv) and layer.shuffled and layer.atoms.shape[0] > 1:
        emitter = Emitter.after(node)
        channel = -1 - len(layer.kernel_size)
        parted = emitter(aten.unflatten.int, node, channel, [layer.atoms.shape[0], -1])
        swapped = emitter(aten.transpose.int, parted, channel - 1, channel)
        shuffled = emitter(aten.flatten.using_ints, swapped, channel - 1, channel)
        node.replace_all_uses_with(shuffled, delete_user_cb=lambda user: user is not parted)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give argument `name` of an operator call another value."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    args = list(node.args)
    if names.index(name) < len(args):
        args[names.index(name)] = value
        node.args = tuple(args)
    else:
        node.kwargs = {**node.kwargs, name: value}


@dataclass
class Emitter:
    """Adds operators at one place of a graph, in order; they belong to the module that owns the place."""

    at: fx.Node
    owner: str
    last: fx.Node | None = None

    @classmethod
    def before(cls, node: fx.Node, name: str) -> Emitter:
        return cls(node, name)

    @classmethod
    def after(cls, node: fx.Node) -> Emitter:
        return cls(node, str(node.meta.get("owner", "")), node)

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        graph = self.at.graph
        with graph.inserting_before(self.at) if self.last is None else graph.inserting_after(self.last):
            made = graph.call_function(target, args)
        return self._placed(made)

    def fetch(self, leaf: str) -> fx.Node:
        with self.at.graph.inserting_before(self.at):
            return self._placed(self.at.graph.get_attr(f"{self.owner}.{leaf}" if self.owner else leaf))

    def _placed(self, made: fx.Node) -> fx.Node:
        made.meta.update(owner=self.at.meta.get("owner", self.owner), source=self.at.meta.get("source", ""))
        if self.last is not None:
            self.last = made
        return made

    def atoms(self, layer: AtomConv) -> fx.Node:
        """`AtomConv.kernel` in operators."""
        count, columns = layer.atoms.shape[0], layer.in_channels // layer.groups
        used = self._cropped(self.fetch("coefficients"), layer.coefficients, (layer.out_channels // count, columns))
        atoms = self(aten.flatten.using_ints, self.fetch("atoms"), 2)
        if layer.drop:
            atoms = self(aten.feature_dropout.default, atoms, layer.drop, False)
        product = self(aten.matmul.default, self(aten.flatten.using_ints, used, -3, -2), atoms)
        return self(aten.reshape.default, product, [layer.out_channels, columns, *layer.kernel_size])

    def _cropped(self, value: fx.Node, tensor: torch.Tensor, sizes: tuple[int, int]) -> fx.Node:
        for dim, size in zip((-3, -2), sizes, strict=True):
            if size < tensor.shape[dim]:
                value = self(aten.slice.Tensor, value, dim, 0, size)
        return value

    def slices(self, layer: FactoredConv) -> fx.Node:
        """`SliceConv.kernel` in operators."""
        assert isinstance(layer, SliceConv)
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        grid, rank = slice_grid(shape, layer.size), len(shape)
        generator = self.fetch("generator")
        codes = self.fetch("codes")
        if layer.generator.dtype != layer.codes.dtype:
            generator = self(aten.type_as.default, generator, codes)
        product = self(aten.matmul.default, codes, self(aten.t.default, generator))
        order = [dim for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for dim in pair]
        tiled = self(aten.permute.default, self(aten.reshape.default, product, [*grid, *layer.size]), order)
        whole = [count * step for count, step in zip(grid, layer.size, strict=True)]
        kernel = self(aten.reshape.default, tiled, whole)
        for dim, (length, full) in enumerate(zip(shape, whole, strict=True)):
            if length < full:
                kernel = self(aten.slice.Tensor, kernel, dim, 0, length)
        return kernel
