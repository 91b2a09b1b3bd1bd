"""The card: figures that are measured, and the word lossless."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip.measuring import slower
from graphzip.report.card import Card, Figures, Latency, Scores
from graphzip.report.page import page_of
from graphzip.report.report import Report

pytestmark = pytest.mark.usefixtures("seeded")

HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def twice() -> nn.Module:
    """Every hidden channel is there twice."""
    model = net()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[4:] = tensor[:4]
    return model


class Fixed(nn.Module):
    """Takes batches of two alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).relu().reshape(1, 16))
        return out


BEFORE = Figures("before", 4_000_000, 8_000_000, 16_000_000, 16_100_000, 40_000_000, (Latency(1, 4.0, 3.9, 4.2, 50),))
AFTER = Figures(
    "after", 1_000_000, 2_000_000, 4_000_000, 4_050_000, 12_000_000, (Latency(1, 1.0, 0.95, 1.25, 200),), drift=0.125
)


def test_the_text_fits_eighty_columns_and_says_where() -> None:
    scores = Scores("accuracy", {"before": 0.9, "after": 0.8, "after tuning": 0.875}, share=True)
    text = Card((BEFORE, AFTER), "a machine").text(scores)
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines()]
    assert ["parameters", "4.000", "M", "1.000", "M", "-75.0", "%"] in rows
    assert text.count("(3.90-4.20)") == text.count("(0.950-1.25)") == 1
    assert ["peak", "memory", "40.00", "MB", "12.00", "MB", "-70.0", "%"] in rows
    assert ["accuracy", "90.00", "%", "80.00", "%", "-10.00", "points"] in rows
    assert ["after", "tuning", "87.50", "%", "-2.50", "points"] in rows
    assert "measured on a machine" in text


def test_a_state_takes_the_place_of_the_one_of_its_name() -> None:
    later = replace(AFTER, name="after distilling", drift=None)
    both = Card((BEFORE, AFTER), "a").with_states(Card((later, replace(AFTER, params=5)), "b", ("a note",)))
    assert [each.name for each in both.figures] == ["before", "after", "after distilling"]
    assert (both.figures[1].params, both.machine, both.notes) == (5, "b", ("a note",))


def test_figures_are_measured() -> None:
    model, x = net(), torch.randn(4, 6)
    compiled = gz.compile(model, HALF, (x,), calibration=[x])
    card = compiled.measure(model, batches=(1, 3))
    before, after = card.figures
    assert (before.params, before.macs, before.bytes) == (8 * 7 + 3 * 9, 6 * 8 + 8 * 3, 4 * (8 * 7 + 3 * 9))
    assert (after.params, after.macs, after.bytes) == (4 * 7 + 3 * 5, 6 * 4 + 4 * 3, 4 * (4 * 7 + 3 * 5))
    assert after.file is not None
    assert before.file is not None
    assert 0 < after.file < before.file
    assert after.drift == compiled.report.drift
    for each in (before, after):
        assert [latency.batch for latency in each.latencies] == [1, 3]
        assert all(0 < latency.low <= latency.median <= latency.high for latency in each.latencies)
        assert all(latency.runs >= 20 for latency in each.latencies)
        assert (each.memory or 0) > 0 or not sys.platform.startswith("linux")
    assert compiled.report.card == card
    assert "latency, batch 3" in str(compiled.report)


def test_a_batch_that_is_fixed_is_measured_as_it_is() -> None:
    model, x = Fixed().eval(), torch.randn(2, 6)
    compiled = gz.compile(model, gz.Plan([]), (x,))
    for figures in compiled.measure(model).figures:
        assert [latency.batch for latency in figures.latencies] == [None]


def test_a_model_that_got_slower_says_what_to_do() -> None:
    slow = replace(AFTER, latencies=(Latency(1, 4.6, 4.4, 4.8, 50),))
    assert slower([BEFORE, AFTER]) == []
    assert slower([BEFORE, replace(slow, macs=BEFORE.macs)]) == []
    assert slower([BEFORE, replace(slow, latencies=(Latency(1, 4.3, 4.1, 4.5, 50),))]) == []  # within the quartiles
    (note,) = slower([BEFORE, slow])
    assert note.startswith("after computes less and takes longer: onnxruntime is fast where widths are multiples of 8")


