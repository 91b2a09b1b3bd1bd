"""Compensation after a merge: what is lossless stays so, what is lossy gets better, and what is said about it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS, Net, head, unit
from planting import randomize_, relative
from torch import Tensor, nn

import graphzip as gz
from graphzip.analysis.layers import own_layers
from graphzip.tracing.trace import trace


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def net(width: int = 12) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A residual network with room to merge: its channels are correlated, for its inputs have few dimensions."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = (x + m.out(m.inner(x))).relu()
        return m.head(x)

    parts = {
        "stem": unit(3, width),
        "inner": unit(width, 2 * width),
        "out": nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        "head": head(width),
    }
    model = Net(run, **parts).eval()
    randomize_(model, 0)
    return model, (torch.randn(2, 3, 8, 8),)


def data(batches: int = 4, *, double: bool = False) -> list[Tensor]:
    found = [torch.randn(16, 3, 8, 8) for _ in range(batches)]
    return [batch.double() for batch in found] if double else found


def merged(model: nn.Module, x: tuple[Tensor, ...], calibration: Any = None, **options: Any) -> gz.Compiled:
    return gz.compile(model, gz.Plan([gz.ClusterMerge(**options)]), x, calibration=calibration)


def distance(model: nn.Module, compiled: gz.Compiled, x: Tensor) -> float:
    with torch.no_grad():
        wanted, given = model(x), compiled.module(x)
    return float((wanted - given).square().mean() / wanted.var())


# --- what is lossless stays so ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensate", ["none", "free", "data"])
@pytest.mark.parametrize("clustering", ["kmeans", "reconstruction"])
@pytest.mark.parametrize("name", ["cifar_resnet_pad", "bottleneck"])
def test_identical_channels_are_merged_without_loss(name: str, clustering: str, compensate: str) -> None:
    model, (x,) = NETS[name]()
    model, x = model.double().eval(), x.double()
    randomize_(model, 0)
    groups = gz.channel_groups(model, (x,))
    for group in (each for each in groups if each.mergeable):
        plant(model, group)
    keep = {group.name: -(-group.size // 2) for group in groups if group.mergeable}
    compiled = merged(model, (x,), data(2, double=True), keep=keep, clustering=clustering, compensate=compensate)
    assert compiled.report.after.params < compiled.report.before.params
    assert relative(model(x), compiled.module(x)) < 1e-9


@pytest.mark.parametrize("features", ["activations", "both"])
@pytest.mark.parametrize("name", ["cifar_resnet_pad", "bottleneck", "flatten_norm_linear"])
def test_identical_channels_are_found_by_what_they_do(name: str, features: str) -> None:
    model, (x,) = NETS[name]()
    model, x = model.double().eval(), x.double()
    randomize_(model, 0)
    groups = [each for each in gz.channel_groups(model, (x,)) if each.mergeable]
    for group in groups:
        plant(model, group)
    keep = {group.name: -(-group.size // 2) for group in groups}
    calibration = [torch.randn(8, *x.shape[1:], dtype=torch.float64) for _ in range(2)]
    compiled = merged(model, (x,), calibration, keep=keep, features=features)
    assert compiled.report.after.params < compiled.report.before.params
    assert relative(model(x), compiled.module(x)) < 1e-9


@torch.no_grad()
def plant(model: nn.Module, group: gz.ChannelGroup) -> None:
    """Channel 2 k + 1 becomes a copy of channel 2 k."""
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    for channel in range(1, group.size, 2):
        for one, other in zip(group.slices(channel - 1), group.slices(channel), strict=True):
            if one.role != "consumer":
                tensor = tensors[one.param]
                tensor.select(other.dim, other.index).copy_(tensor.select(one.dim, one.index))


# --- what is lossy gets better ----------------------------------------------------------------------------------------


def test_channels_that_do_alike_are_merged_though_their_kernels_differ() -> None:
    """An input channel is always zero: what kernels read of it says nothing about what channels do."""
    model = Net(lambda m, x: m.last(m.first(x).relu()), first=nn.Conv2d(3, 8, 3), last=nn.Conv2d(8, 4, 3)).eval()
    first = model.first
    with torch.no_grad():
        first.weight[4:, :2], first.bias[4:] = first.weight[:4, :2], first.bias[:4]
        first.weight[:, 2] = 10 * torch.randn(8, 3, 3)
    x = torch.randn(16, 3, 8, 8)
    x[:, 2] = 0
    by_kernel, by_doing, by_both = (
        merged(model, (x[:2],), [x], keep={"first": 4}, clustering="kmeans", compensate="none", features=features)
        for features in ("weights", "activations", "both")
    )
    (clusters,) = by_doing.report.passes[0]["cluster_merge"]["clusters"].values()
    assert sorted(map(sorted, clusters)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert distance(model, by_doing, x) < 1e-10 < distance(model, by_both, x) <= distance(model, by_kernel, x)


@pytest.mark.parametrize("name", ["resnext_block", "channel_shuffle_module", "grouped_conv"])
def test_groups_of_a_convolution_keep_the_same_number(name: str) -> None:
    model, x = NETS[name]()
    model.eval()
    randomize_(model, 0)
    calibration = [torch.randn(16, *x[0].shape[1:]) for _ in range(2)]
    how = {"keep": 0.5, "clustering": "reconstruction"}
    plain = merged(model, x, calibration, compensate="none", **how)
    fitted = merged(model, x, calibration, compensate="data", **how)
    assert distance(model, fitted, calibration[0]) < distance(model, plain, calibration[0])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("clustering", ["kmeans", "reconstruction"])
def test_transposed_convolutions_are_fitted(clustering: str, groups: int) -> None:
    model = Net(
        lambda m, x: m.up(m.first(x)),
        first=unit(3, 12),
        up=nn.ConvTranspose2d(12, 4, 3, 2, 1, output_padding=1, dilation=2, groups=groups),
    ).eval()
    randomize_(model, 0)
    calibration, unseen = data(), torch.randn(64, 3, 8, 8)
    how = {"keep": 0.5, "clustering": clustering}
    plain = merged(model, (unseen[:2],), calibration, compensate="none", **how)
    fitted = merged(model, (unseen[:2],), calibration, compensate="data", **how)
    assert distance(model, fitted, unseen) < 0.9 * distance(model, plain, unseen)
    (summary,) = fitted.report.passes
    assert "up.weight" in summary["cluster_merge"]["fitted"]
    assert ("kept" in summary["cluster_merge"]) == (clustering == "reconstruction")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("how", [(1, 0, 0, 1), (2, 1, 1, 1), (2, 1, 0, 2), (3, 0, 2, 1), (2, 2, 1, 1)])
def test_a_transposed_convolution_is_a_matrix_product(dims: int, how: tuple[int, ...], groups: int) -> None:
    stride, padding, extra, dilation = how
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    made = kind(4, 6, 3, stride, padding, output_padding=extra, groups=groups, dilation=dilation).double()
    x = torch.randn(2, 4, *[6, 5, 4][:dims], dtype=torch.float64)
    y = made(x)
    (layer,) = own_layers(trace(made, (x,))).values()
    rows = torch.arange(layer.places(y))
    read, weight = layer.read([x], [rows]), layer.plain(made.weight)
    assert weight.shape == layer.shape
    assert torch.equal(layer.plain(weight), made.weight)
    product = read @ weight.reshape(groups, -1, read.shape[2]).transpose(1, 2)
    assert relative(layer.parted(layer.picked(y, rows)), product + made.bias.reshape(groups, 1, -1)) < 1e-12


@pytest.mark.parametrize("clustering", ["kmeans", "reconstruction"])
def test_a_fit_brings_outputs_closer(clustering: str) -> None:
    model, x = net()
    calibration, unseen = data(), torch.randn(64, 3, 8, 8)
    how = {"keep": 0.5, "clustering": clustering}
    plain = merged(model, x, calibration, compensate="none", **how)
    fitted = merged(model, x, calibration, compensate="data", **how)
    assert distance(model, fitted, unseen) < 0.5 * distance(model, plain, unseen)
    (summary,) = fitted.report.passes
    assert "head.2.weight" in summary["cluster_merge"]["fitted"]


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.ReLU6(inplace=True),
        nn.Hardtanh(-0.5, 0.5),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        Net(lambda m, x: x.clamp(-1, 1)),
        Net(lambda m, x: x.clamp(max=0.5)),
        Net(lambda m, x: torch.clamp_min(x, 0.3)),
        Net(lambda m, x: torch.clamp_max(x, 0.3)),
    ],
    ids=str,
)
def test_values_that_an_activation_cuts_off_need_not_be_met(
    activation: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 5), nn.Identity()).eval()
    with torch.no_grad():
        model[2].weight.mul_(12.0)
    model[3] = activation
    x = torch.randn(4096, 6)
    both = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr("graphzip_passes.parts.compensation._flat", lambda node: None)
        fitted = merged(model, (x[:2],), [x], keep={"0": 12}, clustering="kmeans", compensate="data")
        both.append(distance(model, fitted, x))
    assert both[0] < 0.99 * both[1]


def test_the_user_s_model_stays_as_it_is() -> None:
    model, x = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged(model, x, data(), keep=0.5, clustering="reconstruction", compensate="data")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- a warm start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensate", ["none", "free", "data"])
@pytest.mark.parametrize("clustering", ["kmeans", "reconstruction"])
@pytest.mark.parametrize("name", ["cifar_resnet_pad", "bottleneck", "resnext_block", "grouped_conv", "cifar_densenet"])
def test_a_collapsed_model_computes_what_the_slim_one_will(name: str, clustering: str, compensate: str) -> None:
    model, x = NETS[name]()
    model = model.double().eval()
    randomize_(model, 0)
    calibration = [torch.randn(16, *x[0].shape[1:], dtype=torch.float64) for _ in range(2)]
    plan = gz.Plan([gz.ClusterMerge(keep=0.5, clustering=clustering, compensate=compensate)])
    prepared = gz.prepare(model, plan, (x[0].double(),), calibration=calibration)
    expected = gz.compile(model, plan, (x[0].double(),), calibration=calibration).module(calibration[0])
    prepared.collapse_()
    assert prepared.deviation() == 0.0
    assert relative(expected, prepared(calibration[0])) < 1e-9
    compiled = prepared.convert()
    assert relative(expected, compiled.module(calibration[0])) < 1e-9


def test_a_warm_start_stays_collapsed_while_it_trains(caplog: pytest.LogCaptureFixture) -> None:
    model, x = net()
    plan = gz.Plan([gz.ClusterMerge(keep=0.5, clustering="reconstruction", compensate="data")])
    prepared = gz.prepare(model, plan, x, calibration=data())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared.collapse_()
    prepared.train()
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.01, momentum=0.9, steps=len(data()))
    assert "is weak" not in caplog.text
    for batch in data():
        optimizer.zero_grad()
        (prepared(batch) - 1).square().mean().backward()
        optimizer.step()
    assert prepared.deviation() == 0.0
    unseen = torch.randn(8, 3, 8, 8)
    trained = prepared.eval()(unseen).detach()
    compiled = prepared.convert()
    assert relative(trained, compiled.module(unseen)) < 1e-5
    assert relative(trained, model(unseen)) > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_variances_of_merged_kernels_are_corrected_without_data() -> None:
    """The mean of two orthogonal kernels of norm 1 has half the variance of each, and so has the batch norm."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    compiled = merged(model, (torch.randn(4, 2),), keep=1, compensate="free")
    assert compiled.module.get_submodule("1").running_var.tolist() == [0.5]
    (summary,) = compiled.report.passes
    assert summary["cluster_merge"]["variances_corrected"] == ["0.weight"]


