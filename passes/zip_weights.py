"""Weights of a layer as rows of features, and the batch norm behind it; all in float64 on the CPU."""

from __future__ import annotations

import torch

from graphzip.graph.state import get_tensor
from graphzip.graph.trace import Traced
from graphzip.labels import IntArray
from graphzip.rewrite.blocks import put
from passes.zip_layers import Layer

__all__ = ["augmented", "deviations", "double", "matrix", "with_one", "write"]


def with_one(rows: torch.Tensor) -> torch.Tensor:
    """Rows laid out flat, with a one for the bias at the end."""
    return torch.cat([rows.flatten(1), rows.new_ones(len(rows), 1)], 1)


def double(traced: Traced, name: str) -> torch.Tensor:
    return get_tensor(traced.module, name).detach().to("cpu", torch.float64)


def matrix(traced: Traced, layer: Layer) -> torch.Tensor:
    """A layer's weight, `(rows, features)`."""
    return double(traced, layer.weight).flatten(1)


def augmented(traced: Traced, layer: Layer) -> torch.Tensor:
    """The weight with the bias as its last column."""
    weight = matrix(traced, layer)
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else double(traced, layer.bias)
    return torch.cat([weight, bias.unsqueeze(1)], 1)


def deviations(traced: Traced, layer: Layer) -> torch.Tensor:
    """The deviation of every row that the batch norm behind a layer divides by."""
    assert layer.norm is not None
    return (double(traced, layer.norm.var) + layer.norm.eps).sqrt()


def write(traced: Traced, layer: Layer, rows: IntArray, features: IntArray, value: torch.Tensor) -> None:
    """Set weights, and the bias where `features` reach beyond them."""
    whole = augmented(traced, layer)
    whole[torch.from_numpy(rows).unsqueeze(1), torch.from_numpy(features)] = value
    put(traced, layer.weight, whole[:, :-1].reshape(layer.shape))
    if layer.bias is not None and (features == layer.features).any():
        put(traced, layer.bias, whole[:, -1])
