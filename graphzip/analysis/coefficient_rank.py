"""How much of their coefficients the layers of a network have in common.

The experiment of "A Joint Subspace View to Convolutional Neural Networks" (ACDC), section 3.2. Kernels are taken apart,
`K = A D` (here by an exact SVD, with as many atoms as positions). Atom outputs `Z` and layer outputs `Y` of two layers
are aligned by canonical correlation analysis, `P Z` and `Q Y`; the aligned coefficients are `Q A P^-1` (Eq. 2). The
effective ranks of one, and of two on top of each other, tell how much they share: the second is between once and twice
the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn

from graphzip.arguments import check_module, re_iterable
from graphzip.boundary import public, user_data
from graphzip.errors import GraphZipError
from graphzip.graph.batches import run_batch
from graphzip.graph.copies import eval_copy
from graphzip.numeric.im2col import Window
from graphzip.numeric.solvers import checked, pseudo_inverse, singular, singular_values, symmetric_eigen

__all__ = ["CoefficientRank", "RankPair", "coefficient_rank", "effective_rank"]

_PLACES = 20_000  # samples per layer that the alignment is computed on


@dataclass(frozen=True)
class RankPair:
    """Two layers, the effective rank of each one's aligned coefficients, and of both on top of each other."""

    layers: tuple[str, str]
    alone: tuple[float, float]
    joint: float


@dataclass(frozen=True)
class CoefficientRank:
    """The ranks of all pairs of layers of equal shape (`pairs`), and their means."""

    pairs: tuple[RankPair, ...]

    @property
    def alone(self) -> float:
        """Mean effective rank of one layer's coefficients: a number of at least 1."""
        return sum(sum(pair.alone) for pair in self.pairs) / (2 * len(self.pairs))

    @property
    def joint(self) -> float:
        """Mean effective rank of two layers' coefficients together: a number of at least 1."""
        return sum(pair.joint for pair in self.pairs) / len(self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "alone": self.alone, "joint": self.joint}

    def __str__(self) -> str:
        lines = [
            f"{' and '.join(pair.layers)}: {pair.alone[0]:.2f} and {pair.alone[1]:.2f} alone, {pair.joint:.2f} together"
            for pair in self.pairs
        ]
        return "\n".join([*lines, f"mean: {self.alone:.2f} alone, {self.joint:.2f} together"])


def effective_rank(matrix: torch.Tensor) -> float:
    """The exponential of the entropy of the normalised singular values."""
    values = singular_values(matrix, what="the coefficients of a layer")
    share = values[values > 0] / values.sum()
    return float(torch.exp(-(share * share.log()).sum()))


@dataclass
class _Factors:
    coefficients: torch.Tensor
    atoms: torch.Tensor
    feature: tuple[int, ...] = ()
    inner: list[torch.Tensor] | None = None


@public
@torch.no_grad()
def coefficient_rank(model: nn.Module, calibration: Iterable[Any]) -> CoefficientRank:
    """Compare the coefficients of every two convolutions with equal kernels and feature sizes.

    `calibration` yields batches for `model`: a tensor, or a tuple whose first entry is the model's input. The model
    runs in eval mode and is left as it was. Convolutions of one and two dimensions with kernels above 1x1 and without
    groups count.

    Raises `GraphZipError` where no two layers can be compared, `ExampleInputError` for data that the model refuses.
    """
    check_module(model)
    data = re_iterable(calibration, "calibration")
    watched = eval_copy(model)
    layers = {name: layer for name, layer in watched.named_modules() if _counts(layer)}
    seen = {name: _factors(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(_watch(seen[name]))
    for batch in user_data(data):
        run_batch(watched, tuple(batch[:1]) if isinstance(batch, tuple | list) else (batch,))
    pairs = [
        _compare((one, two), seen[one], seen[two])
        for one, two in combinations(seen, 2)
        if seen[one].inner
        and seen[two].inner
        and seen[one].feature == seen[two].feature
        and seen[one].coefficients.shape == seen[two].coefficients.shape
    ]
    if not pairs:
        raise GraphZipError(
            f"{type(model).__name__} has no two convolutions with equal kernels and feature sizes that run on the "
            "calibration data; nothing can be compared"
        )
    return CoefficientRank(tuple(pairs))


def _counts(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1 and layer.weight[0, 0].numel() > 1


def _factors(layer: Any) -> _Factors:
    """`A` as `(c, c' m)` and the atoms as `(m, L)`, exactly."""
    kernel = checked(layer.weight.detach(), "the kernel of a layer").cpu()
    left, values, atoms = singular(kernel.flatten(2).flatten(0, 1), what="the kernel of a layer")
    return _Factors((left * values).reshape(len(kernel), -1), atoms, inner=[])


def _watch(seen: _Factors) -> Any:
    """Collect atom outputs, `(c' m, places)`."""

    def remember(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert seen.inner is not None
        if sum(part.shape[1] for part in seen.inner) < _PLACES:
            read = Window.of_module(layer).patches(inputs[0]).double().cpu()
            seen.feature = (read.shape[3],)
            made = torch.einsum("ml,bclp->cmbp", seen.atoms, read).flatten(2).flatten(0, 1)
            seen.inner.append(made[:, :_PLACES])

    return remember


def _compare(names: tuple[str, str], one: _Factors, two: _Factors) -> RankPair:
    inner = [torch.cat(layer.inner or [], dim=1) for layer in (one, two)]
    inner = [values - values.mean(dim=1, keepdim=True) for values in inner]
    outer = [layer.coefficients @ values for layer, values in zip((one, two), inner, strict=True)]
    aligned = [
        q @ layer.coefficients @ pseudo_inverse(p, what="the alignment of two layers")
        for layer, p, q in zip((one, two), _align(*inner), _align(*outer), strict=True)
    ]
    return RankPair(
        names, (effective_rank(aligned[0]), effective_rank(aligned[1])), effective_rank(torch.cat(aligned, dim=0))
    )


def _align(one: torch.Tensor, two: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical correlation analysis: transformations after which matching rows correlate most."""
    first, second = (_whitening(values) for values in (one, two))
    correlation = first @ (one @ two.t() / one.shape[1]) @ second.t()
    left, _, right = singular(correlation, what="the alignment of two layers")
    return left.t() @ first, right @ second


def _whitening(values: torch.Tensor) -> torch.Tensor:
    spread, vectors = symmetric_eigen(values @ values.t() / values.shape[1], what="the outputs of a layer")
    kept = spread > 1e-10 * spread.max()
    root: torch.Tensor = (vectors * torch.where(kept, spread.clamp_min(1e-300).rsqrt(), 0.0)) @ vectors.t()
    return root
