"""Weights of a layer as rows of features, and the batch norm behind it; in float64 on the CPU.

The weight of one layer can be a good part of a model, so it is turned into float64 some rows at a time.
"""

from __future__ import annotations

import numpy as np
import torch

from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip.labels import IntArray
from graphzip.rewrite.edit import put
from graphzip_passes.zip.layers import TaskLayer
from graphzip_passes.zip.solve import BLOCK

__all__ = ["augmented", "blocks", "deviations", "double", "matrix", "outputs", "parted", "write"]


def blocks(rows: IntArray) -> list[IntArray]:
    """Rows in parts of `BLOCK`."""
    return np.split(rows, range(BLOCK, len(rows), BLOCK))


def parted(layer: TaskLayer, rows: torch.Tensor) -> list[torch.Tensor]:
    """What each part of a layer reads, `(samples, features + 1)`, of `(samples, channels, positions)`.

    Laid out flat, with a one for the bias at the end.
    """
    one = rows.new_ones(len(rows), 1)
    return [torch.cat([part.flatten(1), one], 1) for part in torch.chunk(rows, layer.parts, 1)]


def double(traced: Traced, name: str) -> torch.Tensor:
    """A parameter or buffer; it may be the one that the graph holds, so nothing is written to it."""
    return get_tensor(traced.module, name).detach().to("cpu", torch.float64)


def matrix(traced: Traced, layer: TaskLayer) -> torch.Tensor:
    """A layer's weight, `(rows, features)`."""
    return double(traced, layer.weight).flatten(1)


def augmented(traced: Traced, layer: TaskLayer, rows: IntArray | None = None) -> torch.Tensor:
    """The weight with the bias as its last column, of all rows or of some."""
    weight = get_tensor(traced.module, layer.weight).detach().flatten(1)
    bias = None if layer.bias is None else get_tensor(traced.module, layer.bias).detach()
    if rows is not None:
        chosen = torch.from_numpy(rows).to(weight.device)
        weight, bias = weight[chosen], None if bias is None else bias[chosen]
    made = torch.zeros(len(weight), weight.shape[1] + 1, dtype=torch.float64)
    made[:, :-1] = weight
    if bias is not None:
        made[:, -1] = bias
    return made


def outputs(traced: Traced, layer: TaskLayer, rows: torch.Tensor) -> torch.Tensor:
    """What a layer gives for what it reads, `(samples, channels, positions)`: `(samples, outputs)`."""
    found = []
    for part, flat in enumerate(parted(layer, rows)):
        for some in blocks(np.arange(part * layer.height, (part + 1) * layer.height)):
            found.append(flat @ augmented(traced, layer, some).T)
    return torch.cat(found, 1)


def deviations(traced: Traced, layer: TaskLayer) -> torch.Tensor:
    """The deviation of every row that the batch norm behind a layer divides by."""
    assert layer.norm is not None
    return (double(traced, layer.norm.var) + layer.norm.eps).sqrt()


def write(traced: Traced, layer: TaskLayer, rows: IntArray, features: IntArray, value: torch.Tensor) -> None:
    """Set weights, and the bias where `features` reach beyond them."""
    weight = get_tensor(traced.module, layer.weight).detach().clone(memory_format=torch.contiguous_format)
    own, inner = torch.from_numpy(rows).unsqueeze(1), features < layer.features
    place = own.to(weight.device), torch.from_numpy(features[inner]).to(weight.device)
    weight.flatten(1)[place] = value[:, inner].to(weight.device, weight.dtype)
    put(traced, layer.weight, weight)
    if layer.bias is not None and not inner.all():
        bias = double(traced, layer.bias).clone()
        bias[own] = value[:, ~inner]
        put(traced, layer.bias, bias)
