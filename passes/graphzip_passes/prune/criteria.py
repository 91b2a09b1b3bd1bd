"""Criteria of importance: each a function of one group, `(group: GroupView) -> scores (n,)`, and a line of the table.

`w_c` is everything that makes channel `c`, the slices of all producers; `g` is a gradient of the loss, `x_c` what the
channel holds on calibration data where a layer reads it. The highest scores stay.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from graphzip.numeric.solvers import singular_values
from graphzip.plan.criteria import CRITERIA, Criterion
from graphzip_passes.parts.group_view import GroupView

__all__ = ["BUILT_IN"]


def l1(group: GroupView) -> Tensor:
    """`sum |w|` (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.1)."""
    return group.kernels.abs().sum(1)


def l2(group: GroupView) -> Tensor:
    """`||w||_2` (He et al., "Soft Filter Pruning", IJCAI 2018, Eq. 2 for p = 2)."""
    return group.kernels.square().sum(1).sqrt()


def group_l1(group: GroupView) -> Tensor:
    """`sum |w|` over all that makes, scales or reads a channel, biases aside (Fang et al., "DepGraph: Towards Any
    Structural Pruning", CVPR 2023, section 3.3, as Torch-Pruning's group magnitude has it).
    """
    return _coupled(group, 1)


def group_l2(group: GroupView) -> Tensor:
    """`sum w^2` over the same (Fang et al., "DepGraph", CVPR 2023, Eq. 4)."""
    return _coupled(group, 2)


def _coupled(group: GroupView, power: int) -> Tensor:
    rows = [row for role in ("producer", "consumer") for row in group.matrices(role)]
    total = torch.zeros(group.size, dtype=torch.float64)
    if rows:
        total += torch.cat(rows, 1).abs().pow(power).sum(1)
    scales = [row.abs().pow(power).sum(1) for row in group.scales]
    return total + torch.stack(scales).sum(0) if scales else total


def bn_scale(group: GroupView) -> Tensor:
    """`|gamma|` of the normalisations behind (Liu et al., "Network Slimming", ICCV 2017, Eq. 1); `l2` without any."""
    return l2(group) if group.norm_scales is None else group.norm_scales


def taylor(group: GroupView) -> Tensor:
    """`|sum w g|` with the mean gradient (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR
    2019, Eq. 8, whose square orders alike); without a loss the root mean square over samples and random directions.
    """
    if not group.labelled:
        return group.contributions.square().mean(0).sqrt()
    slopes = group.gradients.get("producer", {})
    products = [group.weights["producer"][name] * slope for name, slope in slopes.items()]
    return torch.cat(products, 1).sum(1).abs() if products else torch.zeros(group.size, dtype=torch.float64)


def fisher(group: GroupView) -> Tensor:
    """Mean over samples of `(sum w g)^2 / 2` (Theis et al., "Faster gaze prediction with dense networks and Fisher
    pruning", 2018, Eq. 9; Liu et al., "Group Fisher Pruning", ICML 2021).
    """
    return group.contributions.square().mean(0) / 2


def hessian(group: GroupView) -> Tensor:
    """`sum w^2 E[g^2] / 2`, the empirical Fisher for the Hessian's diagonal (LeCun et al., "Optimal Brain Damage", NIPS
    1989, Eq. 5).
    """
    slopes = group.squared_gradients.get("producer", {})
    products = [group.weights["producer"][name].square() * slope for name, slope in slopes.items()]
    return torch.cat(products, 1).sum(1) / 2 if products else torch.zeros(group.size, dtype=torch.float64)


def obs(group: GroupView) -> Tensor:
    """`sum over outputs of w_c^T ((M^-1)_cc)^-1 w_c / 2`, with `M` the second moments of what the next layers read:
    what they lose where their other weights are re-fitted (Hassibi and Stork, "Optimal Brain Surgeon", NIPS 1992, Eq.
    5, layer by layer as in Dong et al., NIPS 2017, and for all weights of a channel as in Kurtic et al., "ZipLM",
    NeurIPS 2023, Eq. 3); `wanda` where no layer reads the group.
    """
    losses = group.reading_losses
    return wanda(group) if losses is None else losses / 2


def lamp(group: GroupView) -> Tensor:
    """`||w_c||^2` over the sum of those that are at least as large (Lee et al., "Layer-Adaptive Sparsity for the
    Magnitude-based Pruning", ICLR 2021, Eq. 2, for whole channels).
    """
    squares, order = group.kernels.square().sum(1).sort(stable=True)
    rest = squares.flip(0).cumsum(0).flip(0)
    return torch.empty_like(squares).scatter_(0, order, torch.where(rest > 0, squares / rest, 0.0))


def fpgm(group: GroupView) -> Tensor:
    """`sum over d of ||w_c - w_d||_2`: what lies next to the geometric median goes (He et al., "Filter Pruning via
    Geometric Median", CVPR 2019, Eq. 4).
    """
    return torch.cdist(group.kernels, group.kernels, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def apoz(group: GroupView) -> Tensor:
    """The share of values above zero: one less APoZ behind a ReLU (Hu et al., "Network Trimming", 2016, Eq. 1)."""
    return (group.activations > 0).double().flatten(1).mean(1)


def activation_norm(group: GroupView) -> Tensor:
    """Root mean square of `x_c` (Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
    Inference", ICLR 2017, section 2.2).
    """
    return group.activations.flatten(1).square().mean(1).sqrt()


def activation_variance(group: GroupView) -> Tensor:
    """Variance of `x_c` over samples and places (Polyak and Wolf, "Channel-level acceleration of deep face
    representations", 2015, section III).
    """
    return group.activations.flatten(1).var(1, correction=0)


def wanda(group: GroupView) -> Tensor:
    """`sum |W_oc| ||x_c||_2` over the weights that read the channel (Sun et al., "A Simple and Effective Pruning
    Approach for Large Language Models", ICLR 2024, Eq. 1, summed over a channel); `||x_c||_2` where no weight does.
    """
    norm = group.activations.flatten(1).square().sum(1).sqrt()
    readers = group.weights.get("consumer", {})
    return norm * torch.cat([*readers.values()], 1).abs().sum(1) if readers else norm


def thinet(group: GroupView) -> Tensor:
    """The order in which channels go where each time the one goes whose loss moves the next layers' outputs least, all
    that are gone together (Luo et al., "ThiNet", ICCV 2017, Algorithm 1); `wanda` where no layer reads the group.
    """
    gram = group.reading_gram
    if gram is None:
        return wanda(group)
    cost, order = gram.diagonal().clone(), torch.zeros(group.size, dtype=torch.float64)
    for turn in range(group.size):
        gone = int(cost.argmin())
        order[gone] = turn
        cost += 2 * gram[gone]
        cost[gone] = torch.inf
    return order


def hrank(group: GroupView) -> Tensor:
    """Mean rank of a sample's feature map (Lin et al., "HRank", CVPR 2020, Eq. 4), on 8 samples; where a sample has no
    map of two dimensions, the rank of samples by places.
    """
    maps = group.activations
    maps = maps[:, :8] if maps.dim() == 4 else _samples_by_places(group)[:, None]
    values = singular_values(maps, what=f"group {group.name!r}")
    limit = values[..., :1] * max(maps.shape[-2:]) * torch.finfo(torch.float32).eps
    return (values > limit).double().sum(-1).mean(1)


def chip(group: GroupView) -> Tensor:
    """What the nuclear norm of a sample's channels (n, places) loses without one of them (Sui et al., "CHIP", NeurIPS
    2021, Eq. 5), mean over 2 samples, each on 256 places at most.
    """
    rows = _samples_by_places(group)[:, :2].transpose(0, 1)
    step = -(-rows.shape[2] // 256)
    rows = rows[:, :, ::step]
    what = f"group {group.name!r}"
    whole = singular_values(rows, what=what).sum(-1)
    keep = torch.ones(group.size, dtype=torch.bool)
    found = torch.zeros(group.size, dtype=torch.float64)
    for channel in range(group.size):
        keep[channel] = False
        found[channel] = (whole - singular_values(rows[:, keep], what=what).sum(-1)).mean()
        keep[channel] = True
    return found


def _samples_by_places(group: GroupView) -> Tensor:
    """(n, samples, places)."""
    return group.activations.reshape(group.size, group.activations.shape[1], -1)


def random(group: GroupView) -> Tensor:
    """Drawn evenly, from the seed of the compilation and the group's name."""
    generator = torch.Generator().manual_seed(group.seed + zlib.crc32(group.name.encode()))
    return torch.rand(group.size, generator=generator, dtype=torch.float64)


BUILT_IN: Final[dict[str, Callable[[GroupView], Tensor]]] = {
    each.__name__: each
    for each in (
        l1,
        l2,
        group_l1,
        group_l2,
        bn_scale,
        taylor,
        fisher,
        hessian,
        obs,
        lamp,
        fpgm,
        apoz,
        activation_norm,
        activation_variance,
        wanda,
        thinet,
        hrank,
        chip,
        random,
    )
}
"""By name; those that mean the same in every group are listed in `_COMPARABLE`."""

_COMPARABLE: Final = {lamp, taylor, fisher, hessian, apoz, random}

CRITERIA.update({name: Criterion(each, each in _COMPARABLE, built_in=True) for name, each in BUILT_IN.items()})
