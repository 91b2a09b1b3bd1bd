"""Atoms and coefficients from trained kernels: alternating least squares over all that share coefficients.

Kernels `K_n` of shape `(c_n, c'_n, L_n)` (positions of the kernel laid out flat) are fitted by `A[:c_n, :c'_n, :m] D_n`
with `D_n` of shape `(m, L_n)`, minimising

    sum_n sum_{o,i} (K_n[o,i] - A[o,i] D_n) M_n[i] (K_n[o,i] - A[o,i] D_n)^T

where `M_n[i]` (L_n x L_n) is the second moment of what the kernel reads from input channel `i`: the squared error
of the layer's output, with channels taken as independent. Without moments it is the identity. Either factor is a least
squares problem given the other. A kernel alone without moments is a truncated SVD, which is exact from `m = L`.
(ACDC, "A Joint Subspace View to Convolutional Neural Networks", Eq. 1 to 3, is the model; the fit is ours.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from graphzip.numeric.solvers import orthonormal, pseudo_inverse, singular, symmetric_eigen

__all__ = ["fit_atoms", "random_atoms"]

Moments = Sequence[torch.Tensor | None]

_PLAIN = 0.3  # share of the plain squared error in a weighted one
_PATIENCE = 1e-4  # relative fall of the error below which the alternation ends
_SINGULAR = 1e-2  # of the largest singular value of the atoms: below it coefficients would be large and cancel


def fit_atoms(
    kernels: Sequence[torch.Tensor], atoms: int, *, moments: Moments | None = None, seed: int = 0, rounds: int = 100
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Coefficients `(max c, max c', m)` and one `(m, L_n)` per kernel, in float64.

    `kernels` are `(c_n, c'_n, L_n)`, `moments` `(c'_n, L_n, L_n)` each. Atoms beyond the
    positions of all kernels together start at random.
    """
    kernels = [kernel.detach().double() for kernel in kernels]
    given = list(moments) if moments is not None else [None] * len(kernels)
    scales = [None if moment is None else _root(moment, kernel) for moment, kernel in zip(given, kernels, strict=True)]
    rows, columns = (max(kernel.shape[dim] for kernel in kernels) for dim in (0, 1))
    bases = _start(kernels, atoms, rows, columns, seed)
    coefficients = _coefficients(kernels, bases, scales, rows, columns)
    if len(kernels) > 1 or scales[0] is not None:
        error = _error(kernels, coefficients, bases, scales)
        for _ in range(rounds):
            bases = [_atoms(*each) for each in zip(kernels, _parts(coefficients, kernels), scales, bases, strict=True)]
            coefficients = _coefficients(kernels, bases, scales, rows, columns)
            last, error = error, _error(kernels, coefficients, bases, scales)
            if last - error <= _PATIENCE * last:
                break
    return _conditioned(coefficients, bases)


