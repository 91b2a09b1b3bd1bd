"""Which channels of a group to keep, when what reads them may be re-fitted: greedy elimination by reconstruction.

For a layer with weight `W` (O, I * K) that reads rows with the covariance `C`, taking out channel `j` and re-fitting
the rest by least squares costs, with `M = (C + lambda I)^-1` and the columns `j` of one channel,

    cost_j = sum over o of g_o W[o, j] M[j, j]^-1 W[o, j]^T,

and leaves `W <- W - W[:, j] M[j, j]^-1 M[j, :]`, `M <- M - M[:, j] M[j, j]^-1 M[j, :]`. `g_o` is the mean square of the
derivative of the model's outputs, in random directions, by output `o`: a second-order estimate of what an error there
does to them. The channel with the least cost goes, summed over all that reads it, and so on: one order serves all
widths. Channels that are identical to another one go first.

Sources: Hassibi and Stork, "Optimal Brain Surgeon" (NIPS 1992), Eq. 5, for blocks of weights as in Frantar and
Alistarh, "Optimal Brain Compression" (NeurIPS 2022), section 4.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from graphzip.analysis.groups import ChannelGroup, ChannelGroups, GroupParam
from graphzip.graph.state import get_tensor
from graphzip.graph.torch_private import pytree
from graphzip.graph.trace import Traced
from graphzip.graph.values import Values
from graphzip.labels import IntArray
from graphzip.numeric import SecondMoments, check_finite, factorised
from graphzip_passes.layer_rows import Layer, layers_of
from graphzip_passes.refit import sampled_rows
from graphzip_passes.segments import Partition

__all__ = ["Moments", "duplicates", "elimination_orders", "partition_of", "readers_of"]

logger = logging.getLogger(__name__)

_DAMPING = 1e-2  # lambda, in mean variances of what a layer reads
_AT_ONCE = 1024  # unknowns above which several channels go in one step
_STEPS = 64
_ROWS = 1 << 16  # that covariances are taken over


@dataclass(frozen=True)
class Moments:
    """What is known of a layer on the calibration data: the covariance (G, I * K, I * K) of the rows it reads, and the
    sensitivity (out channels,) of the model's outputs to its own.
    """

    covariance: torch.Tensor
    sensitivity: torch.Tensor


def elimination_orders(
    traced: Traced, groups: ChannelGroups, batches: Sequence[tuple[Any, ...]], names: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """For each of the named groups its channels in the order in which they go: the first one is needed least.

    Every block of a group comes evenly: any number of channels that the blocks can keep in equal parts is left by a
    leading part of the order. Groups that no layer reads which can be re-fitted are left out.
    """
    layers = {traced.qualified(layer.name): layer for layer in layers_of(traced).values()}
    readable = {name: found for name in names if (found := readers_of(groups[name], layers))}
    if not readable:
        return {}
    wanted = {layers[param.param].node for params in readable.values() for param in params}
    moments = _moments(traced, [layer for layer in layers.values() if layer.node in wanted], batches)
    orders = {}
    for name, params in readable.items():
        readers = [
            reader
            for param in params
            for reader in _readers(groups[name], param, layers[param.param], moments[layers[param.param].node], traced)
        ]
        orders[name] = _order(groups[name], readers, duplicates(groups[name], traced))
    return orders


def partition_of(group: ChannelGroup, order: Sequence[int], count: int, traced: Traced) -> tuple[Partition, list[int]]:
    """Clusters of the channels that go around the most similar ones that stay, and the latter: `count` channels."""
    kept = sorted(order[group.size - count :])
    rows = _own_slices(group, traced)
    rows = rows / rows.std(axis=0, keepdims=True).clip(min=1e-12)
    members: dict[int, list[int]] = {channel: [channel] for channel in kept}
    for block in group.blocks:
        inside = [channel for channel in kept if channel in set(block)]
        for channel in set(block) - set(inside):
            distance = np.square(rows[inside] - rows[channel]).sum(axis=1)
            members[inside[int(distance.argmin())]].append(channel)
    return tuple(sorted(tuple(sorted(each)) for each in members.values())), kept


def readers_of(group: ChannelGroup, layers: Mapping[str, Layer]) -> list[GroupParam]:
    """The layers that read the group, if those are all that do."""
    found = [param for param in group.params if param.role == "consumer"]
    usable = all(param.param in layers and param.dim == layers[param.param].input_dim for param in found)
    return found if usable and not group.whole_blocks else []


def _local(traced: Traced, name: str) -> str:
    return name.removeprefix(f"{traced.scope}.") if traced.scope else name


def _own_slices(group: ChannelGroup, traced: Traced) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Everything that makes a channel or acts on it alone, one row per channel."""
    rows = []
    for param in group.params:
        if param.role != "consumer":
            tensor = get_tensor(traced.module, _local(traced, param.param)).detach().movedim(param.dim, 0)
            values = tensor.reshape(tensor.shape[0], -1).double().cpu().numpy()
            rows.append(values[param.indices].reshape(group.size, -1))
    return np.concatenate(rows, axis=1)


