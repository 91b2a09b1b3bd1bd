"""Ranks that meet a budget, alone and together with widths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip.analysis.groups import Analysed
from graphzip.calls import call_of
from graphzip.plan.passes import LowRank
from graphzip.rewrite.join_modes import trace_in
from graphzip.study.units import Units, ranked_layers
from graphzip.study.widths import WidthRules


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Net(nn.Module):
    """A residual network, whose layer `inner` has a weight of rank 3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Conv2d(16, 24, 3, padding=1, stride=(1, 2))
        self.out = nn.Conv2d(24, 16, 3, padding=1, bias=False)
        self.head = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        found: Tensor = self.head((self.out(self.inner(x).relu()) + x[..., ::2]).mean((2, 3)))
        return found


def net() -> Net:
    model = Net().eval()
    rows = model.inner.weight.detach().flatten(1)
    with torch.no_grad():
        model.inner.weight.copy_((rows[:, :3] @ rows[:3]).reshape(model.inner.weight.shape))
    return model


X = (torch.randn(2, 3, 12, 12),)


def data() -> list[Tensor]:
    return [torch.randn(32, 3, 12, 12) for _ in range(4)]


def ranks(plan: gz.Plan) -> dict[str, int]:
    found = next(options for options in plan.passes if isinstance(options, gz.LowRank))
    return dict(found.rank)  # type: ignore[arg-type]


