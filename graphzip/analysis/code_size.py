"""How long a code a slice of a network's kernels needs.

Source: "Associative Convolutional Layers" (CSG), section 3.3: the energy of natural filters is concentrated in few
coefficients of the four-dimensional DCT-II of their slices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.fft import dctn
from torch import nn

from graphzip.arguments import check_module, whole
from graphzip.boundary import public
from graphzip.errors import GraphZipError
from graphzip.numeric.solvers import checked

__all__ = ["suggest_code_size"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@public
def suggest_code_size(model: nn.Module, slice: Sequence[int] = (16, 16, 3, 3), *, energy: float = 0.9) -> int:
    """The number of DCT basis slices that hold a share `energy` (above 0, at most 1) of the energy of the
    kernels of `model`.

    A generator made of these basis slices is linear and the same for all slices, so a trained one of this size does no
    worse. Every whole slice of every convolution but the first, 1x1 and depthwise ones counts; `slice` is in out
    channels, in channels and kernel size. The paper gives no threshold; its choice is 1/18 of the elements of a slice.

    Raises `GraphZipError` where no kernel holds a slice of this shape or `energy` is out of range.
    """
    check_module(model)
    if not isinstance(energy, int | float) or not 0.0 < energy <= 1.0:
        raise GraphZipError(f"energy is {energy}; pass a share above 0 and at most 1")
    if not isinstance(slice, Sequence) or not slice:
        raise GraphZipError(f"slice: {slice!r} is not the shape of a slice, such as (16, 16, 3, 3)")
    for size in slice:
        whole(size, "slice", least=1)
    spectrum, count = np.zeros(tuple(slice)), 0
    for piece in _slices(model, tuple(slice)):
        spectrum += dctn(piece, type=2, norm="ortho") ** 2
        count += 1
    if not count or not spectrum.any():
        raise GraphZipError(
            f"no kernel of {type(model).__name__} holds a slice of {list(slice)} that is not zero; choose a smaller one"
        )
    shares = np.cumsum(np.sort(spectrum, axis=None)[::-1]) / spectrum.sum()
    return min(int(np.searchsorted(shares, energy - 1e-12)) + 1, math.prod(slice))


def _slices(model: nn.Module, size: tuple[int, ...]) -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    layers = [layer for layer in model.modules() if isinstance(layer, _CONVOLUTIONS)]
    for layer in layers[1:]:
        kernel = checked(layer.weight.detach(), "a kernel").cpu()
        whole = kernel.dim() == len(size) and all(a >= b for a, b in zip(kernel.shape, size, strict=True))
        if not whole or math.prod(kernel.shape[2:]) == 1 < math.prod(size[2:]):
            continue
        for dim, step in enumerate(size):
            kernel = kernel.unfold(dim, step, step)
        yield from torch.flatten(kernel, 0, len(size) - 1).numpy()
