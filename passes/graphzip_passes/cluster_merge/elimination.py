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

import itertools
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import fx

from graphzip.analysis.groups import ChannelGroup, ChannelGroups, GroupParam
from graphzip.analysis.layers import Layer, layers_by_weight
from graphzip.graph.batches import Given, shared
from graphzip.graph.interpreter import Values
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.numeric.solvers import SecondMoments, check_finite
from graphzip.process_groups import Processes
from graphzip.progress import told
from graphzip_passes.cluster_merge.greedy import Reader, rounds
from graphzip_passes.parts.compensation import sampled_rows
from graphzip_passes.parts.holders import readers_of
from graphzip_passes.parts.output_slopes import drawn_alike, output_slopes
from graphzip_passes.parts.slices import duplicates, own_rows
from graphzip_passes.parts.tied_slices import Partition

__all__ = [
    "Change",
    "Elimination",
    "Statistics",
    "elimination_orders",
    "eliminations",
    "partition_of",
    "readable_groups",
]

logger = logging.getLogger(__name__)

_ROWS = 1 << 14, 1 << 16  # that covariances are taken over, at least and at most
_ROWS_EACH = 8  # for each unknown


@dataclass(frozen=True)
class Statistics:
    """What is known of a layer on the calibration data: the covariance (G, I * K, I * K) of the rows it reads, and the
    sensitivity (out channels,) of the model's outputs to its own.
    """

    covariance: torch.Tensor
    sensitivity: torch.Tensor


@dataclass(frozen=True)
class Change:
    """What is added to the weight of a layer, `(G * O, I, *kernel)` as `Layer.plain` has it."""

    layer: Layer
    weight: torch.Tensor


@dataclass(frozen=True)
class Elimination:
    """Of one group: its channels in the order in which they go, the first one is needed least. Those that stay come
    last, in any order.

    `changes` has, by the number of channels that are left, what becomes of the layers that read the group: the columns
    of channels that go are taken out, and the others are re-fitted.
    """

    order: tuple[int, ...]
    changes: Mapping[int, tuple[Change, ...]]


