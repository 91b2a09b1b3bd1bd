"""Other ways to zip: neurons paired by the correlation of their outputs, channels merged within each model before."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zip_nets import own_parameters, permuted, randomized

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 4)),
    )


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for one, two in itertools.pairwise(widths):
        layers += [nn.Linear(one, two), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().eval()


def zipped(nets: dict[str, nn.Module], data: dict[str, Tensor], **options: Any) -> gz.Compiled:
    inputs = {name: (x[:2],) for name, x in data.items()}
    calibration = {name: list(x.split(40)) for name, x in data.items()}
    return gz.compile(nets, gz.Plan([gz.Zip(**options)]), inputs, calibration=calibration)


# --- correlation -----------------------------------------------------------------------------------------------------


def test_neurons_whose_outputs_correlate_are_paired() -> None:
    net, x = randomized(cnn()), torch.randn(80, 3, 8, 8, dtype=torch.float64)
    twin = permuted(net, (x[:2],))
    result = zipped({"a": net, "b": twin}, {"a": x, "b": x}, metric="correlation")
    for name in "ab":
        torch.testing.assert_close(result.task(name)(x), net(x), rtol=1e-9, atol=1e-11)
        assert len(own_parameters(result, name)) == 1, "the head alone is a task's own"


def test_how_large_outputs_are_does_not_matter() -> None:
    """Equation 12 compares weights in units of what they read; outputs that are multiples of each other are far."""
    net, x = mlp(6, 5, 3), torch.randn(80, 6, dtype=torch.float64)
    twin = mlp(6, 5, 3)
    order, scale = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([8.0, 0.1, 3.0, 0.5, 20.0], dtype=torch.float64)
    with torch.no_grad():
        for leaf in ("weight", "bias"):
            getattr(twin[0], leaf).copy_(getattr(net[0], leaf)[order] * scale.reshape(-1, *[1] * (leaf == "weight")))
        twin[2].weight.copy_(net[2].weight[:, order] / scale)
        twin[2].bias.copy_(net[2].bias)
        wanted = net[0](x).numpy()
    result = zipped({"a": net, "b": twin}, {"a": x, "b": x}, metric="correlation", refit=False)
    hidden = result.task("a").get_submodule("0")(x).detach().numpy()
    alike = np.corrcoef(hidden.T, wanted.T)[:5, 5:]
    assert np.allclose(alike.max(1), 1.0), "every shared neuron gives a multiple of what one of the first net's gave"


def test_a_threshold_is_how_little_outputs_correlate() -> None:
    net, other, x = mlp(6, 8, 3), mlp(6, 8, 3), torch.randn(200, 6, dtype=torch.float64)
    with torch.no_grad():
        other[0].weight[:3] = net[0].weight[5:]
        other[0].bias[:3] = net[0].bias[5:]
    result = zipped({"a": net, "b": other}, {"a": x, "b": x}, metric="correlation", threshold=1e-6, refit=False)
    assert result.report.passes[0]["zip"]["layers"]["0"]["channels"] == {"b.0": 3}


def test_three_models_and_part_of_the_channels() -> None:
    net, x = randomized(cnn()), torch.randn(80, 3, 8, 8, dtype=torch.float64)
    nets = {"a": net, "b": permuted(net, (x[:2],), 1), "c": permuted(net, (x[:2],), 2)}
    result = zipped(nets, dict.fromkeys(nets, x), metric="correlation", share=0.5)
    for name in nets:
        torch.testing.assert_close(result.task(name)(x), net(x), rtol=1e-8, atol=1e-10)


def test_models_with_other_inputs_have_nothing_that_correlates() -> None:
    nets = {"a": mlp(6, 5, 3), "b": mlp(6, 5, 3)}
    told = (
        r"passes\[0\].zip.metric: 'correlation' compares what models give for the same inputs; give every task the same"
    )
    with pytest.raises(gz.PlanError, match=told):
        zipped(nets, {name: torch.randn(80, 6, dtype=torch.float64) for name in nets}, metric="correlation")
    x = torch.randn(80, 6, dtype=torch.float64)
    with pytest.raises(gz.PlanError, match=told):
        zipped(nets, {"a": x, "b": x[:40]}, metric="correlation")


def test_correlation_needs_data() -> None:
    nets, x = {"a": mlp(6, 5, 3), "b": mlp(6, 5, 3)}, torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(gz.PlanError, match=r"metric: 'correlation' needs calibration data; pass calibration="):
        gz.compile(nets, gz.Plan([gz.Zip(metric="correlation")]), dict.fromkeys(nets, (x,)))


def test_the_paper_pairs_by_no_correlation() -> None:
    nets, x = {"a": mlp(6, 5, 3), "b": mlp(6, 5, 3)}, torch.randn(40, 6, dtype=torch.float64)
    with pytest.raises(gz.PlanError, match=r"zip\.metric: 'correlation' is not what Algorithm 1 does"):
        zipped(nets, dict.fromkeys(nets, x), metric="correlation", paper=True)


# --- within a model --------------------------------------------------------------------------------------------------


def twice(net: nn.Module) -> nn.Module:
    """The network with every hidden neuron there twice, and half as much of each read."""
    wide = mlp(6, 10, 3)
    with torch.no_grad():
        wide[0].weight.copy_(net[0].weight.repeat(2, 1))  # type: ignore[index, union-attr, operator]
        wide[0].bias.copy_(net[0].bias.repeat(2))  # type: ignore[index, union-attr, operator]
        wide[2].weight.copy_(net[2].weight.repeat(1, 2) / 2)  # type: ignore[index, union-attr, operator]
        wide[2].bias.copy_(net[2].bias)  # type: ignore[index, union-attr, arg-type]
    return wide


def test_channels_of_one_model_become_one_before_those_of_several_do() -> None:
    net, x = mlp(6, 5, 3), torch.randn(80, 6, dtype=torch.float64)
    nets = {"a": twice(net), "b": permuted(twice(net), (x[:2],))}
    result = zipped(nets, dict.fromkeys(nets, x), within=0.5)
    for name in nets:
        torch.testing.assert_close(result.task(name)(x), net(x), rtol=1e-7, atol=1e-9)
    assert result.task("a").get_submodule("0").weight.shape == (5, 6)
    assert result.task("a").get_submodule("0").weight is result.task("b").get_submodule("0").weight
    assert [next(iter(each)) for each in result.report.passes] == ["cluster_merge", "zip"]


def test_without_data_channels_are_merged_by_their_weights() -> None:
    net, x = mlp(6, 5, 3), torch.randn(2, 6, dtype=torch.float64)
    nets = {"a": twice(net), "b": permuted(twice(net), (x,))}
    plan = gz.Plan([gz.Zip(within=0.5, metric="euclidean")])
    result = gz.compile(nets, plan, dict.fromkeys(nets, (x,)))
    for name in nets:
        torch.testing.assert_close(result.task(name)(x), net(x), rtol=1e-9, atol=1e-11)


def test_what_is_carried_out_for_a_share_within() -> None:
    plan = gz.Plan([gz.Zip(within=0.25, share=0.5)])
    merge, apart = plan.expanded(has_data=True).passes
    assert merge == gz.ClusterMerge(keep=0.75, features="activations", compensate="data")
    assert apart == gz.Zip(share=0.5, within=0.0)
    assert plan.expanded(has_data=False).passes[0] == gz.ClusterMerge(keep=0.75)
    assert gz.Plan.from_dict(plan.to_dict()) == plan
    whole = gz.Plan([gz.Zip(), gz.FoldBatchNorm()], inputs=[[1, 3]])
    assert whole.expanded(has_data=True) == whole


def test_tasks_with_fewer_batches_begin_again() -> None:
    net, x = mlp(6, 5, 3), torch.randn(80, 6, dtype=torch.float64)
    nets, inputs = {"a": twice(net), "b": twice(net)}, dict.fromkeys("ab", (x[:2],))
    plan = gz.Plan([gz.ClusterMerge(keep={"a.*": 0.5}, features="activations", compensate="data"), gz.Zip(share=0.0)])
    calibration = {"a": [x], "b": [x[:10], x[10:15], x[15:16]]}
    result = gz.compile(nets, plan, inputs, calibration=calibration)
    torch.testing.assert_close(result.task("a")(x), net(x), rtol=1e-7, atol=1e-9)


def test_models_in_folders_are_zipped_alone(tmp_path: Path) -> None:
    told = r"passes\[0\].zip.within: models in folders are zipped alone; merge each with ClusterMerge before"
    folders = {name: tmp_path / name for name in "ab"}
    for folder in folders.values():
        folder.mkdir()
    with pytest.raises(gz.PlanError, match=told):
        gz.compile_folder(folders, gz.Plan([gz.Zip(within=0.5)]), tmp_path / "joint.graphzip")


@pytest.mark.parametrize("within", [1.0, -0.1, True, "half"])
def test_a_share_within_that_is_none(within: Any) -> None:
    with pytest.raises(gz.PlanError, match=r"zip.within: .* is not a share of channels; write a number from 0,"):
        gz.Zip(within=within)
