"""What narrowing each group does to the outputs, to first order: the cost does not grow with the number of groups.

A group at a width changes the weights of the layers that read it by `dW`: channels are taken out and the rest is
re-fitted. With a random direction `v` of the outputs, `E[v v^T] = I`, and `G = d(v . y) / dW` of one sample, the change
of the sample's outputs has the mean square `E_v[(sum over layers of dW . G)^2]`: errors of all layers of a group, and
of all places of a sample, add up with their signs. `dW . G` is the product of the layer's own change of output with the
derivative there, so that all groups and widths together cost one run forward, one backward for every direction, and
each layer once more for every width.

What it leaves out: layers that follow are re-fitted too, which makes up for more of an error the earlier and the larger
it is.

Sources: Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019), Eq. 5, per sample; Hutchinson
(1990) for the directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from graphzip.analysis.layers import Layer
from graphzip.graph.batches import samples_in
from graphzip.graph.operators import arguments_of
from graphzip.graph.traced import Traced
from graphzip.process_groups import ALONE, Processes
from graphzip_passes.cluster_merge.elimination import Change, Elimination
from graphzip_passes.parts.output_slopes import Slopes, output_slopes, parts_of

__all__ = ["first_order_losses"]

_DIRECTIONS: Final = 4


def first_order_losses(
    traced: Traced,
    found: Mapping[str, Elimination],
    batches: Sequence[tuple[Any, ...]],
    *,
    seed: int = 0,
    processes: Processes = ALONE,
) -> dict[tuple[str, int], float]:
    """By group and width the mean square of the change of the outputs, relative to their variance.

    Nothing where no output can be differentiated. All `processes` have the batches, and each sees to some of the groups
    and widths.
    """
    changes = {(name, width): each for name, one in found.items() for width, each in one.changes.items()}
    own = processes.mine(list(changes))
    layers = {change.layer.node: change.layer for each in changes.values() for change in each}
    generator = torch.Generator().manual_seed(seed)
    squares, outputs = dict.fromkeys(own, 0.0), []
    inputs = {layer.input for layer in layers.values()}
    for part in (part for batch in batches for part in parts_of(traced, layers, batch, _DIRECTIONS)):
        slopes = output_slopes(traced, layers, part, generator, directions=_DIRECTIONS, keep=inputs)
        if not slopes.along:
            return {}
        outputs.append(slopes.outputs)
        for key in own:
            squares[key] += _square(changes[key], slopes, samples_in(part))
    wanted = torch.cat(outputs).double()
    scale = max(float(wanted.var(correction=0)), torch.finfo(torch.float64).tiny) * wanted.numel()
    every = {key: value for part in processes.gathered(squares) for key, value in part.items()}
    return {key: every[key] / scale for key in changes}


def _square(changes: Sequence[Change], slopes: Slopes, samples: int) -> float:
    """The sum over samples of the squared change of the outputs."""
    total = torch.zeros(_DIRECTIONS, samples, dtype=torch.float64)
    for change in changes:
        layer = change.layer
        moved = _moved(layer, slopes.values[layer.input], change.weight)
        for number, slope in enumerate(slopes.along.get(layer.node, ())):
            product = (moved * slope).reshape(samples, -1) if moved.numel() % samples == 0 else (moved * slope)[None]
            total[number] += product.sum(tuple(range(1, product.dim()))).double().cpu()
    return float(total.square().sum()) / _DIRECTIONS


def _moved(layer: Layer, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The change of the layer's output, less its mean: a bias or a batch norm takes that in."""
    options = arguments_of(layer.node) | {"input": x, "weight": layer.plain(weight.to(x)), "bias": None}
    moved: torch.Tensor = layer.node.target(**options)  # type: ignore[operator]
    others = [dim for dim in range(moved.dim()) if dim != layer.dim % moved.dim()]
    return moved - moved.mean(others, keepdim=True)
