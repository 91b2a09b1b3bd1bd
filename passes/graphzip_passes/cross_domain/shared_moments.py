"""What is known of one model for the fit of a layer's shared weights: `X^T X` and `X^T R`, or `X` and `R` themselves.

`X` (rows, columns) is what the layer reads, with a column of ones at the end where there is a bias, and `R`
(rows, outs) is what it lacks still. As long as rows are fewer than columns, they take less memory than products of
columns, and the system that is solved has the size of the rows:

    argmin_U || R - Z U ||^2 + l || U ||^2 = Z^T (Z Z^T + l I)^-1 R,    Z = X S,

`S` adding up the columns of the channels of a cluster. What is not damped, the biases, is taken out by centring.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Side", "SideProducts", "SideRows"]


class Side(Protocol):
    """One model: columns are those of `X`."""

    def square(self) -> Tensor:
        """`|| X_i ||^2` of every column."""

    def among(self, columns: Tensor) -> Tensor:
        """The products `X_i^T X_j` of some columns with each other."""

    def lacking(self, columns: Tensor) -> Tensor:
        """`X_i^T R` of columns (...), (..., outs)."""

    def took(self, change: Tensor, columns: Tensor | None = None) -> float:
        """Let weights (columns, outs), of all columns or of some, change so: by how much `|| R ||^2` fell."""

    def followed(self, change: Tensor, to: Tensor) -> float:
        """The same for a change of unknowns, where `to` is the unknown of every column."""


class SideProducts:
    """`gram` is `X^T X` and `left` is `X^T R`."""

    def __init__(self, gram: Tensor, left: Tensor) -> None:
        self.gram, self.left = gram, left

    def square(self) -> Tensor:
        return self.gram.diagonal()

    def among(self, columns: Tensor) -> Tensor:
        return self.gram[columns[:, None], columns]

    def lacking(self, columns: Tensor) -> Tensor:
        return self.left[columns]

    def took(self, change: Tensor, columns: Tensor | None = None) -> float:
        moved = (self.gram if columns is None else self.gram[:, columns]) @ change
        before, after = (each if columns is None else each[columns] for each in (self.left, moved))
        fell = float(((2.0 * before - after) * change).sum())
        self.left -= moved
        return fell

    def followed(self, change: Tensor, to: Tensor) -> float:
        return self.took(change[to])

    def add_to(self, gram: Tensor, left: Tensor, to: Tensor) -> None:
        """Add `S^T X^T X S` and `S^T X^T R`; `to` is the unknown of every column."""
        summed = self.gram.new_zeros(len(gram), len(self.gram)).index_add_(0, to, self.gram)
        gram.index_add_(1, to, summed)
        left.index_add_(0, to, self.left)


class SideRows:
    """`x` is `X` and `rest` is `R`."""

    def __init__(self, x: Tensor, rest: Tensor) -> None:
        self.x, self.rest = x, rest

    def square(self) -> Tensor:
        return self.x.square().sum(0)

    def among(self, columns: Tensor) -> Tensor:
        some = self.x[:, columns]
        return some.t() @ some

    def lacking(self, columns: Tensor) -> Tensor:
        found = self.x[:, columns.flatten()].t() @ self.rest
        return found.reshape(*columns.shape, -1)

    def took(self, change: Tensor, columns: Tensor | None = None) -> float:
        return self._moved((self.x if columns is None else self.x[:, columns]) @ change)

    def followed(self, change: Tensor, to: Tensor) -> float:
        return self._moved(self.summed(to, len(change)) @ change)

    def _moved(self, moved: Tensor) -> float:
        fell = float(((2.0 * self.rest - moved) * moved).sum())
        self.rest -= moved
        return fell

    def summed(self, to: Tensor, size: int) -> Tensor:
        """`Z = X S`, `(rows, size)`."""
        return self.x.new_zeros(len(self.x), size).index_add_(1, to, self.x)

    def products(self) -> SideProducts:
        """The same as products of columns."""
        return SideProducts(self.x.t() @ self.x, self.x.t() @ self.rest)
