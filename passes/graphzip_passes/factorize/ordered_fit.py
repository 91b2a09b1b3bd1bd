"""Factors that are fitted in the order in which their layers run, each to what it reads by then.

Where a layer reads what the layers before it give now, the kernel that would serve it best is a least squares problem
(`graphzip_passes.parts.compensation`). With `W` that kernel, `H` the second moments of what it reads and `s` the scale
of the batch norm behind each filter `o`, a kernel `K` of factors is off by

    e(K) = sum_o s_o^2 (K_o - W_o)^T H (K_o - W_o),

so factors that the layer has alone are brought to the least of it when it is the layer's turn. Factors that several
layers hold are fitted when all have had their turn, together with those that each of them has alone, to the sum over
the layers of `e(K) / e(0)` with the kernels that were given as `W`: what makes up for the layers before would be
another one once these have changed. Then it is everyone's turn again.

`e` is a polynomial of the factors. It is minimised by L-BFGS (Nocedal and Wright, "Numerical Optimization", 7.2) from
where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, fx, nn

from graphzip.analysis.layers import Layer, layer_of
from graphzip.graph.layers.factored import FactoredConv
from graphzip.graph.meta import meta_of
from graphzip.graph.operators import argument_of
from graphzip.graph.state import get_tensor, joined
from graphzip.graph.traced import Traced
from graphzip.process_groups import Processes

__all__ = ["FactoredKernels"]

_STEPS: Final = 60  # of L-BFGS
_REMEMBERED: Final = 20  # steps that the next one is made of
_SETTLED: Final = 1e-6  # of the error: a step that changes it by less is the last one


@dataclass(frozen=True)
class _Aim:
    """The kernel that would be best, (G, I * K, O), and how what it is missed by counts."""

    wanted: Tensor
    moments: Tensor
    scale: Tensor
    whole: float

    @classmethod
    def of(cls, wanted: Tensor, moments: Tensor, scale: Tensor) -> _Aim:
        rows = wanted * scale
        return cls(wanted, moments, scale, float(((moments @ rows) * rows).sum()))

    def missed(self, kernel: Tensor) -> Tensor:
        """What a kernel (out, in / groups, *size) misses of it, as a share of what no kernel would."""
        rows = kernel.reshape(self.wanted.shape[0], self.wanted.shape[2], -1).transpose(1, 2)
        rest = (rows - self.wanted) * self.scale
        return ((self.moments @ rest) * rest).sum() / self.whole


class FactoredKernels:
    """The factored layers of a graph, of which each is called once, and what they are to give (`Kernels`)."""

    def __init__(self, given: Traced, traced: Traced, model: nn.Module, processes: Processes) -> None:
        self._processes = processes
        self._layers: dict[str, FactoredConv] = {}
        self._aims: dict[str, _Aim] = {}
        calls = [(node, meta_of(node)["factored"].layer) for node in traced.graph.nodes if "factored" in node.meta]
        often = Counter(name for _, name in calls)
        tied = {*traced.aliases, *traced.aliases.values()}
        for node, name in calls:
            layer = model.get_submodule(name)
            bias = joined(name, "bias")
            if isinstance(layer, FactoredConv) and often[name] == 1 and bias not in tied:
                self._layers[node.name] = layer
        before = {node.name: node for node in given.graph.nodes if node.name in self._layers}
        self._given = {
            call: get_tensor(given.module, str(argument_of(node, "weight").target)).detach()
            for call, node in before.items()
        }
        held = Counter(id(tensor) for layer in map(model.get_submodule, often) for tensor in _learned(layer))
        self._apart = {
            call: [tensor for tensor in _learned(layer) if held[id(tensor)] == 1]
            for call, layer in self._layers.items()
        }

    @property
    def shared(self) -> bool:
        """Whether layers that have their turn share something that is learned."""
        return any(len(_learned(layer)) > len(self._apart[call]) for call, layer in self._layers.items())

    def layers(self, traced: Traced) -> dict[fx.Node, Layer]:
        found: dict[fx.Node, Layer] = {}
        for node in traced.graph.nodes:
            layer = layer_of(node) if node.name in self._layers else None
            if layer is not None:
                found[node] = layer
        return found

    @torch.enable_grad()
    def bring(self, call: str, wanted: Tensor, moments: Tensor, scale: Tensor) -> None:
        wanted, moments, scale = (each.detach().cpu().double() for each in (wanted, moments, scale))
        aim = _Aim.of(wanted, moments, scale)
        if aim.whole > 0.0:
            self._fit(self._apart[call], [(self._layers[call], aim)])
        groups, _, outs = wanted.shape
        given = self._given[call].cpu().double().reshape(groups, outs, -1).transpose(1, 2)
        self._aims[call] = _Aim.of(given, moments, scale)

    @torch.enable_grad()
    def fit_shared(self) -> None:
        """Fit all factors to the kernels that were given, by what their layers read in the last turn."""
        parts = [(self._layers[call], aim) for call, aim in self._aims.items() if aim.whole > 0.0]
        self._fit(list({id(each): each for layer, _ in parts for each in _learned(layer)}.values()), parts)

    def _fit(self, tensors: Sequence[Tensor], parts: Sequence[tuple[FactoredConv, _Aim]]) -> None:
        """Bring these factors, in place, to where the layers miss least of their aims; the others stay."""
        values = [each.detach().to("cpu", torch.float64, copy=True).requires_grad_() for each in tensors]
        if not values or not parts:
            return
        place = {id(tensor): value for tensor, value in zip(tensors, values, strict=True)}
        operands = [
            [place.get(id(each), each.detach().cpu()) for each in (getattr(layer, name) for name in layer.operands)]
            for layer, _ in parts
        ]
        operands = [[each.double() if each.is_floating_point() else each for each in both] for both in operands]
        optimizer = torch.optim.LBFGS(
            values,
            max_iter=_STEPS,
            history_size=_REMEMBERED,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def missed() -> Tensor:
            optimizer.zero_grad()
            total = torch.stack(
                [
                    aim.missed(layer.build(*both, training=False))
                    for (layer, aim), both in zip(parts, operands, strict=True)
                ]
            ).sum()
            total.backward()  # type: ignore[no-untyped-call]
            return total

        optimizer.step(missed)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for tensor, value in zip(tensors, self._processes.agreed([each.detach() for each in values]), strict=True):
                tensor.copy_(value)

    def values(self) -> list[Tensor]:
        """A copy of all factors."""
        return [each.detach().clone() for layer in self._layers.values() for each in _learned(layer)]

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        own = [each for layer in self._layers.values() for each in _learned(layer)]
        for tensor, value in zip(own, values, strict=True):
            tensor.copy_(value)


def _learned(layer: nn.Module) -> list[Tensor]:
    """The factors of a layer that are no fixed ones."""
    assert isinstance(layer, FactoredConv)
    return [each for each in (getattr(layer, name) for name in layer.operands) if isinstance(each, nn.Parameter)]
