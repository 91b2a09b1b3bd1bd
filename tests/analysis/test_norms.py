"""Norms over merged channels: weighted where that is needed, plain where the plan asks for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphzip as gz

UNEVEN = {"0": [[0, 1, 2], [3], [4, 5]]}


def network(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
        for part in UNEVEN["0"]:
            for tensor in (model[0].weight, model[0].bias, *norm.parameters()):
                tensor[part] = tensor[part[0]].clone()
    return model


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6)])
def test_an_uneven_merge_makes_the_norm_a_weighted_one(norm: nn.Module) -> None:
    model, x = network(norm), torch.randn(5, 4, dtype=torch.float64)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=UNEVEN)]), (x,))
    assert compiled.module.get_submodule("0").out_features == 3
    torch.testing.assert_close(compiled.module(x), model(x), rtol=1e-12, atol=1e-12)
    assert compiled.report.lossless


def test_an_even_merge_leaves_the_norm_as_it_is() -> None:
    model, x = network(nn.LayerNorm(6)), torch.randn(5, 4, dtype=torch.float64)
    clusters = [[0, 1], [2, 3], [4, 5]]
    with torch.no_grad():
        for part in clusters:
            for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
                tensor[part] = tensor[part[0]].clone()
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters={"0": clusters})]), (x,))
    assert isinstance(compiled.module.get_submodule("1"), nn.LayerNorm)
    torch.testing.assert_close(compiled.module(x), model(x), rtol=1e-12, atol=1e-12)


def test_plain_norms_stay_plain_and_the_report_says_that_it_is_not_exact() -> None:
    model, x = network(nn.LayerNorm(6)), torch.randn(5, 4, dtype=torch.float64)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=UNEVEN, norms="plain")]), (x,))
    assert isinstance(compiled.module.get_submodule("1"), nn.LayerNorm)
    assert (compiled.module(x) - model(x)).abs().max() > 1e-3
    assert not compiled.report.lossless
    assert "not lossless: channels were dropped, or norms that were left plain count merged channels once" in str(
        compiled.report
    )
    assert compiled.report.to_dict()["passes"][0]["cluster_merge"]["plain_norms"] == ["layer_norm (node layer_norm)"]


@pytest.mark.parametrize("size", [(), (1,), (1, 1)])
@pytest.mark.parametrize("halved", [False, True])
def test_one_channel_per_group_takes_one_sample(size: tuple[int, ...], halved: bool) -> None:
    """Where two channels of a group were equal, torch took a batch of one; the one that is left takes it as well."""
    make = (nn.Linear(4, 6), nn.Conv1d(4, 6, 1), nn.Conv2d(4, 6, 1))[len(size)]
    torch.manual_seed(0)
    model = nn.Sequential(make, nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.uniform_(-1, 1)
        for tensor in (make.weight, make.bias, model[1].weight, model[1].bias) if halved else ():
            tensor[1::2] = tensor[::2].clone()
    parts = [[n, n + 1] for n in (0, 2, 4)] if halved else [[n] for n in range(6)]
    x = torch.randn(4, 4, *size, dtype=torch.float64)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters={"0": parts})]), (x,))
    assert isinstance(compiled.module.get_submodule("1"), nn.GroupNorm)
    for again in (compiled.module, gz.compile(compiled.module, gz.Plan([]), (x,)).module):
        assert isinstance(again.get_submodule("1"), nn.GroupNorm)
        for batch in (x, x[:1]):
            for mode in (True, False):
                torch.testing.assert_close(again.train(mode)(batch), model.train(mode)(batch), rtol=1e-12, atol=1e-12)


def test_a_norm_of_the_inputs_makes_no_channels() -> None:
    model = nn.Sequential(nn.Flatten(1), nn.LayerNorm(12), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    groups = gz.channel_groups(model, (torch.randn(2, 3, 4),))
    assert groups.names == ("2", "4")