# --- what is said -----------------------------------------------------------------------------------------------------


def test_data_is_asked_for() -> None:
    model, x = net()
    message = (
        "passes[0].cluster_merge.compensate: 'data' needs calibration data; pass calibration=, a list of batches, or "
        "use compensate='free'"
    )
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        merged(model, x, compensate="data")
    message = (
        "passes[0].cluster_merge.clustering: 'reconstruction' needs calibration data; pass calibration=, a list of "
        "batches, or use clustering='kmeans'"
    )
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        merged(model, x, clustering="reconstruction")
    message = (
        "passes[0].cluster_merge.features: 'both' needs calibration data; pass calibration=, a list of batches, or "
        "use features='weights'"
    )
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        merged(model, x, features="both")


@pytest.mark.parametrize("clustering", ["even", "imbalanced", "reconstruction"])
def test_features_that_a_clustering_does_not_look_at_are_refused(clustering: str) -> None:
    model, x = net()
    message = (
        f"passes[0].cluster_merge.features: 'activations' means nothing to clustering '{clustering}'; leave it out, or "
        "use clustering='kmeans'"
    )
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        merged(model, x, data(1), clustering=clustering, features="activations")


def test_unknown_features_are_refused() -> None:
    message = "cluster_merge.features: 'gradients' is not one of 'weights', 'activations', 'both'"
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        gz.ClusterMerge(features="gradients")


