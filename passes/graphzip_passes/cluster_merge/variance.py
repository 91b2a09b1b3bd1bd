"""Correct the variances of merged channels without data.

The mean of a cluster's kernels `F_k` gives values that vary less than those of its members do. With inputs that are
uncorrelated and vary alike, the variances stand as

    s^2 = (1 / n sum_k ||F_k||^2) / ||1 / n sum_k F_k||^2  >=  1,

so a batch norm behind the layer divides its running variance by `s^2` and gives what it gave before. Where the kernels
are identical, `s^2` is 1.

Source: Wang et al., "Forget the Data and Fine-Tuning! Just Fold the Network to Compress" (ICLR 2025), Fold-AR:
`s^2 = n / (1 + (n - 1) E[c])` for kernels of equal norms whose correlations have the mean `E[c]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from graphzip.analysis.layers import norm_behind, own_layers
from graphzip.graph.operators import arguments_of
from graphzip.graph.state import get_tensor
from graphzip.graph.traced import Traced
from graphzip_passes.parts.tied_slices import Slices

__all__ = ["correct_variances_"]


@torch.no_grad()
def correct_variances_(traced: Traced, merged: Sequence[Slices], collapse: Callable[[], None]) -> list[str]:
    """Run `collapse`, which sets the kernels of `merged` to the means of their clusters, and correct batch norms.

    The names of the layers behind which one was corrected.
    """
    kernels = {slices.name: slices for slices in merged if slices.kernel and slices.dim == 0}
    found = {}
    for layer in own_layers(traced).values():
        norm = norm_behind(layer.node)
        if layer.name in kernels and norm is not None:
            weight = get_tensor(traced.module, layer.name)
            cluster = torch.from_numpy(kernels[layer.name].cluster).to(weight.device)
            found[layer.name] = (str(arguments_of(norm)["running_var"].target), cluster, _squares(weight))
    collapse()
    for name, (variance, cluster, before) in found.items():
        counts = torch.bincount(cluster, minlength=len(cluster))
        mean = torch.zeros_like(before).index_add(0, cluster, before) / counts.clamp(min=1)
        after = _squares(get_tensor(traced.module, name))
        ratio = torch.where(after > 0, mean[cluster] / after, 1.0)
        running = get_tensor(traced.module, variance)
        running.copy_(running / ratio.to(running.dtype))
    return list(found)


def _squares(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().double().flatten(1).square().sum(1)
