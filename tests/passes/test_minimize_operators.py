"""What is planted around every operator is found: duplicates, and channels that nothing reads."""

from __future__ import annotations

import copy

import pytest
import torch
from op_case_table import CASES
from planting import plant, relative
from torch import nn

import graphzip as gz
from graphzip.analysis.groups import ChannelGroup, ChannelGroups


def may_shrink(group: ChannelGroup) -> bool:
    return group.mergeable and group.exact and not group.whole_blocks


def silence(model: nn.Module, groups: ChannelGroups) -> dict[str, int]:
    """Let nothing read the last channel of every group that is read by weights of one dimension more, by group."""
    state = dict(model.named_parameters())
    found = {}
    for group in groups:
        readers = [param for param in group.params if param.role == "consumer"]
        if may_shrink(group) and readers and group.size > 2 and len(group.blocks) == 1:
            for param in readers:
                if param.param in state and param.groups == 1:
                    places = torch.from_numpy(param.indices[-1].reshape(-1))
                    with torch.no_grad():
                        state[param.param].index_fill_(param.dim, places[places >= 0], 0.0)
            found[group.name] = group.size - 1
    return found


@pytest.mark.parametrize(
    "name",
    [name if number % 24 == 0 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(CASES)],
)
def test_what_is_planted_is_found(name: str) -> None:
    model, inputs = CASES[name].build()
    groups = gz.channel_groups(model, inputs)
    plan = gz.Plan([gz.Minimize(chains=False)])
    for planted in (plant, silence):
        changed = copy.deepcopy(model)
        if planted is plant:
            clusters = plant(changed, groups, 0, choose=may_shrink)
            most = {group: len(parts) for group, parts in clusters.items()}
        else:
            most = silence(changed, groups)
        compiled = gz.compile(changed, plan, inputs)
        assert compiled.report.lossless
        assert relative(changed(*inputs), compiled.module(*inputs)) < 1e-9
        if planted is plant:
            widths = {group.name: group.after for group in compiled.report.groups}
            for group, count in most.items():
                assert widths.get(group, groups[group].size) <= count, group
