"""A graph that runs while its tensors lie on the disk: each is read when an operator needs it, and dropped behind it.

The graph was traced on the meta device. What operators make there they make on the CPU here.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import fx

from graphzip.graph.batches import Given
from graphzip.graph.interpreter import Values
from graphzip.graph.state import attach, get_tensor, is_persistent, like, named_state
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.mapped import MappedFiles

__all__ = ["ChangedTensors", "Streamed", "Workspace", "on_cpu", "tensors_of"]

Read = Callable[[str], torch.Tensor]

_SPILLED: Final = 1 << 20
"""Bytes of a value from which on it is worth a file."""


class ChangedTensors:
    """Tensors that were changed, each in a file of its own until it is written to where it belongs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._files: dict[str, Path] = {}

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        file = self._files.setdefault(name, self._folder / f"{len(self._files)}.safetensors")
        safetensors.torch.save_file({"value": value.detach().contiguous()}, file)

    def over(self, read: Read) -> Read:
        """What gives the changed tensors, and the others as `read` does."""

        def found(name: str) -> torch.Tensor:
            return safetensors.torch.load_file(self._files[name])["value"] if name in self._files else read(name)

        return found


@dataclass
class Workspace:
    """What a graph needs to run without its weights in memory.

    - `folder`: for tensors that were changed.
    - `spill`: for values of operators, which stay in memory without it.
    - `files`: those that tensors of the graph are mapped from, where it holds its own.
    """

    folder: Path
    spill: Path | None = None
    files: MappedFiles = field(default_factory=MappedFiles)
    _numbers: Iterable[int] = field(default_factory=itertools.count, repr=False)
    _stored: weakref.WeakValueDictionary[int, torch.Tensor] = field(
        default_factory=weakref.WeakValueDictionary, repr=False
    )

    def kept(self) -> ChangedTensors:
        """A place for tensors that are changed by one pass."""
        return ChangedTensors(self.folder / f"kept-{next(iter(self._numbers))}")

    def store(self, traced: Traced) -> None:
        """Let the tensors that a graph holds in memory lie in files from here on, and give back what others take."""
        made: dict[int, torch.Tensor] = {}
        for name, old in list(named_state(traced.module)):
            if old.nbytes < _SPILLED or self._stored.get(id(old)) is old:
                continue
            if id(old) not in made:
                file = self.folder / f"stored-{next(iter(self._numbers))}"
                made[id(old)] = like(self.files.stored(old, file), old)
                self.note_stored(made[id(old)])
            attach(traced.module, name, made[id(old)], persistent=is_persistent(traced.module, name))
        self.files.rest()

    def note_stored(self, tensor: torch.Tensor) -> None:
        """Note that a tensor of a graph lies in a file."""
        self._stored[id(tensor)] = tensor

    def spilled(self, value: Any) -> Any:
        """The same value, mapped from a file where there is a place for these, and memory to gain."""
        if self.spill is None or not isinstance(value, torch.Tensor) or value.nbytes < _SPILLED:
            return value
        if self.files.holds(value) or value.untyped_storage().nbytes() < value.nbytes:
            return value
        return self.files.stored(value, self.spill / f"{next(iter(self._numbers))}.values")


class Streamed(Values):
    """`Values` of a graph on the meta device, whose tensors `read` gives by name; those that are set go into `kept`.

    A tensor is in memory from the first operator that reads it until that one is finished, and is read anew for the
    next.
    """

    def __init__(
        self,
        traced: Traced,
        batches: Given,
        read: Read,
        workspace: Workspace,
        kept: ChangedTensors | None = None,
    ) -> None:
        super().__init__(traced, batches)
        self._workspace, self._kept = workspace, kept
        self._read = tensors_of(traced, read if kept is None else kept.over(read))
        self._dtypes: dict[str, torch.dtype] = {}

    def __getitem__(self, node: fx.Node) -> list[Any]:
        if node.op == "get_attr" and node not in self._values:
            self._values[node] = [self._fetched(node)] * len(self.batches)
        return self._values[node]

    def run(self, node: fx.Node) -> None:
        if node.op != "get_attr":
            super().run(node)

    def _pass(self, end: int) -> None:
        for node in self.nodes[self._done : end]:  # each tensor is read once, and not once for every batch
            self.run(node)
            self.finish(node)
        self._done = max(self._done, end)

    def finish(self, node: fx.Node) -> None:
        super().finish(node)
        weights = [each for each in node.all_input_nodes if each.op == "get_attr"]
        for each in weights:
            self._values.pop(each, None)
        if weights:
            self._workspace.files.rest()

    def set_tensor(self, node: fx.Node, value: torch.Tensor) -> None:
        assert self._kept is not None
        name, made = str(node.target), value.to(self[node][0].dtype)
        self._kept[name] = made.to(self._dtypes.get(name, made.dtype))
        self._values[node] = [made] * len(self.batches)

    def _fetched(self, node: fx.Node) -> torch.Tensor:
        found = self._read(str(node.target))
        self._dtypes[str(node.target)] = found.dtype
        return found.to(node.meta["val"].dtype)

    def _value(self, node: fx.Node, operands: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
        args, kwargs = fx.node.map_aggregate((args, kwargs), _on_cpu)
        return self._workspace.spilled(node.target(*args, **kwargs))  # type: ignore[operator]


def tensors_of(traced: Traced, read: Read) -> Read:
    """What gives all tensors of a graph on the meta device: those of the model as `read` does, and its constants."""
    numbers = {str(node.target): node.meta["numbers"] for node in traced.graph.nodes if "numbers" in node.meta}

    def found(name: str) -> torch.Tensor:
        held = get_tensor(traced.module, name).detach()
        if name in numbers:
            return torch.from_numpy(numbers[name])
        if not held.numel():
            return torch.empty(held.shape, dtype=held.dtype)
        return read(name) if held.is_meta else held

    return found


def on_cpu(traced: Traced) -> Traced:
    """The graph as it is traced on the CPU: what operators make on the meta device they make there."""
    made = traced.copy()
    for node in made.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _on_cpu)
    args, kwargs = pytree.tree_map_only(torch.Tensor, _example, (traced.example_inputs, traced.example_kwargs))
    return replace(made, example_inputs=args, example_kwargs=kwargs)


def _example(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if leaf.is_meta else leaf


def _on_cpu(argument: Any) -> Any:
    """An argument of an operator; the CPU in place of the meta device."""
    return torch.device("cpu") if isinstance(argument, torch.device) and argument.type == "meta" else argument
