"""Shared weights are fitted to what the models gave before."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from domain_pairs import DATA, EXAMPLE, models
from torch import Tensor, nn

import graphzip as gz
from graphzip.process_groups import ALONE
from graphzip_passes.cross_domain import shared_fit
from graphzip_passes.cross_domain.shared_layers import SharedLayer


def joined() -> nn.ModuleDict:
    return nn.ModuleDict(models()).eval()


def feed(model: nn.ModuleDict) -> Any:
    """What gives calibration data to the tasks of a model."""

    def run(begun: Callable[[int], None] | None = None) -> None:
        for task, batches in DATA.items():
            for number, batch in enumerate(batches):
                if begun is not None:
                    begun(number)
                model[task](batch)

    return SimpleNamespace(run=run, processes=ALONE)


def conv() -> SharedLayer:
    return SharedLayer("conv2", ("rgb", "depth"), (6, 6), 8, (3, 3), 5)


def linear() -> SharedLayer:
    return SharedLayer("fc1", ("rgb", "depth"), (32, 32), 12, (), 16)


def by_mean(layer: SharedLayer, number: np.ndarray, model: nn.ModuleDict) -> None:
    weights = [model[task].get_parameter(f"{layer.name}.weight") for task in layer.tasks]
    rows = torch.cat([weight.detach().transpose(0, 1) for weight in weights])
    for cluster in np.unique(number):
        rows[number == cluster] = rows[number == cluster].mean(0)
    for weight, part in zip(weights, rows.split(list(layer.sizes)), strict=True):
        weight.data.copy_(part.transpose(0, 1))


def outputs(layer: SharedLayer, model: nn.ModuleDict) -> Tensor:
    """What a layer gives on all data, of one task after the other."""
    found: list[Tensor] = []
    hooks = [
        model[task].get_submodule(layer.name).register_forward_hook(lambda *called: found.append(called[2].flatten()))
        for task in layer.tasks
    ]
    with torch.no_grad():
        feed(model).run()
    for hook in hooks:
        hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize("layer", [conv(), linear()], ids=["conv", "linear"])
def test_the_fit_is_better_than_the_centre_and_moving_better_than_that(layer: SharedLayer) -> None:
    before, errors = joined(), []
    wanted = outputs(layer, before)
    number = np.random.default_rng(2).permutation(layer.channels) % layer.count
    for kind in ("centre", "fit", "move"):
        model = copy.deepcopy(before)
        by_mean(layer, number, model)
        if kind != "centre":
            found = shared_fit.fit_shared(layer, number, model, before, feed(model), move=kind == "move")
            assert len(np.unique(found)) == layer.count
            assert np.array_equal(found, number) == (kind == "fit")
        errors.append(float((outputs(layer, model) - wanted).square().sum()))
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.9 * errors[1]


def test_the_fit_is_the_damped_least_squares_solution() -> None:
    layer, before = linear(), joined()
    number = np.arange(64) % 16
    model = copy.deepcopy(before)
    by_mean(layer, number, model)
    centre = copy.deepcopy(model)
    shared_fit.fit_shared(layer, number, model, before, feed(model), move=False)

    rows, missing = [], []
    for position, task in enumerate(layer.tasks):
        x = torch.cat([before[task][:7](batch) for batch in DATA[task]]).detach()
        added = x.new_zeros(len(x), 16).index_add(1, torch.from_numpy(number[32 * position :][:32]), x)
        rows.append(torch.cat([added, torch.eye(2, dtype=x.dtype)[position].expand(len(x), -1)], 1))
        missing.append((before[task].fc1(x) - centre[task].fc1(x)).detach())
    left, right = torch.cat(rows).numpy(), torch.cat(missing).numpy()
    damping = 1e-2 * (left[:, :16] ** 2).sum(0).mean()
    left = np.concatenate([left, damping**0.5 * np.eye(16, 18)])
    right = np.concatenate([right, np.zeros((16, 12))])
    change = np.linalg.lstsq(left, right, rcond=None)[0]
    for position, task in enumerate(layer.tasks):
        moved = (model[task].fc1.weight - centre[task].fc1.weight).detach().numpy()
        np.testing.assert_allclose(moved, change[number[32 * position :][:32]].T, atol=1e-9)
        shift = (model[task].fc1.bias - centre[task].fc1.bias).detach().numpy()
        np.testing.assert_allclose(shift, change[16 + position], atol=1e-9)


def few(model: nn.ModuleDict) -> Any:
    """Fewer rows than a layer reads, or has unknowns."""

    def run(begun: Callable[[int], None] | None = None) -> None:
        for task, batches in DATA.items():
            if begun is not None:
                begun(0)
            model[task](batches[0][:5])

    return SimpleNamespace(run=run, processes=ALONE)


def without_bias() -> nn.ModuleDict:
    made = joined()
    for task in made.values():
        task.get_submodule("fc1").register_parameter("bias", None)
    return made


@pytest.mark.parametrize("make", [joined, without_bias])
@pytest.mark.parametrize("move", [False, True])
def test_a_fit_on_few_rows_is_that_on_their_products(
    make: Callable[[], nn.ModuleDict], move: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, before = linear(), make()
    found, kinds = [], []
    side = shared_fit._Seen.side
    for as_products in (False, True):

        def kept(seen: Any, task: str, as_products: bool = as_products) -> Any:
            own = side(seen, task)
            kinds.append(type(own).__name__)
            return own.products() if as_products else own  # type: ignore[union-attr]

        monkeypatch.setattr(shared_fit._Seen, "side", kept)
        model, number = copy.deepcopy(before), np.arange(64) % 16
        by_mean(layer, number, model)
        chosen = shared_fit.fit_shared(layer, number, model, before, few(model), move=move)
        found.append((chosen, [each.detach() for each in model.parameters()]))
    assert set(kinds) == {"SideRows"}
    assert np.array_equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def scaled(scales: list[float]) -> nn.Sequential:
    """Its six channels are three, each twice, in different sizes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 6, 3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(8, 4, 3),
        )
    ).double()
    with torch.no_grad():
        for each in (net.conv1.weight, net.conv1.bias):
            each[3:] = each[:3]
            each.mul_(torch.tensor(scales, dtype=each.dtype).reshape(-1, *[1] * (each.dim() - 1)))
    return net


