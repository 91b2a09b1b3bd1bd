"""Several models side by side: one module that runs each of them on inputs of its own."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from graphzip.errors import GraphZipError
from graphzip.graph.state import graph_module
from graphzip.graph.torch_private import pytree

__all__ = ["Task", "check_task_names", "joined_module"]

_TAKEN = {*dir(fx.GraphModule), "meta"}


@dataclass(frozen=True)
class Task:
    """One of several models in a joint graph: its name, and the call signature that it has alone."""

    name: str
    arguments: tuple[str, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec | None

    @property
    def positional(self) -> pytree.TreeSpec:
        """Structure of the positional arguments; a joint model is given the only one, or a tuple of several."""
        return self.in_spec.child(0)


def check_task_names(names: Iterable[object]) -> None:
    """Raises `GraphZipError` for a name that cannot be both an argument and a submodule."""
    for name in names:
        usable = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
        if not usable or name in _TAKEN or "__" in str(name) or str(name).endswith("_"):
            raise GraphZipError(
                f"{name!r} cannot name a task: it becomes an argument and a prefix of parameter names; use a plain "
                "word such as 'faces' that torch.fx.GraphModule has no attribute of"
            )


def joined_module(models: Mapping[str, nn.Module], arity: Mapping[str, int]) -> fx.GraphModule:
    """A module `forward(a, b)` that gives `{"a": a's output, "b": b's output}`, with the models as its children.

    `arity` is the number of positional inputs of each; a model of several takes them as one tuple.
    """
    graph = fx.Graph()
    given = {name: graph.placeholder(name) for name in models}
    made = {}
    for name, node in given.items():
        inputs: tuple[fx.Node, ...] = (node,)
        if arity[name] != 1:
            inputs = tuple(graph.call_function(operator.getitem, (node, place)) for place in range(arity[name]))
        made[name] = graph.call_module(name, inputs)
    graph.output(made)
    module = _module(models, graph)
    module.training = any(model.training for model in models.values())
    return module


def _module(models: Mapping[str, nn.Module], graph: fx.Graph) -> fx.GraphModule:
    root = nn.Module()
    root._modules.update(models)
    return graph_module(root, graph, "Tasks")
