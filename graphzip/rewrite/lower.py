"""Run the atoms first: a convolution `A D` as a depthwise one by the atoms and a 1x1 one by the coefficients.

`y = (A D) * x = A (D * x)` (ACDC, section 3.1): every input channel is convolved with the `m` atoms of the filters that
read it, then the `m` results of each channel are mixed. Multiply-accumulates per output position: `c' m L + c c' m`
in place of `c c' L`, which is less where `m` is small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from graphzip.graph.inputs import concrete_shape
from graphzip.graph.layers.factored import AtomConv, kernel_nodes
from graphzip.graph.meta import meta_of, owner_name
from graphzip.graph.operators import argument_of, set_argument
from graphzip.graph.restore_modules import factored_layer
from graphzip.graph.state import get_tensor, joined
from graphzip.graph.traced import Traced
from graphzip.rewrite.edit import Edit, before, behind

__all__ = ["AtomCall", "atom_calls", "atoms_first"]

aten = torch.ops.aten

_PLAIN = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclass(frozen=True)
class AtomCall:
    """One call of a convolution whose kernel is atoms times coefficients: of the layer `name`."""

    name: str
    node: fx.Node
    layer: AtomConv

    @property
    def kernel(self) -> tuple[int, ...]:
        return concrete_shape(argument_of(self.node, "weight").meta["val"])

    @property
    def image(self) -> tuple[int, ...]:
        """The shape of the input on the example."""
        return concrete_shape(argument_of(self.node, "input").meta["val"])

    @property
    def groups(self) -> int:
        return self.layer.groups

    @property
    def sizes(self) -> tuple[int, int]:
        """How many groups of filters have atoms of their own, and how many atoms each."""
        count, atoms = self.layer.atoms.shape[:2]
        return count, atoms


def atom_calls(traced: Traced, names: Iterable[str]) -> list[AtomCall]:
    """The calls of the factored convolutions `names`, in order; those that are tied to one go with it."""
    atoms = {id(get_tensor(traced.module, joined(name, "atoms"))): name for name in names}
    found = []
    for node in traced.graph.nodes:
        layer = factored_layer(traced.module, traced.module_types, node)
        if isinstance(layer, AtomConv) and id(layer.atoms) in atoms:
            found.append(AtomCall(atoms[id(layer.atoms)], node, layer))
    return found


def atoms_first(traced: Traced, names: Iterable[str]) -> Traced:
    """A graph in which these factored convolutions run their atoms first. `traced` stays as it is."""
    edit = Edit(traced)
    calls = atom_calls(edit.traced, names)
    rewritten = {*names, *(owner_name(call.node) for call in calls)}
    for call in calls:
        _rewrite(call)
    edit.traced.module_types = {name: kind for name, kind in traced.module_types.items() if name not in rewritten}
    return edit.done()


def _rewrite(call: AtomCall) -> None:
    node, layer, bias = call.node, call.layer, argument_of(call.node, "bias")
    atoms, coefficients = _operands(call)
    build, built = before(node), kernel_nodes(node)
    set_argument(node, "weight", build.inlined(layer.spread_atoms, {atoms: layer.atoms}))
    set_argument(node, "bias", None)
    set_argument(node, "groups", layer.in_channels)
    meta_of(node).pop("factored")
    mixing = build.inlined(layer.mixing, {coefficients: layer.coefficients})
    users, last, after = list(node.users), node, behind(node)
    dims = len(layer.kernel_size)
    if layer.repeats > 1:
        channels = layer.in_channels * layer.repeats * layer.atoms.shape[1]
        last = after.inlined(layer.by_filters, {node: torch.empty(1, channels, *[1] * dims)})
    ones, zeros, count = [1] * dims, [0] * dims, layer.atoms.shape[0]
    groups = layer.groups if count == 1 else count
    mixed = after(_PLAIN[dims], last, mixing, bias, ones, zeros, ones, groups)
    for user in users:
        user.replace_input_with(node, mixed)
    for each in built:
        if not each.users:
            each.graph.erase_node(each)


def _operands(call: AtomCall) -> tuple[fx.Node, fx.Node]:
    """The nodes of the atoms and the coefficients."""
    module = call.node.graph.owning_module
    assert module is not None
    fetched = {
        id(get_tensor(module, str(each.target))): each for each in kernel_nodes(call.node) if each.op == "get_attr"
    }
    return fetched[id(call.layer.atoms)], fetched[id(call.layer.coefficients)]
