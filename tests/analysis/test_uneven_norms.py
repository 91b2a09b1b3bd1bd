"""Group norms over channels of several layers whose groups do not end where the layers' channels do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planting import assert_lossless, relative
from torch import Tensor, nn

import graphzip as gz


class Joined(nn.Module):
    """Channels of two convolutions side by side, normalised in groups of twelve, as U-Nets do."""

    def __init__(self, *, affine: bool = True, left: int = 16, right: int = 32, groups: int = 4) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, left, 3), nn.Conv2d(3, right, 3)
        self.norm = nn.GroupNorm(groups, left + right, affine=affine)
        self.use = nn.Conv2d(left + right, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), torch.relu(self.right(x))], 1)
        return self.head(torch.relu(self.use(torch.relu(self.norm(x)))).mean((2, 3)))


INPUTS = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_both_layers_shrink_alone_and_without_loss(affine: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = Joined(affine=affine)
    found = assert_lossless(model, INPUTS, seed)
    assert found.clusters.keys() == {"left", "right", "use"}
    for name in ("left", "right"):
        assert assert_lossless(model, INPUTS, seed, choose=lambda group, name=name: group.name == name).merged


def test_no_cluster_reaches_over_two_groups_of_the_norm() -> None:
    groups = gz.channel_groups(Joined(), INPUTS)
    assert [len(block) for block in groups["left"].blocks] == [4] * 4
    assert [len(block) for block in groups["right"].blocks] == [4] * 8
    ends = {channel // 12 for block in groups["left"].blocks[:3] for channel in block}
    assert ends == {0}


def test_groups_without_a_common_part_stay() -> None:
    groups = gz.channel_groups(Joined(left=7, right=5, groups=3), INPUTS)
    assert not groups["left"].mergeable


def test_layers_of_different_shares_are_exported_and_pruned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Joined().eval()
    plan = gz.Plan([gz.ClusterMerge(keep={"left": 0.75, "right": 0.25, "*": 1.0})])
    slim = gz.compile(model, plan, INPUTS)
    assert (slim.module.left.out_channels, slim.module.right.out_channels) == (12, 8)
    assert slim.export(tmp_path / "slim.onnx").verified
    again = gz.compile(slim.module, gz.Plan([]), INPUTS)
    with torch.no_grad():
        assert relative(slim.module(*INPUTS), again.module(*INPUTS)) <= 1e-6
    dropped = gz.PruneChannels(keep={"left": 0.75, "right": 0.25, "*": 1.0}, norms="plain")
    pruned = gz.compile(model, gz.Plan([dropped]), INPUTS)
    with torch.no_grad():
        kept = pruned.module.left(*INPUTS), torch.relu(pruned.module.right(*INPUTS))
        x, norm, at = torch.cat(kept, 1), torch.zeros(1), 0
        parts = []
        for size in (9, 3 + 2, 3, 3):
            part = x[:, at : at + size]
            at += size
            spread, norm = torch.var_mean(part, (1, 2, 3), correction=0, keepdim=True)
            parts.append((part - norm) / torch.sqrt(spread + 1e-5))
        y = torch.relu(torch.cat(parts, 1) * pruned.module.norm.weight[:, None, None])
        expected = pruned.module.head(torch.relu(pruned.module.use(y)).mean((2, 3)))
        assert relative(expected, pruned.module(*INPUTS)) <= 1e-5
