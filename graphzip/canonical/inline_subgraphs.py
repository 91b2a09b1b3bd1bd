"""Inline the subgraphs that `torch.export` keeps apart, so that the graph is flat.

A `with torch.no_grad():` block in a forward becomes one node that calls a graph of its own. Its operators move into the
outer graph, and its results are detached, which is what the block does to gradients. A block under an active autocast
computes in another dtype than its operators say, so it is refused, as are branches and loops on tensor values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphzip.canonical.memory import writes, written
from graphzip.errors import TraceError
from graphzip.graph.source import source_of
from graphzip.graph.torch_private import HigherOrderOperator

__all__ = ["inline_subgraphs"]

aten = torch.ops.aten


def inline_subgraphs(module: fx.GraphModule) -> list[str]:
    """Inline every subgraph of `module`, in place; sentences on what one did that the flat graph does not.

    Raises `TraceError`, which names the source line, for one that cannot be inlined.
    """
    notes: list[str] = []
    for node in list(module.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
            notes += _open(module, node)
    return notes


def _open(module: fx.GraphModule, node: fx.Node) -> list[str]:
    kind = node.target.name()  # type: ignore[union-attr]
    if kind not in {"wrap_with_set_grad_enabled", "wrap_with_autocast"}:
        raise TraceError(
            f"{_line(node)}{kind} runs a function of its own inside the model, which graphzip does not look into; "
            "write it without, or compile only a part: scope='name.of.submodule'"
        )
    settings = 1 if kind == "wrap_with_set_grad_enabled" else 4
    subgraph, *operands = node.args[settings:]
    assert isinstance(subgraph, fx.Node)
    inner = module.get_submodule(str(subgraph.target))
    assert isinstance(inner, fx.GraphModule)
    notes = inline_subgraphs(inner)
    detach = False
    if kind == "wrap_with_autocast":
        notes.append(_autocast_off(node, inner))
    elif not node.args[0]:
        detach = True
        for found in inner.graph.nodes:
            found.meta.setdefault("no_grad", True)  # what it writes outside is not differentiated there
    else:
        for found in inner.graph.nodes:
            found.meta.setdefault("no_grad", False)
    _inline(node, str(subgraph.target), inner, tuple(operands), detach=detach)
    return notes


def _autocast_off(node: fx.Node, inner: fx.GraphModule) -> str:
    device, dtype, active = node.args[:3]
    if active:
        raise TraceError(
            f"{_line(node, inner)}a block runs under torch.autocast({device!r}, {dtype}), whose dtypes a graph does "
            "not hold; take autocast out of forward and put it around the call of the model"
        )
    return f"{_line(node, inner)}a block turns autocast off; the result does not, so call it outside of autocast"


def _inline(node: fx.Node, name: str, inner: fx.GraphModule, operands: tuple[Any, ...], *, detach: bool) -> None:
    """Put the nodes of `inner` before `node` and let its readers read them."""
    graph = node.graph
    made: dict[fx.Node, Any] = {}
    given = iter(operands)
    results: Any = ()
    for found in inner.graph.nodes:
        if found.op == "placeholder":
            made[found] = next(given)
        elif found.op == "output":
            results = found.args[0]
        else:
            with graph.inserting_before(node):
                made[found] = graph.node_copy(found, made.__getitem__)
            if found.op == "get_attr":
                made[found].target = f"{name}.{found.target}"
    for user in list(node.users):
        assert user.target is operator.getitem
        result = results[user.args[1]]
        value = made[result]
        if detach and isinstance(user.meta.get("val"), torch.Tensor) and not _is_given(result):
            with graph.inserting_before(user):
                value = graph.call_function(aten.detach.default, (value,))
            value.meta.update(user.meta, val=made[result].meta["val"])
        user.replace_all_uses_with(value)
        graph.erase_node(user)
    subgraph = node.all_input_nodes[0]
    graph.erase_node(node)
    if not subgraph.users:
        graph.erase_node(subgraph)


def _is_given(node: fx.Node) -> bool:
    """Whether a result of a block is a tensor that it was given, maybe written in place: that keeps its gradient."""
    while True:
        source = node.args[0] if node.target is operator.getitem else node
        if not isinstance(source, fx.Node) or not writes(source):
            return node.op == "placeholder"
        node = written(source)[0 if source is node else node.args[1]]  # type: ignore[index]


def _line(node: fx.Node, inner: fx.GraphModule | None = None) -> str:
    """Where the block is: the node's own line, or that of the first operator inside."""
    inside = [] if inner is None else list(inner.graph.nodes)
    source = next((text for text in map(source_of, [node, *inside]) if text), "")
    return f"{source}: " if source else ""
