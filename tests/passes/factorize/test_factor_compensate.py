"""After kernels became factors, batch norms and layers follow on calibration data, by default."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip_passes.factorize import compensate

pytestmark = pytest.mark.usefixtures("seeded")

LOSSY = [
    gz.AtomFactorize(share=None, atoms=3, force=True),
    gz.AtomFactorize(share="net", atoms=4, force=True),
    gz.SliceGenerate(code=4, slice=(8, 8, 3, 3), force=True),
]


def network() -> nn.Sequential:
    """Its first convolution and its head are no factors; batch norms have the statistics of some data."""
    widths = [(3, 8), (8, 8), (8, 8)]
    blocks = [
        nn.Sequential(nn.Conv2d(one, two, 3, padding=1, bias=False), nn.BatchNorm2d(two, eps=1e-12), nn.ReLU())
        for one, two in widths
    ]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)).double()
    for _ in range(20):
        model(torch.randn(32, 3, 8, 8, dtype=torch.float64))
    return model.eval()


def batches() -> list[Tensor]:
    return [torch.randn(64, 3, 8, 8, dtype=torch.float64) for _ in range(4)]


def compiled(model: nn.Module, options: Any, data: Any) -> gz.Compiled:
    return gz.compile(model, gz.Plan([options]), (torch.zeros(2, 3, 8, 8, dtype=torch.float64),), calibration=data)


@torch.no_grad()
def error(one: nn.Module, other: nn.Module, data: list[Tensor]) -> float:
    return sum(float((one(x) - other(x)).square().mean()) for x in data)


@pytest.mark.parametrize("options", LOSSY, ids=["atoms", "shared", "slices"])
def test_outputs_move_less_by_default(options: Any) -> None:
    model, data = network(), batches()
    before = copy.deepcopy(model.state_dict())
    plain = compiled(model, options.model_copy(update={"compensate": "none"}), data)
    fitted = compiled(model, options, data)
    unseen = batches()
    assert error(fitted.module, model, unseen) < 0.5 * error(plain.module, model, unseen)
    assert fitted.report.after.params == plain.report.after.params
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_what_a_batch_norm_gives_has_the_mean_and_the_spread_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate, "_TURNS", 0)  # factors have no turn of their own
    model, data = network(), batches()
    slim = compiled(model, LOSSY[0], data).module
    given = []
    for each in (model, slim):
        rows: list[Tensor] = []
        hook = each.get_submodule("1.1").register_forward_hook(lambda _m, _x, y, rows=rows: rows.append(y))
        for x in data:
            each(x)
        hook.remove()
        given.append(torch.cat(rows).detach())
    one, two = (each.transpose(0, 1).flatten(1) for each in given)
    torch.testing.assert_close(two.mean(1), one.mean(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(two.var(1), one.var(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", LOSSY[:2], ids=["atoms", "shared"])
def test_factors_are_fitted_to_what_the_layers_before_give(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, unseen = network(), batches(), batches()
    fitted = compiled(model, options, data)
    monkeypatch.setattr(compensate, "_TURNS", 0)
    apart = compiled(model, options, data)
    assert error(fitted.module, model, unseen) < 0.99 * error(apart.module, model, unseen)
    assert fitted.report.after.params == apart.report.after.params


def test_nothing_changes_where_the_fit_is_exact() -> None:
    model, data = network(), batches()
    slim = compiled(model, gz.AtomFactorize(share=None, atoms=9, force=True), data).module
    state = slim.state_dict()
    for name, value in model.state_dict().items():
        if name in state:
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-9)
    assert error(slim, model, data) < 1e-15


def test_a_prepared_model_starts_from_there() -> None:
    model, data = network(), batches()
    example = (data[0][:2],)
    prepared = gz.prepare(model, gz.Plan([LOSSY[0]]), example, calibration=data).eval()
    assert error(prepared, compiled(model, LOSSY[0], data).module, data) < 1e-15


@pytest.mark.parametrize("options", LOSSY[::2], ids=["atoms", "slices"])
def test_data_that_is_asked_for_has_to_be_there(options: Any) -> None:
    with pytest.raises(gz.PlanError, match="compensate: 'data' needs calibration data"):
        compiled(network(), options.model_copy(update={"compensate": "data"}), None)
