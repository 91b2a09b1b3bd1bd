"""Bring an exported graph into the one form that the rest relies on.

After `clean` every tensor is fetched once under its first name, no assertion or guard is left, no operator writes in
place, channel shuffles are one `index_select`, and each node knows its owner module and its source line.
"""

from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphzip.graph.functionalize import functionalize
from graphzip.graph.shuffles import fuse_shuffles
from graphzip.graph.state import Aliases

__all__ = ["clean"]

aten = torch.ops.aten

_TORCH_HOME = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')
_NOTHING_TO_KEEP = ("_assert", "_guards", "sym_constrain_range", "assert_")


def clean(module: fx.GraphModule, aliases: Aliases) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        _annotate(node)
        if node.op in {"call_function", "call_module"} and any(mark in str(node.target) for mark in _NOTHING_TO_KEEP):
            graph.erase_node(node)
    _fetch_once(graph, aliases)
    _drop_constant_copies(graph)
    functionalize(graph)
    graph.eliminate_dead_code()
    fuse_shuffles(module)
    graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def _annotate(node: fx.Node) -> None:
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    owner = list(stack.values())[-1][0] if stack else ""
    value = node.meta.get("val")
    source = _source(node.meta.get("stack_trace") or "")
    node.meta.clear()
    node.meta.update(val=value, owner=owner.split("@")[0], source=source)


def _source(stack_trace: str) -> str:
    """`resnet.py:96 in forward`: the innermost line that is not torch's own."""
    frames = [match for match in _FRAME.finditer(stack_trace) if not _is_torch(match["file"])]
    if not frames:
        return ""
    last = frames[-1]
    return f"{Path(last['file']).name}:{last['line']} in {last['name']}"


def _is_torch(file: str) -> bool:
    return file.startswith((_TORCH_HOME, "torch/", "<"))


def _fetch_once(graph: fx.Graph, aliases: Aliases) -> None:
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


def _drop_constant_copies(graph: fx.Graph) -> None:
    """`torch.tensor(...)` in a forward becomes a lifted constant, a fresh copy and a detach of it."""
    for node in list(graph.nodes):
        if node.target in {aten.lift_fresh_copy.default, aten.lift_fresh.default} or (
            node.target in {aten.detach_.default, aten.detach.default} and node.args[0].op == "get_attr"
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is operator.getitem and not node.users:
            graph.erase_node(node)