def test_an_unknown_compensation_is_refused() -> None:
    message = "cluster_merge.compensate: 'all' is not one of 'none', 'free', 'data'"
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        gz.ClusterMerge(compensate="all")


def test_weights_that_cannot_be_fitted_are_named() -> None:
    model = Net(
        lambda m, x: m.head(m.same(m.same(m.first(x)).relu()).relu()),
        first=unit(3, 8),
        same=nn.Conv2d(8, 8, 3, padding=1),
        head=head(8),
    ).eval()
    compiled = merged(model, (torch.randn(2, 3, 8, 8),), data(), keep=0.5, compensate="data")
    (summary,) = compiled.report.passes
    assert summary["cluster_merge"]["not_fitted"] == {"same.weight": "is read in more than one place"}


def test_channels_that_were_chosen_are_part_of_a_checkpoint() -> None:
    model, x = net()
    plan = gz.Plan([gz.ClusterMerge(keep={"inner.0": 0.5}, clustering="reconstruction", compensate="data")])
    one = gz.prepare(model, plan, x, calibration=data())
    other = gz.prepare(model, plan, x, calibration=[torch.ones(4, 3, 8, 8)])
    other.load_state_dict(one.state_dict())
    kept = [each.convert().report.passes[0]["cluster_merge"]["kept"] for each in (one, other)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    "options",
    [
        {"compensate": "data"},
        {"features": "activations"},
        {"features": "both"},
        {"compensate": "data", "clustering": "reconstruction"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_calibration_that_is_not_finite_is_refused(options: dict[str, Any]) -> None:
    model, x = net()
    batches = data(2)
    batches[1][3, 0, 2, 2] = torch.nan
    with pytest.raises(
        gz.WeightsError, match=r"weight' reads or gives values that are NaN or infinite.*check the data"
    ):
        merged(model, x, batches, keep=0.5, **options)


# --- what is not given, where there is data ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, {"clustering": "reconstruction", "compensate": "data"}),
        ({"clustering": "kmeans"}, {"clustering": "kmeans", "compensate": "data"}),
        ({"compensate": "none"}, {"clustering": "reconstruction", "compensate": "none"}),
        ({"features": "activations"}, {"features": "activations", "clustering": "kmeans", "compensate": "data"}),
        ({"clustering": "kmeans", "compensate": "none"}, {"clustering": "kmeans", "compensate": "none"}),
    ],
    ids=str,
)
def test_data_decides_what_is_not_given(given: dict[str, Any], meant: dict[str, Any], tmp_path: Path) -> None:
    model, x = net()
    calibration = data()
    plan = gz.Plan([gz.ClusterMerge(keep={"inner.0": 3}, **given)])
    plan.save(tmp_path / "plan.yaml")
    wanted = merged(model, x, calibration, keep={"inner.0": 3}, **meant)
    for each in (plan, gz.Plan.load(tmp_path / "plan.yaml")):
        found = gz.compile(model, each, x, calibration=calibration)
        assert torch.equal(found.module(*x), wanted.module(*x))
        assert found.report.passes == wanted.report.passes


def test_without_data_the_defaults_need_none() -> None:
    model, x = net()
    plain, meant = merged(model, x), merged(model, x, clustering="kmeans", compensate="none")
    assert torch.equal(plain.module(*x), meant.module(*x))


def test_models_that_are_joined_are_merged_without_their_data() -> None:
    nets = {name: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval() for name in ("one", "other")}
    batches = {name: [torch.randn(16, 4)] for name in nets}
    plan = gz.Plan([gz.ClusterMerge(keep=0.5), gz.Zip(share=0.5, metric="euclidean")])
    inputs = {name: (each[0],) for name, each in batches.items()}
    compiled = gz.compile(nets, plan, inputs, calibration=batches)
    assert compiled.report.after.params < compiled.report.before.params


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_reads_a_constant_is_not_fitted_to_its_rounding(dtype: torch.dtype) -> None:
    """A norm over one channel alone has the mean that it is given: what a pooling behind it gives is rounding."""

    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.head(m.norm(m.conv(x)).mean(2))
        return y

    model = Net(run, conv=nn.Conv1d(2, 4, 3, padding=1), norm=nn.GroupNorm(2, 4), head=nn.Linear(4, 3)).to(dtype)
    x = torch.randn(64, 2, 8, dtype=dtype)
    plan = gz.Plan([gz.ClusterMerge(keep={"conv": 0.5}, clustering="even", compensate="data")])
    slim = gz.compile(model.eval(), plan, (x[:2],), calibration=[x]).module
    assert float(slim.get_parameter("head.weight").abs().max()) < 10.0
    with torch.no_grad():
        torch.testing.assert_close(slim(x), model(x).mean(0).expand(64, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-5), (torch.float64, 1e-5), (torch.float64, 1e-12)])
def test_a_layer_is_not_fitted_to_rounding_that_a_norm_magnifies(dtype: torch.dtype, eps: float) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.head(m.norm(m.conv(x)))
        return y

    model = Net(run, conv=nn.Linear(6, 4), norm=nn.GroupNorm(2, 4, eps=eps), head=nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([0.9, 1.1, 1.3, 0.7]))
        model.norm.bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.4]))
    x = torch.randn(64, 6, dtype=dtype)
    plan = gz.Plan([gz.ClusterMerge(keep={"conv": 0.5}, clustering="even", compensate="data")])
    slim = gz.compile(model.eval(), plan, (x[:2],), calibration=[x]).module
    assert float(slim.get_parameter("head.weight").abs().max()) < 10.0
