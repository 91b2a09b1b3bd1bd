"""Widths that runtimes and formats ask for: multiples, floors, and the same number in all layers of a kind."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip.study.widths import TARGETS


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 40), nn.Linear(40, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


class Stack(nn.Module):
    """Layers of one kind, and another one of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 12)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.wide, self.head = nn.Linear(12, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.wide(x).tanh())


X = (torch.randn(4, 12),)
DATA = [torch.randn(64, 12) for _ in range(3)]


def widths(plan: gz.Plan) -> dict[str, int]:
    return dict(plan.to_dict()["passes"][0]["cluster_merge"]["keep"])


def planned(model: nn.Module, x: Any = X, data: Any = None, **options: Any) -> dict[str, int]:
    return widths(gz.plan_for(model, x, calibration=DATA if data is None else data, effort="fast", **options))


@pytest.mark.parametrize(
    ("options", "multiple"), [({"round_to": 5}, 5), *(({"target": t}, n) for t, n in TARGETS.items())]
)
def test_widths_are_multiples(options: dict[str, Any], multiple: int) -> None:
    model = Stack().eval()
    found = planned(model, macs=0.6, **options)
    assert any(width < 40 for width in found.values())
    inner = {name: width for name, width in found.items() if name != "stem"}
    assert all(width % multiple == 0 for width in inner.values())


def test_no_group_is_narrower_than_the_least_width() -> None:
    model = Stack().eval()
    free = planned(model, macs=0.2)
    assert min(free.values()) < 10
    for options in ({"min_width": 10}, {"passes": [gz.ClusterMerge(min_width=10)]}):
        assert all(width >= 10 for width in planned(model, macs=0.4, **options).values())


def test_a_plan_by_hand_has_a_least_width_too() -> None:
    model = Stack().eval()
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.1, min_width=7, round_to=4)]), X)
    assert {each.after for each in compiled.report.groups} == {8}
    assert gz.ClusterMerge(keep=0.1, min_width=7).to_dict() == {"keep": 0.1, "min_width": 7}
    with pytest.raises(gz.PlanError, match=re.escape("cluster_merge.min_width: 0 is not a number of channels")):
        gz.ClusterMerge(min_width=0)


def test_layers_of_a_kind_keep_the_same_number(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack().eval()
    with torch.no_grad():
        model.layers[0].fc2.weight.mul_(0.01)
    apart = planned(model, macs=0.5)
    assert len({apart[f"layers.{n}.fc1"] for n in range(3)}) > 1
    study = gz.WidthStudy(model, X, calibration=DATA, effort="fast", uniform=True)
    study.measure()
    plan = study.plan(macs=0.5)
    found = widths(plan)
    assert len({found[f"layers.{n}.fc1"] for n in range(3)}) == 1
    compiled = gz.compile(model, plan, X, calibration=DATA)
    assert compiled.report.after.macs <= 0.5 * compiled.report.before.macs
    assert all(cost <= 1.0 for cost, _ in study.frontier(steps=4))


def test_heads_of_all_layers_keep_the_same_number() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    data = [torch.randn(16, 5, 16) for _ in range(2)]
    found = planned(model, (data[0],), data, macs=0.7, uniform=True)
    by_kind: dict[str, set[int]] = {}
    for name, width in found.items():
        by_kind.setdefault(re.sub(r"\d+", "", name), set()).add(width)
    assert all(len(each) == 1 for each in by_kind.values())
    assert len(by_kind) < len(found)


def test_what_has_no_such_width_stays_whole_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack().eval()
    with caplog.at_level(logging.WARNING, logger="graphzip"):
        found = planned(model, macs=0.6, round_to=16)
    assert "stem" not in found
    assert "leave no smaller width for stem (12 channels): they stay whole" in caplog.text
    assert all(width in (16, 32, 40) for width in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": 0}, "round_to: 0 is out of range; write an int from 1"),
        ({"min_width": 2.5}, "min_width: 2.5 is out of range; write an int from 1"),
        ({"target": "gpu"}, "target: 'gpu' is no runtime that is known"),
        ({"uniform": 1}, "uniform: 1 is neither True nor False"),
        ({"target": "arm", "round_to": 4}, "round_to: what widths are multiples of is said by target too"),
        (
            {"passes": [gz.ClusterMerge(round_to=8)], "round_to": 4},
            "round_to: what widths are multiples of is said by the plan's ClusterMerge(round_to=...) too",
        ),
        ({"round_to": 64}, "no group has a smaller width that round_to=64 and min_width=1 allow, such as"),
        ({"min_width": 40}, "no group has a smaller width that round_to=1 and min_width=40 allow, such as"),
    ],
    ids=str,
)
def test_rules_that_cannot_be_kept_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gz.GraphZipError, match=re.escape(message)):
        gz.plan_for(Stack().eval(), X, macs=0.6, **options)