def test_a_card_is_saved_with_the_model_and_grows(tmp_path: Path) -> None:
    model, x = net(), torch.randn(4, 6)
    compiled = gz.compile(model, HALF, (x,), evaluate=lambda module: float(module(x).shape[0]))
    compiled.measure(model, batches=(1,))
    compiled.save(tmp_path / "slim.graphzip")
    again = gz.load(tmp_path / "slim.graphzip")
    assert again.report.card == compiled.report.card
    assert again.report.scores == compiled.report.scores
    again.measure(name="after distilling", score=5.0, batches=(1,))
    assert [each.name for each in again.report.card.figures] == ["before", "after", "after distilling"]  # type: ignore[union-attr]
    assert again.report.scores == Scores("score", {"before": 4.0, "after": 4.0, "after distilling": 5.0})
    assert "distilling" in str(again.report)


def test_several_models_are_measured_together() -> None:
    models, x = {"a": net(), "b": net()}, torch.randn(4, 6)
    inputs, data = {"a": (x,), "b": (x,)}, {"a": [x], "b": [x]}
    compiled = gz.compile(models, gz.Plan([gz.Zip(share=1.0)]), inputs, calibration=data)
    before, after = compiled.measure(models, batches=(1,)).figures
    assert after.params == compiled.report.after.params < before.params == 2 * (8 * 7 + 3 * 9)
    assert len(before.latencies) == len(after.latencies) == 1
    with pytest.raises(gz.GraphZipError, match=r"the original of this result is a mapping with the keys a, b"):
        compiled.measure(models["a"])


def test_what_cannot_be_measured_is_said() -> None:
    model, x = net(), torch.randn(4, 6)
    compiled = gz.compile(model, HALF, (x,))
    assert [each.name for each in compiled.measure(batches=(1,)).figures] == ["after"]
    with pytest.raises(gz.GraphZipError, match="the original of this result is one model"):
        compiled.measure({"a": model})
    with pytest.raises(gz.GraphZipError, match=r"batches: 0 is out of range"):
        compiled.measure(model, batches=(0,))


# ------------------------------------------------------------------------------------------------- scores, lossless


def test_scores_before_after_and_after_tuning() -> None:
    model, x = net(), torch.randn(64, 6)
    wanted = model(x).detach()

    def near(module: nn.Module) -> float:
        assert not module.training
        return -float((module(x) - wanted).square().mean().detach())

    data = list(x.split(16))
    compiled = gz.compile(model, HALF, (x[:2],), calibration=data, evaluate=near, tune=3)
    scores = compiled.report.scores
    assert scores is not None
    assert list(scores.values) == ["before", "after", "after tuning"]
    assert scores.values["before"] == 0.0
    assert scores.values["after"] < scores.values["after tuning"] < 0.0
    assert scores.values["after tuning"] == pytest.approx(near(compiled.module.eval()))
    assert "after tuning" in str(compiled.report)


def test_scores_of_several_models() -> None:
    models = {"one": net(), "two": twice()}
    x = {name: (torch.randn(4, 6),) for name in models}
    evaluate = {"one": lambda module: float(next(module.parameters()).shape[0]), "two": lambda module: 1.0}
    compiled = gz.compile(models, gz.Plan([]), x, evaluate=evaluate)
    scores = compiled.report.scores
    assert scores is not None
    assert scores.tasks == {"one": {"before": 8.0, "after": 8.0}, "two": {"before": 1.0, "after": 1.0}}
    assert scores.values == {"before": 4.5, "after": 4.5}
    rows = [line.split() for line in str(compiled.report).splitlines()]
    assert ["score,", "one", "8", "8", "+0"] in rows
    assert "score, two" in page_of(compiled.report)
    compiled.measure(models, score={"one": 7.0, "two": 1.5})
    rows = [line.split() for line in str(compiled.report).splitlines()]
    assert ["score,", "one", "8", "7", "-1"] in rows
    assert ["score,", "two", "1", "1.5", "+0.5"] in rows
    assert Report.from_dict(compiled.report.to_dict()) == compiled.report


