"""One graph that computes both forms of a model, and the module made of it, which chooses by its mode.

The outputs of the eval form come first, those of the training form after them, and what both compute alike is computed
once. So whatever is decided about channels holds in both, and both share their parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from graphzip.graph.inputs import CallCode
from graphzip.graph.pickling import freeze, thaw
from graphzip.graph.proxies import is_proxy
from graphzip.graph.torch_private import PyTreeCodeGen, PyTreeInfo, pytree

__all__ = ["Forms", "TwoForms", "both_outputs", "eval_form", "form_nodes", "one_form", "returned", "splits"]


@dataclass(frozen=True)
class Forms:
    """That a graph has two forms: with how many outputs the eval form, and what sizes the training form asks for."""

    evaluated: int
    conditions: tuple[str, ...] = ()


def both_outputs(evaluated: fx.Graph, trained: fx.Graph) -> PyTreeInfo:
    """The call signature of a graph that returns what two graphs return, one after the other."""
    info = _info(evaluated)
    specs = [pytree.LeafSpec() if one.out_spec is None else one.out_spec for one in (info, _info(trained))]
    return info._replace(out_spec=pytree.TreeSpec(tuple, None, specs))


def splits(graph: fx.Graph, forms: Forms) -> bool:
    """Whether the outputs of a graph are those of two forms, divided as `forms` says."""
    (end,) = graph.find_nodes(op="output")
    given, spec = end.args[0], _info(graph).out_spec
    if not isinstance(given, tuple | list) or spec is None or spec.type is not tuple or spec.num_children != 2:
        return False
    return [child.num_leaves for child in spec.children()] == [forms.evaluated, len(given) - forms.evaluated]


def one_form(graph: fx.Graph, forms: Forms, *, training: bool) -> fx.Graph:
    """A graph of one form alone, with its own result. Placeholders stay; what the form does not read goes."""
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    wanted = form_nodes(graph, forms, training=training)
    for node in graph.nodes:
        if node.op == "output":
            results = node.args[0]
            results = results[forms.evaluated :] if training else results[: forms.evaluated]
            made.output(fx.node.map_arg(tuple(results), copies.__getitem__))
        elif node.op == "placeholder" or node in wanted:
            copies[node] = made.node_copy(node, copies.__getitem__)
    info = _info(graph)
    assert info.out_spec is not None
    made.set_codegen(CallCode(info._replace(out_spec=info.out_spec.children()[training])))
    return made


def form_nodes(graph: fx.Graph, forms: Forms, *, training: bool) -> set[fx.Node]:
    """What one form computes, and what a graph does besides its results."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output":
            results = node.args[0]
            found.update(_nodes(results[forms.evaluated :] if training else results[: forms.evaluated]))
        elif node in found:
            found.update(node.all_input_nodes)
    return found


def _nodes(results: Any) -> list[fx.Node]:
    return [value for value in pytree.tree_leaves(results) if isinstance(value, fx.Node)]


def returned(graph: fx.Graph, leaves: Sequence[Any], forms: Forms | None = None) -> Any:
    """What the model of a graph returns, of the leaves that the graph gives; of two forms, the eval form."""
    spec = _info(graph).out_spec
    whole = leaves[0] if spec is None else pytree.tree_unflatten(leaves, spec)
    return whole if forms is None else whole[0]


def _info(graph: fx.Graph) -> PyTreeInfo:
    codegen = graph._codegen
    assert isinstance(codegen, PyTreeCodeGen)
    return codegen.pytree_info


class TwoForms(nn.Module):
    """A module that computes one graph in eval mode and another in training, with the same layers and parameters.

    Its own attributes have names that no layer of a model has.
    """

    def __init__(self, root: nn.Module, evaluated: fx.Graph, trained: fx.Graph, name: str) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = root._modules, root._parameters, root._buffers
        self._non_persistent_buffers_set = root._non_persistent_buffers_set
        self.training = root.training
        self._two_graphs, self._two_names = (evaluated, trained), name
        self._two_forms = self._built()

    def _built(self) -> tuple[fx.GraphModule, ...]:
        """A module of either form that has the layers and parameters of this one, also of later ones."""
        made = []
        for graph in self._two_graphs:
            alone = fx.GraphModule(nn.Module(), fx.Graph(), class_name=self._two_names)
            alone._modules, alone._parameters, alone._buffers = self._modules, self._parameters, self._buffers
            alone._non_persistent_buffers_set = self._non_persistent_buffers_set
            alone.graph = graph
            made.append(alone)
        return tuple(made)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the form of the present mode."""
        form = self._two_forms[self.training]
        if is_proxy(args):  # symbolic tracing hands over all positional arguments as one
            return form.forward(*(args[place] for place in range(len(inspect.signature(form.forward).parameters))))
        return form.forward(*args, **kwargs)

    def _get_name(self) -> str:
        return self._two_names

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key != "_two_forms"}
        return state | {"_two_graphs": freeze(self._two_graphs, only_calls=True)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_two_graphs": thaw(state["_two_graphs"])})
        self._two_forms = self._built()


def eval_form(module: nn.Module) -> nn.Module:
    """The eval form alone of a module that has two, on its layers and parameters; any other module as it is."""
    if not isinstance(module, TwoForms):
        return module
    alone = module._two_forms[False]
    alone.training = module.training
    return alone
