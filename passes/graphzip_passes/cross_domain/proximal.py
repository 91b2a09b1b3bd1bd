"""GrOWL as it is minimised: behind every step of an optimizer its proximal operator, and no term of the loss.

For the rows `t_i` of a layer's weights, one for each channel, and weights `w_1 >= w_2 >= ...` of the norms in falling
order, `prox(t)_i = t_i z_i / ||t_i||`, where `z` is the falling sequence, not below zero, that lies nearest to
`||t_[i]|| - s w_i`: isotonic regression. `s` is the learning rate times the strength. Rows become zero, and rows that
are alike get the same norm, neither of which a gradient does.

Sources: Gao, Deng and Huang, "Cross Domain Model Compression by Structurally Weight Sharing" (2019), Eq. 2; Oswal et
al., "Representational Similarity Learning with Application to Brain Networks" (2016), section 4; Bogdan et al.,
"SLOPE - Adaptive Variable Selection via Convex Optimization" (2015), Algorithm 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphzip.numeric.sharded import whole
from graphzip_passes.cross_domain.similarity import growl_weights

__all__ = ["attach_proximal", "growl_proximal"]


@torch.no_grad()
def growl_proximal(channels: Tensor, strength: float) -> Tensor:
    """The proximal operator of `strength` times GrOWL at rows (n, weights of a channel)."""
    from sklearn.isotonic import isotonic_regression

    norms = channels.double().norm(dim=1).cpu()
    order = norms.argsort(descending=True, stable=True)
    reached = (norms[order] - strength * growl_weights(len(norms), norms)).numpy()
    nearest = np.maximum(isotonic_regression(reached, increasing=False), 0.0)
    scale = torch.zeros_like(norms)
    scale[order] = torch.from_numpy(nearest) / norms[order].clamp_min(torch.finfo(norms.dtype).tiny)
    return channels * scale.to(channels)[:, None]


def attach_proximal(
    optimizer: torch.optim.Optimizer,
    layers: Callable[[], Sequence[Tensor]],
    write: Callable[[Sequence[Tensor]], None],
    *,
    strength: float,
    relative: bool,
) -> None:
    """Let every step of `optimizer` end with the proximal operator for the rows `(channels, weights of a channel)` that
    `layers` gives and `write` takes. With `relative` the strength is a share of the norm of the gradient of the loss.
    """
    plain = optimizer.step

    def step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        loss = plain(**options) if closure is None else plain(closure, **options)
        rows = layers()
        factor = strength * (_ratio(self, rows) if relative else 1.0)
        rate = float(self.param_groups[0]["lr"])
        write([growl_proximal(each, rate * factor) for each in rows])
        return loss

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]


def _ratio(optimizer: torch.optim.Optimizer, rows: Sequence[Tensor]) -> float:
    """Norm of the gradient of the loss by that of GrOWL, which is that of its weights where no row is zero."""
    gradients = [each.grad for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
    own = sum(float(growl_weights(len(each), each.double()).square().sum()) for each in rows) ** 0.5
    return float(whole(torch.nn.utils.get_total_norm(gradients))) / own if gradients and own else 0.0