def moved(model: nn.Module, slim: nn.Module) -> float:
    x = torch.randn(128, 3, 12, 12)
    with torch.no_grad():
        wanted = model(x)
        return float((slim(x) - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("method", ["svd", "cp-spatial"])
@pytest.mark.parametrize("widths", [False, True])
def test_prices_are_those_of_the_thin_model(method: Any, widths: bool) -> None:
    """Multiply-accumulates, parameters and bytes at random ranks, and widths, are what compiling leads to."""
    model = Net().eval()
    traced = trace_in("eval", model, call_of(model, X), scope=None, dynamic_shapes=None, outputs=None)
    low_rank, rules = gz.LowRank(method=method), WidthRules()
    layers = ranked_layers(traced, low_rank, rules, [], "")
    merge = gz.ClusterMerge(clustering="even", compensate="none")
    units = Units(traced, Analysed.of(traced), merge if widths else None, layers, rules)
    random = np.random.default_rng(0)
    assert set(layers) <= set(units.choices)
    for _ in range(4):
        gone = np.array([random.choice(choices) for choices in units.choices.values()])
        left = units.widths(gone)
        thin = units.thinned(low_rank, left).model_copy(update={"compensate": "none"})
        plan = gz.Plan([units.narrowed(merge, left), thin] if widths else [thin])
        compiled = gz.compile(model, plan, X)
        if set(ranks(plan)) - set(compiled.report.passes[-1][LowRank.kind]["ranks"]):
            continue  # thin layers that cost more than the narrow one are not made
        after = compiled.report.after
        stored = sum(each.numel() * each.element_size() for each in compiled.module.state_dict().values())
        assert units.prices.macs.at(gone) == pytest.approx(after.macs, rel=1e-3)
        assert units.prices.params.at(gone) == pytest.approx(after.params)
        assert units.prices.bytes.at(gone) == pytest.approx(stored)


@pytest.mark.parametrize("effort", ["fast", "normal", "thorough"])
def test_a_rank_that_is_there_is_found_first(effort: str) -> None:
    model, calibration = net(), data()
    plan = gz.plan_for(model, X, macs=0.6, calibration=calibration, passes=[gz.LowRank()], effort=effort)
    assert ranks(plan)["inner"] == 3
    compiled = gz.compile(model, plan, X, calibration=calibration)
    assert compiled.report.after.macs <= 0.6 * compiled.report.before.macs
    assert moved(model, compiled.module) < 1e-6


def test_mixed_is_as_good_as_the_better_one() -> None:
    model, calibration = net(), data()
    found = {}
    for name, passes in {
        "widths": [gz.ClusterMerge()],
        "ranks": [gz.LowRank()],
        "mixed": [gz.ClusterMerge(), gz.LowRank()],
    }.items():
        plan = gz.plan_for(model, X, params=0.4, calibration=calibration, passes=passes, effort="fast")
        compiled = gz.compile(model, plan, X, calibration=calibration)
        assert compiled.report.after.params <= 0.4 * compiled.report.before.params
        found[name] = moved(model, compiled.module)
    assert found["mixed"] <= 1.3 * min(found["widths"], found["ranks"])


def test_pruning_and_ranks_with_two_budgets() -> None:
    model, calibration = net(), data()
    passes = [gz.PruneChannels(), gz.LowRank(method="cp-spatial", exclude=["head"])]
    plan = gz.plan_for(model, X, macs=0.5, params=0.45, calibration=calibration, passes=passes, effort="fast")
    assert "head" not in ranks(plan)
    report = gz.compile(model, plan, X, calibration=calibration).report
    assert report.after.macs <= 0.5 * report.before.macs
    assert report.after.params <= 0.45 * report.before.params


def test_a_score_judges_ranks() -> None:
    """A score that wants one layer dense: the others get thin."""
    model = net()

    def inner_is_whole(module: Any) -> float:
        return float(module.get_submodule("inner") is not None and hasattr(module.get_submodule("inner"), "weight"))

    plan = gz.plan_for(model, X, macs=0.9, passes=[gz.LowRank()], evaluate=inner_is_whole)
    assert ranks(plan)
    assert "inner" not in ranks(plan)
    mixed = [gz.ClusterMerge(), gz.LowRank()]
    assert "inner" not in ranks(gz.plan_for(model, X, macs=0.9, passes=mixed, evaluate=inner_is_whole))


def test_layers_of_a_kind_get_the_same_rank() -> None:
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
    plan = gz.plan_for(model, (torch.randn(2, 24),), macs=0.6, passes=[gz.LowRank()], uniform=True)
    assert len(ranks(plan)) == 4
    assert len(set(ranks(plan).values())) == 1


def test_a_latency_takes_no_layer_that_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured here is pretended: only `inner` is faster in two layers."""

    def pretended(_: Any, layers: Any, __: Any) -> dict[str, list[int]]:
        return {name: [45, 46, 47] if name == "inner (rank)" else [] for name in layers}

    monkeypatch.setattr("graphzip.study.latency.fast_ranks", pretended)
    monkeypatch.setattr("graphzip.study.latency.latency_at", lambda _, __, thin, ___: 2.0 - len(thin.rank or {}))
    model, calibration = net(), data()
    study = gz.WidthStudy(model, X, calibration=calibration, passes=[gz.LowRank()], round_to=1, effort="fast")
    study.measure()
    plan = study.plan(latency=0.6)
    assert set(ranks(plan)) == {"inner"}
    assert ranks(plan)["inner"] in {1, 2, 3}
    (options,) = plan.passes
    assert isinstance(options, gz.LowRank)
    assert options.timed


def test_ranks_that_are_measured_to_be_faster() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 4))
    x = (torch.randn(64, 512),)
    study = gz.WidthStudy(model, x, passes=[gz.LowRank()], effort="fast")
    assert 2 * 512 - 8 in study.stopwatch.fast_ranks["0 (rank)"]


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([gz.LowRank(rank=4)], "passes[0].low_rank_factors.rank: ranks are found here; leave it out"),
        ([gz.LowRank(energy=0.9)], "passes[0].low_rank_factors.energy: ranks are found here; leave it out"),
        (
            [gz.LowRank(method="tucker")],
            "passes[0].low_rank_factors.method: 'tucker' has two ranks, and a budget finds one; use 'svd', 'data-svd'",
        ),
        (
            [gz.LowRank(), gz.ClusterMerge()],
            "passes[0].low_rank_factors: ranks are found of layers that have their widths; put it behind "
            "passes[1].cluster_merge",
        ),
        ([gz.LowRank(method="data-svd")], "passes[0].low_rank_factors.method: 'data-svd' needs calibration data"),
        ([gz.LowRank(include=["nothing"])], "passes[0].low_rank_factors.include: 'nothing' matches no layer"),
        (
            [gz.LowRank(include=["stem.0"], method="cp-spatial"), gz.FoldBatchNorm()],
            "macs: 0.1 is out of reach; with every layer at its lowest rank the model keeps",
        ),
    ],
)
def test_what_cannot_be_planned_is_said(passes: Any, message: str) -> None:
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        gz.plan_for(net(), X, macs=0.1, passes=passes)


def test_no_layer_may_be_cut() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4))
    with pytest.raises(gz.PlanError, match="no layer costs less at any rank that it may have; add ClusterMerge"):
        gz.plan_for(model, (torch.randn(2, 4, 8),), macs=0.5, passes=[gz.LowRank()])


def test_a_fixed_rank_behind_widths_stays() -> None:
    plan = gz.plan_for(net(), X, macs=0.6, passes=[gz.ClusterMerge(), gz.LowRank(energy=0.5)], effort="fast")
    assert plan.passes[1] == gz.LowRank(energy=0.5)
