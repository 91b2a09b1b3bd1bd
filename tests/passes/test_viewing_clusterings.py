"""Clusterings that are given a view of the group, as criteria are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from residual_net import residual
from torch import Tensor, nn

import graphzip as gz
from graphzip_passes.parts import clustering

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test registers is known to it alone."""
    known, viewing = dict(clustering._CLUSTERINGS), set(clustering._VIEWING)
    yield
    clustering._CLUSTERINGS.clear()
    clustering._CLUSTERINGS.update(known)
    clustering._VIEWING.clear()
    clustering._VIEWING.update(viewing)


def images() -> Tensor:
    return torch.randn(8, 3, 8, 8, dtype=torch.float64)


def merged(model: nn.Module | None = None, **options: Any) -> gz.Compiled:
    plan = gz.Plan([gz.ClusterMerge(keep=0.5, clustering="mine", **options)])
    return gz.compile(model or residual(), plan, (images(),), calibration=[images()])


def activity(group: gz.GroupView) -> Tensor:
    return group.activations.flatten(1).square().mean(1)


def by_activity(group: gz.GroupView, channels: Sequence[int], k: int, seed: int) -> list[list[int]]:
    """The most active channels alone, all others in one."""
    found = activity(group)
    order = sorted(channels, key=lambda channel: -float(found[channel]))
    return [*([channel] for channel in order[: k - 1]), order[k - 1 :]]


def test_it_sees_what_channels_hold() -> None:
    gz.register_clustering("mine", view=True)(by_activity)
    seen: dict[str, Tensor] = {}

    def watched(group: gz.GroupView) -> Tensor:
        seen[group.name] = activity(group)
        return seen[group.name]

    data, model = images(), residual()
    gz.compile(model, gz.Plan([gz.PruneChannels(criterion=watched)]), (data,), calibration=[data])
    plan = gz.Plan([gz.ClusterMerge(keep={"inner": 3}, clustering="mine")])
    found = gz.compile(model, plan, (data,), calibration=[data]).report.passes[0]["cluster_merge"]["clusters"]
    order = seen["inner"].argsort(descending=True).tolist()
    assert sorted(map(sorted, found["inner"])) == sorted([[order[0]], [order[1]], sorted(order[2:])])


def test_blocks_are_divided_one_by_one() -> None:
    told: list[tuple[int, ...]] = []

    def halves(group: gz.GroupView, channels: Sequence[int], k: int, seed: int) -> list[list[int]]:
        told.append(tuple(channels))
        return [list(channels[number::k]) for number in range(k)]

    gz.register_clustering("mine", view=True)(halves)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2)).double()
    compiled = merged(model)
    assert {(0, 1, 2, 3), (4, 5, 6, 7)} <= set(told)
    assert compiled.module.get_submodule("0").out_channels == 4


def test_plans_use_it() -> None:
    gz.register_clustering("mine", view=True)(by_activity)
    passes, model = [gz.ClusterMerge(clustering="mine")], residual()
    plan = gz.plan_for(model, (images(),), macs=0.6, passes=passes, calibration=[images()], effort="fast")
    assert gz.compile(model, plan, (images(),), calibration=[images()]).report.changed


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda group, channels, k, seed: [[99]], "clustering 'mine' returned channel 99; it is to divide 0, 1"),
        (lambda group, channels, k, seed: None, "clustering 'mine' returned no list of lists of channels"),
        (lambda group, channels, k, seed: [list(channels)], "non-empty clusters of 1; it must return exactly"),
        (by_activity, "passes[0].cluster_merge.clustering: 'mine': it looks at calibration data"),
    ],
)
def test_what_is_wrong_is_said(function: Any, message: str) -> None:
    gz.register_clustering("mine", view=True)(function)
    plan = gz.Plan([gz.ClusterMerge(keep=0.5, clustering="mine")])
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        gz.compile(residual(), plan, (images(),))


def test_features_mean_nothing_to_it() -> None:
    gz.register_clustering("mine", view=True)(by_activity)
    with pytest.raises(gz.PlanError, match=re.escape("features: 'both' means nothing to clustering 'mine'")):
        merged(features="both")
