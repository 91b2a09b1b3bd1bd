"""Complex numbers and Fourier transforms: a transform mixes positions along a dimension, and nothing along others."""

from __future__ import annotations

import numpy as np
import torch

from graphzip.ops.rules import mixing, moved, pointwise, same
from graphzip.ops.site import Site
from graphzip.ops.spec import OpSpec, Result

__all__ = ["PAIRS", "SPECS"]

aten = torch.ops.aten


def transform(site: Site) -> Result:
    """`fft`, `irfft2`, `fftshift` ...: positions along `dim` are mixed or moved, however many come out."""
    source = site.args["self"]
    rank, dim, sizes = len(site.shape(source)), site.args.get("dim"), site.args.get("s")
    if isinstance(dim, int):
        dims = [dim]
    elif dim is not None:
        dims = list(dim)
    else:
        dims = list(range(rank if sizes is None else len(sizes)))
        dims = [rank - 1 - place for place in dims]
    return mixing(site, site.axes(source), sorted(each % rank for each in dims), "transforms along it")


def as_pairs(site: Site) -> Result:
    """`view_as_real`: a new last dimension has the two parts of a number."""
    return moved(site, site.axes(site.args["self"]), lambda array: array[..., None])


def of_pairs(site: Site) -> Result:
    """`view_as_complex`: the last dimension, of two, becomes one number."""
    source = site.args["self"]
    last = len(site.shape(source)) - 1
    axes = mixing(site, site.axes(source), [last], "takes pairs of channels for complex numbers")
    return moved(site, axes, lambda array: np.squeeze(array, axis=last))


PAIRS = (OpSpec((aten.view_as_real.default,), as_pairs), OpSpec((aten.view_as_complex.default,), of_pairs))

_TRANSFORMS = """
fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2
fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn fft_fftshift fft_ifftshift
"""
_PARTS = "real imag angle isreal _conj conj_physical resolve_conj"

SPECS = (
    *PAIRS,
    OpSpec(tuple(getattr(aten, name).default for name in _TRANSFORMS.split()), transform),
    OpSpec(tuple(getattr(aten, name).default for name in _PARTS.split()), same),
    OpSpec((aten.complex.default, aten.polar.default), pointwise),
)
