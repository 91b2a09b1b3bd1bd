"""Bring the exported training form into the terms of the eval form: what follows the mode says so.

A graph holds batch norms and dropouts as they are in eval mode, and the module made of it lets them follow the mode. In
the training form they are on; here they are put into the same words, so that both forms have them in common.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn

from graphzip.errors import TraceError
from graphzip.graph.modes import DROPOUTS, DROPOUTS_IN_PLACE, is_exactly
from graphzip.graph.operators import arguments_of, set_argument
from graphzip.graph.source import owner_of, source_of
from graphzip.graph.torch_private import InstanceNorm, NormBase
from graphzip.tracing.compare_modes import Form, counts_batches

__all__ = ["Follower"]

aten = torch.ops.aten


class Follower:
    """Rewrites the raw graph of the training mode of `model`, in place, into the terms of its eval form.

    After `rewrite`, `frozen` are running means that never change, and `notes` are sentences on what is left out.
    """

    def __init__(self, model: nn.Module, evaluated: Form) -> None:
        self.model = model
        self.followed = evaluated.followed
        self.always = {(step.owner, step.source, step.target) for step in evaluated.steps}
        self.frozen: set[str] = set()
        self.notes: list[str] = []

    def rewrite(self, module: fx.GraphModule) -> None:
        """Raises `TraceError` where a buffer is written that the graph reads afterwards."""
        self.frozen = set()
        for node in list(module.graph.nodes):
            if node.op == "call_function":
                self._rewrite(node)
        self.notes = _drop_updates(module.graph)

    def _rewrite(self, node: fx.Node) -> None:
        owner = owner_of(node)
        if counts_batches(node):
            node.graph.erase_node(node)
        elif node.target in DROPOUTS or node.target in DROPOUTS_IN_PLACE:
            self._dropout(node)
        elif node.target is aten.batch_norm.default:
            self._batch_norm(node)
        elif node.target is aten.instance_norm.default:
            if is_exactly(self.model, owner, InstanceNorm) and node.args[3] is not None:
                set_argument(node, "use_input_stats", False)
        elif node.target is aten.rrelu.default and is_exactly(self.model, owner, nn.RReLU):
            set_argument(node, "training", False)

    def _dropout(self, node: fx.Node) -> None:
        """A dropout of the training form acts where its module is in training mode, unless it acts in eval, too."""
        if not arguments_of(node)["train"]:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            node.graph.erase_node(node)
        elif (owner_of(node), source_of(node), str(node.target)) not in self.always:
            set_argument(node, "train", False)

    def _batch_norm(self, node: fx.Node) -> None:
        args = arguments_of(node)
        place = owner_of(node), source_of(node)
        if args["running_mean"] is None:
            return
        if not args["training"]:
            self.frozen.add(str(args["running_mean"].target))
        elif (place, str(node.target)) in self.followed or is_exactly(self.model, place[0], NormBase):
            set_argument(node, "training", False)


def _drop_updates(graph: fx.Graph) -> list[str]:
    """Leave out writes into buffers that nothing reads afterwards: running values that only training brings up to date.

    Raises `TraceError` where something does.
    """
    notes: list[str] = []
    for fetched in [node for node in graph.nodes if node.op == "get_attr"]:
        writes = _writes(graph, fetched)
        if not writes:
            continue
        first = writes[0]
        written = {fetched, *writes}
        late = [user for user in _after(graph, first) if user not in written and written & {*user.all_input_nodes}]
        if late:
            raise TraceError(
                f"the buffer {fetched.target!r} is written in training ({source_of(first)}) and read afterwards "
                f"({source_of(late[0]) or 'it is returned'}); a compiled model does not write to its buffers: compile "
                "with mode='eval', or a part of the model alone (scope='name.of.submodule')"
            )
        for node in reversed(writes):
            graph.erase_node(node)
        notes.append(f"'{fetched.target}' is written in training ({source_of(first)}); the result leaves it as it is")
    return notes


def _writes(graph: fx.Graph, fetched: fx.Node) -> list[fx.Node]:
    """Operators that write into a buffer, or into what such an operator returned."""
    found: list[fx.Node] = []
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node.args and node.args[0] in [fetched, *found]:
            found.append(node)
    return found


def _after(graph: fx.Graph, first: fx.Node) -> Iterable[fx.Node]:
    nodes = list(graph.nodes)
    return nodes[nodes.index(first) + 1 :]
