"""Parameters and buffers under their original names, tied ones once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from graphzip.graph.frozen import Frozen, freeze, thaw
from graphzip.graph.torch_private import pytree

__all__ = [
    "Aliases",
    "Rewritten",
    "attach",
    "drop_unread",
    "fake_memo",
    "find_aliases",
    "get_tensor",
    "graph_module",
    "is_persistent",
    "named_state",
    "rebuild_state",
    "share_tree",
]

Aliases = dict[str, str]
"""Name of a tied parameter or buffer -> the first name of the same tensor."""


def named_state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every name of every parameter and buffer, tied ones under each of their names, parameters first."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def find_aliases(module: nn.Module) -> Aliases:
    """Names that stand for a tensor which has an earlier name: same object, or same memory seen the same way."""
    first: dict[object, str] = {}
    aliases: Aliases = {}
    for name, tensor in named_state(module):
        key = _identity(tensor)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return aliases


def _identity(tensor: torch.Tensor) -> object:
    if tensor.is_meta or tensor.numel() == 0 or tensor.layout != torch.strided:
        return id(tensor)
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def get_tensor(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(owner), leaf)
    assert isinstance(value, torch.Tensor)
    return value


def attach(root: nn.Module, name: str, value: torch.Tensor, *, persistent: bool = True) -> None:
    """Register a parameter or buffer under a dotted name, making plain containers on the way."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value, persistent=persistent)


def is_persistent(root: nn.Module, name: str) -> bool:
    """Whether a buffer is part of the state dict (a parameter always is)."""
    owner, _, leaf = name.rpartition(".")
    return leaf not in root.get_submodule(owner)._non_persistent_buffers_set


class Rewritten(fx.GraphModule):
    """A graph module that is pickled and copied as it is: with its graph, and all its state in the same order.

    (That of `torch.fx` is written as source and traced anew, and a copy of it has its state in the order of its use.)
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self).__name__,), (self._own(), freeze(self.graph, only_calls=True))

    def __setstate__(self, state: tuple[dict[str, Any], Frozen]) -> None:
        own, graph = state
        self.__dict__.update(own)
        self.graph = thaw(graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        twin = memo[id(self)] = _empty(type(self).__name__)
        twin.__dict__.update(copy.deepcopy(self._own(), memo))
        twin.graph = copy.deepcopy(self.graph, fake_memo(self))
        return twin

    def __copy__(self) -> Rewritten:
        twin = _empty(type(self).__name__)
        twin.__dict__.update(self._own())
        twin.graph = self.graph
        return twin

    def _own(self) -> dict[str, Any]:
        """All but what belongs to the graph and what comes from it."""
        return {name: value for name, value in self.__dict__.items() if name not in _OF_THE_GRAPH}


def _empty(name: str) -> Rewritten:
    return Rewritten(nn.Module(), fx.Graph(), class_name=name)


_OF_THE_GRAPH = {
    *("_graph", "_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec", "_tracer_cls", "_tracer_extras"),
    *("_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks", "shape_env"),
}
"""What a graph module has besides its state and what people set on it."""


def fake_memo(module: fx.GraphModule) -> dict[int, Any]:
    """For a deep copy of the graph: the fake results of its nodes are not copied."""
    values = pytree.tree_leaves([node.meta.get("val") for node in module.graph.nodes])
    return {id(value): value for value in values}


def graph_module(root: nn.Module, graph: fx.Graph, name: str, *, compiled: bool = True) -> fx.GraphModule:
    """A graph module that takes over the whole state of `root`, read by the graph or not.

    Where it is not `compiled`, the graph is still going to change, and `recompile` comes after that.
    """
    module = Rewritten(nn.Module(), fx.Graph(), class_name=name)
    module._modules.update(root._modules)
    module._parameters.update(root._parameters)
    module._buffers.update(root._buffers)
    module._non_persistent_buffers_set.update(root._non_persistent_buffers_set)
    module.training = root.training
    if compiled:
        module.graph = graph
    else:
        module._graph = graph
        graph.owning_module = module
    return module


def share_tree(root: nn.Module) -> nn.Module:
    """A tree of plain containers of its own that holds the tensors of `root`; submodules that are one stay one."""
    made: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            twin = made[id(module)] = nn.Module()
            twin.training = module.training
            twin._parameters.update(module._parameters)
            twin._buffers.update(module._buffers)
            twin._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
            twin._modules.update({name: child and copied(child) for name, child in module._modules.items()})
        return made[id(module)]

    return copied(root)


def drop_unread(root: nn.Module, graph: fx.Graph) -> None:
    """Remove parameters that no operator reads, and buffers of modules that have nothing that is read."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    kept = {name.rpartition(".")[0] for name in read}
    tied = {id(get_tensor(root, name)) for name in read}
    for name, tensor in list(named_state(root)):
        owner, _, leaf = name.rpartition(".")
        if id(tensor) not in tied and not (owner in kept and not isinstance(tensor, nn.Parameter)):
            delattr(root.get_submodule(owner), leaf)
    _drop_empty(root)


def _drop_empty(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        _drop_empty(child)
        if not child._modules and not child._parameters and not child._buffers:
            delattr(module, name)


def rebuild_state(source: nn.Module, unlifted: fx.GraphModule, aliases: Aliases) -> nn.Module:
    """A tree of plain containers that holds the source's tensors, and what `torch.export` lifted, under their names."""
    root = nn.Module()
    for prefix, module in source.named_modules(remove_duplicate=False):
        for leaf in module._parameters | module._buffers:
            tensor = module._parameters.get(leaf, module._buffers.get(leaf))
            if tensor is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            shared = get_tensor(root, aliases[name]) if name in aliases and _holds(root, aliases[name]) else tensor
            attach(root, name, shared, persistent=leaf not in module._non_persistent_buffers_set)
    for node in unlifted.graph.nodes:
        if node.op == "get_attr" and not _holds(root, node.target):
            value = get_tensor(unlifted, node.target)
            attach(root, node.target, value.detach(), persistent=False)
    return root


def _holds(root: nn.Module, name: str) -> bool:
    try:
        get_tensor(root, name)
    except (AttributeError, AssertionError):
        return False
    return True
