"""What channels are compared by when they are clustered on calibration data.

A merge replaces the channels of a cluster by their mean, so what the layers behind it lose is the distance of each
channel's values to that mean: k-means on the values themselves makes it small. Channel `c` of a group has the row

    a_c = (x[s, c] for places s of the calibration data),

with `x` what the first layer that reads the group reads. Beside the flattened kernels `w_c` it has the row
`(r w_c / |w|, a_c / |a|)`, both matrices being centred and brought to the same size by their Frobenius norms, with
`r = 1` where both count alike. Where activations alone count `r` is small: it parts channels that only happen to do the
same on this data, such as those that are zero on all of it, so that those go together which are the same.

Source: the activations of Stoica et al., "ZipIt! Merging Models from Different Tasks without Training" (ICLR 2024),
section 4.1; the kernels of Ding et al. (C-SGD), section 3.2.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from graphzip.analysis.groups import ChannelGroups, GroupParam
from graphzip.analysis.layers import Layer, layers_by_weight
from graphzip.graph.batches import Batches, Given
from graphzip.graph.interpreter import Values
from graphzip.graph.traced import Traced
from graphzip.numeric.solvers import check_finite
from graphzip_passes.parts.holders import readers_of
from graphzip_passes.parts.slices import duplicates
from graphzip_passes.parts.tied_slices import features_of

__all__ = ["activations"]

Features = NDArray[np.floating[Any]]

_NUMBERS: Final = 4096
"""Numbers of a channel that are compared, at most, drawn at random from all batches."""


_ALIKE: Final = 1e-3
"""What kernels count beside activations where these alone are asked for."""


@torch.no_grad()
def activations(
    traced: Traced,
    groups: ChannelGroups,
    batches: Given,
    names: Collection[str],
    *,
    with_kernels: bool,
) -> dict[str, Features]:
    """For each of the named groups a row per channel, (channels, numbers), to cluster by: what it does and its kernel.

    Identical channels have equal rows. Groups that no convolution or linear layer reads are left out.
    """
    layers = layers_by_weight(traced)
    readers = {name: params[0] for name in names if (params := readers_of(groups[name], layers))}
    values = Values(traced, batches)
    wanted: dict[Any, list[str]] = {}
    for name, param in readers.items():
        wanted.setdefault(layers[param.param].node, []).append(name)
    found: dict[str, Features] = {}
    for node in values.steps(max((values.place[node] for node in wanted), default=-1), wanted):
        for name in wanted[node]:
            param = readers[name]
            layer = layers[param.param]
            check_finite(layer.name, *values[layer.input])
            doing = _scaled(_rows(values[layer.input], values.shared, layer, param))
            kernels = _scaled(features_of(groups[name], traced))
            rows = np.concatenate([kernels if with_kernels else _ALIKE * kernels, doing], axis=1)
            same = duplicates(groups[name], traced)
            first = np.unique(same, return_index=True)[1]  # identical channels differ by rounding, if at all
            found[name] = rows[first[same]]
    return found


def _scaled(rows: Features) -> Features:
    centred = rows - rows.mean(axis=0)
    length = float(np.square(centred, dtype=np.float64).sum()) ** 0.5
    scaled: Features = centred / max(length, np.finfo(np.float32).tiny)
    return scaled


def _rows(inputs: Sequence[torch.Tensor], batches: Batches, layer: Layer, param: GroupParam) -> Features:
    """The values of a group's channels, and of every place that it has in a flattened input, side by side."""
    slots = max(param.indices.shape[1], 1)
    every = list(batches.sizes([value.numel() // value.shape[layer.dim] for value in inputs]))
    total = sum(places for places, _ in every)
    generator = torch.Generator().manual_seed(0)
    own: list[torch.Tensor] = []
    for places, here in every:
        chosen = torch.randperm(places, generator=generator)[: -(-places * _NUMBERS // (slots * total))]
        if here is not None:
            rows = inputs[here].movedim(layer.dim, 0).flatten(1)
            own.append(rows[:, chosen.to(rows.device)].cpu())
    parts = batches.processes.gathered(own)
    joined = torch.cat([parts[rank][place] for rank, place in batches.order], 1)
    held = (joined if joined.dtype == torch.float64 else joined.float()).numpy()
    read: Features = held[param.indices.clip(min=0)] * (param.indices >= 0)[:, :, None]
    return read.reshape(len(read), -1)
