"""What a model shows of its channels on calibration data: values, losses, gradients. Each is computed once, when asked.

Sources: the empirical Fisher information of Theis et al., "Faster gaze prediction with dense networks and Fisher
pruning" (2018); Hutchinson (1990) for random directions of the outputs, where there is no loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphzip.analysis.channels import Analysis
from graphzip.analysis.groups import ChannelGroup, ChannelGroups
from graphzip.analysis.layers import Layer, layers_by_weight
from graphzip.boundary import call_user
from graphzip.calibration import Calibration
from graphzip.errors import PlanError
from graphzip.graph.batches import Batches, leading, samples_in
from graphzip.graph.interpreter import Values
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.numeric.solvers import check_finite, factorised, relative_damping, squared
from graphzip_passes.parts.compensation import sampled_rows
from graphzip_passes.parts.holders import readers_of
from graphzip_passes.parts.output_slopes import output_slopes
from graphzip_passes.parts.places import Holder, places_of
from graphzip_passes.parts.slices import rows_by_role

__all__ = ["Evidence", "norm_scales_of"]

aten = torch.ops.aten

_HELD: Final = 64
"""Samples whose values are held, and whose gradients are taken one by one."""

_ROWS: Final = 1 << 14
"""Places of a layer that products of what it reads are taken over."""

_DAMPED: Final = 1e-3
"""A share of the mean square of what a layer reads that is added before moments are inverted."""

_NORMS: Final = {
    aten.batch_norm.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.instance_norm.default,
    aten.rms_norm.default,
}


@dataclass
class Evidence:
    """A model, its groups, and the calibration data; `where` is the path of the option that asks, for messages.

    `streams` gives the values of a graph whose weights are never all in memory.
    """

    traced: Traced
    analysis: Analysis
    groups: ChannelGroups
    calibration: Calibration | None
    seed: int
    where: str
    streams: Callable[[Traced, Sequence[tuple[Any, ...]]], Values] | None = None
    _stream: Values | None = field(default=None, repr=False)

    @cached_property
    def batches(self) -> Batches:
        """The inputs of the graph. Raises `PlanError` without calibration data."""
        if self.calibration is None:
            raise PlanError(
                f"{self.where}: it looks at calibration data; pass calibration=, a list of batches, or take a "
                "criterion that looks at weights alone, such as 'l1'"
            )
        return self.calibration.graph_inputs()

    @property
    def labelled(self) -> bool:
        """Whether there is a loss to differentiate."""
        return self.calibration is not None and self.calibration.loss is not None

    # ------------------------------------------------------------------------------------------------- values

    def activations(self, group: ChannelGroup) -> Tensor:
        """(n, samples, ..): what the channels hold. Raises `PlanError` where no value of the graph holds them."""
        if group.name not in self._places:
            raise PlanError(f"{self.where}: no operator holds the channels of group {group.name!r}; exclude it")
        place = self._places[group.name]
        found = [place.gathered(value) for value in self._at(place.node)]
        check_finite(group.name, *found)
        return torch.cat([each for each in found if each.shape[2:] == found[0].shape[2:]], 1).double().cpu()

    def order_of(self, group: ChannelGroup) -> int:
        """In this order groups are looked at without going back."""
        place = self._places.get(group.name)
        return -1 if place is None else self._order[place.node]

    @torch.no_grad()
    def _at(self, node: fx.Node) -> list[Tensor]:
        """The values of a node."""
        if self._stream is None or (self._order[node] < self._stream.done and node not in self._stream):
            self._stream = (self.streams or Values)(self.traced, leading(self.batches, _HELD))
        self._stream.up_to(node)
        return self._stream[node]

    @cached_property
    def _order(self) -> dict[fx.Node, int]:
        return {node: number for number, node in enumerate(self.traced.graph.nodes)}

    @cached_property
    def _layers(self) -> dict[str, Layer]:
        return layers_by_weight(self.traced)

    @cached_property
    def _places(self) -> dict[str, Holder]:
        return places_of(self.groups, self.analysis, self._layers, self._order)

    # ------------------------------------------------------------------------------------------------- gradients

    def gradient(self, name: str) -> Tensor:
        """Of the mean loss by a parameter of the graph. Raises `PlanError` without a loss."""
        return self._mean[1][name]

    @property
    def loss(self) -> float:
        """Mean over the samples. Raises `PlanError` without a loss."""
        return self._mean[0]

    def squared_gradient(self, name: str) -> Tensor:
        """Mean over samples of the squares of the gradient of each by a parameter of the graph."""
        return self._by_sample[0][name]

    def contributions(self, group: ChannelGroup) -> Tensor:
        """(samples, n): `sum of w * d loss / d w` over all that makes a channel."""
        return self._by_sample[1][group.name]

    def _check_whole(self) -> None:
        """Raises `PlanError` where the model cannot be looked at as a whole."""
        if self.streams is not None:
            raise PlanError(
                f"{self.where}: it looks at all layers together, and cannot be carried out a tensor at a time; take "
                "'wanda' or a criterion of weights, or load the model with from_pretrained, and compile that"
            )

    @cached_property
    def _mean(self) -> tuple[float, dict[str, Tensor]]:
        self._check_whole()
        if not self.labelled:
            raise PlanError(
                f"{self.where}: it differentiates a loss; pass loss=, a function (outputs, labels), and calibration "
                "batches (inputs, labels)"
            )
        found, told = self._zeros(), torch.zeros(2, dtype=torch.float64)
        for batch, labels in zip(self.batches.here, self._labels or (), strict=True):
            samples = samples_in(batch)
            loss = self._differentiate(batch, labels, found, scale=samples)
            told += torch.tensor([samples * loss, samples], dtype=torch.float64)
        processes = self.batches.processes
        ((total, count),) = processes.summed(told)
        return float(total / count), {name: value / count for name, value in processes.summed_by_name(found).items()}

    @cached_property
    def _by_sample(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self._check_whole()
        squares, count = self._zeros(), 0
        rows: dict[str, list[Tensor]] = {group.name: [] for group in self.groups}
        for batch, labels in self._one_by_one():
            slopes = self._zeros()
            self._differentiate(batch, labels, slopes)
            for name, slope in slopes.items():
                squares[name] += slope.square()
            for group in self.groups:
                rows[group.name].append(self._along(group, slopes))
            count += 1
        return {name: value / count for name, value in squares.items()}, {
            name: torch.stack(each) for name, each in rows.items()
        }

    def _along(self, group: ChannelGroup, slopes: dict[str, Tensor]) -> Tensor:
        module = self.traced.module
        made = rows_by_role(group, self.traced, lambda name: get_tensor(module, name) * slopes[name])
        sums = [rows.sum(1) for rows in made.get("producer", {}).values()]
        return torch.stack(sums).sum(0) if sums else torch.zeros(group.size, dtype=torch.float64)

    @cached_property
    def _labels(self) -> list[tuple[Any, ...]] | None:
        """Of every batch that is here, where there is a loss."""
        return self.calibration.labels() if self.calibration is not None and self.labelled else None

    def _one_by_one(self) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...] | None]]:
        """Samples, so many of them; where the model takes no other batch than its own, batches."""
        most = _HELD if self.traced.batch_dynamic else sys.maxsize
        batches, left = self.batches.leading(most), _HELD
        found = [None] * len(batches) if self._labels is None else self.batches.leading(most, self._labels)
        for batch, labels in zip(batches, found, strict=True):
            samples = samples_in(batch)
            if not self.traced.batch_dynamic:
                yield batch, labels
                continue
            for number in range(min(samples, left)):
                yield _sample(batch, number, samples), None if labels is None else _sample(labels, number, samples)
            left -= samples

    def _differentiate(
        self, batch: tuple[Any, ...], labels: tuple[Any, ...] | None, into: dict[str, Tensor], *, scale: float = 1.0
    ) -> float:
        """Add the gradients of a batch's loss, without labels of its outputs in a random direction; the loss."""
        found: list[float] = []

        def loss(outputs: Any) -> Tensor:
            assert self.calibration is not None
            assert self.calibration.loss is not None
            value = call_user(self.calibration.loss, outputs, *(labels or ()))
            if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
                raise PlanError(f"loss gave {type(value).__name__}; return a scalar tensor that depends on the outputs")
            found.append(float(value.detach()))
            return value.reshape(())

        goal = None if labels is None else loss
        slopes = output_slopes(self.traced, self._fetches, batch, self._generator, loss=goal)
        for node, along in slopes.along.items():
            into[self._fetches[node]] += scale * along[0].detach().double().cpu()
        return found[0] if found else 0.0

    @cached_property
    def _fetches(self) -> dict[fx.Node, str]:
        """The fetches of the floating parameters of groups, each with the name by which groups know it."""
        first = self.traced.aliases
        wanted = [self.traced.local(param.param) for group in self.groups for param in group.params]
        named = {first.get(name, name): name for name in wanted}
        found = {}
        for node in self.traced.graph.find_nodes(op="get_attr"):
            name = first.get(str(node.target), str(node.target))
            if name in named and isinstance(get_tensor(self.traced.module, name), nn.Parameter):
                found[node] = named[name]
        return found

    def _zeros(self) -> dict[str, Tensor]:
        module = self.traced.module
        wanted = {self.traced.local(param.param) for group in self.groups for param in group.params}
        return {name: torch.zeros(get_tensor(module, name).shape, dtype=torch.float64) for name in wanted}

    @cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    # ------------------------------------------------------------------------------------------------- layers

    @cached_property
    def norm_scales(self) -> frozenset[str]:
        """The names of the scales of normalisations."""
        return norm_scales_of(self.traced)

    def reading_gram(self, group: ChannelGroup) -> Tensor | None:
        """(n, n), summed over the layers that read the group; `None` where no layer does."""
        return self._grams.get(group.name)

    def reading_losses(self, group: ChannelGroup) -> Tensor | None:
        """(n,), summed over the layers that read the group; `None` where no layer does."""
        return self._losses.get(group.name)

    @cached_property
    def _grams(self) -> dict[str, Tensor]:
        return self._summed(_gram)

    @cached_property
    def _losses(self) -> dict[str, Tensor]:
        return self._summed(_losses)

    def _summed(self, measured: Callable[[Tensor, Tensor, Tensor, str], Tensor]) -> dict[str, Tensor]:
        """For every group, summed over the layers that read it, what is measured of second moments of what they read,
        (groups of the layer, columns, columns), their weight, (groups, outputs, columns), and the columns of channels,
        (groups, n, columns).
        """
        self._check_whole()
        readers: dict[fx.Node, list[tuple[str, IntArray, Layer]]] = {}
        for group in self.groups:
            for param in readers_of(group, self._layers):
                layer = self._layers[param.param]
                readers.setdefault(layer.node, []).append((group.name, param.indices.reshape(group.size, -1), layer))
        values = Values(self.traced, leading(self.batches, _HELD))
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for node in values.steps(max(map(self._order.__getitem__, readers), default=-1), readers):
                for name, indices, layer in readers[node]:
                    moments, weight = self._read(layer, values)
                    part = measured(moments, weight, _columns(indices, layer), layer.name)
                    found[name] = found[name] + part if name in found else part
        return found

    def _read(self, layer: Layer, values: Values) -> tuple[Tensor, Tensor]:
        rows = sampled_rows(layer, values, _ROWS)
        read = layer.read(values[layer.input], rows)
        check_finite(layer.name, read)
        moments = squared(read).cpu() / max(read.shape[1], 1)
        weight = layer.plain(get_tensor(self.traced.module, layer.name).detach()).double().cpu()
        return moments, weight.reshape(layer.groups, -1, moments.shape[1])


