"""Slices of many tensors that a partition ties together, as the rows of a few matrices.

C-SGD multiplies gradients by an averaging matrix `Gamma`, `Gamma[m, n] = 1 / |H(m)|` where `H(m) = H(n)` (Eq. 19 of
Ding et al., "Manipulating Identical Filter Redundancy for Efficient Pruning on Deep and Complicated CNN"). Here that
product is a segment mean: rows in the order of their clusters, one mean per cluster, spread over the members again. No
matrix of channels by channels is made, and tensors with slices of the same length share one matrix, so that a step
takes a few large operations whatever the number of layers.

Of parameters that are cut into parts (`fully_shard`) every process has some of the rows, or some of the columns. Where
clusters reach over the cut, what crosses it is one sum per cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from graphzip.analysis.groups import ChannelGroup, ChannelGroups
from graphzip.errors import GraphZipError, WeightsError
from graphzip.graph.state import get_tensor
from graphzip.graph.torch_private import foreach_copy_
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.numeric.sharded import Part, layout_of, local, part_of
from graphzip.ops.spec import FloatArray
from graphzip_passes.base import Constraint
from graphzip_passes.parts.pacesetter import pacesetter_of

__all__ = [
    "Partition",
    "Place",
    "Rows",
    "Slices",
    "Tying",
    "features_of",
    "pull",
    "rows_of",
    "slices_of",
    "squared_deviations",
]

Partition = tuple[tuple[int, ...], ...]
"""Clusters of a group's channels: each sorted, ordered by their smallest channel."""

_MOST: Final = 1 << 24
"""Numbers in a matrix of tensors that are cut: their centres are in memory whole, as a gathered layer would be."""


@dataclass(frozen=True)
class Slices:
    """One dimension of one tensor: `cluster[i]` is the first slice of the cluster that slice i belongs to.

    `owner[i]` is the number of the clustered group of slice i, -1 where it has none. `kernel` tells the slices that
    make channels from those that only act on them. Tensors with the same `pool` have clusters in common: slices with
    equal numbers in `cluster` are then in one cluster, whichever of the tensors they are of.
    """

    name: str
    dim: int
    cluster: IntArray
    owner: IntArray
    kernel: bool
    pool: str = ""


def slices_of(groups: ChannelGroups, partitions: Mapping[str, Partition], traced: Traced) -> list[Slices]:
    """Producer and pointwise slices of all clustered groups, one entry per tensor, dimension and kind.

    A tensor that several groups share (a batch norm after a concatenation) has one entry with the clusters of each
    group at its offset.
    """
    found: dict[tuple[str, int, bool], Slices] = {}
    for number, (name, parts) in enumerate(partitions.items()):
        channels = [channel for part in parts for channel in part]
        firsts = [part[0] for part in parts for _ in part]
        for param in groups[name].params:
            if param.role == "consumer":
                continue
            key = traced.local(param.param), param.dim, param.role == "producer"
            if key not in found:
                size = get_tensor(traced.module, key[0]).shape[param.dim]
                found[key] = Slices(key[0], key[1], np.arange(size), np.full(size, -1, dtype=np.int64), key[2])
            places = param.indices[channels]
            found[key].owner[places] = number
            found[key].cluster[places] = param.indices[firsts]
    return list(found.values())


@dataclass(frozen=True)
class Place:
    """Where a model holds a tensor. It is looked up each time, for a moved model holds another one."""

    holder: Mapping[str, torch.Tensor | None]
    leaf: str
    slices: Slices

    @classmethod
    def of(cls, model: nn.Module, slices: Slices) -> Place:
        """The place of `slices` in `model`."""
        path, _, leaf = slices.name.rpartition(".")
        owner = model.get_submodule(path)
        return cls(owner._parameters if leaf in owner._parameters else owner._buffers, leaf, slices)

    @property
    def is_kernel(self) -> bool:
        """Whether its slices make channels and have more than one element, as Eq. 7 counts them."""
        return self.slices.kernel and self.tensor.dim() > 1

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor that is there now."""
        value = self.holder[self.leaf]
        assert value is not None
        return value

    @property
    def part(self) -> Part | None:
        """What this process holds of the tensor; nothing where that is all."""
        return part_of(self.tensor, self.slices.name)

    @property
    def mine(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which slices this process holds, (slices,)."""
        part, found = self.part, np.ones(self.slices.cluster.size, dtype=np.bool_)
        if part is not None and part.dim == self.slices.dim:
            found[: part.start] = found[part.stop :] = False
        return found


