"""What everything else works on: a model as a flat ATen graph, its tensors, its inputs and what is to be said of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from graphzip.graph.dual_mode import Forms
from graphzip.graph.inputs import InputSpec
from graphzip.graph.pickling import Freezable
from graphzip.graph.state import (
    Aliases,
    attach,
    fake_memo,
    graph_module,
    inside,
    is_persistent,
    joined,
    named_state,
    share_tree,
)
from graphzip.graph.tasks import Task
from graphzip.graph.torch_private import FakeTensor, pytree
from graphzip.numeric.sharded import is_sharded, whole

__all__ = ["Remembered", "Traced"]


class Remembered(dict[Any, Any]):
    """What may be found out again: a copy, or one that was pickled, is empty."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Remembered, ()


@dataclass
class Traced(Freezable):
    """A model as a flat ATen graph.

    `module` holds the graph and, under their original names, the parameters and buffers (shared with the model it
    was traced from). What a node says of itself is in its `meta` (`NodeMeta`). The graph is the model only for inputs
    that fit `inputs` and `conditions`. Where several models were joined, `tasks` lists them, and the names of modules
    and parameters begin with the name of the task. Where `forms` is given, the graph computes the training form, too.
    `notes` are sentences on what the graph does not hold of the model, such as branches that exist only in training;
    they become the report's. `shapes` is for `refresh`, which remembers there what operators give; it is shared with
    copies and with what is made of them.
    """

    module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    example_inputs: tuple[Any, ...]
    example_kwargs: dict[str, Any] = field(default_factory=dict)
    aliases: Aliases = field(default_factory=dict)
    module_types: dict[str, str] = field(default_factory=dict)
    scope: str = ""
    notes: tuple[str, ...] = ()
    batch_dynamic: bool = True
    conditions: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
    forms: Forms | None = None
    shapes: Remembered = field(default_factory=Remembered, repr=False, compare=False)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def qualified(self, name: str) -> str:
        """The name of a parameter or module in the user's model: inside `scope`, where one was given."""
        return joined(self.scope, name)

    def local(self, name: str) -> str:
        """The way back: the name in this graph of what has that name in the user's model."""
        return inside(name, self.scope)

    def copy(self, *, compiled: bool = True) -> Traced:
        """A graph of its own that shares all tensors with this one; `recompile` it where it is not `compiled`."""
        graph = copy.deepcopy(self.module.graph, fake_memo(self.module))
        module = graph_module(share_tree(self.module), graph, type(self.module).__name__, compiled=compiled)
        return replace(self, module=module)

    def adopt_state(self, module: nn.Module, *, copies: bool = True) -> bool:
        """Take over copies of the current tensors of `module`, found by name, in place of the ones held; whole ones of
        those that are spread over processes.

        Without `copies` it is the tensors themselves, which training then changes here, too. Where they are of another
        dtype or on another device, constants and inputs follow; whether that was so. The fake values of operators are
        then out of date.
        """
        current = dict(named_state(module))
        traced_as = {str(node.target): node.meta.get("val") for node in self.graph.nodes if node.op == "get_attr"}
        own: dict[int, torch.Tensor] = {}
        moves: dict[_Place, _Place] = {}
        held = [(name, old, current.get(name)) for name, old in named_state(self.module)]
        for name, old, tensor in held:
            if tensor is None:
                continue
            known = traced_as.get(name)  # the tensor held may be the model's own, moved in place
            before = _place(old if known is None else known)
            if before != _place(tensor):
                moves[before] = _place(tensor)
            if id(tensor) not in own:
                own[id(tensor)] = _copy_of(tensor, isinstance(old, nn.Parameter)) if copies else tensor
            if own[id(tensor)] is not old:
                attach(self.module, name, own[id(tensor)], persistent=is_persistent(self.module, name))
        if not moves:
            return False
        for name, old, tensor in held:
            if tensor is None:
                attach(self.module, name, _moved(old, moves), persistent=is_persistent(self.module, name))
        self._move_inputs(moves)
        return True

    def forget_state(self) -> None:
        """Hold no numbers of the tensors that operators read, only their shapes, until a state is adopted."""
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        made: dict[int, torch.Tensor] = {}
        for name, old in list(named_state(self.module)):
            if name in read:
                if id(old) not in made:
                    value = old.detach().to("meta")
                    flag = old.requires_grad
                    made[id(old)] = nn.Parameter(value, flag) if isinstance(old, nn.Parameter) else value
                attach(self.module, name, made[id(old)], persistent=is_persistent(self.module, name))

    def _move_inputs(self, moves: dict[_Place, _Place]) -> None:
        self.example_inputs, self.example_kwargs = pytree.tree_map(
            lambda leaf: _moved(leaf, moves) if isinstance(leaf, torch.Tensor) else leaf,
            (self.example_inputs, self.example_kwargs),
        )
        specs = []
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, self.inputs, strict=True):
            value = node.meta["val"]
            if isinstance(value, FakeTensor):
                with value.fake_mode:
                    value = node.meta["val"] = _moved(value, moves)
            specs.append(spec if spec.dtype is None else replace(spec, dtype=value.dtype))
        self.inputs = tuple(specs)


def _copy_of(tensor: torch.Tensor, is_parameter: bool) -> torch.Tensor:
    value = whole(tensor.detach()) if is_sharded(tensor) else tensor.detach().clone()
    return nn.Parameter(value, tensor.requires_grad) if is_parameter else value


_Place = tuple[torch.dtype, torch.device]


def _place(tensor: torch.Tensor) -> _Place:
    return tensor.dtype, tensor.device


def _moved(tensor: torch.Tensor, moves: dict[_Place, _Place]) -> torch.Tensor:
    """Where tensors of its kind went; where there were none, to the device that others went to."""
    if _place(tensor) in moves:
        dtype, device = moves[_place(tensor)]
        return tensor.to(device, dtype)
    devices = {old: new for (_, old), (_, new) in moves.items()}
    return tensor.to(devices.get(tensor.device, tensor.device))
