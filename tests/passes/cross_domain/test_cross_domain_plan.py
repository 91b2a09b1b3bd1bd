"""`CrossDomainShare`: which layers share, what is reported, and what is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from domain_pairs import CLUSTERS, DATA, EXAMPLE, models, network, prepared
from torch import Tensor, nn

import graphzip as gz
from graphzip_passes.cross_domain.share import CrossDomainSharePass


@functools.cache
def one_shot() -> gz.Compiled:
    return prepared().convert()


def test_a_plain_number_leaves_the_first_and_the_last_layer() -> None:
    report = prepared(clusters=0.5).convert().report
    assert [(each.name, each.before, each.after) for each in report.groups] == [("conv2", 12, 6), ("fc1", 64, 32)]


def test_excluded_layers_keep_their_channels() -> None:
    assert [each.name for each in prepared(clusters=0.5, exclude=["fc*"]).convert().report.groups] == ["conv2"]


def test_first_layers_that_differ_keep_their_channels_and_the_last_may_be_shared() -> None:
    report = prepared(clusters={"conv1": 2, "fc2": 6}).convert().report
    assert [(each.name, each.after) for each in report.groups] == [("fc2", 6)]


def test_the_report_counts_weights_without_biases() -> None:
    report = prepared(clusters={"fc1": 16}).convert().report
    before = (3 + 1) * 6 * 9 + 2 * 6 * 8 * 9 + 2 * 32 * 12 + 2 * 12 * 4
    after = before - 48 * 12
    found = report.passes[0]["cross_domain_share"]["weights"]
    assert found == {"before": before, "after": after, "times": before / after}
    assert f"{before / after:.2f} times fewer" in str(report)
    json.dumps(report.to_dict())


def test_the_report_says_who_uses_the_clusters() -> None:
    report = one_shot().report
    for name, found in report.passes[0]["cross_domain_share"]["layers"].items():
        sizes = np.array(list(found["sizes"].values()))
        assert sizes.sum() == found["channels"]
        assert sizes.shape == (2, found["clusters"])
        assert (np.diff(sizes.sum(0)) <= 0).all()
        assert found["common"] == int((sizes > 0).all(0).sum())
        assert sum(found["private"].values()) + found["common"] == found["clusters"]
        assert name in str(report)
    assert "rgb alone" in str(report)


def test_the_largest_clusters_as_bars(tmp_path: Path) -> None:
    path = gz.draw_sharing(one_shot().report, tmp_path / "clusters.svg")
    text = path.read_text()
    assert "conv2: 12 channels, 5 clusters" in text
    assert "depth" in text
    with pytest.raises(gz.GraphZipError, match="no shared weights to draw"):
        gz.draw_sharing(gz.compile(network(0), gz.Plan([]), (DATA["depth"][0],)).report, tmp_path / "none.svg")


@pytest.mark.parametrize(("setting", "times"), [("A", 14.79), ("B", 22.79)])
def test_the_alexnet_pair_compresses_as_printed(setting: str, times: float) -> None:
    """Table 1, with torchvision's widths: the printed 512 and 784 of the originals are its 512 and 768."""
    torchvision = pytest.importorskip("torchvision")
    counts = {"A": (32, 96, 192, 128, 1024, 512), "B": (16, 48, 96, 64, 512, 512)}[setting]
    names = [f"features.{n}" for n in (3, 6, 8, 10)] + ["classifier.1", "classifier.4"]
    with torch.device("meta"):
        pair = {name: torchvision.models.alexnet(num_classes=19) for name in ("rgb", "depth")}
        example = {name: (torch.zeros(2, 3, 224, 224),) for name in pair}
    plan = gz.Plan([gz.CrossDomainShare(clusters=dict(zip(names, counts, strict=True)))])
    decision = gz.prepare(pair, plan, example)._progress.active
    assert decision is not None
    active = decision.constraint
    assert isinstance(active, CrossDomainSharePass)
    assert [before for before, _ in active.widths().values()] == [128, 384, 768, 512, 18432, 8192]
    assert round(active.summary()["weights"]["times"], 2) == times


# ------------------------------------------------------------------------------------------------ refusals


def refused(match: str, given: dict[str, nn.Module] | None = None, **options: Any) -> None:
    given = models() if given is None else given
    plan = gz.Plan([gz.CrossDomainShare(**{"clusters": CLUSTERS, **options})])
    with pytest.raises(gz.PlanError, match=match):
        gz.prepare(given, plan, {name: EXAMPLE["rgb" if name == "rgb" else "depth"] for name in given})


def test_three_models_are_refused() -> None:
    three = {**models(), "flow": network(2)}
    refused(r"passes\[0\].cross_domain_share: it shares weights between two models, got 'rgb', 'depth', 'flow'", three)


def test_a_glob_that_matches_no_layer_is_refused() -> None:
    refused(r"clusters: 'conv9' matches no layer", clusters={"conv9": 3})
    refused(r"exclude\[0\]: 'conv9' matches no layer", exclude=["conv9"])


