"""Queries and keys of attention: what their channels are re-fitted to where fewer of them are left.

Of queries `q` and keys `k` (c,) of a head nothing is read but their scores `q . k`, so any basis of the channels will
do. Of all products of r channels those come nearest to the scores that keep the r largest singular values of

    A^1/2 B^1/2 = U diag(s) V^T,    A = E[q q^T],  B = E[(k - E k) (k - E k)^T]:

    q -> diag(s)^1/2 U^T A^-1/2 q,    k -> diag(s)^1/2 V^T B^-1/2 k,

the mean being over all pairs of a query and a key (Eckart and Young, 1936). What all keys have in common adds the same
to all scores of a query, which softmax leaves out. Where several heads read the same keys, `A` is the sum of theirs.

Sources: Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression" (ICLR 2025), section 3.2, for
scores as the unit that is decomposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from graphzip.analysis.channels import Analysis
from graphzip.analysis.groups import ChannelGroups
from graphzip.analysis.layers import Layer, only_reader, own_layers
from graphzip.graph.operators import argument_of, is_view
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray, support
from graphzip.numeric.moments import SteadySum
from graphzip.numeric.solvers import singular, squared, symmetric_eigen
from graphzip.process_groups import Processes
from graphzip.rewrite.layout import Layout

__all__ = ["ScorePair", "groups_of_scores", "score_pairs", "turned"]

aten = torch.ops.aten

_VANISHING = 1e-10  # of the largest mean square of a direction: what is below it is rounding


@dataclass(frozen=True, eq=False)
class ScorePair:
    """Two linear layers of which nothing is read but the products of their outputs, head by head.

    `channels` (heads, c) are numbers of the analysis, and `places` for either layer (heads, c, n) where they stand in
    its output: n times where n heads read the same keys.
    """

    query: Layer
    key: Layer
    channels: IntArray
    places: tuple[IntArray, IntArray]

    @property
    def layers(self) -> tuple[Layer, Layer]:
        return self.query, self.key

    def staying(self, layout: Layout) -> NDArray[np.bool_]:
        """Which of the channels (heads, c) are left."""
        return np.isin(self.places[0][:, :, 0], _kept(self.query, layout))

    def narrows(self, layout: Layout) -> bool:
        """Whether heads that are left have fewer channels."""
        left = self.staying(layout).sum(1)
        return bool(((left > 0) & (left < self.channels.shape[1])).any())


def _kept(layer: Layer, layout: Layout) -> IntArray:
    return layout.kept(layer.node, layer.node.meta["val"].dim() - 1)


def score_pairs(traced: Traced, analysis: Analysis) -> list[ScorePair]:
    """Those of all attention whose queries and keys come from layers of their own, with nothing in between."""
    layers, found = own_layers(traced), []
    for node in traced.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        sides = [_source(argument_of(node, name), layers) for name in ("query", "key")]
        heads = _last_axis(analysis, argument_of(node, "key"))
        if heads is None or sides[0] is None or sides[1] is None or sides[0] is sides[1]:
            continue
        channels = np.unique(heads, axis=0)
        places = [_places(analysis, layer, channels) for layer in sides if layer is not None]
        if places[0] is not None and places[1] is not None:
            found.append(ScorePair(sides[0], sides[1], channels, (places[0], places[1])))
    return found


def groups_of_scores(pairs: list[ScorePair], groups: ChannelGroups) -> set[str]:
    """The names of the groups that are their channels."""
    known = {channel for pair in pairs for channel in pair.channels.ravel().tolist()}
    return {each.name for each in groups if not each.whole_blocks and known.issuperset(each.channels.tolist())}


def _source(node: fx.Node, layers: Mapping[fx.Node, Layer]) -> Layer | None:
    """The linear layer whose output a node is a view of; nothing where anything else reads what lies in between."""
    while is_view(node) and isinstance(node.args[0], fx.Node) and only_reader(node) is not None:
        node = node.args[0]
    layer = layers.get(node)
    return layer if layer is not None and layer.is_linear and only_reader(node) is not None else None


def _last_axis(analysis: Analysis, node: fx.Node) -> IntArray | None:
    """The channels along the last dimension, a row for each head."""
    axes = analysis.propagation.axes.get(node, ())
    dim = node.meta["val"].dim() - 1
    for axis in axes if isinstance(axes, tuple) else ():
        if dim in support(axis):
            found: IntArray = analysis.fine.classes[axis].reshape(-1, axis.shape[dim])
            return found
    return None


def _places(analysis: Analysis, layer: Layer, channels: IntArray) -> IntArray | None:
    """Where the channels stand in what a layer gives; nothing where others do, too, or some stand there less often."""
    row = _last_axis(analysis, layer.node)
    if row is None or len(row) != 1 or channels.size != np.unique(channels).size:
        return None
    order = np.argsort(row[0], kind="stable")
    counts = np.unique(row[0], return_counts=True)
    if not np.array_equal(counts[0], np.sort(channels, axis=None)) or len(set(counts[1].tolist())) != 1:
        return None
    sorted_, times = np.argsort(channels, axis=None), int(counts[1][0])
    found = np.empty((channels.size, times), dtype=np.int64)
    found[sorted_] = order.reshape(-1, times)
    return found.reshape(*channels.shape, times)


def turned(
    pair: ScorePair, layout: Layout, outputs: tuple[list[Tensor], list[Tensor]], processes: Processes
) -> tuple[Tensor, Tensor]:
    """For either layer the matrix (outputs of it, outputs of the slim one) that its outputs are to be multiplied by.

    `outputs` are what they give on the batches that count. Where a channel that stays stands for several, their scores
    are counted as often.
    """
    stays = pair.staying(layout)
    counts = np.bincount(layout.keeper, minlength=len(layout.keeper))
    about = [_moments(values, places, processes) for values, places in zip(outputs, pair.places, strict=True)]
    roots = [_roots(_second(*about[0], centred=False)), _roots(_second(*about[1], centred=True))]
    left, values, right = singular(roots[0][0] @ roots[1][0], what=f"the scores of {pair.query.name!r}")
    bases = [roots[0][1] @ left * values[:, None].sqrt(), roots[1][1] @ right.mT * values[:, None].sqrt()]
    found = []
    for side, (layer, basis, places) in enumerate(zip(pair.layers, bases, pair.places, strict=True)):
        kept = _kept(layer, layout)
        matrix = basis.new_zeros(layer.shape[0], len(kept))
        for head, rows in enumerate(places):
            staying = np.flatnonzero(stays[head])
            scale = torch.from_numpy(counts[pair.channels[head, staying]]).to(basis) if side == 0 else 1.0
            columns = basis[head][:, : len(staying)] / scale
            for time in range(rows.shape[1]):
                at = torch.from_numpy(np.searchsorted(kept, rows[staying, time]))
                matrix[torch.from_numpy(rows[:, time])[:, None], at] = columns
        found.append(matrix)
    return processes.agreed((found[0], found[1]))


def _moments(values: list[Tensor], places: IntArray, processes: Processes) -> tuple[Tensor, Tensor, Tensor]:
    """How many rows there are of every head, their sums (heads, c, 1), and those of their products (heads, c, c)."""
    heads, width, times = places.shape
    at = torch.from_numpy(places.transpose(0, 2, 1).reshape(-1))
    here = sum(value.numel() // value.shape[-1] for value in values) * times
    own = max((float(value.abs().max()) for value in values if value.numel()), default=0.0)
    largest, counts = zip(*processes.gathered((own, here)), strict=True)
    count, most = sum(counts), max(largest)
    sums, products = SteadySum(most * count, heads, width, 1), SteadySum(most**2 * count, heads, width, width)
    for value in values:
        rows = value.reshape(-1, value.shape[-1])[:, at.to(value.device)].reshape(-1, heads, times, width)
        rows = rows.permute(1, 0, 2, 3).reshape(heads, -1, width)
        sums.add(rows.sum(1, dtype=torch.float64)[:, :, None])
        products.add(squared(rows if rows.dtype == torch.float64 else rows.float()))
    return torch.tensor(float(count)), sums.total(processes), products.total(processes)


def _second(count: Tensor, sums: Tensor, products: Tensor, *, centred: bool) -> Tensor:
    mean = sums / count.clamp(min=1.0)
    second = products / count.clamp(min=1.0)
    return second - mean @ mean.mT if centred else second


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The square roots (heads, c, c) of symmetric matrices, and their pseudoinverses."""
    values, vectors = symmetric_eigen(moments, what="what attention compares")
    largest = values[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    there = values > _VANISHING * largest
    roots = torch.where(there, values, 0.0).sqrt()
    inverse = torch.where(there, 1.0 / torch.where(there, roots, 1.0), 0.0)
    return (vectors * roots[:, None]) @ vectors.mT, (vectors * inverse[:, None]) @ vectors.mT
