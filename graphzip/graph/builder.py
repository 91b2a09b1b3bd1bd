"""New nodes in a graph, with what tracing would have said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from graphzip.graph.meta import meta_of, place_meta
from graphzip.graph.state import attach
from graphzip.graph.torch_private import FakeTensor, enable_python_dispatcher, make_fx

__all__ = ["Builder", "rank_of", "shape_of", "size_of"]

aten = torch.ops.aten


@dataclass
class Builder:
    """Makes nodes right before `place`, or behind it one after the other, if `last` says which was the last one.

    They belong to the place: they get its owner and its source line. Where `shaped`, each gets its fake value as well;
    in a graph that is refreshed later none needs one.
    """

    graph: fx.Graph
    place: fx.Node
    last: fx.Node | None = None
    shaped: bool = True

    @classmethod
    def before(cls, place: fx.Node, *, shaped: bool = True) -> Builder:
        return cls(place.graph, place, None, shaped)

    @classmethod
    def behind(cls, place: fx.Node, *, shaped: bool = True) -> Builder:
        return cls(place.graph, place, place, shaped)

    def __call__(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """A call, run on the fake values of its operands."""
        if not self.shaped:
            return self.known(None, target, *args, **kwargs)
        values, options = fx.node.map_arg((args, kwargs), lambda found: found.meta["val"])
        mode = self._mode()
        environment = mode.shape_env
        with mode, enable_python_dispatcher(), nullcontext() if environment is None else environment.suppress_guards():
            value = target(*values, **options)
        return self.known(value, target, *args, **kwargs)

    def known(self, value: Any, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """A call whose value has the shape and the dtype of a known one."""
        with self._inserting():
            made = self.graph.call_function(target, args, kwargs)
        return self._placed(made, value)

    def again(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """The operator of `node` on other operands that look the same."""
        made = self.known(node.meta["val"], node.target, *args, **kwargs)
        made.meta.update(node.meta)
        return made

    def inlined(self, function: Callable[..., torch.Tensor], operands: Mapping[fx.Node, torch.Tensor]) -> fx.Node:
        """The operators that a function of tensors is made of; `operands` are their nodes and what these stand for.

        Nothing is computed: the function is traced on the shapes of the operands.
        """
        like = [torch.empty_like(each, device="meta") for each in operands.values()]
        traced = make_fx(partial(function), pre_dispatch=True)(*like).graph  # a method has one argument more
        made = dict(zip(traced.find_nodes(op="placeholder"), operands, strict=True))
        for node in traced.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
                made[node] = self(node.target, *args, **kwargs)
        (end,) = traced.find_nodes(op="output")
        result: fx.Node = made[end.args[0]]
        return result

    def fetch(self, name: str, value: Any = None) -> fx.Node:
        """A parameter or buffer of the model, by its full name."""
        with self._inserting():
            made = self.graph.get_attr(name)
        return self._placed(made, value)

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A new tensor of the graph's own, which is no part of the state dict."""
        module = self.graph.owning_module
        assert module is not None
        attach(module, name, value, persistent=False)
        return self.fetch(name, self._mode().from_tensor(value, static_shapes=True) if self.shaped else None)

    def index(self, name: str, numbers: Any, device: torch.device) -> fx.Node:
        """A new constant of positions, which the analysis reads as numbers."""
        positions = np.asarray(numbers, dtype=np.int64)
        made = self.constant(name, torch.as_tensor(np.ascontiguousarray(positions), device=device))
        meta_of(made)["numbers"] = positions
        return made

    def _inserting(self) -> Any:
        if self.last is None:
            return self.graph.inserting_before(self.place)
        return self.graph.inserting_after(self.last)

    def _placed(self, made: fx.Node, value: Any) -> fx.Node:
        made.meta.update(place_meta(self.place))
        if value is not None:
            made.meta["val"] = value
        if self.last is not None:
            self.last = made
        return made

    def _mode(self) -> Any:
        values = (node.meta.get("val") for node in self.graph.nodes)
        return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def rank_of(value: fx.Node) -> int:
    """How many dimensions a tensor has."""
    return len(value.meta["val"].shape)


def shape_of(build: Builder, value: fx.Node) -> list[Any]:
    """The sizes of a tensor as arguments: numbers, and nodes for those that the inputs decide."""
    return [size_of(build, value, dim) for dim in range(rank_of(value))]


def size_of(build: Builder, value: fx.Node, dim: int) -> Any:
    """One size of a tensor as an argument."""
    size = value.meta["val"].shape[dim]
    return build(aten.sym_size.int, value, dim) if isinstance(size, torch.SymInt) else size
