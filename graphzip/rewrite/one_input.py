"""Several models that are given the same input: what they compute alike is computed once.

A value of one of the models is a choice of channels of a base, `v = base[index]` along their dimension; values of
several models may have one base. Layers of several models with numbers in common, `W_t` for model t, that read one base
are one product where all of them read the same channels C,

    y = W x[C]    with every row that differs once,    y_t = y[rows of t],

and where a model reads channels A_t of its own besides, what they have in common is one product, added to theirs:

    y_t = (W x[C])[rows of t] + W_t[:, A_t] x[A_t].

So every number that is stored once is multiplied once. The base of a convolution is in pieces, the rows that the same
models have: what reads them reads whole pieces side by side, for runtimes keep what convolutions give in a layout of
their own and a slice leaves it. Operators that treat channels alike act on the base. What is in
common behind that ends where channels are mixed in another way, or scaled by each model for itself: the models read
their own channels there and go on alone.

Source: He, Zhou and Thiele, "Multi-Task Zipping via Layer-wise Neuron Sharing" (2018), Fig. 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from graphzip.analysis.layers import Layer, layer_of
from graphzip.graph.dual_mode import one_form
from graphzip.graph.guards import tie_sizes
from graphzip.graph.inputs import CallCode, InputSpec, concrete_shape, fake_input
from graphzip.graph.meta import owner_name, place_meta
from graphzip.graph.operators import COPIES, arguments_of
from graphzip.graph.randomness import drop_dead
from graphzip.graph.state import attach, drop_unread, graph_module, share_tree
from graphzip.graph.torch_private import FakeTensorMode, ShapeEnv, pytree
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.rewrite.common_layers import Product, Products, StoredNumbers, products, stored
from graphzip.rewrite.edit import settle, tie
from graphzip.rewrite.join_models import inputs_of, renamed

__all__ = ["one_input"]

aten = torch.ops.aten

_POOLS = {
    getattr(aten, f"{kind}_pool{dims}d").default: dims
    for dims in (1, 2, 3)
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
}
_POOLS = {target: dims for target, dims in _POOLS.items() if len(target._schema.returns) == 1}
_BLOCK = 16
"""Runtimes keep channels of what convolutions give in blocks of as many, or of half as many."""

_VIEWS = {aten.view.default, aten.reshape.default, aten.flatten.using_ints}


def one_input(joint: Traced) -> Traced:
    """The eval form of joint models as one graph with the inputs of the first: `forward(x)` gives a dictionary by task.

    The inputs of all tasks are alike but for their names. Tensors that are not changed are shared with the given graph.
    """
    first = joint.tasks[0]
    graph = joint.graph if joint.forms is None else one_form(joint.graph, joint.forms, training=False)
    merging = _Merging(joint, graph)
    inputs, conditions = _inputs(joint)
    merging.take(inputs_of(joint)[first.name], inputs, conditions)
    merging.run()
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]
    merging.made.set_codegen(CallCode(info._replace(orig_args=list(first.arguments), in_spec=first.in_spec)))
    drop_dead(merging.made)
    module = graph_module(merging.root, merging.made, "Tasks", compiled=False)
    drop_unread(module, module.graph)
    one = replace(
        joint,
        module=module,
        inputs=inputs,
        example_inputs=inputs_of(joint)[first.name],
        conditions=conditions,
        tasks=(),
        forms=None,
    )
    tie(one)
    return settle(one)


def _inputs(joint: Traced) -> tuple[tuple[InputSpec, ...], tuple[str, ...]]:
    """The inputs of the first task, with the sizes fixed that any task fixes, and what any of them asks of sizes."""
    count = joint.tasks[0].in_spec.num_leaves
    named = [spec.name.removeprefix(f"{joint.tasks[0].name}_") for spec in joint.inputs[:count]]
    found = []
    for place, name in enumerate(named):
        specs = joint.inputs[place::count]
        shape = tuple(
            next((size for size in sizes if size is not None), None)
            for sizes in zip(*(s.shape for s in specs), strict=True)
        )
        found.append(InputSpec(name, shape, specs[0].dtype))
    names = {spec.name: named[place % count] for place, spec in enumerate(joint.inputs)}
    return tuple(found), tuple(dict.fromkeys(renamed(text, names) for text in joint.conditions))


@dataclass(frozen=True)
class _View:
    """A value of a model: the channels `index` along `dim` of a base, its pieces of these widths side by side."""

    pieces: tuple[fx.Node, ...]
    widths: tuple[int, ...]
    dim: int
    index: IntArray

    @property
    def order(self) -> IntArray:
        """Which channel of the value each of its channels is, when they are in the order of the base."""
        return np.argsort(self.index, kind="stable")

    def sorted(self) -> _View:
        """The same channels in the order of the base."""
        return replace(self, index=self.index[self.order])


class _Merging:
    """Writes the new graph. A model's value is a node of it, or a view of one."""

    def __init__(self, joint: Traced, graph: fx.Graph) -> None:
        self.joint, self.graph = joint, graph
        self.root, self.made = share_tree(joint.module), fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.known: dict[Any, fx.Node] = {}
        self.groups = _groups(joint, graph)
        self.stored = StoredNumbers(joint.module)

    def take(self, example: tuple[Any, ...], inputs: Sequence[InputSpec], conditions: Sequence[str]) -> None:
        """Let all tasks read the inputs of the first."""
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fresh = []
        for spec, leaf in zip(inputs, pytree.tree_leaves((example, {})), strict=True):
            made = self.made.placeholder(spec.name)
            made.meta["val"] = fake_input(mode, leaf, spec)
            fresh.append(made)
        tie_sizes(conditions, {str(each.target): each.meta["val"] for each in fresh})
        for place, node in enumerate(self.graph.find_nodes(op="placeholder")):
            self.values[node] = fresh[place % len(fresh)]

    def run(self) -> None:
        """Write node after node; layers with numbers in common when what all of them read is there."""
        waiting = [node for node in self.graph.nodes if node.op != "placeholder"]
        while waiting:
            left = [node for node in waiting if not self._write(node)]
            if len(left) == len(waiting):  # each of two layers waits for the other
                node = next(node for node in left if node in self.groups)
                self.groups = {each: group for each, group in self.groups.items() if node not in group}
            waiting = left

    def _write(self, node: fx.Node) -> bool:
        """Whether what a node needs is there; then it is written."""
        group = self.groups.get(node, (node,))
        if node in self.values:
            return True
        if any(source not in self.values for each in group for source in each.all_input_nodes):
            return False
        if len(group) > 1:
            self._layers(group)
        elif node.op == "output":
            self.made.output(fx.node.map_arg(node.args[0], self._whole))
        else:
            self.values[node] = self._on_base(node) or self._copied(node)
        return True

    def _whole(self, node: fx.Node) -> fx.Node:
        """A node with all that a value holds, in its own order."""
        value = self.values[node]
        if not isinstance(value, _View):
            return value  # type: ignore[no-any-return]
        return self._chosen(self._read(value.sorted()), value.dim, np.argsort(value.order))

    def _read(self, view: _View) -> fx.Node:
        """The channels of a view that is in the order of its base: whole pieces, as far as it can be."""
        starts = np.cumsum([0, *view.widths])
        parts = []
        for piece, start, stop in zip(view.pieces, starts, starts[1:], strict=False):
            own = view.index[(view.index >= start) & (view.index < stop)] - start
            if own.size:
                parts.append(self._chosen(piece, view.dim, own, int(stop - start)))
        return parts[0] if len(parts) == 1 else self._emit(aten.cat.default, parts, view.dim, like=parts[0])

    def _chosen(self, value: fx.Node, dim: int, index: IntArray, width: int | None = None) -> fx.Node:
        """Channels of a value that has `width`, by default as many as are chosen."""
        if np.array_equal(index, np.arange(index.size if width is None else width)):
            return value
        start, stop = int(index[0]), int(index[-1]) + 1
        if np.array_equal(index, np.arange(start, stop)):
            return self._emit(aten.slice.Tensor, value, dim, start, stop, like=value)
        return self._emit(aten.index_select.default, value, dim, self._constant(index, value), like=value)

    def _constant(self, index: IntArray, like: fx.Node) -> fx.Node:
        key = ("places", index.tobytes())
        if key not in self.known:
            name = f"places_{len(self.known)}"
            device = next((each.device for each in self.joint.module.parameters()), None)
            attach(self.root, name, torch.from_numpy(np.ascontiguousarray(index)).to(device), persistent=False)
            self.known[key] = self.made.get_attr(name)
            self.known[key].meta.update(place_meta(like) | {"numbers": index})
        return self.known[key]

    def _emit(self, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """A call, or the same one that is there already."""
        key = (target, _frozen(args), _frozen(kwargs))
        random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
        if random or key not in self.known:
            made = self.made.call_function(target, args, kwargs)
            made.meta.update(place_meta(like))
            self.known[key] = made
        return self.known[key]

    def _copied(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            if node.target not in self.known:
                self.known[node.target] = self.made.node_copy(node)
                self.known[node.target].meta.pop("val", None)
            return self.known[node.target]
        replaced = self._in_order(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: replaced.get(each) or self._whole(each))
        made = self._emit(node.target, *args, like=node, **kwargs)
        made.meta.update({key: value for key, value in node.meta.items() if key != "val"})
        return made

    def _in_order(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        """What a layer reads in place of channels in another order than that of their base: weights in that order."""
        layer = layer_of(node)
        view = None if layer is None or layer.groups > 1 else self.values[layer.input]
        if layer is None or not isinstance(view, _View) or layer.weight is layer.input:
            return {}
        weight = self._chosen(self._whole(layer.weight), layer.input_dim, view.order)
        return {layer.input: self._read(view.sorted()), layer.weight: weight}

    def _on_base(self, node: fx.Node) -> _View | None:
        """The view that a node gives of what its operator makes of a base, if channels are alike to it."""
        source = node.args[0] if node.args else None
        view = self.values.get(source) if isinstance(source, fx.Node) else None
        if not isinstance(view, _View) or node.all_input_nodes[0] is not source:
            return None
        if node.target in _VIEWS:
            return self._flattened(node, view)
        if len(node.all_input_nodes) > 1 or not _treats_alike(node, view.dim):
            return None
        pieces = [self._emit(node.target, piece, *node.args[1:], like=node, **node.kwargs) for piece in view.pieces]
        return replace(view, pieces=tuple(pieces))

    def _flattened(self, node: fx.Node, view: _View) -> _View | None:
        """Where a channel becomes as many as it has places."""
        source, made = node.all_input_nodes[0].meta["val"], node.meta["val"]
        before, after, inner = source.shape, made.shape, concrete_shape(source)[view.dim + 1 :]
        fixed = all(isinstance(size, int) for size in before[view.dim :])
        if view.dim != 1 or not fixed or len(after) != 2 or after[1] != before[1] * math.prod(inner):
            return None
        places = math.prod(inner)
        pieces = tuple(self._emit(aten.flatten.using_ints, piece, 1, -1, like=node) for piece in view.pieces)
        index = (view.index[:, None] * places + np.arange(places)).ravel()
        return _View(pieces, tuple(width * places for width in view.widths), 1, index)

    def _layers(self, group: Sequence[fx.Node]) -> None:
        """Layers with numbers in common: those that read one base are written together, others alone."""
        together: dict[Any, list[tuple[Layer, _View]]] = {}
        for node in group:
            layer = layer_of(node)
            assert layer is not None
            value = self.values[layer.input]
            if not isinstance(value, _View):
                rank, width = layer.input.meta["val"].dim(), layer.shape[1]
                value = _View((value,), (width,), rank + layer.dim, np.arange(width))
            rest = {key: each for key, each in arguments_of(node).items() if key not in ("input", "weight", "bias")}
            key = (value.pieces, value.dim, node.target, layer.kernel, _frozen(rest))
            together.setdefault(key, []).append((layer, value))
        for members in together.values():
            layers, views = zip(*members, strict=True)
            normed = any(user.target is aten.batch_norm.default for layer in layers for user in layer.node.users)
            numbers = [self.stored.of(layer) for layer in layers]
            found = None
            if len(members) > 1:
                block = 1 if layers[0].is_linear else _BLOCK
                found = products(numbers, [view.index for view in views], apart=normed, block=block)
            if found is None:
                self.values.update({layer.node: self._copied(layer.node) for layer in layers})
            else:
                self._common(layers, views, found)

    def _common(self, layers: Sequence[Layer], views: Sequence[_View], found: Products) -> None:
        """Write the products of layers; convolutions row by row of those who have them, which keeps them whole."""
        runs = [found.common.outs] if layers[0].is_linear else found.runs
        parts = np.split(np.arange(found.common.outs), np.cumsum(runs)[:-1])
        pieces = tuple(
            self._product(layers[0], views[0], found.common.in_order(rows), f"common_{number}" if number else "common")
            for number, rows in enumerate(parts)
        )
        for layer, view, rows, own in zip(layers, views, found.rows, found.own, strict=True):
            made = _View(pieces, tuple(runs), view.dim, rows)
            if own is not None:
                alone = self._product(layer, view, own.in_order(made.order), "own")
                added = self._emit(aten.add.Tensor, self._read(made.sorted()), alone, like=layer.node)
                made = _View((added,), (rows.size,), view.dim, np.argsort(made.order))
            self.values[layer.node] = made

    def _product(self, layer: Layer, view: _View, product: Product, what: str) -> fx.Node:
        """The operator of a layer with another weight, on the channels of the base that it reads."""
        owner = owner_name(layer.node)
        fetched = {}
        for leaf, tensor in (("weight", product.weight), ("bias", product.bias)):
            if tensor is not None:
                name = ".".join(part for part in (owner, f"{leaf}_{what}") if part)
                attach(self.root, name, nn.Parameter(tensor, requires_grad=False))
                fetched[leaf] = self.made.get_attr(name)
                fetched[leaf].meta.update(place_meta(layer.node))
        read = self._read(replace(view, index=product.reads))
        args = arguments_of(layer.node) | {"bias": None, "input": read} | fetched
        names = [argument.name for argument in layer.node.target._schema.arguments]  # type: ignore[union-attr]
        return self._emit(layer.node.target, *(args[name] for name in names), like=layer.node)


def _treats_alike(node: fx.Node, dim: int) -> bool:
    """Whether an operator does the same to every channel along `dim` and leaves it where it is."""
    rank = node.all_input_nodes[0].meta["val"].dim()
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in COPIES:
        return True
    if node.target in _POOLS:
        return bool(dim < rank - _POOLS[node.target])
    if node.target is aten.mean.dim:
        dims: Iterable[int] = arguments_of(node)["dim"] or ()
        return bool(dims) and all(each % rank > dim for each in dims)
    return False


def _groups(joint: Traced, graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """For every layer with numbers that layers of other tasks have, too, all of these, of each task one at most."""
    groups: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        layer = layer_of(node)
        names = () if layer is None or layer.transposed or layer.groups > 1 else stored(layer, joint.module)
        found = list({id(groups[name]): groups[name] for name in names if name in groups}.values())
        merged = [*(each for group in found for each in group), node] if names else []
        held = {name for name, group in groups.items() if any(group is each for each in found)}
        groups.update(dict.fromkeys({*names, *held}, merged))
    several = {id(group): tuple(group) for group in groups.values() if len(group) > 1}
    return {node: group for group in several.values() if _one_of_each(group) for node in group}


def _one_of_each(group: Sequence[fx.Node]) -> bool:
    tasks = [owner_name(node).partition(".")[0] for node in group]
    return len(set(tasks)) == len(tasks)


def _frozen(value: Any) -> Any:
    """Arguments as a key."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(each)) for key, each in value.items())
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
