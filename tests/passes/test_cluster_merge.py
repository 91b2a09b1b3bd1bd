"""Cluster-merge as a pass: centres, deviation, pacesetters, and how its options reach a model."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from nets import Net
from planting import relative
from residual_net import Residual, residual
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")

IMAGE = (2, 3, 8, 8)


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, *IMAGE[1:], dtype=torch.float64)


def prepared(model: nn.Module, x: Tensor | None = None, **options: Any) -> gz.Prepared:
    return gz.prepare(model, gz.Plan([gz.ClusterMerge(**options)]), (image() if x is None else x,))


STEM = [[0, 3], [1], [2, 4, 5], [6, 7]]
INNER = [[0], [1, 2, 3], [4], [5]]


# --- deviation and centres -------------------------------------------------------------------------------------------


def test_deviation_of_a_hand_computed_example() -> None:
    """Eq. 7: rows (1, 0), (3, 4) have the mean (2, 2), from which each is off by 1 + 4; row (7, 7) is alone."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [7.0, 7.0], [3.0, 4.0]]))
        model[0].bias.copy_(torch.tensor([5.0, 0.0, -5.0]))
    ready = prepared(model, torch.randn(2, 2), clusters={"0": [[0, 2], [1]]})
    assert ready.deviation() == 10.0
    ready.pull_(0.5)
    assert ready.deviation() == 2.5
    assert ready.model[0].weight.tolist() == [[1.5, 1.0], [7.0, 7.0], [2.5, 3.0]]
    assert ready.model[0].bias.tolist() == [2.5, 0.0, -2.5]
    ready.collapse_()
    assert ready.deviation() == 0.0
    assert ready.model[0].weight.tolist() == [[2.0, 2.0], [7.0, 7.0], [2.0, 2.0]]
    assert ready.model[0].bias.tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(ready.model[2].weight, model[2].weight)


def expected_deviation(kernels: list[tuple[Tensor, list[list[int]]]]) -> float:
    total = 0.0
    for kernel, clusters in kernels:
        for members in clusters:
            rows = kernel.detach()[members]
            total += float((rows - rows.mean(0)).square().sum())
    return total


def test_deviation_counts_the_kernels_of_every_producer() -> None:
    model = residual()
    ready = prepared(model, clusters={"stem": STEM, "inner": INNER})
    kernels = [(model.stem.weight, STEM), (model.out.weight, STEM), (model.inner.weight, INNER)]
    assert ready.deviation() == pytest.approx(expected_deviation(kernels), rel=1e-12)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_pulling_takes_the_deviation_down_by_a_square(fraction: float) -> None:
    ready = prepared(residual(), keep=0.5)
    before = ready.deviation()
    assert before > 0
    ready.pull_(fraction)
    assert ready.deviation() == pytest.approx(before * (1 - fraction) ** 2, rel=1e-9, abs=1e-25)


def test_centres_are_the_means_of_producer_and_pointwise_slices() -> None:
    model = residual()
    ready = prepared(model, clusters={"stem": STEM, "inner": INNER})
    ready.collapse_()
    state, moved = model.state_dict(), ready.model.state_dict()
    touched = {
        **{f"{layer}.{leaf}": STEM for layer in ("stem", "out") for leaf in ("weight", "bias")},
        "inner.weight": INNER,
        **{f"norm0.{leaf}": STEM for leaf in ("weight", "bias", "running_mean", "running_var")},
        **{f"norm1.{leaf}": INNER for leaf in ("weight", "bias", "running_mean", "running_var")},
    }
    for name, tensor in moved.items():
        if name not in touched:
            assert torch.equal(tensor, state[name]), name
            continue
        for members in touched[name]:
            torch.testing.assert_close(tensor[members], state[name][members].mean(0).expand_as(tensor[members]))
        alone = [members[0] for members in touched[name] if len(members) == 1]
        assert torch.equal(tensor[alone], state[name][alone])


