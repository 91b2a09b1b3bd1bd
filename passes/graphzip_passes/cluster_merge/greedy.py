"""Greedy elimination of channels that some layers read: plain numbers.

`Reader` is one layer, with `M` less what is gone already (see `elimination` for the equations). `rounds` takes channels
out. In each round the channels that cost least now are candidates, and among these alone one goes after the
other, exactly: a round works on the candidates' own rows and columns of `M` and of `W^T W`, and everything else is
brought up to date once, by matrix products. A channel that was no candidate costs more than the fourth part of them.

Source: Frantar and Alistarh, "SparseGPT" (ICML 2023), section 3.2, for updates that wait until a block is done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from graphzip.labels import IntArray
from graphzip.numeric.solvers import factorised, relative_damping

__all__ = ["Reader", "rounds"]

_DAMPING: Final = 1e-2  # lambda, in mean variances of what a layer reads
_ROUNDS: Final = 64  # of a large group
_TOGETHER: Final = 4  # channels that go in a round, at least
_CANDIDATES: Final = 4  # for each that goes
_LARGE: Final = 1024  # unknowns above which most is computed in float32
_LEAST: Final = torch.finfo(torch.float64).tiny


class Reader:
    """A layer (one group of a convolution), or several that read the same, with what they read of some channels.

    `M` is not written anew for every channel, for it is large: it stays `inverse - factor factor^T`, whose blocks on
    the diagonal, one per channel, are kept up to date. What goes is pivots of a Cholesky factorisation then, column
    after column. Once half of the columns are gone, the rest is written anew.
    """

    def __init__(self, weight: Tensor, covariance: Tensor, columns: IntArray, *, what: str = "a layer") -> None:
        """`weight` (O, F), scaled by sensitivities, `covariance` (F, F), `columns` (channels, c).

        A channel that is read at fewer columns than others, or not at all, has -1 in the places that are left.
        """
        self.what, self.start = what, weight
        self.inverse = _damped_inverse(covariance, what)
        self.weight = weight.t().contiguous().to(self.inverse.dtype)  # F, O
        self.place = torch.arange(len(self.weight))  # where a row stood in the beginning
        self.left = torch.ones(len(self.weight), dtype=torch.bool)
        self.factor, self.gone = torch.empty_like(self.inverse), 0
        self.columns = torch.from_numpy(columns)
        self.held = self.columns >= 0
        both = self.held[:, :, None] & self.held[:, None, :]
        self.blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]].double() * both
        self.blocks.diagonal(dim1=1, dim2=2).masked_fill_(~self.held, 1.0)

    @property
    def width(self) -> int:
        """Columns of a channel, at most."""
        return int(self.columns.shape[1])

    def costs(self, channels: Tensor) -> Tensor:
        """What taking out each one of these channels alone costs."""
        weight = self._weights(channels)
        return _costs(self.blocks[channels], (weight @ weight.mT).double(), self.what)

    def _weights(self, channels: Tensor) -> Tensor:
        """(channels, c, O)."""
        return self.weight[self.columns[channels]] * self.held[channels][:, :, None]

    def among(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """`M` and `W^T W` among the columns of some channels, (n * c, n * c); places without a column are nothing."""
        columns, held = self.columns[channels].flatten(), self.held[channels].flatten()
        past = self.factor[columns, : self.gone]
        inner = torch.addmm(self.inverse[columns[:, None], columns], past, past.t(), alpha=-1)
        inner *= held[:, None] & held[None, :]
        inner.diagonal().masked_fill_(~held, 1.0)
        weight = self._weights(channels).flatten(0, 1)
        return inner.double(), (weight @ weight.t()).double()

    def remove(self, channels: Tensor) -> None:
        """Take channels out and re-fit the rest."""
        gone = self.columns[channels][self.held[channels]]
        if not gone.numel():
            return
        past = self.factor[:, : self.gone]
        rows = torch.addmm(self.inverse[gone], past[gone], past.t(), alpha=-1)
        root = factorised(rows[:, gone], what=self.what)
        pull = root.halved(torch.cat([rows, self.weight[gone]], 1).double()).to(rows.dtype)
        new, share = pull[:, : len(self.inverse)].t(), pull[:, len(self.inverse) :]
        self.weight.addmm_(new, share, alpha=-1)
        self.factor[:, self.gone : self.gone + len(gone)] = new
        self.gone += len(gone)
        self.held[channels], self.left[gone] = False, False
        part = new[self.columns].double() * self.held[:, :, None]
        self.blocks.baddbmm_(part, part.transpose(1, 2), alpha=-1)
        if 2 * self.gone > len(self.inverse):
            self._compact()

    def _compact(self) -> None:
        """Leave out what belongs to columns that are gone."""
        left = self.left.nonzero()[:, 0]
        past = self.factor[left, : self.gone]
        self.inverse = self.inverse[left[:, None], left].addmm_(past, past.t(), alpha=-1)
        self.factor, self.gone = torch.empty_like(self.inverse), 0
        self.columns = (self.left.cumsum(0) - 1)[self.columns].clamp(min=0)
        self.weight, self.place, self.left = self.weight[left], self.place[left], self.left[left]

    def change(self) -> Tensor:
        """What is added to the weight (O, F) by now."""
        found = -self.start
        left = self.left.nonzero()[:, 0]
        found[:, self.place[left]] += self.weight[left].t()
        return found


def _damped_inverse(covariance: Tensor, what: str) -> Tensor:
    """`(covariance + lambda I)^-1`, in float32 where it is large: damped as it is, what comes next needs no more."""
    damping = relative_damping(covariance.diagonal().mean(), _DAMPING, otherwise=1.0)
    dtype = torch.float32 if len(covariance) > _LARGE else torch.float64
    return factorised(covariance, damping, what=what).inverse(dtype)


def _costs(inner: Tensor, weights: Tensor, what: str) -> Tensor:
    """`trace(inner^-1 weights)` of matrices (.., c, c)."""
    if inner.shape[-1] == 1:
        found = weights[..., 0, 0] / inner[..., 0, 0].clamp(min=_LEAST)
    else:
        found = factorised(inner, what=what).solve(weights).diagonal(dim1=-2, dim2=-1).sum(-1)
    return found.clamp(min=0.0)


# ------------------------------------------------------------------------------------------------- rounds


def rounds(
    blocks: Sequence[Sequence[int]], readers: Sequence[Reader], same: IntArray, stops: Collection[int] = ()
) -> Iterator[list[int]]:
    """All channels of a group, those that are needed least first, a round at a time; the readers are as far as that.

    Blocks take turns. Channels with the same number in `same` are identical: they go first, all but one. A round ends
    where one of `stops` channels are left.
    """
    left = _Left(blocks, same)
    turns = max(-(-_TOGETHER // len(blocks)), max(map(len, blocks)) // _ROUNDS)
    while left.count:
        stop = max((stop for stop in stops if stop < left.count), default=0)
        most = min(left.count - stop, left.above(turns))
        channels = left.whose_turn(turns)
        costs = torch.stack([reader.costs(channels) for reader in readers]).sum(0)
        found = _round(left, readers, left.cheapest(channels, costs, _CANDIDATES * turns), most)
        for reader in readers:
            reader.remove(torch.tensor(found))
        yield found


class _Left:
    """Which channels of which blocks are left, and how often each of those that are identical."""

    def __init__(self, blocks: Sequence[Sequence[int]], same: IntArray) -> None:
        self.same = torch.from_numpy(same)
        self.block = torch.zeros(len(same), dtype=torch.int64)
        for number, block in enumerate(blocks):
            self.block[list(block)] = number
        self.sizes = torch.tensor([len(block) for block in blocks])
        self.copies = torch.bincount(self.same)
        self.is_left = torch.ones(len(same), dtype=torch.bool)

    @property
    def count(self) -> int:
        return int(self.sizes.sum())

    def above(self, turns: int) -> int:
        """How many go before every block has at most as many as the largest one has after so many turns."""
        return int((self.sizes - (self.sizes.max() - turns).clamp(min=0)).clamp(min=0).sum())

    def whose_turn(self, turns: int) -> Tensor:
        """The channels of blocks that may lose one in so many turns."""
        return (self.is_left & (self.sizes[self.block] > self.sizes.max() - turns)).nonzero()[:, 0]

    def cheapest(self, channels: Tensor, costs: Tensor, most: int) -> Tensor:
        """So many channels of every block, ascending."""
        ranked = channels[self.preferred(channels, costs).argsort(stable=True)]
        blocks = self.block[ranked]
        found = [ranked[blocks == number][:most] for number in range(len(self.sizes))]
        return torch.cat(found).sort().values

    def preferred(self, channels: Tensor, costs: Tensor) -> Tensor:
        """The costs, below all others those of channels that have a copy."""
        twins = self.copies[self.same[channels]] > 1
        return torch.where(twins, costs - 2 * costs.abs().max() - 1.0, costs)

    def remove(self, channel: int) -> None:
        """One channel less."""
        self.is_left[channel] = False
        self.sizes[self.block[channel]] -= 1
        self.copies[self.same[channel]] -= 1


def _round(left: _Left, readers: Sequence[Reader], candidates: Tensor, most: int) -> list[int]:
    """The candidates that go, one after the other."""
    windows = _windows(readers, candidates)
    found: list[int] = []
    while len(found) < most:
        open_ = left.is_left[candidates] & (left.sizes[left.block[candidates]] == left.sizes.max())
        costs = torch.stack([window.costs() for window in windows]).sum(0)
        at = int(left.preferred(candidates, costs).masked_fill(~open_, torch.inf).argmin())
        found.append(int(candidates[at]))
        left.remove(found[-1])
        for window in windows:
            window.remove(at)
    return found


class _Window:
    """`M` and `W^T W` (R, n * c, n * c) of R readers among n candidates with c columns, less those that are gone."""

    def __init__(self, inner: Tensor, weights: Tensor, width: int, what: str) -> None:
        self.inner, self.weights, self.width, self.what = inner, weights, width, what

    def _blocks(self, matrices: Tensor) -> Tensor:
        count = matrices.shape[1] // self.width
        parted = matrices.reshape(-1, count, self.width, count, self.width)
        return parted.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def costs(self) -> Tensor:
        """What taking out each candidate costs, all readers together (n,); of those that are gone, nothing."""
        return _costs(self._blocks(self.inner), self._blocks(self.weights), self.what).sum(0)

    def remove(self, at: int) -> None:
        """Take a candidate out and re-fit the others."""
        own = slice(at * self.width, (at + 1) * self.width)
        pivot, rows = self.inner[:, own, own], self.inner[:, own].clone()
        pull = factorised(pivot, what=self.what).solve(rows) if self.width > 1 else rows / pivot.clamp(min=_LEAST)
        mine = self.weights[:, own].clone()
        share = mine - 0.5 * mine[:, :, own] @ pull
        self.inner.baddbmm_(rows.mT, pull, alpha=-1)
        self.weights.baddbmm_(pull.mT, share, alpha=-1).baddbmm_(share.mT, pull, alpha=-1)
        self.weights[:, own], self.weights[:, :, own] = 0.0, 0.0
        self.inner[:, own], self.inner[:, :, own] = 0.0, 0.0
        self.inner[:, own, own] = torch.eye(self.width, dtype=self.inner.dtype)


def _windows(readers: Sequence[Reader], candidates: Tensor) -> list[_Window]:
    """One for all readers with the same number of columns of a channel."""
    by_width: dict[int, list[Reader]] = {}
    for reader in readers:
        by_width.setdefault(reader.width, []).append(reader)
    found = []
    for width, alike in by_width.items():
        inner, weights = zip(*(reader.among(candidates) for reader in alike), strict=True)
        what = ", ".join(reader.what for reader in alike)
        found.append(_Window(torch.stack(inner), torch.stack(weights), width, what))
    return found