def test_features_that_differ_in_their_amplitude_alone_keep_the_output() -> None:
    pair = {"rgb": scaled([1.0, 2.0, 0.5, 3.0, 0.1, 1.0]), "depth": scaled([1.0, 2.0, 0.5, 3.0, 0.1, 1.0])}
    data = dict.fromkeys(pair, DATA["depth"])
    plan = gz.Plan([gz.CrossDomainShare(clusters={"conv2": 3})])
    compiled = gz.compile(pair, plan, {name: (each[0],) for name, each in data.items()}, calibration=data)
    for name, model in pair.items():
        expected = model(data[name][1])
        assert float((compiled.task(name)(data[name][1]) - expected).detach().abs().max()) < 1e-9


def test_clusters_set_by_hand_do_not_change() -> None:
    by_hand = torch.cat([torch.arange(12) % 5, torch.arange(64) % 16])
    plan = gz.Plan([gz.CrossDomainShare(clusters={"conv2": 5, "fc1": 16})])
    ready = gz.prepare(models(), plan, EXAMPLE, calibration=DATA)
    for stage in ready.steps():
        if stage == "regularize":
            ready.clusters.copy_(by_hand)
        else:
            for ours, given in zip(ready.clusters.split([12, 64]), by_hand.split([12, 64]), strict=True):
                assert torch.equal(ours[:, None] == ours, given[:, None] == given)


def test_a_later_layer_is_fitted_to_what_the_earlier_one_gives_now() -> None:
    """With conv2 spoilt, the fit of fc1 reads what comes through it."""
    layer, before = linear(), joined()
    number = np.arange(64) % 16
    spoilt = copy.deepcopy(before)
    for task in layer.tasks:
        spoilt[task].conv2.weight.data.mul_(0.5)
    by_mean(layer, number, spoilt)
    wanted = outputs(layer, before)
    error = float((outputs(layer, spoilt) - wanted).square().sum())
    shared_fit.fit_shared(layer, number, spoilt, before, feed(spoilt), move=False)
    assert float((outputs(layer, spoilt) - wanted).square().sum()) < 0.7 * error


def test_a_layer_that_reads_too_much_keeps_its_centres(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_fit, "_FEATURES", 53)
    layer, model = conv(), joined()
    before = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, "graphzip_passes.cross_domain.shared_fit"):
        shared_fit.fit_shared(layer, np.arange(12) % 5, model, before, feed(model), move=True)
    assert "conv2 keeps the centres of its clusters: it has 54 inputs" in caplog.text
    assert torch.equal(model["rgb"].conv2.weight, before["rgb"].conv2.weight)


def test_a_bias_that_both_models_have_in_common_stays() -> None:
    layer, model = conv(), joined()
    model["depth"].conv2.bias = model["rgb"].conv2.bias
    before, bias = copy.deepcopy(model), model["rgb"].conv2.bias.detach().clone()
    number = np.arange(12) % 5
    by_mean(layer, number, model)
    shared_fit.fit_shared(layer, number, model, before, feed(model), move=False)
    assert torch.equal(model["rgb"].conv2.bias, bias)
    assert not torch.equal(model["rgb"].conv2.weight, before["rgb"].conv2.weight)
