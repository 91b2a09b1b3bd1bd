"""What a network holds for nothing is found and goes, and no output changes; where nothing is, nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_nets import ATTENTION_NETS
from nets import NETS
from planting import double, plant, randomize_, relative
from residual_net import residual
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 10, 10, dtype=torch.float64)


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 14, 1, bias=False),
        nn.BatchNorm2d(14),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(56, 20),
        nn.GELU(),
        nn.Linear(20, 5),
    ).double()
    randomize_(model, 0)
    return model.eval()


def minimized(model: nn.Module, x: Tensor | None = None, **options: Any) -> gz.Compiled:
    return gz.compile(model, gz.Plan([gz.Minimize(**options)]), (images() if x is None else x,))


def found(compiled: gz.Compiled) -> dict[str, dict[str, int]]:
    channels: dict[str, dict[str, int]] = compiled.report.passes[0]["minimize"]["channels"]
    return channels


def assert_same(model: nn.Module, compiled: gz.Compiled, *, train: bool = True) -> None:
    for count in (1, 4):
        x = images(count)
        assert relative(model(x), compiled.module(x)) < 1e-9
    if train:
        x = images(4)
        assert relative(copy.deepcopy(model).train()(x), copy.deepcopy(compiled.module).train()(x)) < 1e-9
    assert compiled.report.lossless


# ---------------------------------------------------------------------------------------------------- each kind


def test_channels_that_nothing_reads() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[:, [2, 7]] = 0.0
        model[6].weight[:, 5] = 0.0
        model[11].weight[:, 12:20] = 0.0  # all places of the channels 3 and 4
        model[13].weight[:, 19] = 0.0
    result = minimized(model)
    assert found(result) == {"0": {"dead": 2}, "3": {"dead": 1}, "6": {"dead": 2}, "11": {"dead": 1}}
    assert_same(model, result)
    assert [result.module.get_submodule(name).weight.shape[0] for name in ("0", "3", "6", "11")] == [10, 15, 12, 19]


def test_what_becomes_dead_when_the_dead_are_gone() -> None:
    model = network()
    with torch.no_grad():
        model[11].weight[:, 20:24] = 0.0  # channel 5 of layer 6, which alone reads channel 4 of layer 3
        model[6].weight[:, 4] = 0.0
        model[6].weight[5, 4] = 1.0
        model[3].weight[:, 1] = 0.0
        model[3].weight[4, 1] = 1.0
    result = minimized(model)
    assert found(result) == {"0": {"dead": 1}, "3": {"dead": 1}, "6": {"dead": 1}}
    assert_same(model, result)


@pytest.mark.parametrize("value", [0.0, 0.7, -0.4])
def test_channels_that_hold_one_number(value: float) -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[[3, 8]] = 0.0
        model[3].bias[[3, 8]] = value
        model[11].weight[4] = 0.0
        model[11].bias[4] = value
    result = minimized(model)
    assert found(result) == {"3": {"constant": 2}, "11": {"constant": 1}}
    assert_same(model, result)


def test_a_number_in_front_of_padding_stays_and_zero_goes() -> None:
    def net() -> nn.Sequential:
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).double()
        with torch.no_grad():
            model[0].weight[5] = 0.0
        return model

    model = net()
    with torch.no_grad():
        model[0].bias[5] = 0.5
    result = minimized(model)
    assert not result.report.changed
    model = net()
    with torch.no_grad():
        model[0].bias[5] = -0.5
    result = minimized(model)
    assert found(result) == {"0": {"constant": 1}}
    assert_same(model, result)


def test_channels_that_are_equal_or_in_proportion() -> None:
    model = network()
    with torch.no_grad():
        for target, source, factor in ((4, 1, 1.0), (9, 1, 0.3), (11, 2, 7.0)):
            model[3].weight[target] = factor * model[3].weight[source]
            model[3].bias[target] = factor * model[3].bias[source]
        norm: Any = model[1]
        model[0].weight[6] = 2 * model[0].weight[5]  # in proportion, and equal behind the norm
        model[0].bias[6] = 2 * model[0].bias[5]
        norm.running_mean[6] = 2 * norm.running_mean[5]
        norm.running_var[6] = 4 * (norm.running_var[5] + norm.eps) - norm.eps
        norm.weight[6] = 3 * norm.weight[5]
        norm.bias[6] = 3 * norm.bias[5]
        model[11].weight[3] = 2 * model[11].weight[2]  # GELU does not grow with what it reads
        model[11].bias[3] = 2 * model[11].bias[2]
    result = minimized(model)
    assert found(result) == {"0": {"proportional": 1}, "3": {"identical": 1, "proportional": 2}}
    assert_same(model, result, train=False)


def test_opposite_channels_and_slopes_of_their_own_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[1].weight.uniform_(0.1, 0.9)
        model[0].weight[1] = -model[0].weight[0]
        model[0].bias[1] = -model[0].bias[0]
        model[1].weight[1] = model[1].weight[0]
        model[0].weight[3] = 2 * model[0].weight[2]
        model[0].bias[3] = 2 * model[0].bias[2]
    x = torch.randn(5, 4, dtype=torch.float64)
    assert not minimized(model, x).report.changed
    with torch.no_grad():
        model[1].weight[3] = model[1].weight[2]
    result = minimized(model, x)
    assert found(result) == {"0": {"proportional": 1}}
    assert relative(model(x), result.module(x)) < 1e-12


class Between(nn.Module):
    """Two layers, and something in between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between, self.first, self.last = between, nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.between(self.first(x).relu()))
        return found


