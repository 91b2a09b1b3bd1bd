"""Efforts of planning: what is measured, what is estimated, and that estimates say what they should."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphzip as gz
from graphzip.graph.batches import Batches
from graphzip.progress import duration
from graphzip.study import first_order, sensitivities
from graphzip.study.laboratory import Laboratory
from graphzip.tracing.trace import trace
from graphzip_passes.cluster_merge.elimination import Elimination, eliminations
from graphzip_passes.parts import output_slopes

pytestmark = pytest.mark.usefixtures("seeded")


def stack(depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(6, 16), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(16, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 5)).eval()


def data(count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(32, 6) for _ in range(count)]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The groups and widths that are measured from now on."""
    found: list[tuple[str, int]] = []
    loss = Laboratory.loss

    def counted(self: Laboratory, name: str, width: int) -> float:
        found.append((name, width))
        return loss(self, name, width)

    monkeypatch.setattr(Laboratory, "loss", counted)
    return found


def study(depth: int, effort: str, **options: Any) -> gz.WidthStudy:
    torch.manual_seed(1)
    calibration = data()
    made = gz.WidthStudy(stack(depth), (calibration[0],), calibration=calibration, effort=effort, **options)
    made.measure()
    return made


def one_layer(calibration: list[torch.Tensor]) -> tuple[gz.WidthStudy, dict[str, Elimination]]:
    """A study of a net with one inner layer, and what is taken out of it."""
    made = gz.WidthStudy(stack(1), (calibration[0],), calibration=calibration)
    widths = {name: made.subject.widths(name) for name in made.choices}
    return made, eliminations(made.traced, made.groups, made.batches, list(made.choices), widths)


