"""Residual branches: sums `x + f(x)` of which `f` can go and leaves `x`.

In the graph a branch is what lies between `x` and the operand `f` of an addition of the same shape and dtype, where it
has weights of its own. `x` may itself be such a sum: of `x + f(x) + g(x)` both are branches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from graphzip.graph.meta import owner_name
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor, joined
from graphzip.graph.traced import Traced

__all__ = ["Residual", "residuals"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Residual:
    """A sum of `skip` and `branch`; `parameters` are the names of those that the branch reads.

    `name` is that of the module that adds, where it adds once (`layer1.0`), else that of the part of it that has most
    of the branch's weights (`encoder_layer_0.mlp`); `#2`, `#3` ... tell those apart that would have the same.
    """

    name: str
    sum: fx.Node
    skip: fx.Node
    branch: fx.Node
    parameters: tuple[str, ...]


def residuals(traced: Traced) -> list[Residual]:
    """The residual branches of a graph, in the order in which they are added."""
    nodes = list(traced.graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    above: list[int] = []
    for number, node in enumerate(nodes):
        found = 1 << number
        for source in node.all_input_nodes:
            found |= above[place[source]]
        above.append(found)
    drafts = []
    for node in nodes:
        for skip, branch in _operands(node):
            start = next((each for each in _summands(skip) if above[place[branch]] >> place[each] & 1), None)
            if start is None:
                continue
            inside = [
                each
                for each in nodes[place[start] + 1 : place[branch] + 1]
                if above[place[branch]] >> place[each] & 1 and above[place[each]] >> place[start] & 1
            ]
            parameters = _parameters(traced, inside)
            if parameters:
                drafts.append(Residual("", node, skip, branch, parameters))
                break
    return _named(traced, drafts)


def _operands(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operands of a plain sum of two tensors that look like it, both ways."""
    if node.target is not aten.add.Tensor:
        return
    args = arguments_of(node)
    left, right = args["self"], args["other"]
    both = isinstance(left, fx.Node) and isinstance(right, fx.Node) and left is not right and args["alpha"] == 1
    if both and _kind(left) == _kind(right) == _kind(node) is not None:
        yield left, right
        yield right, left


def _kind(node: fx.Node) -> tuple[object, ...] | None:
    value = node.meta.get("val")
    return (*map(str, value.shape), value.dtype) if isinstance(value, torch.Tensor) and value.dim() else None


def _summands(node: fx.Node) -> Iterator[fx.Node]:
    """A value, and where it is a sum the values that it is a sum of."""
    waiting = [node]
    while waiting:
        found = waiting.pop(0)
        yield found
        waiting += [operand for operand, _ in _operands(found)]


def _parameters(traced: Traced, inside: list[fx.Node]) -> tuple[str, ...]:
    """The parameters that operators of a branch read; none where there is no matrix or kernel among them."""
    names = dict.fromkeys(
        str(source.target) for node in inside for source in node.all_input_nodes if source.op == "get_attr"
    )
    tensors = {name: get_tensor(traced.module, name) for name in names}
    own = {name: value for name, value in tensors.items() if isinstance(value, nn.Parameter)}
    return tuple(own) if any(value.dim() > 1 for value in own.values()) else ()


def _named(traced: Traced, drafts: list[Residual]) -> list[Residual]:
    adds = Counter(owner_name(draft.sum) for draft in drafts)
    times: Counter[str] = Counter()
    found = []
    for draft in drafts:
        owner = owner_name(draft.sum)
        name = owner if owner and adds[owner] == 1 else _part(traced, draft, owner)
        times[name] += 1
        name = name if times[name] == 1 else f"{name}#{times[name]}"
        found.append(Residual(traced.qualified(name), draft.sum, draft.skip, draft.branch, draft.parameters))
    return found


def _part(traced: Traced, draft: Residual, owner: str) -> str:
    """The part of a module that has most of the weights of a branch."""
    start = f"{owner}." if owner else ""
    sizes: Counter[str] = Counter()
    for name in draft.parameters:
        if name.startswith(start) and "." in name[len(start) :]:
            sizes[name[len(start) :].partition(".")[0]] += get_tensor(traced.module, name).numel()
    return joined(owner, sizes.most_common(1)[0][0]) if sizes else owner or "block"