def test_more_clusters_than_channels_are_refused() -> None:
    refused("'conv2' has 12 input channels over both models, fewer than 13 clusters", clusters={"conv2": 13})


def test_a_plan_that_shares_nothing_is_refused() -> None:
    refused("no layer shares weights", clusters={"conv2": 1.0})


def test_layers_that_are_unlike_are_refused() -> None:
    other = network(1)
    other.fc1 = nn.Linear(32, 10).double()
    other.fc2 = nn.Linear(10, 4).double()
    given = {"rgb": network(0, 3), "depth": other}
    refused(r"'fc1' cannot be shared: its weights are \[12, 32\] in one model and \[10, 32\] in the other", given)
    other = network(1)
    other.conv2 = nn.Sequential(other.conv2)
    refused("'conv2' cannot be shared: only one of the models has it", {"rgb": network(0, 3), "depth": other})


def test_other_input_channels_behind_the_first_layer_are_refused() -> None:
    other = network(1)
    other.conv1, other.norm1 = nn.Conv2d(1, 7, 3).double(), nn.BatchNorm2d(7).double()
    other.conv2 = nn.Conv2d(7, 8, 3, stride=2, padding=1).double()
    given = {"rgb": network(0, 3), "depth": other}
    refused("'conv2' cannot be shared: its number of input channels differs", given)


def test_layers_that_cannot_be_shared_are_refused_with_a_reason() -> None:
    grouped = models()
    for model in grouped.values():
        model.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2).double()
    refused("'conv2' cannot be shared: it has groups", grouped)
    one = models()
    one["depth"].fc1 = one["rgb"].fc1
    refused("'fc1' cannot be shared: its weights are shared already", one)

    class Twice(nn.Module):
        def __init__(self, seed: int) -> None:
            torch.manual_seed(seed)
            super().__init__()
            self.first, self.again, self.last = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(self.again(self.again(self.first(x)).relu()))
            return found

    refused(
        "'again' cannot be shared: its weights are read more than once",
        {"rgb": Twice(0).double(), "depth": Twice(1).double()},
        clusters=0.5,
    )


def test_there_must_be_features() -> None:
    plan = gz.Plan([gz.CrossDomainShare(clusters=CLUSTERS)])
    with pytest.raises(gz.GraphZipError, match=r"there are no features of 'conv2' .*; pass calibration="):
        gz.compile(models(), plan, EXAMPLE)


def test_the_regularizer_needs_a_forward_pass_of_both_tasks() -> None:
    ready = prepared()
    with pytest.raises(gz.ExampleInputError, match="conv2: there are no features of 'rgb', 'depth' for a batch; run"):
        ready.regularizer()
    ready.task("rgb")(DATA["rgb"][0])
    with pytest.raises(gz.ExampleInputError, match="conv2: there are no features of 'depth' for a batch; run"):
        ready.regularizer()


def test_batches_of_different_sizes_are_refused() -> None:
    with pytest.raises(gz.ExampleInputError, match=r"conv2: 'depth' has \d+ numbers per channel where another"):
        prepared()(rgb=DATA["rgb"][0], depth=DATA["depth"][0][:4])


def test_calibration_of_different_lengths_is_refused() -> None:
    plan = gz.Plan([gz.CrossDomainShare(clusters=CLUSTERS)])
    data = {**DATA, "depth": DATA["depth"][:2]}
    with pytest.raises(gz.ExampleInputError, match="'depth' for a batch; calibration: give all tasks as many batches"):
        gz.compile(models(), plan, EXAMPLE, calibration=data)


def test_features_that_are_not_finite_are_refused() -> None:
    given = models()
    with torch.no_grad():
        given["rgb"].conv1.weight.fill_(torch.nan)
    plan = gz.Plan([gz.CrossDomainShare(clusters=CLUSTERS)])
    with pytest.raises(gz.WeightsError, match="'conv2' reads values that are NaN or infinite"):
        gz.compile(given, plan, EXAMPLE, calibration=DATA)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clusters": 0}, "clusters: 0 is out of range"),
        ({"regularizer": "graph"}, "regularizer: 'graph' is not one of 'normalized', 'plain', 'simple', 'growl', null"),
        ({"strength": -1}, "strength: -1 is not a strength"),
        ({"pool": 4}, r"pool: 4 is not a height and a width; write two ints of at least 1, such as \[4, 4\]"),
        ({"pool": [4, 0]}, r"pool: \[4, 0\] is not a height and a width"),
        ({"samples": 0}, "samples: 0 is not a number of numbers of a channel"),
        ({"exclude": "fc"}, "exclude: 'fc' is one glob"),
    ],
)
def test_options_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(gz.PlanError, match=rf"cross_domain_share\.{match}"):
        gz.CrossDomainShare(**options)


def test_options_go_through_a_plan_file(tmp_path: Path) -> None:
    plan = gz.Plan([gz.CrossDomainShare(clusters={"fc*": 0.5}, regularizer=None, pool=[2, 2])])
    plan.save(tmp_path / "plan.yaml")
    assert gz.Plan.load(tmp_path / "plan.yaml") == plan