def elimination_orders(
    traced: Traced,
    groups: ChannelGroups,
    batches: Given,
    names: Sequence[str],
    least: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """For each of the named groups its channels in the order in which they go, until `least` are left."""
    return {name: each.order for name, each in eliminations(traced, groups, batches, names, least=least).items()}


def eliminations(
    traced: Traced,
    groups: ChannelGroups,
    batches: Given,
    names: Sequence[str],
    widths: Mapping[str, Collection[int]] | None = None,
    *,
    least: Mapping[str, int] | None = None,
) -> dict[str, Elimination]:
    """The eliminations of the named groups; changes are kept at the given widths, or the next ones below.

    Where `least` channels of a group are left, no more of them go; by default none are left, or the smallest of the
    widths. Every block of a group comes evenly: any number of channels that the blocks can keep in equal parts is left
    by a leading part of the order. Groups that no layer reads which can be re-fitted are left out.
    """
    layers = layers_by_weight(traced)
    readable = {name: params for name in names if (params := readers_of(groups[name], layers))}
    if not readable:
        return {}
    open_ = {name: {layers[param.param].node for param in params} for name, params in readable.items()}
    found: dict[str, Elimination] = {}
    processes, turns = shared(batches).processes, itertools.count()
    for moments in _moments(traced, [layers[each.param] for params in readable.values() for each in params], batches):
        for name in [name for name, nodes in open_.items() if nodes <= moments.keys()]:
            turn = next(turns)
            if turn % processes.size == processes.rank:
                told(turn, len(readable), f"choosing channels of {name}")
                readings = _readings(groups[name], readable[name], layers, moments, traced)
                kept = sorted((widths or {}).get(name, ()), reverse=True)
                last = (least or {}).get(name, min(kept, default=0))
                found[name] = _eliminated(groups[name], readings, duplicates(groups[name], traced), kept, last)
            del open_[name]
        for node in moments.keys() - set().union(*open_.values()):
            del moments[node]
    found = _of_all(found, layers, processes)
    return {name: found[name] for name in readable}


def _of_all(
    found: Mapping[str, Elimination], layers: Mapping[str, Layer], processes: Processes
) -> dict[str, Elimination]:
    """What every process found of its groups; layers are the ones of this process."""
    if processes.size == 1:
        return dict(found)
    plain = [
        (name, each.order, left, [(change.layer.name, change.weight) for change in changes])
        for name, each in found.items()
        for left, changes in (each.changes or {0: ()}).items()
    ]
    together: dict[str, Elimination] = {}
    for name, order, left, weights in itertools.chain(*processes.gathered(plain)):
        known = together.get(name, Elimination(order, {})).changes
        own = tuple(Change(layers[layer], weight) for layer, weight in weights)
        together[name] = Elimination(order, {**known, left: own} if own else known)
    return together


def readable_groups(traced: Traced, groups: ChannelGroups, names: Sequence[str]) -> list[str]:
    """Those of the named groups that are read by layers which can be re-fitted, and by nothing else."""
    layers = layers_by_weight(traced)
    return [name for name in names if readers_of(groups[name], layers)]


def partition_of(group: ChannelGroup, order: Sequence[int], count: int, traced: Traced) -> tuple[Partition, list[int]]:
    """Clusters of the channels that go around the most similar ones that stay, and the latter: `count` channels."""
    kept = sorted(order[group.size - count :])
    rows = own_rows(group, traced)
    rows = rows / rows.std(axis=0, keepdims=True).clip(min=1e-12)
    members: dict[int, list[int]] = {channel: [channel] for channel in kept}
    for block in map(set, group.blocks):
        inside = [channel for channel in kept if channel in block]
        goes = sorted(block - set(inside))
        for channel, nearest in zip(goes, cdist(rows[goes], rows[inside], "sqeuclidean").argmin(axis=1), strict=True):
            members[inside[int(nearest)]].append(channel)
    return tuple(sorted(tuple(sorted(each)) for each in members.values())), kept


# ------------------------------------------------------------------------------------------------- moments


def _moments(traced: Traced, layers: Sequence[Layer], batches: Given) -> Iterator[dict[fx.Node, Statistics]]:
    """What is known by the calls of layers, one more of them at a time; what is taken out is forgotten."""
    by_node = {layer.node: layer for layer in layers}
    sensitivity = _sensitivities(traced, by_node, batches)
    values = Values(traced, batches)
    known: dict[fx.Node, Statistics] = {}
    for node in values.steps(max(values.place[node] for node in by_node), by_node):
        layer = by_node[node]
        same = (each.covariance for other, each in known.items() if _reads_alike(layer, by_node[other]))
        covariance = next(same, None)
        known[node] = Statistics(_covariance(layer, values) if covariance is None else covariance, sensitivity[node])
        yield known


def _reads_alike(one: Layer, other: Layer) -> bool:
    """Whether two layers read the same rows."""
    if one.input is not other.input or one.groups != other.groups or one.is_linear != other.is_linear:
        return False
    return one.is_linear or one.window == other.window


def _covariance(layer: Layer, values: Values) -> torch.Tensor:
    inputs, (source, _) = values[layer.input], values.shared.order[0]
    moments = SecondMoments(values.shared.processes, source)
    most = int(np.clip(_ROWS_EACH * math.prod(layer.shape[1:]), *_ROWS))
    for x, rows in zip(inputs, sampled_rows(layer, values, most), strict=True):
        read = layer.read([x], [rows])
        check_finite(layer.name, read)
        moments.add(read)
    covariance = moments.covariance()
    unknowns, noise = covariance.shape[1], torch.finfo(inputs[0].dtype).eps
    rounding = 4 * unknowns**0.5 * noise * covariance.diagonal(dim1=1, dim2=2).mean()
    covariance.diagonal(dim1=1, dim2=2).add_(rounding)
    return covariance


def _sensitivities(traced: Traced, layers: Mapping[fx.Node, Layer], batches: Given) -> dict[fx.Node, torch.Tensor]:
    """Mean square of the derivative in random directions, summed over a layer's places, per output channel."""
    names = {node.name: node for node in layers}
    total: dict[str, torch.Tensor] = {}
    for batch, generator in drawn_alike(traced, layers, shared(batches)):
        for node, slopes in output_slopes(traced, layers, batch, generator).along.items():
            squares = slopes[0].double().square().movedim(layers[node].dim, -1)
            sums = squares.reshape(-1, squares.shape[-1]).sum(0).cpu()
            total[node.name] = total[node.name] + sums if node.name in total else sums
    total = shared(batches).processes.summed_by_name(total)
    found = {names[name]: value for name, value in total.items() if bool(value.any())}
    return {node: found.get(node, torch.ones(layer.shape[0], dtype=torch.float64)) for node, layer in layers.items()}


# ------------------------------------------------------------------------------------------------- elimination


@dataclass(frozen=True)
class _Part:
    """A group of a layer, the square roots of the sensitivities (O,) that its rows were multiplied by, and which rows
    of a reader are its.
    """

    layer: Layer
    number: int
    scale: torch.Tensor
    rows: slice


@dataclass(frozen=True)
class _Reading:
    """A reader and what it is made of: groups of layers that read the same."""

    reader: Reader
    parts: tuple[_Part, ...]


def _readings(
    group: ChannelGroup,
    params: Sequence[GroupParam],
    layers: Mapping[str, Layer],
    moments: Mapping[fx.Node, Statistics],
    traced: Traced,
) -> list[_Reading]:
    together: dict[Any, list[tuple[Layer, int, torch.Tensor, torch.Tensor, IntArray]]] = {}
    for param in params:
        layer, known = layers[param.param], moments[layers[param.param].node]
        weight = layer.plain(get_tensor(traced.module, layer.name).detach().double().cpu())
        scales = known.sensitivity.sqrt().reshape(layer.groups, -1)
        weight = weight.reshape(layer.groups, -1, weight[0].numel()) * scales[:, :, None]
        for number, columns in _columns(group, param, layer).items():
            key = id(known.covariance), number, columns.tobytes()
            together.setdefault(key, []).append((layer, number, scales[number], weight[number], columns))
    found = []
    for alike in together.values():
        ends = np.cumsum([0, *(len(weight) for *_, weight, _ in alike)]).tolist()
        parts = [
            _Part(layer, number, scale, slice(start, end))
            for (layer, number, scale, *_), start, end in zip(alike, ends, ends[1:], strict=False)
        ]
        layer, number, _, _, columns = alike[0]
        what = f"layer {layer.name!r}"
        covariance = moments[layer.node].covariance[number].cpu()
        reader = Reader(torch.cat([weight for *_, weight, _ in alike]), covariance, columns, what=what)
        found.append(_Reading(reader, tuple(parts)))
    return found


def _columns(group: ChannelGroup, param: GroupParam, layer: Layer) -> dict[int, IntArray]:
    """By group of the layer which columns of its rows are those of each channel, (channels, c); -1 for none."""
    inputs, positions = layer.shape[1], math.prod(layer.kernel)
    found = {}
    for number in range(layer.groups):
        inside = (param.indices >= number * inputs) & (param.indices < (number + 1) * inputs) & (param.indices >= 0)
        if not inside.any():
            continue
        local = np.where(inside, param.indices - number * inputs, 0)[:, :, None] * positions + np.arange(positions)
        columns = np.where(inside[:, :, None], local, -1).reshape(group.size, -1)
        found[number] = -np.sort(-columns, axis=1)[:, : int((columns >= 0).sum(axis=1).max())]
    return found


def _eliminated(
    group: ChannelGroup, readings: Sequence[_Reading], same: IntArray, widths: Sequence[int], least: int
) -> Elimination:
    """Take channels out down to `least`, and keep what that changes at these widths, the largest first."""
    ahead, order = list(widths), list[int]()
    changes: dict[int, tuple[Change, ...]] = {}
    for gone in rounds(group.blocks, [each.reader for each in readings], same, {*widths, least}):
        order += gone
        left = group.size - len(order)
        while ahead and left <= ahead[0]:
            changes[ahead.pop(0)] = _changes(readings)
        if left <= least:
            break
    rest = np.setdiff1d(np.arange(group.size), order)
    return Elimination((*order, *rest.tolist()), changes)


def _changes(readings: Sequence[_Reading]) -> tuple[Change, ...]:
    """Those of all groups of a layer together."""
    found: dict[fx.Node, torch.Tensor] = {}
    layers = {}
    for reading in readings:
        change = reading.reader.change()
        for part in reading.parts:
            layer = layers[part.layer.node] = part.layer
            if layer.node not in found:
                found[layer.node] = torch.zeros(
                    layer.groups, layer.shape[0] // layer.groups, math.prod(layer.shape[1:])
                )
            scale = part.scale[:, None]
            found[layer.node][part.number] += torch.where(scale > 0, change[part.rows] / scale, 0.0).float()
    return tuple(Change(layers[node], weight.reshape(layers[node].shape)) for node, weight in found.items())