def _gram(moments: Tensor, weight: Tensor, owner: Tensor, _: str) -> Tensor:
    """`sum over outputs of z_i z_j`, mean over places, with `z_i` what channel i adds to an output."""
    products = moments * (weight.mT @ weight)
    return torch.stack([spread @ part @ spread.T for part, spread in zip(products, owner, strict=True)]).sum(0)


def _losses(moments: Tensor, weight: Tensor, owner: Tensor, what: str) -> Tensor:
    """`sum over outputs of w_c^T ((M^-1)_cc)^-1 w_c`: what the outputs move by in the mean square without a channel
    where the weights of all others make up for it as well as they can.
    """
    found = torch.zeros(owner.shape[1], dtype=torch.float64)
    for square, rows, spread in zip(moments, weight, owner, strict=True):
        damping = relative_damping(square.diagonal().mean(), _DAMPED)
        inverse = factorised(square, damping, what=f"layer {what!r}").inverse()
        for channel in range(len(spread)):
            columns = spread[channel].nonzero()[:, 0]
            if len(columns):
                mine = rows[:, columns].T
                block = factorised(inverse[columns][:, columns], what=f"layer {what!r}")
                found[channel] += (mine * block.solve(mine)).sum()
    return found


def norm_scales_of(traced: Traced) -> frozenset[str]:
    """The names of the scales of normalisations in the user's model."""
    nodes = [node for node in traced.graph.nodes if node.target in _NORMS]
    scales = [arguments_of(node).get("weight") for node in nodes]
    return frozenset(traced.qualified(str(each.target)) for each in scales if isinstance(each, fx.Node))


def _columns(indices: IntArray, layer: Layer) -> Tensor:
    """(groups of the layer, n, columns): one where a channel is read at a column of the layer's weight."""
    positions = int(np.prod(layer.kernel, dtype=np.int64))
    found = torch.zeros(len(indices), layer.groups * layer.shape[1], dtype=torch.float64)
    channel, slot = np.nonzero(indices >= 0)
    found[channel, indices[channel, slot]] = 1.0
    return found.reshape(len(found), layer.groups, -1).transpose(0, 1).repeat_interleave(positions, 2)


def _sample(values: tuple[Any, ...], number: int, samples: int) -> tuple[Any, ...]:
    """One sample of a batch: of every tensor that has so many."""
    taken: tuple[Any, ...] = pytree.tree_map(
        lambda leaf: (
            leaf[number : number + 1]
            if isinstance(leaf, torch.Tensor) and leaf.dim() and len(leaf) == samples
            else leaf
        ),
        values,
    )
    return taken
