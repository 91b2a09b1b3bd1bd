"""Channels that go from cluster to cluster, one after the other, on second moments.

What a layer lacks changes with every channel that goes, and so does what the next one would lose. With `G = X^T X`,
`L = X^T R` and weights `g` that stay as they are, a channel j that goes from c to c' changes, for channel i,

    L_i -= G_ij s_j,    L_i g^T -= G_ij (g_c' - g_c) g^T,    s_j = g_c' - g_c.

So a few channels at a time are looked at: their rows of `L` and `L g^T` are computed together, those behind a channel
that went are corrected by means of `g g^T`, and `L` itself once for all that went. That gives what changing `L` after
every channel gives, at the price of some matrix products.

Source: `graphzip_passes.cross_domain.shared_fit`, whose equations these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from graphzip.labels import IntArray
from graphzip.numeric.solvers import pseudo_inverse
from graphzip_passes.cross_domain.shared_moments import Side

__all__ = ["Regrouping"]

_TOGETHER: Final = 64  # channels whose rows are computed together
_LEAST: Final = 1e-3  # of a channel's mass: what is left of its cluster without it, at least
_GAIN: Final = 1e-9  # of a channel's share of the output: what a move has to bring, so that rounding moves nothing


class Regrouping:
    """One round over the channels of a layer, whose `weights` (clusters, kernel, outs) stay as they are.

    `number` (channels,), the cluster of every channel, is changed in place. `mass` (channels,) is the sum of squares of
    what each channel gives. `made` counts the moves, `gained` is by how much `sum ||R||^2` fell.
    """

    def __init__(self, weights: Tensor, number: IntArray, mass: Tensor, name: str) -> None:
        self.weights, self.number, self.name = weights, number, name
        self.made, self.gained, self._mass = 0, 0.0, mass
        clusters, kernel, _ = weights.shape
        rows = weights.flatten(0, 1)
        self._products = (rows @ rows.t()).reshape(clusters, kernel, clusters, kernel)
        self._squares = torch.stack([self._products[c, :, c, :] for c in range(clusters)])
        self._sizes = np.bincount(number, minlength=clusters)
        self._held = mass.new_zeros(clusters).index_add(0, torch.from_numpy(number), mass)

    def go_through(self, side: Side, channels: range) -> None:
        """Let the channels of one task go; what it lacks is changed in place.

        Only those are looked at again in their turn that would go as things are at the beginning.
        """
        wanting: list[int] = []
        for part in _parts(channels):
            seen = _Near(self, side, part, channels.start)
            wanting += [channel for place, channel in enumerate(part) if self._best(seen, place) != seen.here[place]]
        for part in _parts(wanting):
            self._go(side, _Near(self, side, part, channels.start))

    def _go(self, side: Side, seen: _Near) -> None:
        gone: list[int] = []
        steps: list[Tensor] = []
        for place, channel in enumerate(seen.channels):
            here = seen.here[place]
            to = self._best(seen, place) if self._sizes[here] > 1 else here
            if to == here:
                continue
            step, block = self.weights[to] - self.weights[here], seen.blocks[place]
            before = seen.pull[place] - block @ self.weights[here]
            self.gained += float(((2.0 * before - block @ step) * step).sum())
            seen.correct(place, step, self._products[to] - self._products[here])
            gone.append(place)
            steps.append(step)
            self.number[channel] = to
            self._sizes[here], self._sizes[to] = self._sizes[here] - 1, self._sizes[to] + 1
            mass = self._mass[channel]
            self._held[here], self._held[to] = self._held[here] - mass, self._held[to] + mass
        if gone:
            side.took(torch.cat(steps), seen.columns[gone].flatten())
            self.made += len(gone)

    def _best(self, seen: _Near, place: int) -> int:
        """The cluster that suits a channel best; its own where no other gains."""
        here, mass, block = seen.here[place], self._mass[seen.channels[place]], seen.blocks[place]
        pull, tiny = seen.pull[place], torch.finfo(mass.dtype).tiny
        apart = self._squares.flatten(1) @ block.flatten() - 2.0 * seen.dots[place]
        apart = (apart + (pull * (seen.inverses[place] @ pull)).sum()).clamp_min(0.0)
        factor = self._held / (self._held + mass).clamp_min(tiny)
        factor[here] = self._held[here] / torch.maximum(self._held[here] - mass, _LEAST * mass).clamp_min(tiny)
        cost = apart * factor
        least, to = cost.min(0)
        gains = cost[here] - least > _GAIN * (self._squares[here] * block).sum()
        return int(to) if gains else here


class _Near:
    """What is known of a few channels of a task that begins with the channel `start`.

    `pull` (n, kernel, outs) is `X_i^T (R + X_i g_c)`, `dots` (n, clusters) its products with the weights of all
    clusters, `blocks` (n, kernel, kernel) `X_i^T X_i`.
    """

    def __init__(self, moves: Regrouping, side: Side, channels: Sequence[int], start: int) -> None:
        weights = moves.weights
        kernel = weights.shape[1]
        self.channels, self.here = channels, moves.number[channels].tolist()
        self.columns = (torch.tensor(channels)[:, None] - start) * kernel + torch.arange(kernel)
        flat = self.columns.flatten()
        self.among = side.among(flat).reshape(len(channels), kernel, len(channels), kernel)
        self.blocks = torch.stack([self.among[place, :, place, :] for place in range(len(channels))])
        self.inverses = pseudo_inverse(self.blocks, hermitian=True, what=f"layer {moves.name!r}")
        self.pull = side.lacking(self.columns) + self.blocks @ weights[self.here]
        self.dots = self.pull.flatten(1) @ weights.flatten(1).t()

    def correct(self, place: int, step: Tensor, products: Tensor) -> None:
        """Take in that the channel at `place` took this step (kernel, outs), whose products with all weights are these
        (kernel, clusters, kernel).
        """
        behind = slice(place + 1, None)
        cross = self.among[behind, :, place, :]
        self.pull[behind] -= cross @ step
        self.dots[behind] -= torch.einsum("npq,qcp->nc", cross, products)


def _parts(channels: Sequence[int]) -> list[list[int]]:
    return [list(channels[first : first + _TOGETHER]) for first in range(0, len(channels), _TOGETHER)]
