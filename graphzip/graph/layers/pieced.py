"""Layers whose parameters are put together from tiles that several models share in part.

A layer of which models share some channels has no weight of its own: `graphzip.rewrite.partition` stores what models
have in common once, in tiles `<layer>.shared_a_b.weight`, and what one has alone as `<layer>.own.weight`. The layer is
still what it was: `layer.weight` is the whole weight, in its original shape, and the state dict has that under its
original name, so that it fits the model that was given. In eval mode the weight is put together once and kept until a
tile changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn

from graphzip.errors import GraphZipError
from graphzip.graph.layers.factored import KeptValue
from graphzip.graph.proxies import as_layer, is_proxy
from graphzip.graph.state import get_tensor

__all__ = ["PIECED", "Assembled", "Assembly", "Pieced", "Tile", "assembly_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Step:
    """A concatenation, or slices in another order, of values that are known by their numbers: tiles first, then what
    earlier steps made.
    """

    joins: bool
    operands: tuple[int, ...]
    dim: int


@dataclass(frozen=True)
class Assembly:
    """How a parameter is put together: what these steps make of tiles, and of orders of their slices."""

    steps: tuple[_Step, ...]
    kept: KeptValue = field(default_factory=KeptValue, compare=False)

    def value(self, tensors: Sequence[torch.Tensor], *, training: bool) -> torch.Tensor:
        """The parameter: anew in training, else as it was kept."""
        return self.kept.of(tensors, lambda: self.built(tensors), training=training)

    def built(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parameter, put together anew."""
        values = list(tensors)
        for step in self.steps:
            given = [values[number] for number in step.operands]
            values.append(torch.cat(given, step.dim) if step.joins else given[0].index_select(step.dim, given[1]))
        return values[-1]

    def parted(self, whole: torch.Tensor, tensors: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """The way back: the value of each tile, by its number among `tensors`, that a whole parameter holds."""
        orders = {step.operands[1] for step in self.steps if not step.joins}
        tiles = [number for number in range(len(tensors)) if number not in orders]
        places, start = list(tensors), 0
        for number in tiles:
            count = tensors[number].numel()
            places[number] = torch.arange(start, start + count, device=whole.device).reshape(tensors[number].shape)
            start += count
        flat = whole.new_empty(start)
        flat[self.built(places).flatten()] = whole.flatten()
        parts = torch.split(flat, [tensors[number].numel() for number in tiles])
        return {number: part.reshape(tensors[number].shape) for number, part in zip(tiles, parts, strict=True)}


class Assembled(nn.Module):
    """A parameter that is put together from the tensors that it is called with, where no layer of its own reads it."""

    def __init__(self, assembly: Assembly) -> None:
        super().__init__()
        self.assembly = assembly

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        if is_proxy(*tensors):
            return as_layer(self, *tensors)  # type: ignore[no-any-return]
        return self.assembly.value(tensors, training=self.training)

    def extra_repr(self) -> str:
        return f"{len(self.assembly.steps)} steps"


def assembly_of(node: fx.Node) -> tuple[Assembly, list[fx.Node], list[fx.Node]] | None:
    """What puts this value together from parameters alone, the nodes that fetch these, and those in between.

    Nothing where it is computed otherwise.
    """
    found: list[fx.Node] = [node]
    for each in found:
        if each.op == "get_attr":
            continue
        if each.target not in (aten.cat.default, aten.index_select.default):
            return None
        found += [operand for operand in each.all_input_nodes if operand not in found]
    order = [each for each in node.graph.nodes if each in set(found)]
    fetched = [each for each in order if each.op == "get_attr"]
    made = [each for each in order if each.op != "get_attr"]
    if not made:
        return None
    number = {each: place for place, each in enumerate([*fetched, *made])}
    return Assembly(tuple(_step(each, number) for each in made)), fetched, made


def _step(node: fx.Node, number: dict[fx.Node, int]) -> _Step:
    if node.target is aten.cat.default:
        parts, *dims = node.args
        return _Step(True, tuple(number[part] for part in cast(Any, parts)), cast(int, dims[0] if dims else 0))
    source, dim, index = cast(Any, node.args)
    return _Step(False, (number[source], number[index]), dim)


class Tile(nn.Module):
    """Holds tiles of the parameters of a layer, whose state dict has them as parts of the whole parameters."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        return None

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *found: Any
    ) -> None:
        """What has the names of tiles, as `named_parameters` gives them, is taken; nothing is missed."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, False, *found)


class Pieced(nn.Module):
    """What such layers share: `pieces` has of every parameter how it is put together, and from which tensors."""

    pieces: dict[str, tuple[Assembly, tuple[str, ...]]]

    def put_together(self, pieces: Mapping[str, tuple[Assembly, tuple[str, ...]]]) -> None:
        """Let parameters be put together from tensors of this module, given by their names in it."""
        for leaf in pieces:
            self._parameters.pop(leaf, None)
        self.pieces = dict(pieces)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("pieces", ()):
            return self.pieces[name][0].value(self._tensors(name), training=self.training)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("pieces", ()):
            own = [each for each in self.pieces[name][1] if isinstance(get_tensor(self, each), nn.Parameter)]
            raise GraphZipError(
                f"{name} is put together from what several models share and what one has alone; set "
                f"{' and '.join(own)}, or load a state dict"
            )
        super().__setattr__(name, value)

    def _tensors(self, leaf: str) -> list[torch.Tensor]:
        return [get_tensor(self, name) for name in self.pieces[leaf][1]]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for leaf, (assembly, _) in self.pieces.items():
            with torch.set_grad_enabled(keep_vars and torch.is_grad_enabled()):
                destination[prefix + leaf] = assembly.built(self._tensors(leaf))
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Whole parameters are cut into tiles; of what several models share the last that is loaded counts."""
        whole = {prefix + leaf for leaf in self.pieces}
        rest = {key: value for key, value in state_dict.items() if key not in whole}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for leaf, (_, names) in self.pieces.items():
            given = state_dict.get(prefix + leaf)
            tiles = [name for name in names if isinstance(get_tensor(self, name), nn.Parameter)]
            if given is not None:
                self._load(leaf, given, prefix, error_msgs)
            elif strict and not all(prefix + name in state_dict for name in tiles):
                missing_keys.append(prefix + leaf)

    def _load(self, leaf: str, given: torch.Tensor, prefix: str, error_msgs: list[str]) -> None:
        assembly, tensors = self.pieces[leaf][0], self._tensors(leaf)
        if any(tensor.is_meta for tensor in tensors):
            error_msgs.append(f"{prefix}{leaf}: its tiles have no memory; load into a model that has some")
            return
        with torch.no_grad():
            shape = assembly.built(tensors).shape
            if given.shape != shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{leaf}: copying a param with shape {given.shape} from checkpoint, the "
                    f"shape in current model is {shape}."
                )
                return
            given = given.to(tensors[0].device)
            for number, value in assembly.parted(given, tensors).items():
                tensors[number].copy_(value)


class PiecedLinear(Pieced, nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = as_layer(self, input) if is_proxy(input) else super().forward(input)
        return found


class PiecedConv1d(Pieced, nn.Conv1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = as_layer(self, input) if is_proxy(input) else super().forward(input)
        return found


class PiecedConv2d(Pieced, nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = as_layer(self, input) if is_proxy(input) else super().forward(input)
        return found


class PiecedConv3d(Pieced, nn.Conv3d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = as_layer(self, input) if is_proxy(input) else super().forward(input)
        return found


PIECED: dict[type[nn.Module], type[Pieced]] = {
    nn.Linear: PiecedLinear,
    nn.Conv1d: PiecedConv1d,
    nn.Conv2d: PiecedConv2d,
    nn.Conv3d: PiecedConv3d,
}
"""For each class of layers the one whose parameters are put together."""
