"""A small network in place of an eigendecomposition: the spectral embedding of a similarity graph.

The embedding `z` (n, k) of n channels that makes `sum_ij S_ij ||z_i - z_j||^2` small under `z^T z / n = I` (Eq. 8) is
that of spectral clustering. A network `z_i = f(x_i)` finds it by gradient steps, one per batch (Eq. 9); its last layer
is `z = y L^-T sqrt(n)` with `y^T y = L L^T`, the Cholesky factorisation, and makes the columns orthogonal.

The numbers that a channel has in one batch belong to other pictures than those of the next batch. So the first layer
is `x_i -> D^-1 S R`, with `R` random and fixed: what channel i is like, which is the same in every batch.

Channels are clustered only once, and then by the eigenvectors themselves: singular vectors of the factor of the graph,
which need no matrix of channels by channels either.

Source: Gao, Deng and Huang, "Cross Domain Model Compression by Structurally Weight Sharing" (2019), section 3.3;
Shaham et al., "SpectralNet: Spectral Clustering using Deep Neural Networks" (2018), section 3 and appendix B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphzip.numeric.solvers import factorised, leading_left
from graphzip_passes.cross_domain.random_state import drawn_so_far, go_on_from, parts_of
from graphzip_passes.cross_domain.similarity import degrees, spectral_loss

__all__ = ["NODES", "Embedding", "Learned", "orthogonal", "spectral_embedding"]

NODES: Final = 1024
"""Channels of a layer, drawn at random, that the regulariser of one step looks at."""

_RATE: Final = 3e-3
_HIDDEN = 64
_JITTER = 1e-9  # relative to the mean square of a column: lets columns that are alike be factorised


def orthogonal(y: Tensor) -> Tensor:
    """Columns in place of those of `y` (n, k), n >= k, with `z^T z / n = I`: they span the same space."""
    wide = y.double()
    gram = wide.t() @ wide
    size = gram.diagonal().mean().clamp_min(torch.finfo(wide.dtype).tiny)
    jitter = _JITTER * size * torch.eye(len(gram), dtype=wide.dtype, device=wide.device)
    columns = factorised(gram + jitter, what="the embedding of a layer's channels").halved(wide.t())
    scaled: Tensor = columns.t() * len(y) ** 0.5
    return scaled.to(y.dtype)


class Embedding(nn.Module):
    """From the similarity graph of `nodes` channels to `size` orthogonal columns. The same seed gives the same one."""

    sketch: Tensor

    def __init__(self, nodes: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        width, hidden = min(nodes, max(_HIDDEN, 2 * size)), max(_HIDDEN, 2 * size)
        self.register_buffer("sketch", _random(nodes, width, generator))
        shapes = (hidden, width), (hidden, hidden), (size, hidden)
        self.weights = nn.ParameterList(_random(*shape, generator) for shape in shapes)
        self.biases = nn.ParameterList(torch.zeros(outputs) for outputs, _ in shapes)

    def forward(self, factor: Tensor, chosen: Tensor | None = None) -> Tensor:
        """The embedding of the channels `chosen` (all by default) in the graph with this factor (nodes, m)."""
        own = factor if chosen is None else factor[chosen]
        rows = own @ (factor.t() @ self.sketch) / degrees(own, factor)[:, None]
        rows = rows - rows.mean(0)
        rows = rows / (rows.square().mean() + torch.finfo(rows.dtype).eps).sqrt()
        first, second, last = zip(self.weights, self.biases, strict=True)
        return orthogonal(F.linear(F.linear(F.linear(rows, *first).tanh(), *second).tanh(), *last))


class Learned:
    """An embedding network of one layer with the optimizer that trains it, a part of the channels a step."""

    def __init__(self, nodes: int, size: int, *, normalized: bool, seed: int, like: Tensor) -> None:
        self.nodes, self.normalized = nodes, normalized
        self.network = Embedding(nodes, size, torch.Generator().manual_seed(seed)).to(like.device, like.dtype)
        self._optimizer = torch.optim.Adam(self.network.parameters(), _RATE)
        self._random = np.random.default_rng(seed)

    def state(self) -> dict[str, Tensor]:
        """What goes on after a checkpoint as if there had been none: the network, its optimizer and what is drawn."""
        found = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for number, moments in self._optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
        return found | {"random": drawn_so_far(self._random)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises `KeyError`, `RuntimeError` or `ValueError` for the state of another network."""
        self.network.load_state_dict(parts_of(state, "network"))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts_of(state, "optimizer").items():
            number, _, what = name.partition(".")
            moments.setdefault(int(number), {})[what] = tensor.clone()
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        go_on_from(self._random, state["random"])

    def term(self, factor: Tensor) -> Tensor:
        """The regulariser (Eq. 7 or 10) of the graph with this factor, for the gradient of the factor alone.

        The network takes a step of its own before. As in SpectralNet both look at a sample of the channels.
        """
        chosen = torch.from_numpy(self._random.permutation(self.nodes)[:NODES]).to(factor.device)
        fixed = factor.detach()
        self.network.requires_grad_(True)
        self._optimizer.zero_grad()
        loss = spectral_loss(fixed[chosen], self.network(fixed, chosen), normalized=self.normalized)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.network.requires_grad_(False)
        return spectral_loss(factor[chosen], self.network(factor, chosen), normalized=self.normalized)


def _random(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Normal numbers that keep the size of what is multiplied by them."""
    return torch.randn(rows, columns, generator=generator).div_(columns**0.5)


def spectral_embedding(factor: Tensor, size: int, *, seed: int) -> Tensor:
    """The embedding (n, size) that the networks approximate, for a graph with this factor (n, m); at most m columns.

    The first eigenvectors of `D^-1/2 S D^-1/2`, which are the left singular vectors of `D^-1/2 F`, with rows of length
    one (Ng, Jordan and Weiss, "On Spectral Clustering", 2002).
    """
    scale = degrees(factor, factor).rsqrt()[:, None]
    rows = scale * factor
    vectors = leading_left(rows, min(size, *rows.shape), seed=seed, what="the similarity graph of a layer's channels")
    return F.normalize(vectors, dim=1).to(factor)
