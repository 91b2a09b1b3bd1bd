"""Codes and generators that keep what layers give, in place of their kernels: slices weighed by what they read.

A slice `s` of a kernel covers some filters, input channels and places. With `M_c` the second moments of what the kernel
reads of channel c at these places, the squared error of the layer's output, channels taken as independent, is

    sum over filters o and channels c of (s_oc - G_oc z)^T M_c (s_oc - G_oc z),

so that with `M_c = R_c R_c^T` the best code `z` for a generator `G` is the least squares solution for `R_c^T s_oc` and
`R_c^T G_oc`. A generator begins as the truncated SVD of the slices; given the codes it is the least squares solution in
which a channel counts by its mean moment, and so on in turn, as long as the error falls. (CSG, "Associative
Convolutional Layers", Eq. 1, is the model; the fit is ours.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from graphzip.graph.layers.factored import slice_grid
from graphzip.numeric.solvers import pseudo_inverse, singular_values, symmetric_eigen

__all__ = ["SliceWeights", "fit_weighted"]

_PLAIN = 0.3  # share of the plain squared error in a weighted one
_ROUNDS = 8
_SETTLED = 1e-3  # relative fall of the error below which a round is the last one


@dataclass(frozen=True)
class SliceWeights:
    """What counts for the slices of one kernel: for each the number of its roots, `roots` of them, `(k, l, l)` each,
    and the mean moment of each of its channels, `(slices, k)`.
    """

    which: torch.Tensor
    roots: tuple[torch.Tensor, ...]
    mass: torch.Tensor

    @classmethod
    def of(cls, kernel: torch.Tensor, size: Sequence[int], moment: torch.Tensor | None) -> SliceWeights:
        """Of a kernel `(o, i, *places)` cut into slices of `size`, with moments `(i, L, L)`; plain where none."""
        _, ins, *places = kernel.shape
        length = math.prod(places)
        moment = _scaled(kernel.flatten(2), moment)
        grid = slice_grid(kernel.shape, size)
        numbers = torch.arange(length).reshape(places)
        roots, mass = [], []
        for at in itertools.product(*map(range, grid[1:])):
            channels = torch.arange(at[0] * size[1], min((at[0] + 1) * size[1], ins))
            inside = [
                range(step * number, min(step * (number + 1), whole))
                for number, step, whole in zip(at[1:], size[2:], places, strict=True)
            ]
            chosen = numbers[tuple(torch.meshgrid(*(torch.tensor(each) for each in inside), indexing="ij"))].flatten()
            positions = _positions([len(each) for each in inside], size[2:])
            own = moment[channels[:, None, None], chosen[:, None], chosen]
            root = torch.zeros(size[1], math.prod(size[2:]), math.prod(size[2:]), dtype=torch.float64)
            root[: len(channels), positions[:, None], positions] = _root(own)
            roots.append(root)
            mass.append(torch.zeros(size[1], dtype=torch.float64))
            mass[-1][: len(channels)] = own.diagonal(dim1=1, dim2=2).mean(1)
        which = torch.arange(len(roots)).repeat(grid[0])
        return cls(which, tuple(roots), torch.stack(mass)[which])

    def lost(self, rest: torch.Tensor) -> float:
        """The squared error of the layer's output, for what slices lack, `(slices, elements)`."""
        channels = self.mass.shape[1]
        return sum(
            float(self._seen(rest[self.which == number], root, channels).square().sum())
            for number, root in enumerate(self.roots)
        )

    def codes(self, slices: torch.Tensor, used: torch.Tensor, generator: torch.Tensor) -> torch.Tensor:
        """The best codes `(slices, n_c)`, given the generator."""
        channels = self.mass.shape[1]
        codes = slices.new_zeros(len(slices), generator.shape[1])
        for rows, inside, root in self._alike(used):
            given = self._seen((generator * inside[:, None]).t(), root, channels).t()
            wanted = self._seen(slices[rows] * inside, root, channels)
            codes[rows] = wanted @ pseudo_inverse(given, what="a generator").t()
        return codes

    def _alike(self, used: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Slices with the same roots and the same elements inside, which elements these are, and the roots."""
        for number, root in enumerate(self.roots):
            here = torch.nonzero(self.which == number).flatten()
            patterns, pattern = torch.unique(used[here], dim=0, return_inverse=True)
            for each, inside in enumerate(patterns):
                yield here[pattern == each], inside, root

    @staticmethod
    def _seen(rows: torch.Tensor, root: torch.Tensor, channels: int) -> torch.Tensor:
        """Rows of elements `(n, filters * k * l)` as the layer's output has them: each channel times its root."""
        parted = rows.reshape(len(rows), -1, channels, root.shape[1])
        return torch.einsum("nokl,klm->nokm", parted, root).flatten(1)


def fit_weighted(
    slices: Sequence[torch.Tensor],
    used: Sequence[torch.Tensor],
    weights: Sequence[SliceWeights],
    generator: torch.Tensor,
    *,
    fixed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `(slices of all kernels, n_c)` and the generator `(elements, n_c)`, from a generator to begin with.

    `slices` and `used` are those of each kernel, `(slices, elements)`. With `fixed` the generator stays.
    """
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    least, every, inside = math.inf, torch.cat(list(slices)), torch.cat(list(used))
    mass = torch.cat([each.mass for each in weights])
    for _ in range(_ROUNDS):
        cuts = zip(slices, used, weights, strict=True)
        found = [each.codes(own, at, generator) for own, at, each in cuts]
        rest = ((own - codes @ generator.t()) * at for own, codes, at in zip(slices, found, used, strict=True))
        lost = sum(each.lost(each_rest) for each, each_rest in zip(weights, rest, strict=True))
        codes = torch.cat(found)
        if lost < least:
            best = codes, generator
        if fixed or lost >= least * (1.0 - _SETTLED):
            break
        least = lost
        filled = torch.where(inside, every, codes @ generator.t())
        generator = _generator(filled, codes, mass, weights[0].roots[0].shape[1])
    assert best is not None
    codes, generator = best
    if not fixed:  # both alike, so that steps of training move the kernels alike through either
        sizes = [float(singular_values(each, what="the fit of slices").max()) for each in best]
        scale = (sizes[0] / sizes[1]) ** 0.5 if min(sizes) > 0.0 else 1.0
        codes, generator = codes / scale, generator * scale
    return codes, generator.contiguous()


def _generator(slices: torch.Tensor, codes: torch.Tensor, mass: torch.Tensor, places: int) -> torch.Tensor:
    """The best generator for these codes, where channel c of slice i counts `mass[i, c]` at all of its `places`."""
    channels = mass.shape[1]
    parted = slices.reshape(len(slices), -1, channels, places)
    made = parted.new_empty(*parted.shape[1:], codes.shape[1])
    for channel in range(channels):
        weighed = (codes * mass[:, channel, None]).t()
        inverse = pseudo_inverse(weighed @ codes, hermitian=True, what="the codes of slices")
        rows = inverse @ (weighed @ parted[:, :, channel].flatten(1))
        made[:, channel] = rows.t().reshape(-1, places, codes.shape[1])
    return made.flatten(0, 2)


def _positions(lengths: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """Where places of a part of a slice, of these lengths, stand among all of the slice's."""
    numbers = torch.arange(math.prod(size)).reshape(list(size))
    return numbers[tuple(slice(0, length) for length in lengths)].flatten()


def _scaled(kernel: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """Moments in a scale in which every kernel counts by its own size, with a share of the plain error."""
    ins, length = kernel.shape[1:]
    plain = torch.eye(length, dtype=torch.float64).expand(ins, -1, -1)
    if moment is None:
        return plain
    size = torch.einsum("oik,ikl,oil->", kernel, moment, kernel)
    whole = moment * (kernel.square().sum() / size) if size > 0 else torch.zeros_like(moment)
    return (1.0 - _PLAIN) * whole + _PLAIN * plain


def _root(moments: torch.Tensor) -> torch.Tensor:
    values, vectors = symmetric_eigen(moments, what="the fit of slices")
    root: torch.Tensor = vectors * values.clamp_min(0.0).sqrt()[:, None, :]
    return root