def test_a_loss_to_first_order_is_that_of_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the outputs are linear in what changes, the estimate is the loss, but for the noise of its directions."""
    monkeypatch.setattr(first_order, "_DIRECTIONS", 2000)
    calibration = data()
    made, eliminated = one_layer(calibration)
    estimates = first_order.first_order_losses(made.traced, eliminated, made.batches)
    net = made.model
    x = torch.cat(calibration)
    hidden = net[1](net[0](x)).detach()  # type: ignore[index]
    outputs = net[2](hidden).detach()  # type: ignore[index]
    for (name, width), loss in estimates.items():
        gone = torch.tensor(eliminated[name].order[: 16 - width])
        left = [channel for channel in range(16) if channel not in gone]
        rows = torch.cat([hidden[:, left], torch.ones(len(x), 1)], 1)
        fitted = rows @ torch.linalg.lstsq(rows, outputs).solution
        best = float((fitted - outputs).square().mean() / outputs.var(correction=0))
        assert best <= loss * 1.1
        assert loss <= best * 1.35 + 1e-6, (width, loss, best)  # elimination damps, least squares do not


def test_each_effort_measures_what_it_says(measured: list[tuple[str, int]]) -> None:
    counts = {}
    for effort in ("fast", "normal", "thorough"):
        measured.clear()
        made = study(4, effort)
        counts[effort] = len(measured)
        assert all(loss >= 0 for each in made.sensitivities for _, loss in each.points)
        widths = [dict(each.points) for each in made.sensitivities]
        assert all(list(points) == sorted(points, reverse=True) for points in widths)
        plan = made.plan(macs=0.5)
        compiled = gz.compile(made.model, plan, made.example_inputs, calibration=data())
        assert compiled.report.after.macs <= 0.5 * compiled.report.before.macs
    assert counts == {"fast": 0, "normal": 8, "thorough": 20}


def test_a_measured_width_has_the_loss_that_was_measured(measured: list[tuple[str, int]]) -> None:
    made = study(3, "normal")
    keys = list(measured)
    lab = sensitivities.Survey(made.subject, "normal", None)._laboratory
    for each in made.sensitivities:
        for name, width in keys:
            if name == each.group:
                assert dict(each.points)[width] == pytest.approx(lab.loss(name, width), rel=1e-6)
    assert len(keys) == 6


def test_no_more_groups_are_measured_than_so_many(
    monkeypatch: pytest.MonkeyPatch, measured: list[tuple[str, int]]
) -> None:
    monkeypatch.setattr(sensitivities, "_FITTED", 3)
    made = study(7, "normal")
    assert [name for name, _ in measured] == ["0", "0", "6", "6", "12", "12"]
    assert len(made.sensitivities) == 7


def test_a_fit_goes_through_what_was_measured() -> None:
    fit = sensitivities._fit({8: 0.1, 4: 0.3, 2: 0.9}, {8: 0.02, 2: 0.06})
    assert fit is not None
    curve = fit.curve({8: 0.1, 4: 0.3, 2: 0.9}, {})
    assert curve == pytest.approx({8: 0.02, 4: 0.02 * 3**0.5, 2: 0.06})
    assert fit.curve({8: 0.1, 4: 0.3, 2: 0.9}, {4: 0.0})[8] == 0.0
    assert sensitivities._fit({8: 0.1}, {}) is None
    assert sensitivities._fit({8: 0.1, 2: 0.5}, {8: 0.0, 2: 0.0}) is None


def test_fits_between_measured_groups_lie_between_theirs() -> None:
    low, high = sensitivities._Fit(1.0, 0.5), sensitivities._Fit(8.0, 0.8)
    found = sensitivities._between([low, None, None, high, None])
    np.testing.assert_allclose([fit.scale for fit in found], [1.0, 2.0, 4.0, 8.0, 8.0])
    np.testing.assert_allclose([fit.exponent for fit in found], [0.5, 0.6, 0.7, 0.8, 0.8])
    assert sensitivities._between([None]) == [sensitivities._Fit(1.0, 0.75)]


def test_a_score_and_other_clusterings_are_measured(measured: list[tuple[str, int]]) -> None:
    study(2, "normal", evaluate=lambda module: 1.0)
    assert len(measured) == 10
    measured.clear()
    study(2, "fast", passes=[gz.ClusterMerge(clustering="even")])
    assert len(measured) == 10


def test_what_is_estimated_is_kept_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[tuple[str, int]]
) -> None:
    net, calibration = stack(3), data()
    found = []
    for _ in range(2):
        made = gz.WidthStudy(net, (calibration[0],), calibration=calibration, cache=tmp_path / "cache.json")
        found.append(made.measure())
        monkeypatch.setattr(sensitivities, "eliminations", lambda *_: pytest.fail("estimated again"))
    assert found[0] == found[1]
    assert len(measured) == 6


def test_channels_that_are_equal_cost_nothing() -> None:
    net, calibration = stack(1), data()
    with torch.no_grad():
        net[0].weight[8:] = net[0].weight[:8]  # type: ignore[index]
        net[0].bias[8:] = net[0].bias[:8]  # type: ignore[index]
    made = gz.WidthStudy(net, (calibration[0],), calibration=calibration)
    points = dict(made.measure()[0].points)
    assert {loss for width, loss in points.items() if width >= 8} == {0.0}
    assert points[4] > 1e-3


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(gz.PlanError, match="effort='great' is none of 'fast', 'normal', 'thorough'"):
        gz.plan_for(stack(1), (torch.randn(2, 6),), macs=0.5, effort="great")


class Attention(nn.Module):
    """One head: its queries and keys are read by a product, its values by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 16) for _ in range(3))
        self.out = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), 2)
        return self.out(scores @ self.value(x))


def test_groups_without_an_estimate_grow_as_a_power_of_what_goes(measured: list[tuple[str, int]]) -> None:
    calibration = [torch.randn(32, 4, 6) for _ in range(4)]
    made = gz.WidthStudy(Attention().eval(), (calibration[0],), calibration=calibration)
    found = {each.group: dict(each.points) for each in made.measure()}
    assert measured == [("query", 8), ("query", 2), ("value", 8), ("value", 2)]
    widths, losses = zip(*sorted(found["query"].items()), strict=True)
    assert widths == (1, 2, 4, 8, 12)
    assert list(losses) == sorted(losses, reverse=True)
    powers = np.diff(np.log(losses)) / np.diff(np.log(1.0 - np.array(widths) / 16))
    np.testing.assert_allclose(powers, powers[0])


