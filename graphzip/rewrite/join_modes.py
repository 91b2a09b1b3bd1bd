"""Trace both forms of a model and join them into one graph, so that what becomes of one becomes of the other."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from graphzip.errors import GraphZipError
from graphzip.graph.dual_mode import Forms, both_outputs
from graphzip.graph.inputs import CallCode
from graphzip.graph.meta import meta_of
from graphzip.graph.randomness import is_dropout
from graphzip.graph.state import attach, get_tensor, is_persistent, named_state
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.rewrite.edit import settle
from graphzip.tracing.compare_modes import same_numbers
from graphzip.tracing.results import Outputs
from graphzip.tracing.trace import trace, trace_training

__all__ = ["MODES", "join_forms", "trace_in"]

MODES = ("eval", "train")


def trace_in(
    mode: str,
    model: nn.Module,
    example_inputs: Any,
    *,
    scope: str | None = None,
    dynamic_shapes: Any | None = None,
    outputs: Outputs | None = None,
    compare: bool = False,
) -> Traced:
    """Trace the eval form of a model, or, with the mode "train", both of its forms as one graph.

    Errors are those of `trace`; `TraceError` too where the training form cannot be traced, and `GraphZipError` for
    another mode.
    """
    if mode not in MODES:
        raise GraphZipError(f"mode is 'eval' (the eval form alone) or 'train' (the training form, too), got {mode!r}")
    if mode == "eval":
        return trace(
            model, example_inputs, scope=scope, dynamic_shapes=dynamic_shapes, outputs=outputs, compare=compare
        )
    evaluated, trained = trace_training(
        model, example_inputs, scope=scope, dynamic_shapes=dynamic_shapes, outputs=outputs
    )
    return evaluated if trained is None else join_forms(evaluated, trained)


def join_forms(evaluated: Traced, trained: Traced) -> Traced:
    """One graph of both forms of a model; what they compute alike is computed once. Tensors are shared with both."""
    joint = evaluated.copy(compiled=False)
    graph = joint.graph
    made = _Joiner(joint, trained).run()
    (end,) = graph.find_nodes(op="output")
    (other,) = trained.graph.find_nodes(op="output")
    ours: Any = tuple(end.args[0])
    theirs: Any = fx.node.map_arg(tuple(other.args[0]), made.__getitem__)
    end.args = ((*ours, *theirs),)
    graph.set_codegen(CallCode(both_outputs(evaluated.graph, trained.graph)))
    joint = replace(
        joint,
        aliases=trained.aliases | evaluated.aliases,
        module_types=trained.module_types | evaluated.module_types,
        notes=(*evaluated.notes, *trained.notes),
        forms=Forms(len(ours), trained.conditions),
    )
    return settle(joint, check=graph.lint)


class _Joiner:
    """Copies into a graph what another graph of the same model computes beyond it."""

    def __init__(self, joint: Traced, trained: Traced) -> None:
        self.joint = joint
        self.trained = trained
        self.made: dict[fx.Node, fx.Node] = {}
        self.held = dict(named_state(joint.module))
        self.fetched: dict[str, fx.Node] = {str(node.target): node for node in joint.graph.find_nodes(op="get_attr")}
        self.known: defaultdict[str, list[fx.Node]] = defaultdict(list)
        for node in joint.graph.nodes:
            if node.op == "call_function":
                self.known[_key(node, {})].append(node)

    def run(self) -> dict[fx.Node, fx.Node]:
        """For every node of the other graph the one that stands for it."""
        graph = self.joint.graph
        inputs = iter(graph.find_nodes(op="placeholder"))
        (end,) = graph.find_nodes(op="output")
        with graph.inserting_before(end):
            for node in self.trained.graph.nodes:
                if node.op == "placeholder":
                    self.made[node] = next(inputs)
                elif node.op == "get_attr":
                    self.made[node] = self._fetched(node)
                elif node.op == "call_function":
                    self.made[node] = self._called(node)
        self._hold_unread()
        return self.made

    def _hold_unread(self) -> None:
        """Buffers that no operator reads, such as the counters of batch norms."""
        read = {str(node.target) for node in self.trained.graph.find_nodes(op="get_attr")}
        for name, value in named_state(self.trained.module):
            if name not in self.held and name not in read:
                self._hold(name, value, persistent=is_persistent(self.trained.module, name))

    def _called(self, node: fx.Node) -> fx.Node:
        """The same call, which stands for one call only: what drops out or counts batches does so once each."""
        alike = self.known[_key(node, self.made)]
        return alike.pop(0) if alike else self._copied(node)

    def _fetched(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        value = get_tensor(self.trained.module, name)
        if {"constant", "choice", "numbers"} & node.meta.keys():
            name = self._constant(name, value)
        elif name not in self.held:
            self._hold(name, value, persistent=is_persistent(self.trained.module, name))
        if name not in self.fetched:
            self.fetched[name] = self._copied(node)
            self.fetched[name].target = name
        return self.fetched[name]

    def _constant(self, name: str, value: torch.Tensor) -> str:
        """The name of a tensor of the model's code: that of an equal one of the other form, or one of its own."""
        own = name
        while name in self.held and not same_numbers(self.held[name], value):
            name = f"{name}_of_training"
        if name not in self.held:
            self._hold(name, value, persistent=is_persistent(self.trained.module, own))
        return name

    def _hold(self, name: str, value: torch.Tensor, *, persistent: bool) -> None:
        attach(self.joint.module, name, value, persistent=persistent)
        self.held[name] = value

    def _copied(self, node: fx.Node) -> fx.Node:
        copied: fx.Node = self.joint.graph.node_copy(node, self.made.__getitem__)
        copied.meta["val"] = None  # it was made for the sizes of the other trace
        if is_dropout(node):
            meta_of(copied)["follows_mode"] = True
        return copied


def _key(node: fx.Node, made: dict[fx.Node, fx.Node]) -> str:
    """What a call computes and for which module, by the names of what it reads."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: made.get(each, each))
    leaves, tree = pytree.tree_flatten((args, kwargs))
    return repr((str(node.target), node.meta.get("owner", ""), leaves, tree))
