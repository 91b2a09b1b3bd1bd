"""What the benchmark of shared weights compares is comparable."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture(scope="module")
def bench() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("cross_domain_mnist")
    sys.modules.pop("cross_domain_mnist", None)


def run(bench: Any) -> Any:
    """Untrained networks and noise."""
    generator = np.random.default_rng(0)
    digits = generator.integers(0, 255, (24, 28, 28)).astype(np.uint8)
    data = bench.part(digits, np.arange(24) % 10, None)
    options = argparse.Namespace(
        batch=8, epochs=1, finetune=1, lr=0.01, finetune_lr=0.01, regularizer="normalized", strength=1.0, growl=1e-3
    )
    torch.manual_seed(0)
    models = {name: bench.lenet() for name in bench.TASKS}
    return bench.Run(models, models, data, options, bench.CLUSTERS[16], 0)


@pytest.mark.parametrize("times", [4, 8, 16])
def test_the_cuts_are_what_they_are_called(bench: Any, times: int) -> None:
    weights = {name: each.numel() for name, each in bench.lenet().named_parameters() if name.endswith("weight")}
    before = 2 * sum(weights.values())
    clusters = bench.CLUSTERS[times]
    per_channel = {"conv2": 50 * 25, "fc1": 500}
    after = 2 * (weights["conv1.weight"] + weights["fc2.weight"]) + sum(k * per_channel[n] for n, k in clusters.items())
    assert before / after == pytest.approx(times, rel=0.01)


def test_both_domains_show_the_same_digits(bench: Any) -> None:
    images = np.zeros((6, 28, 28), np.uint8)
    images[np.arange(6), 14, 4 + 3 * np.arange(6)] = 255
    data = bench.part(images, np.arange(6), 4)
    assert all(each.shape == (4, 1, 28, 28) for each in data.pictures.values())
    for index, label in enumerate(data.labels.tolist()):
        row = data.pictures["blurred"][index, 0, 14]
        assert abs(float(row.gt(0).nonzero().float().mean()) - (4 + 3 * label)) <= 4


def test_all_methods_keep_as_many_weights(bench: Any) -> None:
    given = run(bench)
    for name, method in bench.METHODS.items():
        models = method(given)
        held = {id(p): p for model in models.values() for key, p in model.named_parameters() if key.endswith("weight")}
        kept = sum(int((each != 0).sum()) for each in held.values())
        most = 39_400 if name == "bytes" else 53_500
        assert most - 500 <= kept <= most, name
        assert set(bench.accuracies(models, given.train)) == {*bench.TASKS, "fused"}


def test_correlations_have_the_channels_of_both_domains(bench: Any) -> None:
    given = run(bench)
    ready = bench.prepared(given, given.models)
    weights, features = bench.correlations(ready, given.train, "conv2")
    assert weights.shape == features.shape == (40, 40)
    torch.testing.assert_close(weights.diagonal(), torch.ones(40))
    assert 0.0 <= bench.across(features) <= 1.0


def test_pictures(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = bench.pictures(run(bench), run(bench).train, tmp_path / "figures")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"conv2.png", "fc1.png", "clusters.svg"}
    assert list(found) == ["before", "normalized", "growl"]
    for layers in found.values():
        for measured in layers.values():
            assert all(0.0 <= each <= 1.0 for row in measured.values() for each in row.values())


def test_blocks_are_the_clusters_in_common(bench: Any) -> None:
    labels = torch.tensor([0, 1, 1, 0, 0, 1])
    features = torch.nn.functional.one_hot(labels).double()
    found = bench.clustered(features @ features.t(), 2)
    assert torch.equal(found[:, None] == found, labels[:, None] == labels)
    assert bench.blocks(features @ features.t(), labels) == {"best": 1.0, "within": 1.0, "between": 0.0}
