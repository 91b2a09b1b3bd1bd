"""New operator calls in a graph, with the fake values that tracing would have given them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphzip.graph.torch_private import FakeTensor, enable_python_dispatcher

__all__ = ["Builder"]


@dataclass
class Builder:
    """Makes nodes right before `place`, which they belong to: they get its owner and its source line."""

    graph: fx.Graph
    place: fx.Node

    def __call__(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """A call, run on the fake values of its operands."""
        values, options = fx.node.map_arg((args, kwargs), lambda found: found.meta["val"])
        mode = self._mode()
        environment = mode.shape_env
        with mode, enable_python_dispatcher(), nullcontext() if environment is None else environment.suppress_guards():
            value = target(*values, **options)
        return self.known(value, target, *args, **kwargs)

    def known(self, value: Any, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """A call whose value has the shape and the dtype of a known one."""
        with self.graph.inserting_before(self.place):
            made = self.graph.call_function(target, args, kwargs)
        made.meta.update({key: self.place.meta.get(key) for key in ("owner", "source")}, val=value)
        return made

    def again(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """The operator of `node` on other operands that look the same."""
        made = self.known(node.meta["val"], node.target, *args, **kwargs)
        made.meta.update(node.meta)
        return made

    def _mode(self) -> Any:
        values = (node.meta.get("val") for node in self.graph.nodes)
        return next(value.fake_mode for value in values if isinstance(value, FakeTensor))

    def fake(self, value: torch.Tensor) -> torch.Tensor:
        """The fake value of a new constant."""
        made: torch.Tensor = self._mode().from_tensor(value)
        return made
