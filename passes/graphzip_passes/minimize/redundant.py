"""Which channels of a group are redundant, and the weights with which they are identical to others or read by nobody.

Nothing but weights changes here, and no output does: a channel that holds the same number everywhere goes into the
biases of the layers that read it; one that all of them read with zeros, and nothing else reads, may hold anything, and
is made a copy of another; one that is another one times a number, wherever it is read, becomes that one, and is read so
much more strongly. Copies are what channels are merged by without loss. Where a norm runs over the channels, one that
is zero in front of it is no copy of anything: it is dropped, and the norm goes on counting it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from graphzip.analysis.groups import ChannelGroup
from graphzip.analysis.layers import Layer, norm_behind
from graphzip.graph.interpreter import Values
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.rewrite.edit import put
from graphzip_passes.minimize.proportion import Numbers, in_proportion
from graphzip_passes.minimize.region import Region
from graphzip_passes.minimize.still import Flags, still_in, zeros_in
from graphzip_passes.parts.slices import duplicates, own_rows, rows_of

__all__ = ["Redundant", "examine", "partition_of", "reparametrized", "wanted"]

Constants = dict[int, dict[Layer, Tensor]]
"""By channel the numbers (slots,) that it holds where layers read it."""


@dataclass
class Redundant:
    """Of one group: for each redundant channel the one it follows, with `factors` by reader and channel of how much
    more strongly that one is read; `kinds` says why, `constants` are numbers that go into biases. With `drops` channels
    leave nothing behind.
    """

    group: ChannelGroup
    region: Region | None = None
    follows: dict[int, int] = field(default_factory=dict)
    factors: dict[str, Numbers] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    constants: Constants = field(default_factory=dict)
    drops: bool = False


def wanted(traced: Traced, region: Region) -> set[fx.Node]:
    """The operators whose values on an example tell which channels are constant; none where no channel can be."""
    every = np.ones(region.group.size, dtype=bool)
    asked = set[fx.Node]()

    def zero(node: fx.Node) -> Flags:
        asked.add(node)
        return every

    still = still_in(traced, region, zero)
    read = {layer.input for layer, _ in region.readers} | region.counting
    if not any(still[node].any() for node in read):
        return set()
    return {node for node in asked | {node for node in read if still[node].any()} if node.op != "get_attr"}


def examine(
    traced: Traced, group: ChannelGroup, region: Region | None, values: Values, tolerance: float
) -> list[Redundant]:
    """What is redundant in a group: what is dropped, and what follows. `values` are those that are `wanted`."""
    silent = set[int]()
    found = Redundant(group, region)
    if region is not None:
        silent, found.constants = _silent(traced, region, values)
    kinds = {channel: "constant" if channel in found.constants else "dead" for channel in silent}
    if region is not None and region.counting and silent:
        gone = Redundant(group, region, constants=found.constants, kinds=kinds, drops=True)
        _follow_any(gone, silent, silent)
        _even(gone)
        return [gone] if gone.follows else []
    same = _same(traced, group, tolerance, silent)
    found.follows |= same
    found.kinds |= dict.fromkeys(same, "identical") | kinds
    if region is not None:
        alike = in_proportion(traced, region, tolerance, silent | same.keys())
        found.factors = alike.factors
        for channel, keeper in same.items():
            for name in alike.factors:
                alike.factors[name][channel] = alike.factors[name][keeper]
            found.follows[channel] = alike.follows.get(keeper, keeper)
        found.follows |= alike.follows
        for channel in alike.follows:
            ones = all(abs(each[channel] - 1.0) < 1e-12 for each in alike.factors.values())
            found.kinds[channel] = "identical" if ones else "proportional"
    _follow_any(found, silent, silent | found.follows.keys())
    _even(found)
    return [found] if found.follows else []


def _follow_any(found: Redundant, silent: Iterable[int], gone: Iterable[int]) -> None:
    """Let silent channels follow one of their block that stays."""
    for block in found.group.blocks:
        keeper = next((channel for channel in block if channel not in set(gone)), block[0])
        for channel in sorted(set(block) & set(silent)):
            if channel != keeper:
                found.follows[channel] = keeper
    found.kinds = {channel: kind for channel, kind in found.kinds.items() if channel in found.follows}


def _even(found: Redundant) -> None:
    """Let every block keep as many channels."""
    blocks = found.group.blocks
    most = max(len(block) - sum(channel in found.follows for channel in block) for block in blocks)
    for block in blocks:
        followers = [channel for channel in block if channel in found.follows]
        for channel in followers[len(block) - most :]:
            del found.follows[channel], found.kinds[channel]


def partition_of(found: Redundant) -> list[list[int]]:
    """Each channel that stays, first, with those that follow it."""
    parts = {channel: [channel] for channel in range(found.group.size) if channel not in found.follows}
    for channel, keeper in found.follows.items():
        parts[keeper].append(channel)
    return [*parts.values()]


# ------------------------------------------------------------------------------------------------- constant and dead


def _silent(traced: Traced, region: Region, values: Values) -> tuple[set[int], Constants]:
    """Channels that no reader misses, and the numbers that layers have to be given in place of some."""
    count = region.group.size
    still = still_in(traced, region, lambda node: _zero(traced, region, node, values))
    misses = np.zeros(count, dtype=bool)
    for node in region.counting:
        misses |= ~still[node]
        if not misses.all():
            misses |= ~_zero(traced, region, node, values)
    for param in region.deaf:
        misses |= _heard(traced, region, str(traced.local(param.param)))
    constants: Constants = {}
    for layer, columns in region.readers:
        heard = _heard(traced, region, layer.name) & ~misses
        for channel in np.flatnonzero(heard).tolist():
            number = _held(layer, columns[channel], values) if still[layer.input][channel] else None
            if number is None or not (region.steady or not bool(number.any())):
                misses[channel] = True
            else:
                constants.setdefault(channel, {})[layer] = number
    silent = set(np.flatnonzero(~misses).tolist())
    return silent, {channel: held for channel, held in constants.items() if channel in silent}


def _zero(traced: Traced, region: Region, node: fx.Node, values: Values) -> Flags:
    """Which channels are zero at a node on the example; none where nobody wanted its values."""
    spots = region.nodes[node]
    if spots is None or (node.op != "get_attr" and node not in values):
        return np.zeros(region.group.size, dtype=bool)
    held = [get_tensor(traced.module, str(node.target))] if node.op == "get_attr" else values[node]
    found: Flags = np.logical_and.reduce([zeros_in(value, spots, region.group.size) for value in held])
    return found


def _heard(traced: Traced, region: Region, name: str) -> Flags:
    """Which channels a weight does not multiply by zero."""
    found = np.zeros(region.group.size, dtype=bool)
    for param in region.group.params:
        if param.role == "consumer" and traced.local(param.param) == name:
            found |= rows_of(param, region.group, get_tensor(traced.module, name)).any(1).numpy()
    return found


def _held(layer: Layer, columns: IntArray, values: Values) -> Tensor | None:
    """What a channel holds at each of its slots, (slots,), if that is one number in all places and can be moved."""
    dim = -1 if layer.is_linear else 1 - len(layer.shape)
    slots = torch.from_numpy(columns[columns >= 0])
    read = torch.cat([value.movedim(dim, 0).flatten(1)[slots] for value in values[layer.input]], 1).double()
    number = read[:, 0]
    if not bool((read == number[:, None]).all()) or not bool(number.isfinite().all()):
        return None
    padded = not layer.is_linear and (layer.transposed or any(layer.window.pads))
    nowhere = layer.bias is None and norm_behind(layer.node) is None
    return None if (padded or nowhere) and bool(number.any()) else number


# ------------------------------------------------------------------------------------------------- alike


def _same(traced: Traced, group: ChannelGroup, tolerance: float, silent: set[int]) -> dict[int, int]:
    """For each channel that is identical to an earlier one of its block, or within the tolerance, that one."""
    same, found = duplicates(group, traced), dict[int, int]()
    rows = None
    if tolerance > 0:
        own = torch.from_numpy(own_rows(group, traced))
        rows = own / own.norm(dim=1).max().clamp(min=1e-300)
    for block in group.blocks:
        first: dict[int, int] = {}
        for channel in (each for each in block if each not in silent):
            keeper = first.get(int(same[channel]))
            if keeper is None and rows is not None:
                apart = ((rows[channel] - rows[each]).norm() for each in first.values())
                near = (bool(each <= tolerance) for each in apart)
                keeper = next((each for each, is_near in zip([*first.values()], near, strict=True) if is_near), None)
            if keeper is None:
                first[int(same[channel])] = channel
            else:
                found[channel] = keeper
    return found


# ------------------------------------------------------------------------------------------------- weights


@torch.no_grad()
def reparametrized(traced: Traced, found: Redundant) -> None:
    """Give the graph, which has tensors of its own, weights with which channels are copies of those they follow."""
    group = found.group
    followers, keepers = ([*each] for each in (found.follows.keys(), found.follows.values()))
    for channel in followers:
        for layer, held in found.constants.get(channel, {}).items():
            _absorb(traced, layer, _columns(found, layer)[channel], held)
    silent = np.array([found.kinds[channel] in {"dead", "constant"} for channel in followers])
    for param in group.params:
        name = traced.local(param.param)
        value = get_tensor(traced.module, name).detach().double().clone()
        indices = param.indices.reshape(group.size, -1)
        if param.role == "consumer":
            factors = found.factors.get(name, np.ones(group.size))[followers]
            _scale(value, param.dim, param.groups, indices[followers], np.where(silent, 0.0, factors))
        else:
            slices = value.movedim(param.dim, 0)
            ours, theirs = indices[followers].ravel(), indices[keepers].ravel()
            there = (ours >= 0) & (theirs >= 0)
            slices[ours[there]] = slices[theirs[there]]
        put(traced, name, value)


def _columns(found: Redundant, layer: Layer) -> IntArray:
    assert found.region is not None
    return next(columns for reader, columns in found.region.readers if reader is layer)


def _scale(value: Tensor, dim: int, groups: int, columns: IntArray, factors: Numbers) -> None:
    """Multiply slices of a weight along a dimension, of which every group of a convolution has its own, in place."""
    size = value.shape[dim]
    parts = value.view(groups, -1, *value.shape[1:]).movedim(dim + 1, 1) if groups > 1 else value.movedim(dim, 0)[None]
    row, slot = np.nonzero(columns >= 0)
    number = columns[row, slot]
    which, inside = (number // size, number % size) if groups > 1 else (np.zeros_like(number), number)
    scale = torch.from_numpy(factors).to(value.dtype)[torch.from_numpy(row)]
    places = torch.from_numpy(which), torch.from_numpy(inside)
    parts[places] = parts[places] * scale.reshape(-1, *[1] * (parts.dim() - 2))


def _absorb(traced: Traced, layer: Layer, columns: IntArray, held: Tensor) -> None:
    """Let the bias of a layer, or the running mean behind it, take what inputs give that hold the same everywhere."""
    if not bool(held.any()):
        return
    weight = layer.plain(get_tensor(traced.module, layer.name).detach()).double()
    inputs = weight.reshape(layer.groups, -1, layer.shape[1], weight[0, 0].numel()).sum(3)
    given = torch.zeros(layer.groups, inputs.shape[1], dtype=torch.float64)
    for column, number in zip(columns[columns >= 0].tolist(), held.tolist(), strict=True):
        given[column // layer.shape[1]] += number * inputs[column // layer.shape[1], :, column % layer.shape[1]]
    norm = norm_behind(layer.node)
    place = layer.bias if layer.bias is not None else arguments_of(norm)["running_mean"]  # type: ignore[arg-type]
    name = str(place.target)
    sign = 1.0 if layer.bias is not None else -1.0
    put(traced, name, get_tensor(traced.module, name).detach().double() + sign * given.flatten())
