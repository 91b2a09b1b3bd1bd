"""Parameters and buffers under their original names, tied ones once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from graphzip.graph.pickling import Frozen, freeze, thaw
from graphzip.graph.torch_private import LazyGraphModule, pytree

__all__ = [
    "Aliases",
    "Rewritten",
    "attach",
    "bytes_of",
    "drop_unread",
    "fake_memo",
    "find_aliases",
    "get_tensor",
    "graph_module",
    "inside",
    "is_persistent",
    "joined",
    "like",
    "made_owner",
    "named_state",
    "own_tensors",
    "owner_of",
    "rebuild_state",
    "share_tree",
    "with_code",
]

Aliases = dict[str, str]
"""Name of a tied parameter or buffer -> the first name of the same tensor."""


def joined(prefix: str, name: str) -> str:
    """The name of what is called `name` inside of `prefix`; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def inside(name: str, prefix: str) -> str:
    """The way back of `joined`: a name as it is inside of `prefix`, empty for what is called that itself."""
    return "" if prefix and name == prefix else name.removeprefix(f"{prefix}.") if prefix else name


def like(value: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`value` in the dtype of `old`, a parameter where that is one."""
    value = value.to(old.dtype)
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def named_state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every name of every parameter and buffer, tied ones under each of their names, parameters first."""
    modules: list[tuple[str, nn.Module]] = []
    _walk(module, "", modules)
    for prefix, inner in modules:
        yield from ((prefix + leaf, value) for leaf, value in inner._parameters.items() if value is not None)
    for prefix, inner in modules:
        yield from ((prefix + leaf, value) for leaf, value in inner._buffers.items() if value is not None)


def _walk(module: nn.Module, prefix: str, found: list[tuple[str, nn.Module]]) -> None:
    """All modules, with what the names of their tensors begin with; `named_modules` walks each level once more."""
    found.append((prefix, module))
    for name, inner in module._modules.items():
        if inner is not None:
            _walk(inner, f"{prefix}{name}.", found)


def bytes_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each once."""
    stored = {id(each): each for each in (*module.parameters(), *module.buffers())}
    return sum(each.numel() * each.element_size() for each in stored.values())


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


def owner_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds what has this full name, and its name there; `get_submodule` asks several times as long.

    Raises `AttributeError` where there is no such module.
    """
    *path, leaf = name.split(".")
    for part in path:
        found = root._modules.get(part)
        if found is None:
            raise AttributeError(f"{name!r}: there is no module {part!r}")
        root = found
    return root, leaf


def made_owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The same, with plain containers made on the way where there are none."""
    *path, leaf = name.split(".")
    for part in path:
        found = root._modules.get(part)
        if found is None:
            found = nn.Module()
            root.add_module(part, found)
        root = found
    return root, leaf


def get_tensor(module: nn.Module, name: str) -> torch.Tensor:
    owner, leaf = owner_of(module, name)
    value = owner._parameters.get(leaf)
    if value is None:
        value = getattr(owner, leaf)
    assert isinstance(value, torch.Tensor)
    return value


def attach(root: nn.Module, name: str, value: torch.Tensor, *, persistent: bool = True) -> None:
    """Register a parameter or buffer under a dotted name, making plain containers on the way."""
    owner, leaf = made_owner(root, name)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value, persistent=persistent)


def is_persistent(root: nn.Module, name: str) -> bool:
    """Whether a buffer is part of the state dict (a parameter always is)."""
    owner, leaf = owner_of(root, name)
    return leaf not in owner._non_persistent_buffers_set


class Rewritten(LazyGraphModule):
    """A graph module that is pickled and copied as it is: with its graph, and all its state in the same order.

    Its code is made when its `forward` is first asked for, for most are neither run nor looked at. `with_code`
    makes it at once.

    (That of `torch.fx` is written as source and traced anew, and a copy of it has its state in the order of its use.)
    """

    @classmethod
    def recompile(cls) -> None:  # type: ignore[override]
        """Let the code be made anew."""
        cls.forward = _MAKES_CODE

    @classmethod
    def _needs_recompile(cls) -> bool:
        return cls.forward is _MAKES_CODE

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


def with_code(module: fx.GraphModule) -> fx.GraphModule:
    """The module, whose code is made now where it was not."""
    if isinstance(module, Rewritten):
        module.real_recompile()
    return module


_MAKES_CODE: Any = property(lambda module: with_code(module).forward)
"""Stands for the `forward` of a graph module, and asked for it puts the real one in its place."""


def _empty(name: str) -> Rewritten:
    return Rewritten(nn.Module(), fx.Graph(), class_name=name)


_OF_THE_GRAPH = {
    *("_graph", "_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec", "_tracer_cls", "_tracer_extras"),
    *("_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks", "shape_env"),
}
"""What a graph module has besides its state and what people set on it."""


def fake_memo(module: fx.GraphModule) -> dict[int, Any]:
    """For a deep copy of the graph: the fake results of its nodes are not copied."""
    values = [node.meta.get("val") for node in module.graph.nodes]
    several = pytree.tree_leaves([value for value in values if not isinstance(value, torch.Tensor)])
    return {id(value): value for value in (*values, *several)}


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


@contextmanager
def own_tensors(root: nn.Module) -> Iterator[None]:
    """Let a module hold copies of its tensors for a while, which may be written to; then it has its own again."""
    held = [(name, value, is_persistent(root, name)) for name, value in named_state(root)]
    copies = {id(value): like(value.detach().clone(), value) for _, value, _ in held}
    try:
        for name, value, persistent in held:
            attach(root, name, copies[id(value)], persistent=persistent)
        yield
    finally:
        for name, value, persistent in held:
            attach(root, name, value, persistent=persistent)


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
            name = joined(prefix, leaf)
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
