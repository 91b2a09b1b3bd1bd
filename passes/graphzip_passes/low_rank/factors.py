"""Weights as products of thinner ones: how each way of factorising cuts a layer into layers that follow each other.

A layer with `O` outputs and `I` inputs and kernel `k` (none for a linear layer) has the weight `W`, (O, I, *k).

- `svd`: `W`, as a matrix (O, I * K), is `U V`, with `V` (r, I, *k) the layer as it was with `r` outputs and `U` (O, r)
  a layer of kernel 1 behind it (Denton et al., "Exploiting Linear Structure Within Convolutional Networks for Efficient
  Evaluation", NIPS 2014, section 3.2).
- `data-svd`: so, too, with `U` the leading principal directions of what the layer gives on calibration data and
  `V = U^T W`: of all weights of that rank the one whose outputs are nearest (Zhang et al., "Accelerating Very Deep
  Convolutional Networks", TPAMI 2016, section 3.1).
- `cp-spatial`: for kernels of two dimensions, `W` as a matrix (I * k_h, k_w * O) is a layer of kernel (k_h, 1) with one
  of (1, k_w) behind it (Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", BMVC
  2014, scheme 2; solved by an SVD as in Tai et al., ICLR 2016, Eq. 4).
- `tucker`: kernel 1 from `I` to `r_1`, the kernel from `r_1` to `r_2`, kernel 1 from `r_2` to `O`, by HOSVD (Kim et
  al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications", ICLR 2016, Eq.
  4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from graphzip.numeric.solvers import singular, singular_values, symmetric_eigen

__all__ = ["Factors", "Spectrum", "factorised_by", "rank_of", "spectrum_by"]

_DAMPING: Final = 1e-6
"""What directions count that calibration data does not show, in what the average one does."""


@dataclass(frozen=True)
class Spectrum:
    """The energies of the parts of a layer, in descending order, and how many of them it takes to have all of it."""

    energies: Tensor
    rank: int

    def lost(self, count: int) -> float:
        """The share of the energy that is not in the first parts."""
        total = float(self.energies.sum())
        return float(self.energies[count : self.rank].sum()) / total if total > 0 else 0.0


@dataclass(frozen=True)
class Factors:
    """A weight cut into thinner ones: for each, (outputs, inputs, *kernel), which of the dimensions of the kernel are
    its own. `lost` is a share of the energy, `exact` says that nothing is. `ranks` are those between the layers.
    """

    weights: tuple[Tensor, ...]
    own: tuple[tuple[bool, ...], ...]
    ranks: tuple[int, ...]
    lost: float
    exact: bool


def rank_of(spectrum: Spectrum, *, wanted: float | None, energy: float | None) -> int:
    """The rank that is asked for: a number, a share of the full one, or the smallest that keeps so much energy."""
    full = len(spectrum.energies)
    if wanted is not None:
        count = wanted if isinstance(wanted, int) else max(1, math.floor(wanted * full + 1e-9))
        return min(count, spectrum.rank)
    if energy is None or energy >= 1.0:
        return spectrum.rank
    kept = spectrum.energies.cumsum(0)
    return min(int((kept < energy * kept[-1]).sum()) + 1, spectrum.rank)


Rank = Callable[[Spectrum], int]


def factorised_by(method: str, weight: Tensor, outputs: Tensor | None, rank: Rank, what: str) -> Factors:
    """The factors of a weight (O, I, *kernel); `outputs` are mean products (O, O) of what the layer gives."""
    if method == "cp-spatial":
        return _spatial(weight, rank, what)
    if method == "tucker" and weight.dim() > 2:
        return _tucker(weight, rank, what)
    if method == "data-svd":
        assert outputs is not None
        return _by_outputs(weight, outputs, rank, what)
    return _svd(weight, rank, what)


def spectrum_by(method: str, weight: Tensor, outputs: Tensor | None, what: str) -> Spectrum:
    """The energies of the parts that a method with one rank cuts a weight (O, I, *kernel) into."""
    if method == "data-svd":
        assert outputs is not None
        return _directions(weight, outputs, what)[0]
    matrix = _halves(weight) if method == "cp-spatial" else weight.double().flatten(1)
    return _spectrum(singular_values(matrix, what=what), weight)


def _spectrum(values: Tensor, weight: Tensor) -> Spectrum:
    """Of the singular values of a matrix that holds the numbers of `weight`; those that are only rounding count for
    nothing.
    """
    noise = torch.finfo(weight.dtype).eps * max(weight.shape[0], weight[0].numel())
    rank = int((values > noise * values[0]).sum()) if values.numel() else 0
    return Spectrum(values.square(), max(rank, 1))


def _svd(weight: Tensor, rank: Rank, what: str) -> Factors:
    left, values, right = singular(weight.double().flatten(1), what=what)
    spectrum = _spectrum(values, weight)
    count = rank(spectrum)
    root = values[:count].sqrt()
    first = (root[:, None] * right[:count]).reshape(count, *weight.shape[1:])
    return _pair(first, left[:, :count] * root, spectrum)


def _by_outputs(weight: Tensor, outputs: Tensor, rank: Rank, what: str) -> Factors:
    spectrum, vectors = _directions(weight, outputs, what)
    left = vectors[:, : rank(spectrum)]
    return _pair((left.T @ weight.double().flatten(1)).reshape(-1, *weight.shape[1:]), left, spectrum)


def _directions(weight: Tensor, outputs: Tensor, what: str) -> tuple[Spectrum, Tensor]:
    """The principal directions of the outputs, as columns, the first one first, and their variances."""
    dense = weight.double().flatten(1)
    gram = dense @ dense.T
    scale = _DAMPING * float(outputs.trace()) / max(float(gram.trace()), torch.finfo(torch.float64).tiny)
    energies, vectors = symmetric_eigen(outputs + (scale or 1.0) * gram, what=what)
    rank = _spectrum(singular_values(dense, what=what), weight).rank
    return Spectrum(energies.flip(0).clamp(min=0)[: dense.shape[1]], rank), vectors.flip(1)


def _pair(first: Tensor, second: Tensor, spectrum: Spectrum) -> Factors:
    dims, count = first.dim() - 2, len(first)
    ones = second.reshape(*second.shape, *[1] * dims)
    own = (True,) * dims, (False,) * dims
    return Factors((first, ones), own, (count,), spectrum.lost(count), count >= spectrum.rank)


def _spatial(weight: Tensor, rank: Rank, what: str) -> Factors:
    outs, ins, height, width = weight.shape
    left, values, right = singular(_halves(weight), what=what)
    spectrum = _spectrum(values, weight)
    count = rank(spectrum)
    root = values[:count].sqrt()
    first = (left[:, :count] * root).T.reshape(count, ins, height, 1)
    second = (root[:, None] * right[:count]).reshape(count, 1, width, outs).permute(3, 0, 1, 2)
    own = (True, False), (False, True)
    return Factors((first, second), own, (count,), spectrum.lost(count), count >= spectrum.rank)


def _halves(weight: Tensor) -> Tensor:
    """(I * height, width * O)."""
    outs, ins, height, width = weight.shape
    return weight.double().permute(1, 2, 3, 0).reshape(ins * height, width * outs)


def _tucker(weight: Tensor, rank: Rank, what: str) -> Factors:
    dense = weight.double()
    sides, exact = [], True
    for dim in (0, 1):
        left, values, _ = singular(dense.movedim(dim, 0).flatten(1), what=what)
        spectrum = _spectrum(values, weight)
        sides.append(left[:, : rank(spectrum)])
        exact &= sides[-1].shape[1] >= spectrum.rank
    outs, ins = sides
    core = torch.einsum("oi...,or,iq->rq...", dense, outs, ins)
    dims = weight.dim() - 2
    ones = [1] * dims
    weights = (ins.T.reshape(*ins.T.shape, *ones), core, outs.reshape(*outs.shape, *ones))
    total = float(dense.square().sum())
    lost = max(0.0, 1.0 - float(core.square().sum()) / total) if total > 0 and not exact else 0.0
    own = (False,) * dims, (True,) * dims, (False,) * dims
    return Factors(weights, own, (ins.shape[1], outs.shape[1]), lost, exact)
