"""Bring an exported graph into the one form that the rest relies on.

After `clean` every tensor is fetched once under its first name, no assertion or guard is left, no operator writes in
place, channel shuffles are one `index_select`, and each node knows its owner module and its source line.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from graphzip.canonical.decompose import decompose
from graphzip.canonical.functionalize import Writes, functionalize
from graphzip.canonical.joined_writes import join_writes
from graphzip.canonical.shuffles import fuse_shuffles
from graphzip.canonical.split_packed import unpack
from graphzip.graph.randomness import drop_dead
from graphzip.graph.source import annotate
from graphzip.graph.state import Aliases, get_tensor

__all__ = ["clean", "fetch_once", "is_assertion"]

aten = torch.ops.aten

_NOTHING_TO_KEEP = ("_assert", "_guards", "sym_constrain_range", "assert_")


def clean(module: fx.GraphModule, aliases: Aliases) -> Writes:
    """Clean the graph of `module`; what is to be said of its writes."""
    graph = module.graph
    for node in list(graph.nodes):
        annotate(node)
        if is_assertion(node):
            graph.erase_node(node)
    fetch_once(graph, aliases)
    found = functionalize(graph)
    _drop_other_names(graph)
    _drop_constant_copies(module)
    decompose(graph)
    drop_dead(graph)
    join_writes(graph)
    fuse_shuffles(module)
    unpack(module)
    drop_dead(graph)
    module.graph.lint()
    return found


def is_assertion(node: fx.Node) -> bool:
    """Whether a node only checks something."""
    return node.op in {"call_function", "call_module"} and any(mark in str(node.target) for mark in _NOTHING_TO_KEEP)


def fetch_once(graph: fx.Graph, aliases: Aliases) -> None:
    """Fetch every tensor that is read once, under its first name, and no other."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        node.target = aliases.get(node.target, node.target)
        if node.target in first:
            node.replace_all_uses_with(first[node.target])
            graph.erase_node(node)
        elif node.users:
            first[node.target] = node
        else:
            graph.erase_node(node)


def _drop_other_names(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _drop_constant_copies(module: fx.GraphModule) -> None:
    """`torch.tensor(...)` in a forward becomes a lifted constant, a fresh copy and a detach of it."""
    for node in list(module.graph.nodes):
        if node.target in {aten.lift_fresh_copy.default, aten.lift_fresh.default} or (
            node.target is aten.detach.default and _is_constant(module, node.args[0])
        ):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target is operator.getitem and not node.users:
            module.graph.erase_node(node)


def _is_constant(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether no gradient can come from a value: a buffer. Detaching a parameter stops its gradient and stays."""
    return node.op == "get_attr" and not isinstance(get_tensor(module, str(node.target)), nn.Parameter)
