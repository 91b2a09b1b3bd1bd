"""Parameters that are put together from tiles: built once in eval mode, and kept until a tile changes.

What several models share in part each of them concatenates from its tiles (`graphzip.rewrite.partition`). In training,
with gradients, or while a model is exported that is done at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from graphzip.graph.proxies import as_layer, is_proxy

__all__ = ["Assembled", "KeptValue", "assembly_of"]

aten = torch.ops.aten


class KeptValue:
    """A tensor that is computed from others, kept while these stay as they are."""

    def __init__(self) -> None:
        self._kept: tuple[Any, torch.Tensor] | None = None

    def of(self, tensors: Sequence[torch.Tensor], build: Callable[[], torch.Tensor], *, training: bool) -> torch.Tensor:
        """What `build` gives for these tensors: anew in training, with gradients, and while a model is traced."""
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        special = torch.compiler.is_compiling() or any(
            tensor.is_inference() or type(tensor) not in (nn.Parameter, torch.Tensor) for tensor in tensors
        )
        if training or learns or special:
            return build()
        state = [(id(tensor), tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in tensors]
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (state, build())
        return self._kept[1]

    def forget(self) -> None:
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None}


@dataclass(frozen=True)
class _Step:
    """A concatenation, or slices in another order, of values that are known by their numbers: tiles first, then what
    earlier steps made.
    """

    joins: bool
    operands: tuple[int, ...]
    dim: int


class Assembled(nn.Module):
    """The parameter that these steps make of the tensors that it is called with."""

    def __init__(self, steps: Sequence[_Step]) -> None:
        super().__init__()
        self.steps = tuple(steps)
        self._value = KeptValue()

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        if is_proxy(*tensors):
            return as_layer(self, *tensors)  # type: ignore[no-any-return]
        return self._value.of(tensors, lambda: self._built(tensors), training=self.training)

    def _built(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        values = list(tensors)
        for step in self.steps:
            given = [values[number] for number in step.operands]
            values.append(torch.cat(given, step.dim) if step.joins else given[0].index_select(step.dim, given[1]))
        return values[-1]

    def train(self, mode: bool = True) -> Any:
        self._value.forget()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{len(self.steps)} steps"


def assembly_of(node: fx.Node) -> tuple[Assembled, list[fx.Node], list[fx.Node]] | None:
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
    return Assembled([_step(each, number) for each in made]), fetched, made[:-1]


def _step(node: fx.Node, number: dict[fx.Node, int]) -> _Step:
    if node.target is aten.cat.default:
        parts, *dims = node.args
        return _Step(True, tuple(number[part] for part in cast(Any, parts)), cast(int, dims[0] if dims else 0))
    source, dim, index = cast(Any, node.args)
    return _Step(False, (number[source], number[index]), dim)
