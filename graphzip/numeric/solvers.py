"""Least squares and factorisations: the one place where matrices are factorised.

Second moments are positive semi-definite on paper alone. Channels that are dead, that repeat each other, that stand
far from zero or are multiplied in float32 leave pivots of a factor that are nothing but rounding. So a factorisation is
tried with the damping that is asked for, and with ten times more in proportion to each unit's own size until there is
one (`factorised`). Rows are centred before they are multiplied where there is an intercept (`Fit`), and products are
added up in float64. What is not finite is refused, with the name of the layer it belongs to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from graphzip.errors import WeightsError
from graphzip.process_groups import ALONE, Processes

__all__ = [
    "Factor",
    "Fit",
    "RowParts",
    "SecondMoments",
    "all_finite",
    "centred",
    "check_finite",
    "checked",
    "damping_share",
    "factorised",
    "leading_left",
    "orthonormal",
    "pivoted_cholesky",
    "products",
    "pseudo_inverse",
    "relative_damping",
    "ridge",
    "singular",
    "singular_values",
    "squared",
    "symmetric_eigen",
]

logger = logging.getLogger(__name__)

_DAMPING: Final = 1e-4  # of a least-squares fit, in mean squares of what a layer reads
_FEW: Final = 1e-2  # the same where rows are not many more than unknowns
_MANY: Final = 20  # rows for an unknown
_FAR: Final = 100.0  # times its variance: a mean square above that comes from the mean
_FIRST: Final = 1e-12  # what is added first where a matrix has no factor, in what is on its diagonal
_LAST: Final = (
    1e6  # at most: any symmetric matrix of fewer rows with no entry larger than the diagonal has a factor then
)
_PARTS, _NARROW = 4, 64  # columns are multiplied in so many parts, none of them narrower
_AT_ONCE: Final = 1 << 13  # rows that are added up in their own precision


def all_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def check_finite(layer: str, *values: Tensor) -> None:
    """Raises `WeightsError` where what a layer of that name reads or gives on the calibration data is not finite."""
    if not all(map(all_finite, values)):
        raise WeightsError(
            f"{layer!r} reads or gives values that are NaN or infinite on the calibration data; check the data "
            "and the model's weights"
        )


def checked(value: Tensor, what: str) -> Tensor:
    """The values in float64. Raises `WeightsError`, which begins with `what`, where they are not finite."""
    if value.is_meta:
        raise WeightsError(f"{what}: there are no values, for the model is on the meta device; load its weights first")
    if not all_finite(value):
        raise WeightsError(f"{what}: there are values that are NaN or infinite; check the model's weights and the data")
    return value.double()


# ------------------------------------------------------------------------------------------------- positive definite


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor `L` of a symmetric matrix (.., n, n) with `damping` (.., n) on its diagonal."""

    lower: Tensor
    damping: Tensor

    def solve(self, columns: Tensor) -> Tensor:
        """`(A + D)^-1 V` for `V` (.., n, k)."""
        return torch.cholesky_solve(columns, self.lower)

    def halved(self, columns: Tensor) -> Tensor:
        """`L^-1 V`, whose columns have the products `V^T (A + D)^-1 V` with each other."""
        found: Tensor = torch.linalg.solve_triangular(self.lower, columns, upper=False)
        return found

    def inverse(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """`(A + D)^-1`, computed in this type: large ones take half the time in float32."""
        return torch.cholesky_inverse(self.lower.to(dtype))


def factorised(matrix: Tensor, damping: Tensor | float = 0.0, *, what: str) -> Factor:
    """The factor in float64 of a symmetric matrix (.., n, n), of which the lower half counts.

    `damping`, a number or (.., 1) or (.., n), is added to the diagonal, and more where rounding demands it: of each
    entry there as much as of the others relative to its size, so that no unit is too small or too large. The matrix is
    left as it is; the factor can be differentiated by it.

    Raises `WeightsError`, which begins with `what`, where the matrix is not finite, or so far from positive definite
    that it is none of moments.
    """
    matrix = checked(matrix, what)
    differentiable = matrix.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        lower, added = _damped(matrix.detach().clone() if differentiable else matrix, damping, what)
    if differentiable:
        lower = torch.linalg.cholesky_ex(matrix + torch.diag_embed(added))[0]
    return Factor(lower, added)


def _damped(matrix: Tensor, damping: Tensor | float, what: str) -> tuple[Tensor, Tensor]:
    """The factor and what is on the diagonal for it; copies of a large matrix are spared by writing there and back."""
    square = matrix.diagonal(dim1=-2, dim2=-1).clone()
    asked = torch.zeros_like(square) + damping
    added, more = asked, square.new_zeros(square.shape[:-1])
    try:
        while True:
            matrix.diagonal(dim1=-2, dim2=-1).copy_(square + added)
            lower, failed = torch.linalg.cholesky_ex(matrix)
            failed = (failed != 0) | ~lower.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
            if not bool(failed.any()):
                if bool((more[square.any(-1)] > 0.0).any()):
                    logger.warning("%s: an ill-conditioned Hessian was damped by %.0e more", what, float(more.max()))
                return lower, added
            more = torch.where(failed, (10.0 * more).clamp(min=_FIRST), more)
            if float(more.max()) > _LAST:
                raise WeightsError(f"{what}: no damping makes its second moments positive; check the weights and data")
            added = asked + more[..., None] * _own_sizes(square)
    finally:
        matrix.diagonal(dim1=-2, dim2=-1).copy_(square)


def _own_sizes(square: Tensor) -> Tensor:
    """What is on the diagonal; the mean of it where there is nothing or less; one where there is nothing at all."""
    mean = square.abs().mean(-1, keepdim=True)
    return torch.where(square > 0.0, square, torch.where(mean > 0.0, mean, 1.0))


# ------------------------------------------------------------------------------------------------- least squares


def relative_damping(mean: Tensor | float, share: float, *, otherwise: float | None = None) -> Tensor:
    """A share of the mean of what stands on the diagonal of second moments, in float64.

    Where there is nothing it is `otherwise`, by default the share of one.
    """
    mean = torch.as_tensor(mean, dtype=torch.float64)
    return torch.where(mean > 0.0, share * mean, share if otherwise is None else otherwise)


def ridge(square: Tensor, spread: Tensor, rows: int, *, precision: float) -> Tensor:
    """The damping (.., 1) of a least-squares fit on so many rows of numbers with that relative precision.

    It is in proportion to the sums of squares `square` (.., n) of what is read, unless those are large for the sake of
    the means alone: `spread` are the sums of squares about what an intercept takes in. It is no less than what rounding
    to the next number adds to them.
    """
    whole, about = square.mean(-1, keepdim=True), spread.mean(-1, keepdim=True)
    share = damping_share(rows, square.shape[-1])
    return torch.maximum(torch.minimum(whole, _FAR * about) * share, precision**2 / 12.0 * whole)


def damping_share(rows: int, unknowns: int) -> float:
    """The damping of a least-squares fit in mean squares of what is read: more where rows are few for the unknowns."""
    return _FEW if rows <= _MANY * unknowns else _DAMPING


@dataclass(frozen=True)
class RowParts:
    """How rows lie: those of every batch one after the other, so many of each, in each of some processes.

    Sums over rows are taken batch by batch, and then over all: it makes no difference which process has which batch.
    """

    sizes: Sequence[int]
    processes: Processes = ALONE

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Of rows (G, R, F) those of every batch."""
        return torch.split(rows, list(self.sizes), 1)

    def sum(self, value: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """What `value` gives for the rows of a batch, in float64, added up over all batches."""
        total: Tensor | None = None
        for each in zip(*map(self.parts, rows), strict=True):
            found = value(*each)
            total = found if total is None else total.add_(found)
        assert total is not None
        return self.processes.summed(total)[0]

    def count(self) -> int:
        """All of them."""
        return int(self.processes.summed(torch.tensor(float(sum(self.sizes)), dtype=torch.float64))[0])


class Fit:
    """Damped least squares of `Y = X W + 1 b^T` for rows `X` (G, R, F), which are centred in place for the intercept.

    `rows` says how they lie; else they are of one batch. `weights` (G, F, O) and `offset` (G, 1, O), what is given
    where `X` is zero, begin with zero.
    """

    def __init__(self, x: Tensor, outputs: int, *, intercept: bool, what: str, rows: RowParts | None = None) -> None:
        self.x, self.intercept = x, intercept
        self.rows = rows or RowParts([x.shape[1]])
        self.count = self.rows.count()
        mean = centred(x, self.rows) if intercept else x.new_zeros(len(x), 1, x.shape[2], dtype=torch.float64)
        moments = self.rows.sum(squared, x)
        spread = moments.diagonal(dim1=1, dim2=2)
        square = spread + self.count * mean[:, 0].square()
        damping = ridge(square, spread, self.count, precision=torch.finfo(x.dtype).eps)
        self.factor = factorised(moments, damping, what=what)
        self.mean = mean
        self.weights = moments.new_zeros(len(x), x.shape[2], outputs)
        self.level = moments.new_zeros(len(x), 1, outputs)

    def given(self) -> Tensor:
        """`X W + 1 b^T`, (G, R, O)."""
        return self.x @ self.weights.to(self.x.dtype) + self.level.to(self.x.dtype)

    def improve(self, error: Tensor) -> None:
        """Take in what is missing of `Y` still, (G, R, O): one step of Newton's method, which is the whole way."""
        pull = self.rows.sum(products, self.x, error) - self.factor.damping[:, :, None] * self.weights
        self.weights = self.weights + self.factor.solve(pull)
        if self.intercept:
            self.level = self.level + self.rows.sum(_total, error) / max(self.count, 1)

    @property
    def offset(self) -> Tensor:
        """`b`."""
        return self.level - self.mean @ self.weights


def centred(x: Tensor, rows: RowParts | None = None) -> Tensor:
    """The mean (G, 1, F) in float64 of rows (G, R, F), which is taken off them in place.

    It is taken twice, in the precision of the rows: the second time of what the first one left.
    """
    rows = rows or RowParts([x.shape[1]])
    count = max(rows.count(), 1)
    first = (rows.sum(_total, x) / count).to(x.dtype)
    x.sub_(first)
    if x.dtype == torch.float64:
        return first
    second = (rows.sum(_total, x) / count).to(x.dtype)
    x.sub_(second)
    return first.double() + second.double()


def _total(x: Tensor) -> Tensor:
    """The sum (G, 1, F) of rows (G, R, F), in float64."""
    found = x.new_zeros(len(x), 1, x.shape[2], dtype=torch.float64)
    for part in torch.split(x, _AT_ONCE, 1):
        found += part.sum(1, keepdim=True, dtype=torch.float64)
    return found


def _mean(x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    return mean if all_finite(mean) else x.mean(1, keepdim=True, dtype=torch.float64).to(x.dtype)


class SecondMoments:
    """Moments of rows (G, R, F) that come in parts. They are taken about the mean of the first part: of several
    processes, of that of `source`; each of them has one, which may be empty.
    """

    def __init__(self, processes: Processes = ALONE, source: int = 0) -> None:
        self.start: Tensor | None = None
        self.total = self.product = torch.zeros((), dtype=torch.float64)
        self.count, self.processes, self.source = 0, processes, source

    def add(self, rows: Tensor) -> None:
        """Count rows, which are changed."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.start is None:
            mean = _mean(rows) if rows.shape[1] else rows.new_zeros(())
            self.start = self.processes.agreed(mean, self.source)
        rows.sub_(self.start)
        self.total = self.total + rows.sum(1, keepdim=True).double()
        self.product = self.product + squared(rows)
        self.count += rows.shape[1]

    def covariance(self) -> Tensor:
        """(G, F, F) in float64, of what all processes counted."""
        own = torch.tensor(float(self.count), dtype=torch.float64)
        count, total, product = self.processes.summed(own, self.total, self.product)
        mean = total / count.clamp(min=1.0)
        return product / count.clamp(min=1.0) - mean.mT * mean


def squared(rows: Tensor) -> Tensor:
    """The products of the columns with each other, (G, F, F) in float64, for rows (G, R, F): each one is taken once."""
    size = rows.shape[2]
    found = rows.new_empty(len(rows), size, size, dtype=torch.float64)
    step = max(-(-size // _PARTS), _NARROW)
    for start in range(0, size, step):
        end = min(start + step, size)
        found[:, start:end, :end] = products(rows[:, :, start:end], rows[:, :, :end])
        found[:, :start, start:end] = found[:, start:end, :start].transpose(1, 2)
    return found


def products(one: Tensor, other: Tensor) -> Tensor:
    """`X^T Y` in float64 for rows (G, R, F) and (G, R, O), added up in float64 over parts of the rows.

    Where the precision of the rows is too small for their squares, they are multiplied in float64 as well.
    """
    found = _added_up(one, other, one.dtype if one.dtype == torch.float64 else torch.float32)
    if one.dtype != torch.float64 and (not all_finite(found) or _vanished(found, one, other)):
        found = _added_up(one, other, torch.float64)
    return found


def _added_up(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    found = one.new_zeros(len(one), one.shape[2], other.shape[2], dtype=torch.float64)
    for left, right in zip(torch.split(one, _AT_ONCE, 1), torch.split(other, _AT_ONCE, 1), strict=True):
        found += left.to(dtype).transpose(1, 2) @ right.to(dtype)
    return found


def _vanished(found: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether products are so small that float32 has lost them."""
    least = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
    return bool(found.numel()) and float(found.abs().max()) < least and bool(one.any()) and bool(other.any())


# ------------------------------------------------------------------------------------------------- other factorisations


def _tried(first: Callable[[Tensor], Any], second: Callable[[NDArray[Any]], Any], matrix: Tensor, what: str) -> Any:
    """Several results of `first`; where it does not converge `second`, a slower algorithm, matrix by matrix."""
    matrix = checked(matrix, what)
    try:
        return first(matrix)
    except LinAlgError:
        logger.info("%s: a factorisation did not converge and is done by a slower algorithm", what)
    flat = matrix.detach().cpu().numpy().reshape(-1, *matrix.shape[-2:])
    try:
        parts = zip(*(second(each) for each in flat), strict=True)
    except (np.linalg.LinAlgError, ValueError) as error:
        raise WeightsError(f"{what}: its matrix cannot be factorised ({error}); check the model's weights") from error
    lead = matrix.shape[:-2]
    return tuple(
        torch.from_numpy(np.stack(part)).reshape(*lead, *part[0].shape).to(matrix.device) for part in map(list, parts)
    )


def singular(matrix: Tensor, *, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition `U diag(s) V^T` in float64."""
    left, values, right = _tried(
        lambda each: torch.linalg.svd(each, full_matrices=False),
        lambda each: scipy.linalg.svd(each, full_matrices=False, lapack_driver="gesvd"),
        matrix,
        what,
    )
    return left, values, right


def symmetric_eigen(matrix: Tensor, *, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors as columns, in float64, of a symmetric matrix."""
    values, vectors = _tried(torch.linalg.eigh, lambda each: scipy.linalg.eigh(each, driver="ev"), matrix, what)
    return values, vectors


def pseudo_inverse(matrix: Tensor, *, rtol: float | None = None, hermitian: bool = False, what: str) -> Tensor:
    """The pseudoinverse in float64, without the singular values below `rtol` of the largest."""
    if not matrix.numel():
        return matrix.mT.double()
    if rtol is None:
        rtol = max(matrix.shape[-2:]) * torch.finfo(torch.float64).eps
    if hermitian:
        values, right = symmetric_eigen(matrix, what=what)
        left, right = right, right.mT
    else:
        left, values, right = singular(matrix, what=what)
    kept = values.abs() > rtol * values.abs().amax(-1, keepdim=True)
    inverse = torch.where(kept, 1.0 / torch.where(kept, values, 1.0), 0.0)
    return (right.mT * inverse[..., None, :]) @ left.mT


def singular_values(matrix: Tensor, *, what: str) -> Tensor:
    """In descending order, in float64."""
    (values,) = _tried(
        lambda each: (torch.linalg.svdvals(each),),
        lambda each: (scipy.linalg.svd(each, compute_uv=False, lapack_driver="gesvd"),),
        matrix,
        what,
    )
    found: Tensor = values
    return found


def orthonormal(matrix: Tensor, *, what: str) -> Tensor:
    """Orthonormal columns that span those of a matrix, which has no more columns than rows."""
    found: Tensor = torch.linalg.qr(checked(matrix, what))[0]
    return found


def leading_left(rows: Tensor, size: int, *, seed: int, what: str) -> Tensor:
    """The first left singular vectors (n, size), nearly: by a random projection."""
    from sklearn.utils.extmath import randomized_svd

    rows = checked(rows, what).cpu()
    try:
        vectors = torch.from_numpy(randomized_svd(rows.numpy(), size, random_state=seed)[0])
    except np.linalg.LinAlgError:
        vectors = singular(rows, what=what)[0][:, :size]
    return vectors


def pivoted_cholesky(gram: NDArray[Any]) -> NDArray[Any]:
    """Rows (n, rank) with the inner products `gram` (n, n), in its precision."""
    (factorise,) = scipy.linalg.get_lapack_funcs(("pstrf",), (gram,))
    factor, order, rank, _ = factorise(gram, lower=1)
    found: NDArray[Any] = np.empty((len(gram), rank), dtype=gram.dtype)
    found[order - 1] = np.tril(factor)[:, :rank]
    return found