@pytest.mark.parametrize(
    ("between", "grows"),
    [
        (lambda h: nn.functional.pad(h, (1, 1, 1, 1)), True),
        (lambda h: nn.functional.pad(h, (1, 1, 1, 1), value=1.0), False),
        (lambda h: torch.cat([h, h], 2), True),
        (lambda h: torch.cat([h, torch.ones_like(h[:, :, :1])], 2), False),
        (lambda h: h + nn.functional.max_pool2d(h, 3, 1, 1), True),
        (lambda h: h + torch.ones_like(h), False),
        (lambda h: h + 1, False),
        (lambda h: h + torch.arange(6.0, dtype=torch.float64)[:, None, None] * 0 + torch.tensor(0.5).double(), False),
        (lambda h: h * h, True),
        (lambda h: h * h.mean((2, 3), keepdim=True), True),
        (lambda h: h * h.sigmoid(), False),
        (lambda h: h / (1 + h.sum(1, keepdim=True).detach() * 0), False),
        (lambda h: h.round().to(torch.int32).double(), False),
    ],
)
def test_what_is_in_between_has_to_grow_with_the_channels(between: Callable[[Tensor], Tensor], grows: bool) -> None:
    model = Between(between).double()
    with torch.no_grad():
        model.first.weight[4] = 2 * model.first.weight[1]
        model.first.bias[4] = 2 * model.first.bias[1]
    result = minimized(model)
    assert found(result) == ({"first": {"proportional": 1}} if grows else {})
    assert_same(model, result, train=False)


@pytest.mark.parametrize("value", [0.5, -0.5])
def test_a_number_that_depends_on_the_size_stays(value: float) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 6, 1), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(self.first(x).relu().sum((2, 3)))
            return found

    model = Summed().double()
    with torch.no_grad():
        model.first.weight[4] = 0.0
        model.first.bias[4] = value
    result = gz.compile(model, gz.Plan([gz.Minimize()]), (images(),), dynamic_shapes="height,width")
    assert found(result) == ({} if value > 0 else {"first": {"constant": 1}})
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    assert relative(model(x), result.module(x)) < 1e-12


def test_linear_layers_in_a_row() -> None:
    model = nn.Sequential(
        nn.Linear(6, 30), nn.Linear(30, 12, bias=False), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 2), nn.Linear(2, 9)
    ).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    result = minimized(model, x)
    assert result.report.passes[0]["minimize"]["joined"] == [["0", "1"], ["1", "2"]]
    assert relative(model(x), result.module(x)) < 1e-12
    assert set(dict(result.module.named_parameters())) == {
        *("2.weight", "2.bias", "4.weight", "4.bias", "5.weight", "5.bias")
    }
    assert not minimized(model, x, chains=False).report.changed


