"""One channel group as a criterion sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from graphzip.analysis.groups import ChannelGroup
from graphzip.graph.state import get_tensor
from graphzip.numeric.solvers import checked
from graphzip_passes.parts.evidence import Evidence
from graphzip_passes.parts.slices import Rows, rows_by_role

__all__ = ["GroupView"]


@dataclass(frozen=True)
class GroupView:
    """One channel group of n channels (`group`), as a criterion of `PruneChannels` sees it, and the `evidence` on it;
    computed as far as it is looked at.

    Tensors are float64 on the CPU. What looks at data raises `PlanError` where there is no calibration data; what needs
    a loss raises it where none was given.
    """

    group: ChannelGroup
    evidence: Evidence

    @property
    def name(self) -> str:
        """The group's name, as in `graphzip.channel_groups`."""
        return self.group.name

    @property
    def size(self) -> int:
        """Number of channels, n."""
        return self.group.size

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The sets of channels that keep equal counts (heads, groups of a convolution); one set for most groups."""
        return self.group.blocks

    @property
    def seed(self) -> int:
        """The number that everything random begins with."""
        return self.evidence.seed

    @cached_property
    def weights(self) -> Mapping[str, Rows]:
        """By role (`"producer"`, `"pointwise"`, `"consumer"`) and parameter the slices of the channels, (n, entries).

        Raises `WeightsError` where some are not finite.
        """
        traced = self.evidence.traced
        what = f"group {self.name!r}"
        return rows_by_role(self.group, traced, lambda name: checked(get_tensor(traced.module, name), what))

    @cached_property
    def kernels(self) -> Tensor:
        """All that makes a channel, the slices of every producer side by side: (n, entries)."""
        rows = self.weights.get("producer") or self.weights.get("pointwise") or {}
        return torch.cat([*rows.values()], 1) if rows else torch.zeros(self.size, 1, dtype=torch.float64)

    def matrices(self, role: str) -> list[Tensor]:
        """The slices (n, entries) in the parameters of a role that have more than one dimension: no biases."""
        traced = self.evidence.traced
        return [
            row
            for name, row in self.weights.get(role, {}).items()
            if get_tensor(traced.module, traced.local(name)).dim() > 1
        ]

    @property
    def labelled(self) -> bool:
        """Whether a loss was given, and labels with the calibration data."""
        return self.evidence.labelled

    @property
    def loss(self) -> float:
        """The mean loss of the model over the calibration data, one number."""
        return self.evidence.loss

    @cached_property
    def gradients(self) -> Mapping[str, Rows]:
        """As `weights`: the derivatives of the mean loss over the calibration data."""
        return rows_by_role(self.group, self.evidence.traced, self.evidence.gradient)

    @cached_property
    def squared_gradients(self) -> Mapping[str, Rows]:
        """As `weights`: the mean over samples of the squared derivatives of each one's loss, the empirical Fisher.

        Without a loss the outputs are differentiated in random directions, which gives the Gauss-Newton matrix of their
        squared error.
        """
        return rows_by_role(self.group, self.evidence.traced, self.evidence.squared_gradient)

    @cached_property
    def contributions(self) -> Tensor:
        """(samples, n): the derivative of a sample's loss by a factor on a channel's kernels, `sum of w * dloss/dw`.

        Without a loss that of the outputs in a random direction.
        """
        return self.evidence.contributions(self.group)

    @cached_property
    def activations(self) -> Tensor:
        """(n, samples, ..): what the channels hold where a layer reads them first, or last where none does."""
        return self.evidence.activations(self.group)

    @cached_property
    def norm_scales(self) -> Tensor | None:
        """(n,): the scales of the normalisations that act on the channels, summed in absolute value; or `None`."""
        return torch.cat(self.scales, 1).abs().sum(1) if self.scales else None

    @property
    def scales(self) -> list[Tensor]:
        """The scales of each of these normalisations, (n, entries)."""
        known = self.evidence.norm_scales
        return [row for name, row in self.weights.get("pointwise", {}).items() if name in known]

    @cached_property
    def reading_gram(self) -> Tensor | None:
        """(n, n): mean over places of `sum over outputs of z_i z_j`, with `z_i` what channel i adds to an output.

        Of all layers that read the group; `None` where anything else reads it.
        """
        return self.evidence.reading_gram(self.group)

    @cached_property
    def reading_losses(self) -> Tensor | None:
        """(n,): mean squares over places of what the layers that read the group lose without a channel, where their
        other weights make up for it as well as they can. `None` where no layer reads the group.
        """
        return self.evidence.reading_losses(self.group)
