"""Budgets that are met by pruning channels: by any criterion, compensated, and with widths that suit it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, head, unit
from planting import randomize_
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def net() -> tuple[nn.Module, tuple[Tensor]]:
    model = Net(
        lambda m, x: m.head((m.inner(y := m.stem(x)) + y).relu()),
        stem=unit(3, 8),
        inner=nn.Sequential(unit(8, 16), nn.Conv2d(16, 8, 3, padding=1)),
        head=head(8),
    )
    randomize_(model, 0)
    return model.eval(), (torch.randn(2, 3, 8, 8),)


def data() -> list[Tensor]:
    return [torch.randn(16, 3, 8, 8) for _ in range(3)]


@pytest.mark.parametrize("criterion", ["l1", "taylor", "activation_norm"])
@pytest.mark.parametrize("effort", ["fast", "normal", "thorough"])
def test_a_plan_prunes_to_its_budget(criterion: str, effort: str) -> None:
    model, x = net()
    calibration, unseen = data(), torch.randn(64, 3, 8, 8)
    passes = [gz.PruneChannels(criterion=criterion)]
    plan = gz.plan_for(model, x, macs=0.5, calibration=calibration, passes=passes, effort=effort)
    (options,) = plan.passes
    assert isinstance(options, gz.PruneChannels)
    assert (options.criterion, options.compensate, options.ranking) == (criterion, "data", "local")
    compiled = gz.compile(model, plan, x, calibration=calibration)
    report = compiled.report
    assert 0.4 < report.after.macs / report.before.macs <= 0.5
    with torch.no_grad():
        wanted = model(unseen)
        assert float((compiled.module(unseen) - wanted).square().mean() / wanted.var()) < 1.0


def test_widths_go_where_pruning_costs_least() -> None:
    """A group of which half the channels are nothing loses those, and the others stay whole."""
    model, x = net()
    with torch.no_grad():
        for name in ("inner.0.0.weight", "inner.0.1.weight", "inner.0.1.bias"):
            model.get_parameter(name)[:8] = 0.0
    calibration = data()
    study = gz.WidthStudy(model, x, calibration=calibration, passes=[gz.PruneChannels()])
    study.measure()
    compiled = gz.compile(model, study.plan(macs=0.62), x, calibration=calibration)
    (dropped,) = [each["prune_channels"]["dropped"] for each in compiled.report.passes]
    assert [set(each) for each in dropped.values()] == [set(range(8))]
    torch.testing.assert_close(compiled.module(x[0]), model(x[0]), rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_is() -> None:
    model, x = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gz.plan_for(model, x, params=0.6, calibration=data(), passes=[gz.PruneChannels(criterion="wanda")])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_data_plans_need_none(tmp_path: Path) -> None:
    model, x = net()
    plan = gz.plan_for(model, x, macs=0.5, passes=[gz.PruneChannels(criterion="l2")])
    plan.save(tmp_path / "plan.yaml")
    gz.compile(model, gz.Plan.load(tmp_path / "plan.yaml"), x)


def test_a_criterion_that_looks_at_data_asks_for_it() -> None:
    model, x = net()
    with pytest.raises(gz.PlanError, match=re.escape("passes[0].prune_channels.criterion: 'apoz': it looks at calib")):
        gz.plan_for(model, x, macs=0.5, passes=[gz.PruneChannels(criterion="apoz")])


def test_a_score_judges_pruned_widths() -> None:
    model, x = net()

    def stem_is_whole(module: Any) -> float:
        return float(module.get_submodule("stem.0").out_channels == 8)

    plan = gz.plan_for(model, x, macs=0.6, passes=[gz.PruneChannels()], evaluate=stem_is_whole)
    assert gz.compile(model, plan, x).module.get_submodule("stem.0").out_channels == 8


def test_measurements_count_for_one_criterion(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the same name, too: what a function computes is told by its code."""
    model, x = net()

    def plan(function: Any) -> gz.Plan:
        gz.register_criterion("mine", function)
        return gz.plan_for(
            model, x, macs=0.5, calibration=data(), passes=[gz.PruneChannels(criterion="mine")], cache=tmp_path / "m"
        )

    plan(lambda group: torch.arange(group.size))
    assert "it is measured anew" not in caplog.text
    plan(lambda group: -torch.arange(group.size))
    assert "it is measured anew" in caplog.text


def test_ranking_is_the_budget_s() -> None:
    model, x = net()
    with pytest.raises(gz.PlanError, match=re.escape("passes[0].prune_channels.ranking: widths are found here")):
        gz.plan_for(model, x, macs=0.5, passes=[gz.PruneChannels(ranking="global")])