def test_residual_streams() -> None:
    """Channels of a sum are dead where every reader of it is deaf, and constant where every term is."""
    model = residual()
    with torch.no_grad():
        model.inner.weight[:, 3] = 0.0
        model.head.weight[:, 3] = 0.0
        for layer in (model.stem, model.out):
            layer.weight[5] = 0.0
        model.inner.weight[:, 5] = 0.0
        model.out.weight[:, 2] = 0.0
    result = minimized(model)
    assert found(result) == {"stem": {"constant": 1, "dead": 1}, "inner": {"dead": 1}}
    assert_same(model, result, train=False)
    model = residual()
    with torch.no_grad():
        model.inner.weight[:, 3] = 0.0  # the head still reads it
    assert not minimized(model).report.changed


def test_a_norm_over_channels_hears_every_one_of_them() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 10), nn.LayerNorm(10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(self.norm(self.first(x)))
            return found

    model = Normed().double()
    with torch.no_grad():
        model.last.weight[:, 2] = 0.0
    x = torch.randn(5, 4, dtype=torch.float64)
    assert not minimized(model, x).report.changed
    with torch.no_grad():
        for layer in (model.first, model.norm):
            layer.weight[[4, 7]] = 0.0
            layer.bias[[4, 7]] = 0.0
    result = minimized(model, x)
    assert found(result) == {"first": {"constant": 2}}  # the norm goes on counting them
    assert relative(model(x), result.module(x)) < 1e-9


class ReadApart(nn.Module):
    """A shift of channels, one of which nobody reads; the mean of the shift, which has no channels, is given out."""

    def __init__(self, *, runs: bool) -> None:
        super().__init__()
        self.a, self.b, self.runs = nn.Linear(4, 6), nn.Linear(6, 3), runs
        self.shift = nn.Parameter(torch.randn(6))
        with torch.no_grad():
            self.b.weight[:, 2] = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.b((self.a(x) + self.shift).relu()) if self.runs else x), self.shift.mean()


@pytest.mark.parametrize("runs", [True, False])
def test_parameters_that_are_read_apart_from_their_channels(runs: bool) -> None:
    model, x = ReadApart(runs=runs).double().eval(), torch.randn(5, 4, dtype=torch.float64)
    result = minimized(model, x)
    for got, wanted in zip(result.module(x), model(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_one_channel_of_every_group_stays() -> None:
    model = network()
    with torch.no_grad():
        model[13].weight.zero_()
    result = minimized(model)
    assert all(group.after == 1 for group in result.report.groups)
    assert_same(model, result)


def test_a_tolerance_takes_what_is_nearly_alike() -> None:
    model = network()
    with torch.no_grad():
        model[11].weight[4] = model[11].weight[3] * (1 + 1e-5)
        model[11].bias[4] = model[11].bias[3]
    assert not minimized(model).report.changed
    result = minimized(model, tolerance=1e-3)
    assert found(result) == {"11": {"identical": 1}}
    assert not result.report.lossless
    assert result.module.get_submodule("11").weight.shape[0] == 19


# ---------------------------------------------------------------------------------------------------- any network


@pytest.mark.parametrize(
    "name",
    [
        name if number % 8 == 0 else pytest.param(name, marks=pytest.mark.slow)
        for number, name in enumerate([*NETS, *ATTENTION_NETS])
    ],
)
def test_what_is_planted_is_found_and_nothing_else(name: str) -> None:
    """In float64; some networks have redundant channels of their own."""
    model, inputs = (NETS | ATTENTION_NETS)[name]()
    model = double(model)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    randomize_(model, 0, inputs)
    plan = gz.Plan([gz.Minimize(chains=False)])
    before = gz.compile(model, plan, inputs)
    assert relative(model(*inputs), before.module(*inputs)) < 1e-9
    groups = gz.channel_groups(model, inputs)
    planted = plant(model, groups, 0, choose=lambda group: group.mergeable and group.exact and not group.whole_blocks)
    after = gz.compile(model, plan, inputs)
    assert relative(model(*inputs), after.module(*inputs)) < 1e-9
    widths = {group.name: group.after for group in after.report.groups}
    for group, clusters in planted.items():
        assert widths.get(group, groups[group].size) <= len(clusters), group


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1}, "minimize.tolerance: -1 is not a tolerance; write a number of at least 0"),
        ({"exclude": ["x"]}, r"passes\[0\].minimize.exclude\[0\]: 'x' matches no channel group; "),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gz.PlanError, match=message):
        minimized(network(), **options)


def test_excluded_groups_stay() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[:, 2] = 0.0
        model[6].weight[:, 5] = 0.0
    assert found(minimized(model, exclude=["0"])) == {"3": {"dead": 1}}