@pytest.mark.parametrize(
    ("several", "evaluate", "said"),
    [
        (False, {"a": len}, "evaluate: a mapping is for several models, but one was given; give the function alone"),
        (True, {"three": len}, "evaluate: there is no model 'three'; there are: 'one', 'two'"),
        (True, {"one": 3}, "evaluate['one']: 3 cannot be called"),
    ],
)
def test_scores_that_do_not_fit_the_models(several: bool, evaluate: dict[str, object], said: str) -> None:
    models: Any = {"one": net(), "two": net()} if several else net()
    x = (torch.randn(4, 6),)
    with pytest.raises(gz.PlanError, match=re.escape(said)):
        gz.compile(models, gz.Plan([]), {"one": x, "two": x} if several else x, evaluate=evaluate)


def test_a_score_that_is_none_is_refused() -> None:
    with pytest.raises(gz.PlanError, match="evaluate gave 'good', which is no number"):
        gz.compile(net(), HALF, (torch.randn(2, 6),), evaluate=lambda _: "good")  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("calibrated", [True, False])
def test_lossless_means_that_outputs_stay(calibrated: bool) -> None:
    x = torch.randn(4, 6)
    data = [x] if calibrated else None
    plan = gz.Plan([gz.ClusterMerge(clusters={"0": [[i, i + 4] for i in range(4)]})])
    kept, lost = (gz.compile(model, plan, (x,), calibration=data).report for model in (twice(), net()))
    assert (kept.lossless, kept.losses) == (True, ())
    assert not lost.lossless
    assert lost.losses[0] == "channels that were not identical became one"
    assert [each.partition(" by ")[0] for each in lost.losses[1:]] == ["outputs moved"] * calibrated
    assert "not lossless: channels that were not identical became one" in str(lost)
    assert (lost.drift is None) != calibrated
    assert Report.from_dict(lost.to_dict()) == lost


def test_of_a_random_forward_nothing_is_said_of_outputs() -> None:
    """Two runs of the original differ, too."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.two(self.one(x).relu())
            return y + torch.rand_like(y)

    model = Noisy().eval()
    with torch.no_grad():
        for each in (model.one.weight, model.one.bias):
            each[4:] = each[:4]
    plan = gz.Plan([gz.ClusterMerge(clusters={"one": [[n, n + 4] for n in range(4)]})])
    report = gz.compile(model, plan, (torch.randn(2, 4),)).report
    assert report.lossless
    assert "outputs moved" not in str(report)


def test_notebooks_and_pages_show_it(tmp_path: Path) -> None:
    model, x = net(), torch.randn(4, 6)
    study = gz.WidthStudy(model, (x,), effort="fast")
    study.measure()
    plan = study.plan(macs=0.5)
    assert study.summary().chosen is not None
    cost, _ = study.summary().chosen  # type: ignore[misc]
    assert cost <= 0.5
    compiled = gz.compile(model, plan, (x,))
    compiled.report = replace(compiled.report, study=study.summary(), notes=("a <b> note",))
    for shown, said in (
        (study, "multiply-accumulates, share"),
        (plan, "cluster_merge"),
        (gz.channel_groups(model, (x,)), "1 of 2 groups can shrink"),
        (compiled, "not lossless"),
        (compiled.report, "→"),
    ):
        text = shown._repr_html_()
        assert said in text
        assert "<script" not in text
    compiled.report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt; note" in page
    assert page.count("<svg") == 4
    assert "the plan" in page
    with pytest.raises(gz.GraphZipError, match=r"report\.pdf is no page; name a file that ends in \.html"):
        compiled.report.save(tmp_path / "report.pdf")


def test_the_repr_of_a_result_is_short() -> None:
    compiled = gz.compile(net(), HALF, (torch.randn(2, 6),))
    text = repr(compiled)
    assert text.startswith("Compiled(")
    assert "parameters 83 -> 43 (-48.2 %)" in text
    assert "not lossless" in text
    assert len(text) < 300