def test_pulling_keeps_the_parameter_objects_and_their_gradients() -> None:
    ready = prepared(residual().train(), keep=0.5)
    objects = dict(ready.named_parameters())
    ready(image()).sum().backward()
    gradient = ready.model.stem.weight.grad
    ready.pull_(0.3)
    ready.collapse_()
    assert all(parameter is objects[name] for name, parameter in ready.named_parameters())
    assert ready.model.stem.weight.grad is gradient
    assert all(parameter.requires_grad for parameter in ready.parameters())


def test_pulling_during_training() -> None:
    """Plain steps and pulls in turn bring every cluster together, and the result loses nothing."""
    ready = prepared(residual().train(), keep=0.5)
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.01, momentum=0.9)
    start = ready.deviation()
    for _ in range(20):
        loss = (ready(image(4)) - 1).square().mean() + ready.regularizer()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ready.pull_(0.5)
    assert ready.deviation() < 1e-2 * start
    ready.collapse_()
    x = image()
    expected = ready.eval()(x).detach()
    assert relative(expected, ready.convert().module.eval()(x)) < 1e-12


def test_the_result_is_the_collapsed_model() -> None:
    model, x = residual(), image(3)
    ready = prepared(model, keep=0.5)
    ready.collapse_()
    collapsed = ready.model
    module = prepared(model, keep=0.5).convert().module
    with torch.no_grad():
        assert relative(collapsed(x), module(x)) < 1e-12
        assert relative(model(x), module(x)) > 1e-3
    assert module.stem.weight.shape == (4, 3, 3, 3)
    assert module.head.weight.shape == (4, 4)


def test_low_precision_and_frozen_layers() -> None:
    model = Residual().to(torch.bfloat16)
    model.stem.requires_grad_(False)
    x = torch.randn(IMAGE, dtype=torch.bfloat16)
    ready = prepared(model, x, clusters={"stem": STEM})
    ready.collapse_()
    assert torch.equal(ready.model.stem.weight[0], ready.model.stem.weight[3])
    module = ready.convert().module
    assert not module.stem.weight.requires_grad
    assert module.head.weight.dtype == torch.bfloat16
    expected = model.head.weight.float()[:, [2, 4, 5]].sum(1)
    torch.testing.assert_close(module.head.weight[:, 2].float(), expected, rtol=1e-2, atol=1e-2)


def test_statistics_of_batches_seen_are_not_merged() -> None:
    model = residual().train()
    model(image())
    module = prepared(model, keep=0.5).convert().module
    assert int(module.norm0.num_batches_tracked) == 1
    assert module.norm0.num_batches_tracked.dtype == torch.int64


# --- which channels --------------------------------------------------------------------------------------------------


def clusters_of(model: nn.Module, x: Tensor | None = None, seed: int = 0, **options: Any) -> dict[str, Any]:
    plan = gz.Plan([gz.ClusterMerge(**options)])
    report = gz.compile(model, plan, (image() if x is None else x,), seed=seed).report
    found: dict[str, Any] = report.passes[0]["cluster_merge"]["clusters"]
    return found


def test_even_and_imbalanced_clusters() -> None:
    model = residual()
    assert clusters_of(model, clustering="even", keep={"stem": 3}) == {"stem": [[0, 1, 2], [3, 4, 5], [6, 7]]}
    assert clusters_of(model, clustering="imbalanced", keep={"stem": 3}) == {"stem": [[0, 1, 2, 3, 4, 5], [6], [7]]}


def test_clusters_by_hand_are_sorted() -> None:
    given = {"stem": [[7, 6], [5, 2, 4], [1], [3, 0]]}
    assert clusters_of(residual(), clusters=given) == {"stem": STEM}


def test_kmeans_looks_at_the_pacesetter() -> None:
    """The first producer in execution order decides; its followers take over the clusters."""
    model = residual()
    order = [0, 1, 0, 1, 1, 0, 1, 0]
    with torch.no_grad():
        centres = torch.randn(2, *model.stem.weight.shape[1:], dtype=torch.float64)
        model.stem.weight.copy_(centres[order] + 1e-3 * torch.randn_like(model.stem.weight))
    expected = [[k for k in range(8) if order[k] == which] for which in (0, 1)]
    for seed in range(3):
        assert clusters_of(model, keep={"stem": 2}, seed=seed) == {"stem": expected}