def test_all_groups_are_measured_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round that corrects a plan is kept as measurements are."""
    net, calibration = stack(3), data()
    tried: list[dict[str, int]] = []
    together = Laboratory.loss_together

    def counted(self: Laboratory, widths: dict[str, int]) -> float:
        tried.append(widths)
        return together(self, widths)

    monkeypatch.setattr(Laboratory, "loss_together", counted)
    plans = []
    for _ in range(2):
        made = gz.WidthStudy(net, (calibration[0],), calibration=calibration, cache=tmp_path / "cache.json")
        made.measure()
        plans.append(made.plan(macs=0.5).to_dict())
    assert plans[0] == plans[1]
    assert 1 < len(tried) <= sensitivities.CHECKS["normal"]
    assert len({tuple(each.items()) for each in tried}) == len(tried)


def test_the_fast_effort_tries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Laboratory, "loss_together", lambda *_: pytest.fail("measured"))
    study(2, "fast").plan(macs=0.5)


def test_what_all_groups_do_together_is_judged_on_samples_that_were_not_fitted() -> None:
    made = study(2, "normal")
    lab = sensitivities.Survey(made.subject, "normal", None)._laboratory
    lab.samples = 64
    fitted, judged = lab._together
    assert [len(part) for part in (fitted, judged)] == [2, 2]
    widths = dict.fromkeys(made.choices, 8)
    compiled = gz.compile(
        made.model, made._plan_of(widths), made.example_inputs, calibration=[batch[0] for batch in made.batches.here]
    )
    with torch.no_grad():
        outputs = [torch.cat([module(batch[0]) for batch in judged]) for module in (made.model, compiled.module)]
    moved = (outputs[0] - outputs[1]).square().mean() / outputs[0].var(correction=0)
    assert lab.loss_together(widths) == pytest.approx(float(moved), rel=0.5)
    assert lab.loss_together(dict.fromkeys(made.choices, 16)) == pytest.approx(0.0, abs=1e-9)


def test_slopes_of_parts_are_taken_where_all_would_be_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions are others then, so that estimates are about the same."""
    monkeypatch.setattr(first_order, "_DIRECTIONS", 400)
    made, eliminated = one_layer(data())
    at_once = first_order.first_order_losses(made.traced, eliminated, made.batches)
    monkeypatch.setattr(output_slopes, "_MOST", 400 * 5 * 12)
    layers = {change.layer.node for each in eliminated.values() for change in each.changes[1]}
    (batch,) = made.batches.here[:1]
    parts = list(output_slopes.parts_of(made.traced, layers, batch, 400))
    assert [len(part[0]) for part in parts] == [12, 12, 8]
    assert torch.cat([part[0] for part in parts]).equal(batch[0])
    in_parts = first_order.first_order_losses(made.traced, eliminated, made.batches)
    for key, loss in at_once.items():
        assert in_parts[key] == pytest.approx(loss, rel=0.25)


def test_a_batch_that_is_fixed_is_not_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_slopes, "_MOST", 1)
    fixed = trace(stack(1), (torch.randn(8, 6),), dynamic_shapes={})
    layers = [node for node in fixed.graph.nodes if node.target is torch.ops.aten.linear.default]
    x = torch.randn(8, 6)
    assert list(output_slopes.parts_of(fixed, layers, (x,))) == [(x,)]


@pytest.mark.parametrize(("effort", "counts"), [("fast", (0, 0)), ("normal", (6, 4)), ("thorough", (15, 12))])
def test_how_long_it_takes_is_said_first(effort: str, counts: tuple[int, int]) -> None:
    said: list[str] = []
    calibration = data()
    made = gz.WidthStudy(stack(3), (calibration[0],), calibration=calibration, effort=effort)
    made.measure(lambda _, __, what: said.append(what))
    assert re.fullmatch(rf"measuring {counts[0]} times and trying {counts[1]} plans, in about \d+ (s|min|h)", said[0])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59, "59 s"), (119, "119 s"), (150, "2 min"), (7199, "120 min"), (9000, "2 h")]
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("effort", "samples", "some"),
    [("normal", 600, 192), ("fast", 360, 120), ("normal", 120, 64), ("normal", 20, 64), ("thorough", 120, 384)],
)
def test_measurements_leave_samples_to_judge_by(effort: str, samples: int, some: int) -> None:
    batches = Batches([(torch.zeros(20, 1),) for _ in range(samples // 20)])
    assert batches.samples == samples
    assert sensitivities.measured_on(effort, batches) == some
