"""The baselines: channels that are dropped by magnitude, after group lasso or without."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from nets import NETS
from planting import relative
from residual_net import residual
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def image() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64)


def prepared(model: nn.Module, **options: Any) -> gz.Prepared:
    return gz.prepare(model, gz.Plan([gz.PruneChannels(**options)]), (image(),))


def smallest(count: int, *kernels: Tensor) -> list[int]:
    """By the sum of absolute values over all kernels that make a channel."""
    size = torch.stack([kernel.detach().abs().flatten(1).sum(1) for kernel in kernels]).sum(0)
    return sorted(size.argsort()[:count].tolist())


def test_the_smallest_channels_go() -> None:
    model = residual()
    compiled = gz.compile(model, gz.Plan([gz.PruneChannels(keep={"stem": 0.5, "inner": 4})]), (image(),))
    stem, inner = smallest(4, model.stem.weight, model.out.weight), smallest(2, model.inner.weight)
    assert compiled.report.passes[0]["prune_channels"]["dropped"] == {"stem": stem, "inner": inner}
    left, left_inner = ([k for k in range(n) if k not in gone] for n, gone in ((8, stem), (6, inner)))
    module = compiled.module
    assert torch.equal(module.stem.weight, model.stem.weight[left])
    assert torch.equal(module.inner.weight, model.inner.weight[left_inner][:, left])
    assert torch.equal(module.head.weight, model.head.weight[:, left])
    assert torch.equal(module.norm0.running_var, model.norm0.running_var[left])
    assert not compiled.report.lossless
    assert "not lossless: channels were dropped" in str(compiled.report)


def test_dropping_channels_that_are_zero_changes_nothing() -> None:
    model, x = residual(), image()
    ready = prepared(model, keep=0.5)
    assert ready.deviation() > 0
    ready.collapse_()
    assert ready.deviation() == ready.residual() == 0.0
    expected = ready(x).detach()
    assert relative(expected, ready.convert().module(x)) < 1e-12


@pytest.mark.parametrize("name", ["cifar_resnet_pad", "cifar_densenet", "grouped_after_cat", "layer_norm_channels"])
def test_other_networks(name: str) -> None:
    model, inputs = NETS[name]()
    compiled = gz.compile(model, gz.Plan([gz.PruneChannels()]), inputs)
    widths = {group.name: group.after for group in compiled.report.groups}
    merged = gz.compile(model, gz.Plan([gz.ClusterMerge(clustering="even")]), inputs)
    assert widths == {group.name: group.after for group in merged.report.groups}
    assert compiled.module(*inputs).shape == model(*inputs).shape


def test_residual_and_group_lasso_by_hand() -> None:
    """Eq. 22, and the sum of the kernels' norms over every layer of a group."""
    model = residual()
    ready = prepared(model, keep={"stem": 6, "inner": 5}, strength=0.25)
    stem, inner = smallest(2, model.stem.weight, model.out.weight), smallest(1, model.inner.weight)
    kernels = [model.stem.weight[stem], model.out.weight[stem], model.inner.weight[inner]]
    norms = torch.cat([kernel.flatten(1).norm(dim=1) for kernel in kernels])
    assert ready.residual() == pytest.approx(float(norms.detach().square().sum()), rel=1e-12)
    assert float(ready.regularizer().detach()) == pytest.approx(0.25 * float(norms.detach().sum()), rel=1e-9)


def test_group_lasso_makes_the_residual_small() -> None:
    ready = prepared(residual().train(), keep=0.5, strength=0.3)
    optimizer = ready.optimizer(torch.optim.SGD, lr=0.02)
    start = ready.residual()
    for _ in range(100):
        loss = (ready(image()) - 1).square().mean() + ready.regularizer()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ready.residual() < 0.05 * start
    assert ready.history[0].residual == start
    assert ready.history[-1].residual < 0.05 * start


def test_merging_reports_the_residual_beside_the_deviation() -> None:
    model = residual()
    ready = gz.prepare(model, gz.Plan([gz.ClusterMerge(clusters={"inner": [[0, 2], [1, 3, 4], [5]]})]), (image(),))
    gone = model.inner.weight.detach()[[2, 3, 4]]
    assert ready.residual() == pytest.approx(float(gone.square().sum()), rel=1e-12)
    assert float(ready.regularizer()) == 0.0
    assert ready.record().residual == ready.residual()


def test_what_goes_travels_in_a_checkpoint() -> None:
    ready, again = prepared(residual(), keep=0.5), prepared(residual(), keep=0.5)
    with torch.no_grad():
        again.model.stem.weight.copy_(torch.randn_like(again.model.stem.weight))
    ready.clusters[:8] = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    again.load_state_dict(ready.state_dict())
    assert again.convert().report.passes[0]["prune_channels"]["dropped"]["stem"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1}, "prune_channels.strength: -1 is not a strength; write a number of at least 0"),
        ({"keep": 9}, "passes[0].prune_channels.keep: 9 channels cannot be kept of group 'stem', which has 8"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gz.PlanError, match=re.escape(message)):
        prepared(residual(), **options)