@pytest.mark.parametrize("pacesetter", ["projection", "first"])
def test_the_projection_of_a_stage_is_its_pacesetter(pacesetter: str) -> None:
    """The branch of the block runs first; the projection beside it has fewer layers in front."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 8, 3, padding=1)
            self.projection, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.outer(self.inner(x).relu())
            y = self.head((y + self.projection(x)).relu())
            return y

    model = Block()
    orders = {"first": [0, 1, 0, 1, 1, 0, 1, 0], "projection": [0, 0, 1, 1, 1, 1, 0, 0]}
    with torch.no_grad():
        for layer, order in ((model.outer, orders["first"]), (model.projection, orders["projection"])):
            centres = torch.randn(2, *layer.weight.shape[1:])
            layer.weight.copy_(centres[order] + 1e-3 * torch.randn_like(layer.weight))
    plan = gz.Plan([gz.ClusterMerge(keep={"outer": 2}, pacesetter=pacesetter)])
    found = gz.compile(model, plan, (torch.randn(2, 3, 6, 6),)).report.passes[0]["cluster_merge"]["clusters"]["outer"]
    order = orders[pacesetter]
    assert found == [[k for k in range(8) if order[k] == which] for which in (0, 1)]


def test_kmeans_finds_planted_duplicates() -> None:
    model, x = residual(), image()
    with torch.no_grad():
        for members in STEM:
            for name in ("stem.weight", "stem.bias", "out.weight", "out.bias", "norm0.weight", "norm0.bias",
                         "norm0.running_mean", "norm0.running_var"):  # fmt: skip
                tensor = model.state_dict()[name]
                tensor[members[1:]] = tensor[members[0]].clone()
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep={"stem": 4})]), (x,), calibration=[x])
    assert compiled.report.passes[0]["cluster_merge"]["clusters"] == {"stem": STEM}
    assert compiled.report.drift is not None
    assert compiled.report.drift < 1e-12


def test_a_registered_clustering_sees_the_flattened_kernels() -> None:
    seen: list[tuple[np.ndarray[Any, Any], int, int]] = []

    @gz.register_clustering("first and rest")
    def first_and_rest(features: Any, k: int, seed: int) -> list[list[int]]:
        seen.append((features.copy(), k, seed))
        return [[k] for k in range(k - 1)] + [list(range(k - 1, len(features)))]

    model = residual()
    found = clusters_of(model, clustering="first and rest", keep={"inner": 2}, seed=5)
    assert found == {"inner": [[0], [1, 2, 3, 4, 5]]}
    ((features, k, seed),) = seen
    assert (k, seed) == (2, 5)
    assert np.array_equal(features, model.inner.weight.detach().flatten(1).numpy())


def test_transposed_convolutions_are_clustered_by_their_second_dimension() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    with torch.no_grad():
        model[0].weight[:, 2] = model[0].weight[:, 0]
        model[0].bias[2] = model[0].bias[0]
    assert clusters_of(model, keep=3) == {"0": [[0, 2], [1], [3]]}


def test_clusters_stay_inside_the_groups_of_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model, x = model.double(), image()
    for group in (group for group in gz.channel_groups(model, (x,)) if len(group.blocks) > 1):
        blocks = [set(block) for block in group.blocks]
        for how in ("kmeans", "even", "imbalanced"):
            found = clusters_of(model, clustering=how, keep={group.name: 0.5})[group.name]
            assert len(found) == 4
            assert all(any(set(members) <= block for block in blocks) for members in found)
            assert [sum(set(members) <= block for members in found) for block in blocks] == [2, 2]


def test_a_tied_weight_goes_by_its_first_name() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=first, b=second, c=nn.Linear(4, 3))
    x = torch.randn(2, 4)
    groups = gz.channel_groups(model, (x,))
    assert groups.names[0] == "a"
    assert not any(place.param.startswith("b.weight") for group in groups for place in group.slices(0))


# --- widths reach the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "stem", "inner"),
    [
        ({}, 4, 3),
        ({"keep": 0.7}, 5, 4),
        ({"keep": 5}, 5, 5),
        ({"keep": {"inner": 2}}, 8, 2),
        ({"keep": {"st*": 3, "*": 0.5}}, 3, 3),
        ({"keep": 0.5, "exclude": ["inner"]}, 4, 6),
        ({"keep": 0.3, "round_to": 4}, 4, 4),
        ({"clusters": {"inner": INNER}}, 8, 4),
        ({"clusters": {"inner": INNER}, "keep": 0.25}, 2, 4),
    ],
)  # fmt: skip
def test_widths(options: dict[str, Any], stem: int, inner: int) -> None:
    model = residual()
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clustering="even", **options)]), (image(),))
    module = compiled.module
    assert module.stem.weight.shape[0] == module.out.weight.shape[0] == module.norm0.running_var.shape[0] == stem
    assert module.inner.weight.shape == (inner, stem, 3, 3)
    assert module.head.weight.shape == (4, stem)
    assert {group.name: group.after for group in compiled.report.groups} == {
        name: width for name, width, size in (("stem", stem, 8), ("inner", inner, 6)) if width < size
    }
    assert module.eval()(image()).shape == (2, 4)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": {"stm": 0.5}}, "passes[1].cluster_merge.keep['stm']: matches no channel group; did you mean 'stem'"),
        ({"keep": {"head": 2}}, "passes[1].cluster_merge.keep['head']: group 'head' cannot be merged: "),
        ({"keep": 9}, "passes[1].cluster_merge.keep: 9 channels cannot be kept of group 'stem', which has 8"),
        ({"exclude": ["inner", "layer*"]}, "passes[1].cluster_merge.exclude[1]: 'layer*' matches no channel group"),
        ({"clusters": {"innr": [[0]]}}, "clusters['innr']: no channel group has this name; did you mean 'inner'"),
        ({"clusters": {"inner": [[0, 1], [2, 3]]}}, "clusters['inner']: channels 4, 5 are in no cluster; name every"),
        (
            {"clusters": {"inner": [[0, 1, 2], [3, 4, 5, 6]]}},
            "channel 6 is outside the group, whose 6 channels are 0 to",
        ),
        (
            {"clustering": "kmean"},
            "passes[1].cluster_merge.clustering: unknown clustering 'kmean'; did you mean 'kmeans'",
        ),
    ],
)
def test_options_that_do_not_fit_the_model(options: dict[str, Any], message: str) -> None:
    plan = gz.Plan([gz.FoldBatchNorm(), gz.ClusterMerge(**options)])
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        gz.compile(residual(), plan, (image(),))


def test_a_channel_in_two_clusters() -> None:
    with pytest.raises(gz.PlanError, match=r"clusters\['inner'\].*1.*(twice|more than one)"):
        gz.compile(residual(), gz.Plan([gz.ClusterMerge(clusters={"inner": [[0, 1], [1, 2, 3, 4, 5]]})]), (image(),))


def test_weights_that_are_not_finite() -> None:
    model = residual()
    with torch.no_grad():
        model.stem.weight[3, 0, 0, 0] = float("nan")
    with pytest.raises(
        gz.WeightsError, match=r"group 'stem': 1 of 8 channels have NaN or infinite weights, the first is"
    ):
        clusters_of(model)
    assert len(clusters_of(model, clustering="even")) == 2


def test_a_clustering_that_returns_nonsense() -> None:
    gz.register_clustering("broken")(lambda features, k, seed: [[0]] * k)
    with pytest.raises(gz.PlanError, match=r"group 'stem': clustering 'broken' returned channel 0 more than once"):
        clusters_of(residual(), clustering="broken")