def duplicates(group: ChannelGroup, traced: Traced) -> IntArray:
    """For every channel the number of the set of identical channels, of its block, that it belongs to."""
    blocks = np.zeros((group.size, 1))
    for number, block in enumerate(group.blocks):
        blocks[list(block)] = number
    rows = np.concatenate([blocks, _own_slices(group, traced) + 0.0], axis=1)
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


# ------------------------------------------------------------------------------------------------- moments


def _moments(traced: Traced, layers: Sequence[Layer], batches: Sequence[tuple[Any, ...]]) -> dict[fx.Node, Moments]:
    by_node = {layer.node: layer for layer in layers}
    values = Values(traced, batches)
    covariance = {}
    with torch.no_grad():
        for node in values.steps(len(values.nodes)):
            if node in by_node:
                covariance[node] = _covariance(by_node[node], values)
    sensitivity = _sensitivities(traced, by_node, batches)
    return {node: Moments(covariance[node], sensitivity[node]) for node in by_node}


def _covariance(layer: Layer, values: Values) -> torch.Tensor:
    outputs, inputs = values[layer.node], values[layer.input]
    moments = SecondMoments()
    for x, output, rows in zip(inputs, outputs, sampled_rows(layer, outputs, _ROWS), strict=True):
        read = layer.read([x], [output], [rows])
        check_finite(layer.name, read)
        moments.add(read)
    covariance = moments.covariance()
    unknowns, noise = covariance.shape[1], torch.finfo(inputs[0].dtype).eps
    rounding = 4 * unknowns**0.5 * noise * covariance.diagonal(dim1=1, dim2=2).mean()
    covariance.diagonal(dim1=1, dim2=2).add_(rounding)
    return covariance


class _Watched(fx.Interpreter):
    """Runs a graph and keeps what some nodes give, so that outputs can be differentiated by it."""

    def __init__(self, module: fx.GraphModule, watched: Mapping[fx.Node, Layer]) -> None:
        super().__init__(module)
        self.watched = watched
        self.seen: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.watched:
            self.seen[n] = value if value.requires_grad else value.detach().requires_grad_()
            return self.seen[n]
        return value


def _sensitivities(
    traced: Traced, layers: Mapping[fx.Node, Layer], batches: Sequence[tuple[Any, ...]]
) -> dict[fx.Node, torch.Tensor]:
    """Mean square of the derivative in random directions, summed over a layer's places, per output channel."""
    generator = torch.Generator().manual_seed(0)
    total = {node: torch.zeros((), dtype=torch.float64) for node in layers}
    for batch in batches:
        run = _Watched(traced.module, layers)
        with torch.enable_grad():
            outputs = [
                leaf
                for leaf in pytree.tree_leaves(run.run(*batch))
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad
            ]
            directions = [torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in outputs]
            found = torch.autograd.grad(outputs, list(run.seen.values()), directions, allow_unused=True)
        for node, slope in zip(run.seen, found, strict=True):
            if slope is not None:
                squares = slope.double().square().movedim(layers[node].dim, -1)
                total[node] = total[node] + squares.reshape(-1, squares.shape[-1]).sum(0).cpu()
    ones = {node: torch.ones(layer.shape[0], dtype=torch.float64) for node, layer in layers.items()}
    return {node: value if value.dim() and bool(value.any()) else ones[node] for node, value in total.items()}


# ------------------------------------------------------------------------------------------------- elimination


