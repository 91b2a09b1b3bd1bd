"""Budgets of depth and width, and passes in front of the one whose widths are found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planting import randomize_
from torch import Tensor, nn

import graphzip as gz


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Block(nn.Module):
    """`x + f(x)`, where `f` gives so much."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


SIZES = (1.0, 1e-4, 1.0, 1e-4, 1.0)
X = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def blocks(sizes: tuple[float, ...] = SIZES) -> nn.Module:
    """Some of these, of which two hardly matter."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), *map(Block, sizes), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    randomize_(net, 0)
    with torch.no_grad():
        for block in net:
            if isinstance(block, Block):
                block.norm2.weight *= block.size
                block.norm2.bias *= block.size
    return net.eval()


def data() -> list[Tensor]:
    return [torch.randn(32, 3, 8, 8) for _ in range(4)]


def moved(model: nn.Module, compiled: gz.Compiled) -> float:
    """How far outputs move on other data, relative to their variance."""
    x = torch.randn(128, 3, 8, 8)
    with torch.no_grad():
        wanted, found = model(x), compiled.module(x)
    return float((wanted - found).square().mean() / wanted.var())


@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_branches_that_hardly_matter_go_before_channels_do(effort: str) -> None:
    model, batches = blocks(), data()
    options: dict[str, Any] = {"macs": 0.5, "calibration": batches, "effort": effort}
    plan = gz.plan_for(model, X, passes=[gz.DropBlocks(), gz.ClusterMerge()], **options)
    dropped, widths = plan.passes
    assert dropped == gz.DropBlocks(keep=0, blocks=("2", "4"))
    assert isinstance(widths, gz.ClusterMerge)
    mixed = gz.compile(model, plan, X, calibration=batches)
    alone = gz.compile(model, gz.plan_for(model, X, **options), X, calibration=batches)
    for each in (mixed, alone):
        assert each.report.after.macs <= 0.5 * each.report.before.macs
    assert moved(model, mixed) < 0.5 * moved(model, alone)


def test_no_branch_goes_where_all_of_them_matter() -> None:
    model, batches = blocks((1.0, 1.0, 1.0)), data()
    passes = [gz.DropBlocks(), gz.ClusterMerge()]
    plan = gz.plan_for(model, X, macs=0.9, calibration=batches, passes=passes, effort="fast")
    assert [type(each) for each in plan.passes] == [gz.ClusterMerge]


def test_branches_go_where_widths_alone_cannot_meet_the_budget() -> None:
    model, batches = blocks(), data()
    options: dict[str, Any] = {"macs": 0.5, "calibration": batches, "effort": "fast", "min_width": 6}
    with pytest.raises(gz.PlanError, match=r"macs: 0\.5 is out of reach"):
        gz.plan_for(model, X, **options)
    plan = gz.plan_for(model, X, passes=[gz.DropBlocks(), gz.ClusterMerge()], **options)
    compiled = gz.compile(model, plan, X, calibration=batches)
    assert compiled.report.after.macs <= 0.5 * compiled.report.before.macs
    with pytest.raises(gz.PlanError, match=r"macs: 0\.01 is out of reach"):
        gz.plan_for(model, X, passes=[gz.DropBlocks(), gz.ClusterMerge()], **{**options, "macs": 0.01})


def test_a_budget_is_of_the_original_where_the_number_of_branches_is_said() -> None:
    model, batches = blocks(), data()
    study = gz.WidthStudy(
        gz.trace(model, X), calibration=batches, passes=[gz.DropBlocks(keep=3), gz.ClusterMerge()], effort="fast"
    )
    study.check(macs=0.5)
    study.measure()
    compiled = gz.compile(model, study.plan(macs=0.5), X, calibration=batches)
    share = compiled.report.after.macs / compiled.report.before.macs
    assert 0.4 < share <= 0.5
    assert study.chosen is not None
    assert study.chosen[1] == pytest.approx(share)
    assert compiled.report.passes[0]["drop_blocks"]["dropped"] == ["2", "4"]


def test_branches_go_by_their_weights_where_there_is_no_data() -> None:
    model = blocks()
    plan = gz.plan_for(model, X, params=0.5, passes=[gz.DropBlocks(keep=3), gz.ClusterMerge()], effort="fast")
    assert plan.passes[0] == gz.DropBlocks(keep=0, blocks=("2", "4"))
    compiled = gz.compile(model, plan, X)
    assert compiled.report.after.params <= 0.5 * compiled.report.before.params


def test_widths_are_of_what_an_earlier_pass_leaves() -> None:
    model, batches = blocks(), data()
    with torch.no_grad():
        for block in model:
            if isinstance(block, Block):  # dead channels, which go first
                block.norm1.weight[:4] = 0.0
                block.norm1.bias[:4] = 0.0
    plan = gz.plan_for(
        model, X, macs=0.4, calibration=batches, passes=[gz.Minimize(), gz.ClusterMerge()], effort="fast"
    )
    widths = plan.passes[1]
    assert isinstance(widths, gz.ClusterMerge)
    keep: Any = widths.keep
    assert max(keep[name] for name in keep if name.endswith("conv1")) <= 4
    compiled = gz.compile(model, plan, X, calibration=batches)
    assert 0.3 < compiled.report.after.macs / compiled.report.before.macs <= 0.4


def test_latency_is_a_share_of_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(traced: Any) -> float:
        return float(sum(value.numel() for value in traced.module.state_dict().values()))

    monkeypatch.setattr("graphzip.study.latency.latency_of", computed)
    monkeypatch.setattr("graphzip.study.latency.latency_price", lambda units, whole, times: units.prices.macs)
    model, batches = blocks(), data()
    passes = [gz.DropBlocks(keep=3), gz.ClusterMerge()]
    plan = gz.plan_for(model, X, latency=0.5, calibration=batches, passes=passes, effort="fast")
    compiled = gz.compile(model, plan, X, calibration=batches)
    before, after = (sum(value.numel() for value in each.state_dict().values()) for each in (model, compiled.module))
    assert 0.3 * before < after <= 0.5 * before


def test_what_was_measured_of_depth_is_kept(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, batches, counts = blocks(), data(), []
    for _ in range(2):
        plan = gz.plan_for(
            model, X, macs=0.5, calibration=batches, cache=tmp_path / "cache", effort="fast",
            passes=(each for each in [gz.DropBlocks(), gz.ClusterMerge()]),
        )  # fmt: skip
        counts.append(len((tmp_path / "cache").read_text().splitlines()))
        assert [each.kind for each in plan.passes] == ["drop_blocks", "cluster_merge"]
    assert counts[0] == counts[1] > 0
    assert "another model" not in caplog.text


def test_all_branches_may_go() -> None:
    model, batches = blocks((1e-4, 1e-4)), data()
    passes = [gz.DropBlocks(), gz.ClusterMerge()]
    plan = gz.plan_for(model, X, macs=0.1, calibration=batches, passes=passes, effort="fast", min_width=7)
    assert plan.passes[0] == gz.DropBlocks(keep=0, blocks=("1", "2"))


@pytest.mark.parametrize("passes", [None, 5, gz.Plan([gz.ClusterMerge()])])
def test_passes_that_are_no_list(passes: Any) -> None:
    with pytest.raises(gz.PlanError, match="is not a list of passes"):
        gz.plan_for(blocks(), X, macs=0.5, passes=passes)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(passes: list[gz.PassOptions], message: str, called: Any = gz.plan_for) -> None:
    options = {"macs": 0.5} if called is gz.plan_for else {}
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        called(blocks(), X, passes=passes, calibration=data(), effort="fast", **options)


@pytest.mark.parametrize("keep", [{}, {"keep": 2}])
def test_blocks_behind_widths(keep: dict[str, Any]) -> None:
    refused(
        [gz.ClusterMerge(), gz.DropBlocks(**keep)],
        "passes[1].drop_blocks: widths and ranks are found for the blocks that stay; put it in front of "
        "passes[0].cluster_merge",
    )


def test_a_study_of_no_number_of_blocks() -> None:
    refused(
        [gz.DropBlocks(), gz.ClusterMerge()],
        "passes[0].drop_blocks.keep: only plan_for finds it, for one such pass; say how many blocks stay",
        gz.WidthStudy,
    )


def test_blocks_alone() -> None:
    refused([gz.DropBlocks()], "passes: none of them is a ClusterMerge, a PruneChannels or a LowRank")


def test_a_model_without_branches() -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(gz.PlanError, match=r"passes\[0\].drop_blocks: the model has no residual branches"):
        gz.plan_for(plain, (torch.randn(2, 4),), macs=0.5, passes=[gz.DropBlocks(), gz.ClusterMerge()], effort="fast")
