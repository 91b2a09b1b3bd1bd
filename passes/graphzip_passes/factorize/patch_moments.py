"""Second moments of what convolutions read, from calibration data.

For input channel `i` of a layer, `M[i] = E[p p^T]` over all patches `p` (the L positions under the kernel) that the
kernel is laid on. Layers with kernels of three dimensions are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from graphzip.calibration import Calibration
from graphzip.numeric.im2col import Window
from graphzip.numeric.solvers import check_finite

__all__ = ["input_moments"]

_CHUNK = 16  # samples whose patches are laid out at once


@torch.no_grad()
def input_moments(layers: Mapping[str, nn.Module], data: Calibration) -> dict[str, torch.Tensor]:
    """`(in channels / groups, L, L)` for each layer that the data comes through, in float64.

    Raises `WeightsError` where what one of them reads is not finite.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def remember(conv: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            for chunk in torch.split(inputs[0], _CHUNK):
                read = Window.of_module(conv).patches(chunk)
                check_finite(name, read)
                sums[name] = sums.get(name, 0.0) + torch.einsum("bclp,bckp->clk", read, read).double().cpu()
                counts[name] = counts.get(name, 0.0) + torch.tensor(read.shape[0] * read.shape[3], dtype=torch.float64)

        return remember

    hooks = [
        layer.register_forward_pre_hook(watch(name))
        for name, layer in layers.items()
        if isinstance(layer, nn.Conv1d | nn.Conv2d)
    ]
    try:
        data.run()
    finally:
        for hook in hooks:
            hook.remove()
    sums, counts = map(data.processes.summed_by_name, (sums, counts))
    groups: dict[str, Any] = {name: layer.groups for name, layer in layers.items()}
    return {name: torch.unflatten(total / counts[name], 0, (groups[name], -1)).mean(0) for name, total in sums.items()}