def random_atoms(
    shapes: Sequence[tuple[int, ...]], atoms: int, generator: torch.Generator
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Kaiming normal coefficients and orthogonal atoms (appendix A) for kernels of these `(c, c', L)`.

    Atoms are scaled so that every kernel has the spread of a Kaiming start, whatever corner of them it uses.
    """
    rows, columns = (max(shape[dim] for shape in shapes) for dim in (0, 1))
    coefficients = torch.randn(rows, columns, atoms, generator=generator, dtype=torch.float64)
    coefficients *= (2.0 / (columns * atoms)) ** 0.5
    made = []
    for _, own, length in shapes:
        square = torch.randn(max(atoms, length), min(atoms, length), generator=generator, dtype=torch.float64)
        basis = orthonormal(square, what="the start of atoms")
        basis = basis if atoms > length else basis.t()
        made.append(basis * (columns / own * max(atoms / length, 1.0)) ** 0.5)
    return coefficients, made


def _root(moment: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """`R` with `R R^T = M` for every input channel, in a scale in which every kernel counts by its own size.

    A share of the identity keeps the kernel where no data reached it.
    """
    moment = moment.double()
    size = torch.einsum("oik,ikl,oil->", kernel, moment, kernel)
    whole = moment * (kernel.square().sum() / size) if size > 0 else torch.zeros_like(moment)
    eye = torch.eye(moment.shape[-1], dtype=torch.float64)
    values, vectors = symmetric_eigen((1.0 - _PLAIN) * whole + _PLAIN * eye, what="the fit of atoms")
    root: torch.Tensor = vectors * values.clamp_min(0.0).sqrt()[:, None, :]
    return root


def _start(kernels: list[torch.Tensor], atoms: int, rows: int, columns: int, seed: int) -> list[torch.Tensor]:
    """The leading right singular vectors of all kernels side by side, absent ones as zeros."""
    lengths = [kernel.shape[2] for kernel in kernels]
    gram = torch.zeros(sum(lengths), sum(lengths), dtype=torch.float64)
    offsets = [sum(lengths[:number]) for number in range(len(lengths))]
    for first, left in enumerate(kernels):
        for second, right in enumerate(kernels[: first + 1]):
            common = tuple(min(a, b) for a, b in zip(left.shape[:2], right.shape[:2], strict=True))
            one, two = (kernel[: common[0], : common[1]].flatten(0, 1) for kernel in (left, right))
            here = slice(offsets[first], offsets[first] + lengths[first])
            there = slice(offsets[second], offsets[second] + lengths[second])
            gram[here, there] = one.t() @ two
            gram[there, here] = two.t() @ one
    vectors = symmetric_eigen(gram, what="the fit of atoms")[1].flip(1)[:, :atoms].t()
    if len(vectors) < atoms:
        generator = torch.Generator().manual_seed(seed)
        more = torch.randn(atoms - len(vectors), vectors.shape[1], generator=generator, dtype=torch.float64)
        vectors = torch.cat([vectors, more / more.norm(dim=1, keepdim=True)])
    return [vectors[:, offset : offset + length].clone() for offset, length in zip(offsets, lengths, strict=True)]


def _conditioned(coefficients: torch.Tensor, bases: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same products from atoms that are orthogonal over all kernels together, of norm 1 in the mean of the kernels.

    Least squares may end with atoms that are nearly parallel and coefficients that cancel, which spoils training.
    """
    lengths = [basis.shape[1] for basis in bases]
    left, values, right = singular(torch.cat(bases, dim=1), what="the fit of atoms")
    size = len(bases) ** 0.5
    mixed = coefficients @ (left * values) / size
    missing = coefficients.shape[2] - len(values)
    extra = torch.cat(bases, dim=1)[len(values) :]
    right = torch.cat([right * size, extra]) if missing else right * size
    return nn.functional.pad(mixed, (0, missing)), list(torch.split(right, lengths, dim=1))


def _parts(coefficients: torch.Tensor, kernels: list[torch.Tensor]) -> list[torch.Tensor]:
    return [coefficients[: kernel.shape[0], : kernel.shape[1]] for kernel in kernels]


def _coefficients(
    kernels: list[torch.Tensor],
    bases: list[torch.Tensor],
    scales: list[torch.Tensor | None],
    rows: int,
    columns: int,
) -> torch.Tensor:
    """The best coefficients for given atoms, corner by corner: each position is fitted to the kernels that have it."""
    made = torch.zeros(rows, columns, len(bases[0]), dtype=torch.float64)
    edges = [sorted({0, *(kernel.shape[dim] for kernel in kernels)}) for dim in (0, 1)]
    for top, bottom in zip(edges[0], edges[0][1:], strict=False):
        for left, right in zip(edges[1], edges[1][1:], strict=False):
            here = [n for n, kernel in enumerate(kernels) if kernel.shape[0] >= bottom and kernel.shape[1] >= right]
            if not here:
                continue
            if all(scales[n] is None for n in here):
                basis = torch.cat([bases[n] for n in here], dim=1)
                values = torch.cat([kernels[n][top:bottom, left:right] for n in here], dim=2)
                made[top:bottom, left:right] = values @ pseudo_inverse(basis, rtol=_SINGULAR, what="the fit of atoms")
                continue
            for column in range(left, right):
                weighted = [_weighted(kernels[n][top:bottom, column], bases[n], scales[n], column) for n in here]
                values = torch.cat([value for value, _ in weighted], dim=1)
                basis = torch.cat([basis for _, basis in weighted], dim=1)
                made[top:bottom, column] = values @ pseudo_inverse(basis, rtol=1e-9, what="the fit of atoms")
    return made


def _weighted(
    values: torch.Tensor, basis: torch.Tensor, scale: torch.Tensor | None, column: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return (values, basis) if scale is None else (values @ scale[column], basis @ scale[column])


def _atoms(
    kernel: torch.Tensor, coefficients: torch.Tensor, scale: torch.Tensor | None, last: torch.Tensor
) -> torch.Tensor:
    """The best atoms for given coefficients."""
    if scale is None:
        flat = coefficients.flatten(0, 1)
        inverse = pseudo_inverse(flat.t() @ flat, hermitian=True, what="the fit of atoms")
        return inverse @ (flat.t() @ kernel.flatten(0, 1))
    moments = scale @ scale.transpose(1, 2)
    grams = torch.einsum("oia,oib->iab", coefficients, coefficients)
    left = torch.einsum("iab,ikl->akbl", grams, moments).reshape(last.numel(), last.numel())
    right = torch.einsum("oia,oik,ikl->al", coefficients, kernel, moments).reshape(-1)
    inverse = pseudo_inverse(left, hermitian=True, rtol=1e-12, what="the fit of atoms")
    return (inverse @ right).reshape(last.shape)


def _error(
    kernels: list[torch.Tensor],
    coefficients: torch.Tensor,
    bases: list[torch.Tensor],
    scales: list[torch.Tensor | None],
) -> float:
    total = 0.0
    for kernel, part, basis, scale in zip(kernels, _parts(coefficients, kernels), bases, scales, strict=True):
        rest = kernel - part @ basis
        total += float((rest if scale is None else torch.einsum("oik,ikl->oil", rest, scale)).square().sum())
    return total