@dataclass(frozen=True)
class _Others:
    """What rows know of those in other processes.

    `counts` are the members of every cluster there is, (clusters, 1), and `firsts` of those whose first row is here
    the cluster and that row; both only where the cut goes between rows.
    """

    part: Part
    counts: torch.Tensor | None = None
    firsts: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class Rows:
    """Slices of several tensors of one device, dtype and slice length L as one matrix (rows, L).

    Of tensors that are cut into parts it has the part of this process, and knows of the `others`.
    """

    places: tuple[Place, ...]
    cluster: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor
    heights: list[int]
    vectors: bool
    layout: Any = None
    others: _Others | None = None

    @classmethod
    def of(cls, places: Sequence[Place], device: torch.device) -> Rows:
        """The matrix of these places; what it computes with lives on `device`."""
        parts = [place.part for place in places]
        between = [part is not None and part.dim == at.slices.dim for part, at in zip(parts, places, strict=True)]
        mine = [at.mine for at in places]
        here = np.concatenate(mine)
        _, first, number, counts = np.unique(
            _numbers([place.slices for place in places]), return_index=True, return_inverse=True, return_counts=True
        )
        number = number.reshape(-1)
        order = np.argsort(number[here], kind="stable")
        starts = np.searchsorted(number[here][order], np.arange(first.size))
        indices = [torch.from_numpy(each.astype(np.int64)).to(device) for each in (number[here], order, starts)]
        others = _Others(parts[0]) if parts[0] is not None else None
        if others is not None and between[0]:
            position = np.cumsum(here) - 1
            held = np.flatnonzero(here[first])
            firsts = [torch.from_numpy(each).to(device) for each in (held, position[first[held]])]
            others = _Others(others.part, torch.from_numpy(counts).to(device)[:, None], (firsts[0], firsts[1]))
        heights = [int(each.sum()) for each in mine]
        vectors = all(place.tensor.dim() == 1 for place in places)
        return cls(
            tuple(places), indices[0], indices[1], indices[2], heights, vectors, layout_of(places[0].tensor), others
        )

    def tensors(self) -> list[torch.Tensor]:
        """The tensors, as they are now; of those that are cut, the parts of this process."""
        return [local(place.tensor.detach()) for place in self.places]

    def of_each(self, function: Callable[[Slices], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """For every row what `function` gives for the slices of its tensor, (rows,)."""
        return np.concatenate([function(place.slices)[place.mine] for place in self.places])

    def gather(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """A matrix (rows, L) with the slices of `tensors`, which are shaped as those of the places."""
        if self.vectors:
            return torch.cat(tuple(tensors)).unsqueeze(1)
        return torch.cat([_flat(tensor, at.slices.dim) for tensor, at in zip(tensors, self.places, strict=True)])

    def parts(self, rows: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The matrix cut into tensors of the shapes of `like`, without a copy."""
        if self.vectors:
            return list(torch.split(rows.squeeze(1), self.heights))
        found = []
        for part, tensor, place in zip(torch.split(rows, self.heights), like, self.places, strict=True):
            dim = place.slices.dim
            if dim == 0:
                found.append(part.view_as(tensor))
            else:
                shape = (tensor.shape[dim], *tensor.shape[:dim], *tensor.shape[dim + 1 :])
                found.append(part.view(shape).movedim(0, dim))
        return found

    def means(self, rows: torch.Tensor) -> torch.Tensor:
        """For every row the mean over its cluster: the product with `Gamma`, shape (rows, L)."""
        if self.others is not None and self.others.counts is not None:
            wide = rows.float() if rows.dtype.itemsize < 4 else rows  # what is added up over processes is not rounded
            sums = wide.new_zeros(len(self.starts), rows.shape[1])
            if rows.numel():
                sums = F.embedding_bag(self.order, wide, self.starts, mode="sum")
            centres = (self.others.part.added_up(sums) / self.others.counts).to(rows.dtype)
        elif not rows.numel():
            return rows.clone()
        else:
            centres = F.embedding_bag(self.order, rows, self.starts, mode="mean")
        return centres.index_select(0, self.cluster)

    def first(self, rows: torch.Tensor) -> torch.Tensor:
        """For every row the first one of its cluster, shape (rows, L)."""
        if self.others is None or self.others.firsts is None:
            return rows.index_select(0, self.order[self.starts][self.cluster])
        cluster, row = self.others.firsts
        found = rows.new_zeros(len(self.starts), rows.shape[1])
        found[cluster] = rows[row]
        return self.others.part.added_up(found).index_select(0, self.cluster)

    def whole_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the columns that this process has of its rows, added up over all columns."""
        return values if self.others is None or self.others.counts is not None else self.others.part.added_up(values)

    def all_rows(self, value: torch.Tensor) -> torch.Tensor:
        """A sum over the rows that this process has, with whole columns, added up over all rows."""
        return value if self.others is None or self.others.counts is None else self.others.part.added_up(value)

    def by_owner(self, values: torch.Tensor, owner: IntArray, count: int) -> FloatArray:
        """Sums (count,) of the values (rows,) of each owner, over all processes; float64. -1 is none."""
        squares = values.double().cpu().numpy()
        sums = np.bincount(owner[owner >= 0], weights=squares[owner >= 0], minlength=count).astype(np.float64)
        if self.others is None:
            return sums
        found: FloatArray = self.others.part.added_up(torch.from_numpy(sums).to(values.device)).cpu().numpy()
        return found

    def fits(self) -> bool:
        """Whether the model still lives where the matrix was made for."""
        tensor = self.places[0].tensor
        return tensor.device == self.order.device and layout_of(tensor) == self.layout


def _numbers(slices: Sequence[Slices]) -> IntArray:
    """A number for the cluster of every row; what has no pool in common has no number in common."""
    keys = [each.pool or position for position, each in enumerate(slices)]
    span: dict[Any, int] = {}
    for key, each in zip(keys, slices, strict=True):
        span[key] = max(span.get(key, 0), int(each.cluster.max(initial=-1)) + 1)
    base = dict(zip(span, np.cumsum([0, *span.values()]).tolist(), strict=False))
    return np.concatenate([each.cluster + base[key] for key, each in zip(keys, slices, strict=True)])


def _flat(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    rows = tensor if dim == 0 else tensor.movedim(dim, 0)
    return rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)


def rows_of(places: Iterable[tuple[Place, int]]) -> list[tuple[int, Rows]]:
    """As few matrices as possible; places with different numbers do not share one, and the number goes with it.

    A tensor that is clustered along two dimensions is in two matrices, and the later one sees what the earlier did.
    Raises `GraphZipError` where tensors with clusters in common cannot be in one matrix.
    """
    found: dict[Any, list[Place]] = {}
    seen: dict[tuple[int, str], int] = {}
    for place, number in places:
        tensor = place.tensor
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        level = seen[id(place.holder), place.leaf] = seen.get((id(place.holder), place.leaf), -1) + 1
        length = tensor.numel() // tensor.shape[place.slices.dim]
        key = level, number, tensor.device, tensor.dtype, length, tensor.dim() == 1, _spread(place)
        found.setdefault(key, []).append(place)
    _check_pools(found.values())
    listed = sorted(found, key=lambda key: key[0])
    return [(key[1], Rows.of(each, key[2])) for key in listed for each in _bounded(found[key])]


def _spread(place: Place) -> Any:
    """Equal for tensors whose parts may be rows of one matrix, in every process."""
    layout, part = layout_of(place.tensor), place.part
    if part is None:
        return layout
    return layout, part.dim == place.slices.dim or (part.dim, place.slices.dim, place.tensor.shape)


def _bounded(places: list[Place]) -> list[list[Place]]:
    """The places of one matrix, or of several where the tensors are cut and many; those of one pool stay together."""
    if layout_of(places[0].tensor) is None:
        return [places]
    found: list[list[Place]] = []
    total = 0
    for place in places:
        tied = bool(found) and place.slices.pool and place.slices.pool == found[-1][-1].slices.pool
        if not found or (total + place.tensor.numel() > _MOST and not tied):
            found.append([])
            total = 0
        found[-1].append(place)
        total += place.tensor.numel()
    return found


@torch.no_grad()
def pull(places: Iterable[Place], fraction: float) -> None:
    """Move every slice by `fraction` (0 to 1) of the way to the centre of its cluster."""
    for _, rows in rows_of((place, 0) for place in places):
        tensors = rows.tensors()
        apart = rows.gather(tensors)
        centre = rows.means(apart)
        moved = centre if fraction == 1.0 else torch.lerp(apart, centre, fraction)
        foreach_copy_(tensors, rows.parts(moved, tensors))


@torch.no_grad()
def squared_deviations(places: Iterable[Place], names: Sequence[str]) -> dict[str, float]:
    """Sum of squared distances of kernels from the centres of their clusters (C-SGD, Eq. 7), by the name of the owner.

    `names[n]` is the owner with number n.
    """
    total = np.zeros(len(names))
    for _, rows in rows_of((place, 0) for place in places if place.is_kernel):
        apart = rows.gather(rows.tensors()).double()
        apart = apart - rows.first(apart)  # slices that are equal are exactly no distance apart
        squares = (apart - rows.means(apart)).square().sum(1)
        total += rows.by_owner(squares, rows.of_each(lambda each: each.owner), len(names))
    return dict(zip(names, total.tolist(), strict=True))


def _check_pools(matrices: Iterable[Sequence[Place]]) -> None:
    seen: dict[str, str] = {}
    for places in matrices:
        own = {place.slices.pool: place.slices.name for place in places if place.slices.pool}
        for pool, name in own.items():
            if pool in seen:
                raise GraphZipError(
                    f"{seen[pool]} and {name} share clusters; keep them on one device and in one dtype, and give the "
                    "optimizer both in one parameter group, or none of them"
                )
        seen |= own


def features_of(
    group: ChannelGroup, traced: Traced, front: dict[str, int] | None = None
) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
    """The flattened kernels of a group's pacesetter, (channels, numbers); `front` as in `pacesetter_of`.

    Raises `WeightsError` where the model has no weights.
    """
    lead = pacesetter_of(group, traced, front)
    tensor = get_tensor(traced.module, traced.local(lead.param)).detach()
    if tensor.is_meta:
        raise WeightsError(
            f"group {group.name!r} has no weights to cluster (they are on the meta device); load them first"
        )
    tensor_rows = tensor.movedim(lead.dim, 0).reshape(tensor.shape[lead.dim], -1).cpu()
    values = (tensor_rows if tensor_rows.dtype == torch.float64 else tensor_rows.float()).numpy()
    rows: np.ndarray[Any, np.dtype[np.floating[Any]]] = values[lead.indices].reshape(group.size, -1)
    return rows


class Tying(Constraint):
    """What a pass is like whose clusters tie slices of parameters together until they are one."""

    clusters: Mapping[str, Any]
    _found: tuple[nn.Module, list[Place]] | None = None

    def pull_(self, model: nn.Module, fraction: float) -> None:
        pull(self._places(model), fraction)

    def deviations(self, model: nn.Module) -> dict[str, float]:
        return squared_deviations(self._places(model), list(self.clusters))

    def _tied(self) -> Iterable[Slices]:
        """The slices, each group of clusters with a number of its own."""
        raise NotImplementedError

    def _places(self, model: nn.Module) -> list[Place]:
        """Where the slices are; the same list for the same model until `_found` is forgotten."""
        if self._found is None or self._found[0] is not model:
            self._found = model, [Place.of(model, slices) for slices in self._tied()]
        return self._found[1]
