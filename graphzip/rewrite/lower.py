"""Run the atoms first: a convolution `A D` as a depthwise one by the atoms and a 1x1 one by the coefficients.

`y = (A D) * x = A (D * x)` (ACDC, section 3.1): every input channel is convolved with the `m` atoms of the filters that
read it, then the `m` results of each channel are mixed. Multiply-accumulates per output position: `c' m L + c c' m`
in place of `c c' L`, which is less where `m` is small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphzip.graph.inputs import concrete_shape
from graphzip.graph.trace import Traced
from graphzip.ops.site import bind
from graphzip.rewrite.factor import Emitter, set_argument
from graphzip.rewrite.refresh import refresh

__all__ = ["AtomCall", "atom_calls", "atoms_first"]

aten = torch.ops.aten

_PLAIN = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclass(frozen=True)
class AtomCall:
    """One call of a convolution whose kernel is atoms times coefficients.

    `used` gives the coefficients, `(s, s', m)` or `(g, s, s', m)`; `atoms` the atoms laid out flat, `(g, m, L)`.
    """

    name: str
    node: fx.Node
    used: fx.Node
    atoms: fx.Node

    @property
    def kernel(self) -> tuple[int, ...]:
        return concrete_shape(bind(self.node)["weight"].meta["val"])

    @property
    def image(self) -> tuple[int, ...]:
        """The shape of the input on the example."""
        return concrete_shape(bind(self.node)["input"].meta["val"])

    @property
    def groups(self) -> int:
        return int(bind(self.node)["groups"])

    @property
    def sizes(self) -> tuple[int, int]:
        """How many groups of filters have atoms of their own, and how many atoms each."""
        count, atoms, _ = concrete_shape(self.atoms.meta["val"])
        return count, atoms


def atom_calls(traced: Traced, names: Iterable[str]) -> list[AtomCall]:
    """The calls of the factored convolutions `names`, in order."""
    leaves = {f"{name}.atoms" if name else "atoms": name for name in names}
    found = []
    for node in traced.graph.nodes:
        weight = bind(node).get("weight") if str(node.target).startswith("aten.conv") else None
        if weight is None or weight.target is not aten.reshape.default:
            continue
        product: Any = weight.args[0]
        if product.target is not aten.matmul.default:
            continue
        flat, atoms = product.args
        source = next((each for each in _ancestors(atoms) if each.op == "get_attr"), None)
        if source is not None and str(source.target) in leaves:
            found.append(AtomCall(leaves[str(source.target)], node, flat.args[0], atoms))
    return found


def _ancestors(node: fx.Node) -> list[fx.Node]:
    found = [node]
    for each in found:
        found += [operand for operand in each.all_input_nodes if operand not in found]
    return found


def atoms_first(traced: Traced, names: Iterable[str]) -> Traced:
    """A graph in which these factored convolutions run their atoms first. `traced` stays as it is."""
    result = traced.copy(compiled=False)
    calls = atom_calls(result, names)
    rewritten = {*names, *(str(call.node.meta.get("owner", "")) for call in calls)}
    for call in calls:
        _rewrite(call)
    result.module_types = {name: kind for name, kind in traced.module_types.items() if name not in rewritten}
    result.graph.eliminate_dead_code()
    refresh(result, rewritten=True)
    result.module.recompile()
    return result


def _rewrite(call: AtomCall) -> None:
    node, bias = call.node, bind(call.node)["bias"]
    outs, columns, *size = call.kernel
    count, atoms = call.sizes
    parts = call.groups
    inputs = columns * parts
    channel = -1 - len(size)
    repeats = max(count // parts, 1)  # groups of filters that read the same channels
    before = Emitter.before(node, call.name)
    wide = before(aten.unflatten.int, call.atoms, 0, [-1, 1, repeats])
    wide = before(aten.expand.default, wide, [-1, inputs * repeats // count, -1, -1, -1])
    set_argument(node, "weight", before(aten.reshape.default, wide, [inputs * repeats * atoms, 1, *size]))
    set_argument(node, "bias", None)
    set_argument(node, "groups", inputs)
    mixing = before(aten.flatten.using_ints, call.used, -2, -1)
    groups = parts if count == 1 else count
    if count > 1 and len(concrete_shape(call.used.meta["val"])) == 3:
        mixing = before(aten.expand.default, before(aten.unsqueeze.default, mixing, 0), [count, -1, -1])
    mixing = before(aten.reshape.default, mixing, [outs, columns * atoms, *[1] * len(size)])
    after = Emitter.after(node)
    users = list(node.users)
    last = node
    if repeats > 1:
        parted = after(aten.unflatten.int, node, channel, [parts, columns, repeats, atoms])
        swapped = after(aten.transpose.int, parted, channel - 2, channel - 1)
        last = after(aten.flatten.using_ints, swapped, channel - 3, channel)
    ones, zeros = [1] * len(size), [0] * len(size)
    mixed = after(_PLAIN[len(size)], last, mixing, bias, ones, zeros, ones, groups)
    for user in users:
        user.replace_input_with(node, mixed)
