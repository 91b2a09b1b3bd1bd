"""Which channels of a group are redundant, and the weights with which they are identical to others or read by nobody.

Nothing but weights changes here, and no output does: a channel that holds the same number everywhere goes into the
biases of the layers that read it; one that all of them read with zeros, and nothing else reads, may hold anything, and
is made a copy of another; one that is another one times a positive number, with nothing in between that would not grow
with it, becomes that one, and is read so much more strongly. Copies are what channels are merged by without loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphzip.analysis.groups import ChannelGroup
from graphzip.analysis.layers import Layer, norm_behind
from graphzip.graph.interpreter import Values
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.rewrite.edit import put
from graphzip_passes.minimize.region import Region
from graphzip_passes.parts.slices import duplicates, own_rows, rows_of

__all__ = ["Redundant", "examine", "partition_of", "reparametrized", "unfed"]


@dataclass
class Redundant:
    """Of one group: for each redundant channel the one it follows and how much more strongly it is read; `kinds` says
    why, `constants` are the numbers that channels hold at each of their slots where a layer reads them.
    """

    group: ChannelGroup
    follows: dict[int, int] = field(default_factory=dict)
    factors: dict[int, float] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    constants: dict[int, dict[Layer, Tensor]] = field(default_factory=dict)
    region: Region | None = None


def examine(traced: Traced, group: ChannelGroup, region: Region | None, values: Values, tolerance: float) -> Redundant:
    """What is redundant in a group. `values` are those on an example, for channels that may be constant."""
    found = Redundant(group, region=region)
    if region is not None:
        found.constants = _constants(traced, region, values)
    dead = _dead(traced, region, found.constants) if region is not None else set()
    same, strength = _alike(traced, group, region, tolerance)
    for block in group.blocks:
        first: dict[int, int] = {}
        alive = [channel for channel in block if channel not in dead]
        for channel in alive:
            keeper = first.setdefault(int(same[channel]), channel)
            if keeper != channel:
                ratio = strength[channel] / strength[keeper]
                found.follows[channel], found.factors[channel] = keeper, float(ratio)
                found.kinds[channel] = "identical" if ratio == 1.0 else "proportional"
        for channel in sorted(set(block) & dead):
            keeper = alive[0] if alive else block[0]
            if channel != keeper:
                found.follows[channel], found.factors[channel] = keeper, 1.0
                found.kinds[channel] = "constant" if channel in found.constants else "dead"
    _even(found)
    return found


def _even(found: Redundant) -> None:
    """Let every block keep as many channels."""
    blocks = found.group.blocks
    most = max(len(block) - sum(channel in found.follows for channel in block) for block in blocks)
    for block in blocks:
        followers = [channel for channel in block if channel in found.follows]
        for channel in followers[len(block) - most :]:
            for part in (found.follows, found.factors, found.kinds):
                part.pop(channel)


def partition_of(found: Redundant) -> list[list[int]]:
    """Each channel that stays, first, with those that follow it."""
    parts = {channel: [channel] for channel in range(found.group.size) if channel not in found.follows}
    for channel, keeper in found.follows.items():
        parts[keeper].append(channel)
    return [*parts.values()]


# ------------------------------------------------------------------------------------------------- constant and dead


def unfed(traced: Traced, region: Region) -> list[int]:
    """The channels whose makers give them no part of what they read."""
    made = [param for param in region.group.params if param.role == "producer"]
    if not region.makers or not made:
        return []
    rows = torch.cat([rows_of(p, region.group, get_tensor(traced.module, traced.local(p.param))) for p in made], 1)
    found: list[int] = torch.nonzero(~rows.any(1)).flatten().tolist()
    return found


def _constants(traced: Traced, region: Region, values: Values) -> dict[int, dict[Layer, Tensor]]:
    """Those of them that hold one number where they are read."""
    found: dict[int, dict[Layer, Tensor]] = {}
    for channel in unfed(traced, region):
        held = {layer: _held(layer, columns[channel], values) for layer, columns in region.readers}
        if all(value is not None and (region.steady or not bool(value.any())) for value in held.values()):
            found[channel] = {layer: value for layer, value in held.items() if value is not None}
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


def _dead(traced: Traced, region: Region, constants: Mapping[int, Any]) -> set[int]:
    """Channels that every reader reads with zeros, or as a number that goes into its bias."""
    heard = torch.zeros(region.group.size, dtype=torch.bool)
    for param in region.group.params:
        if param.role == "consumer":
            heard |= rows_of(param, region.group, get_tensor(traced.module, traced.local(param.param))).any(1)
    return {channel for channel in range(region.group.size) if not heard[channel] or channel in constants}


# ------------------------------------------------------------------------------------------------- alike


def _alike(
    traced: Traced, group: ChannelGroup, region: Region | None, tolerance: float
) -> tuple[IntArray, np.ndarray[Any, np.dtype[np.float64]]]:
    """For each channel the number of the set that it is like, and how large it is in that set."""
    same, ones = duplicates(group, traced), np.ones(group.size)
    if region is not None and region.scaling:
        rows, fixed = _made_rows(traced, region)
        strength = rows.norm(dim=1).numpy()
        limit = max(tolerance, 64 * torch.finfo(_dtype(traced, region)).eps)
        unit = torch.cat([rows / torch.from_numpy(strength).clamp(min=1e-300)[:, None], fixed], 1)
        return _joined(same, unit, strength, limit)
    if tolerance > 0:
        rows = torch.from_numpy(own_rows(group, traced))
        return _joined(same, rows / rows.norm(dim=1).max().clamp(min=1e-300), ones, tolerance)
    return same, ones


def _joined(
    same: IntArray, rows: Tensor, strength: np.ndarray[Any, np.dtype[np.float64]], limit: float
) -> tuple[IntArray, np.ndarray[Any, np.dtype[np.float64]]]:
    """Sets of channels whose rows lie no further than `limit` from those of the first; equal ones stay together."""
    found = np.full(len(rows), -1)
    sizes = strength.copy()
    for channel in range(len(rows)):
        if found[channel] < 0:
            near = ((rows - rows[channel]).norm(dim=1) <= limit).numpy() & (found < 0) & (strength > 0)
            near |= same == same[channel]
            found[near & (found < 0)] = channel
    for channel in range(len(rows)):
        if same[channel] == same[found[channel]]:
            sizes[channel] = sizes[found[channel]]  # what is equal is so to the last bit
    sizes[sizes == 0] = 1.0
    return found, sizes


def _dtype(traced: Traced, region: Region) -> torch.dtype:
    return get_tensor(traced.module, region.makers[0].name).dtype


def _made_rows(traced: Traced, region: Region) -> tuple[Tensor, Tensor]:
    """What scales with a channel, its kernels and shifts with the batch norms behind them; and what has to be equal."""
    scaled, fixed, taken = [], [], set[str]()
    by_name = {traced.local(param.param): param for param in region.group.params if param.role != "consumer"}

    def rows(name: str) -> Tensor:
        taken.add(name)
        return rows_of(by_name[name], region.group, get_tensor(traced.module, name))

    for layer in region.makers:
        kernel = rows(layer.name)
        shift = torch.zeros(len(kernel), 1, dtype=torch.float64) if layer.bias is None else rows(str(layer.bias.target))
        norm = norm_behind(layer.node)
        if norm is not None:
            args = arguments_of(norm)
            scale = torch.rsqrt(rows(str(args["running_var"].target)) + args["eps"])
            scale = scale if args["weight"] is None else scale * rows(str(args["weight"].target))
            shift = (shift - rows(str(args["running_mean"].target))) * scale
            shift = shift if args["bias"] is None else shift + rows(str(args["bias"].target))
            kernel = kernel * scale
        scaled += [kernel, shift]
    fixed = [rows(name) for name in by_name if name not in taken]
    empty = torch.zeros(region.group.size, 0, dtype=torch.float64)
    return torch.cat(scaled, 1), torch.cat([empty, *fixed], 1)


# ------------------------------------------------------------------------------------------------- weights


@torch.no_grad()
def reparametrized(traced: Traced, found: Redundant) -> None:
    """Give the graph, which has tensors of its own, weights with which channels are copies of those they follow."""
    group = found.group
    followers, keepers = ([*each] for each in (found.follows.keys(), found.follows.values()))
    for channel in followers:
        if found.kinds[channel] == "constant":
            for layer, held in found.constants[channel].items():
                _absorb(traced, layer, _columns(found, layer)[channel], held)
    silent = {"dead", "constant"}
    factors = [0.0 if found.kinds[channel] in silent else found.factors[channel] for channel in followers]
    for param in group.params:
        name = traced.local(param.param)
        value = get_tensor(traced.module, name).detach().double().clone()
        indices = param.indices.reshape(group.size, -1)
        if param.role == "consumer":
            _scale(value, param.dim, param.groups, indices[followers], factors)
        else:
            slices = value.movedim(param.dim, 0)
            slices[indices[followers].ravel()] = slices[indices[keepers].ravel()]
        put(traced, name, value)


def _columns(found: Redundant, layer: Layer) -> IntArray:
    assert found.region is not None
    return next(columns for reader, columns in found.region.readers if reader is layer)


def _scale(value: Tensor, dim: int, groups: int, columns: IntArray, factors: Sequence[float]) -> None:
    """Multiply slices of a weight along a dimension, of which every group of a convolution has its own, in place."""
    size = value.shape[dim]
    parts = value.view(groups, -1, *value.shape[1:]).movedim(dim + 1, 1) if groups > 1 else value.movedim(dim, 0)[None]
    row, slot = np.nonzero(columns >= 0)
    number = columns[row, slot]
    which, inside = (number // size, number % size) if groups > 1 else (np.zeros_like(number), number)
    scale = torch.tensor(factors, dtype=value.dtype)[torch.from_numpy(row)]
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