class _Reader:
    """A layer (one group of a convolution) that reads some channels, less those that are gone.

    `M` is never written anew, for it is large: it stays `inverse - factor factor^T`, whose blocks on the diagonal, one
    per channel, are kept up to date. What goes is pivots of a Cholesky factorisation then, column after column.
    """

    def __init__(
        self, weight: torch.Tensor, covariance: torch.Tensor, columns: IntArray, *, what: str = "a layer"
    ) -> None:
        """`weight` (O, F), scaled by sensitivities, `covariance` (F, F), `columns` (channels, c): -1 where not read."""
        self.what = what
        self.weight = weight.clone()
        self.inverse = _damped_inverse(covariance, what)
        self.factor, self.gone = torch.empty_like(self.inverse), 0
        self.columns = torch.from_numpy(columns)
        self.read = self.columns[:, 0] >= 0
        self.blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]

    def costs(self, channels: torch.Tensor) -> torch.Tensor:
        """What taking out each one of these channels alone costs."""
        costs = torch.zeros(len(channels), dtype=self.weight.dtype)
        read = self.read[channels]
        weight = self.weight[:, self.columns[channels[read]]].permute(1, 2, 0)
        costs[read] = factorised(self.blocks[channels[read]], what=self.what).halved(weight).square().sum((1, 2))
        return costs

    def remove(self, channels: torch.Tensor) -> None:
        """Take channels out and re-fit the rest."""
        gone = self.columns[channels[self.read[channels]]].flatten()
        if not gone.numel():
            return
        past = self.factor[:, : self.gone]
        rows = torch.addmm(self.inverse[gone], past[gone], past.t(), alpha=-1)
        root = factorised(rows[:, gone], what=self.what)
        pull = root.halved(torch.cat([rows, self.weight[:, gone].t()], 1))
        new, share = pull[:, : len(self.inverse)], pull[:, len(self.inverse) :]
        self.weight.addmm_(share.t(), new, alpha=-1)
        self.factor[:, self.gone : self.gone + len(gone)] = new.t()
        self.gone += len(gone)
        part = new.t()[self.columns]
        self.blocks.baddbmm_(part, part.transpose(1, 2), alpha=-1)


def _damped_inverse(covariance: torch.Tensor, what: str) -> torch.Tensor:
    """`(covariance + lambda I)^-1`."""
    scale = float(covariance.diagonal().mean())
    return factorised(covariance, _DAMPING * scale if scale > 0.0 else 1.0, what=what).inverse()


def _readers(group: ChannelGroup, param: GroupParam, layer: Layer, moments: Moments, traced: Traced) -> list[_Reader]:
    weight = layer.plain(get_tensor(traced.module, layer.name).detach().double().cpu())
    weight = (weight.flatten(1) * moments.sensitivity.sqrt()[:, None]).reshape(layer.groups, -1, weight[0].numel())
    inputs = layer.shape[1]
    positions = weight.shape[2] // inputs
    found = []
    for number in range(layer.groups):
        inside = (param.indices >= number * inputs) & (param.indices < (number + 1) * inputs) & (param.indices >= 0)
        if not inside.any():
            continue
        local = np.where(inside, param.indices - number * inputs, 0)[:, :, None] * positions + np.arange(positions)
        columns = np.where(inside[:, :, None], local, -1).reshape(group.size, -1)
        columns = -np.sort(-columns, axis=1)[:, : int((columns >= 0).sum(axis=1).max())]
        found.append(_Reader(weight[number], moments.covariance[number].cpu(), columns, what=f"layer {layer.name!r}"))
    return found


def _order(group: ChannelGroup, readers: Sequence[_Reader], same: IntArray) -> tuple[int, ...]:
    """All channels, the one that is needed least first; the blocks take turns."""
    left = [set(block) for block in group.blocks]
    block_of = {channel: number for number, block in enumerate(group.blocks) for channel in block}
    widest = max(len(reader.inverse) for reader in readers)
    at_once = max(1, group.size // _STEPS) if widest > _AT_ONCE and len(left) == 1 else 1
    order: list[int] = []
    while len(order) < group.size:
        most = max(map(len, left))
        open_ = torch.tensor(sorted(channel for block in left if len(block) == most for channel in block))
        costs = torch.stack([reader.costs(open_) for reader in readers]).sum(0)
        alive = [channel for block in left for channel in block]
        twins = np.bincount(same[alive], minlength=int(same.max()) + 1)[same[open_.numpy()]] > 1
        costs[torch.from_numpy(twins)] -= 2 * costs.abs().max() + 1.0
        ranked = open_[costs.argsort(stable=True)].tolist()
        gone = ranked[: 1 if twins.any() else at_once]
        for reader in readers:
            reader.remove(torch.tensor(gone))
        for channel in gone:
            left[block_of[channel]].discard(channel)
        order += gone
    return tuple(order)
