"""Budgets of latency: prices are what layers are measured to take, and widths fall where they are fast."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphzip as gz
from graphzip.export.latency import RowLayer, kernel_milliseconds
from graphzip.study.allocation import Budget, Curve, allocate
from graphzip.study.cost_model import Point, Price, WidthTable
from graphzip.study.latency_price import latency_price

X = (torch.randn(2, 3, 8, 8),)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU())
        self.deep = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.last = nn.Conv2d(48, 160, 1)
        self.head = nn.Linear(160, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.deep(self.stem(x)).relu()).mean((2, 3)))


def in_blocks(image: tuple[int, ...], layer: RowLayer) -> float:
    """What a machine takes that has blocks of 16 channels, and a beginning."""
    outs, ins, *kernel = layer.weight
    outs, ins = 16 * -(-outs // 16), 16 * -(-ins // 16)
    return 1e-3 + 1e-9 * outs * ins * np.prod(kernel) * np.prod(image) / image[1]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphzip.study.latency_price.kernel_milliseconds", in_blocks)
    monkeypatch.setattr("graphzip.study.latency.latency_at", lambda *_: 1.0)


def study(**options: Any) -> gz.WidthStudy:
    torch.manual_seed(0)
    return gz.WidthStudy(Branches().eval(), X, effort="fast", **options)


@pytest.mark.usefixtures("pretended")
def test_layers_cost_what_they_are_measured_to_take() -> None:
    found = study(round_to=1)
    price, names = found.stopwatch.price, list(found.choices)
    assert price.whole == pytest.approx(1.0)
    assert len(price.tables) == 4
    assert set(names) == {"stem.0", "last"}

    def saved(**left: int) -> float:
        gone = [found.units.size(name) - left.get(name.replace(".", "_"), found.units.size(name)) for name in names]
        return price.whole - price.at(np.array(gone, dtype=np.float64))

    assert saved(stem_0=47) == 0.0
    assert saved(stem_0=32) > saved(stem_0=33) == 0.0
    assert saved(last=144) > saved(last=145) > 0  # the mean behind it has one channel less
    assert saved(stem_0=16, last=16) > saved(stem_0=16) + 0.1


def test_layers_are_measured_once_for_all_studies_with_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[RowLayer] = []

    def counted(image: tuple[int, ...], layer: RowLayer) -> float:
        measured.append(layer)
        return in_blocks(image, layer)

    monkeypatch.setattr("graphzip.study.latency_price.kernel_milliseconds", counted)
    monkeypatch.setattr("graphzip.study.latency.latency_at", lambda *_: 1.0)
    cache = tmp_path / "cache"
    first = study(round_to=1, cache=cache)
    first.measure()
    price, count = first.stopwatch.price, len(measured)
    again = study(round_to=2, cache=cache)
    gone = np.zeros(price.groups)
    assert again.stopwatch.price.at(gone + 4) == pytest.approx(price.at(gone + 4))
    assert count == len(measured) > 0


@pytest.mark.usefixtures("pretended")
def test_widths_fall_where_layers_are_fast() -> None:
    found = study(round_to=1)
    curves = [Curve(np.arange(size), np.arange(size) / size) for size in map(found.units.size, found.choices)]
    price = found.stopwatch.price
    for share in (0.8, 0.6, 0.4):
        gone = found.units.kinds.allocate(curves, [Budget(price, share * price.whole)])
        assert gone is not None
        widths = found.units.widths(gone)
        assert widths["stem.0"] % 16 == 0 or widths["last"] % 16 == 0
        assert price.at(gone.astype(float)) <= share * price.whole


def random_price(random: np.random.Generator, groups: int) -> Price:
    """Terms of products, and of tables whose first two dimensions are narrowed by one group each."""
    along = tuple(np.eye(groups)[random.integers(0, groups, 4)] / 8 for _ in range(2))
    tables = {
        term: WidthTable((np.linspace(0, 3, 9), np.linspace(0, 2, 9)), np.sort(random.random((4, 3)), axis=0))
        for term in (0, 2)
    }
    return Price(random.random(4), along, tables)


@pytest.mark.parametrize("seed", range(5))
def test_a_point_that_moves_costs_what_it_costs_there(seed: int) -> None:
    random = np.random.default_rng(seed)
    price = Price.total([(2.0, random_price(random, 3)), (0.5, random_price(random, 3))])
    gone = random.integers(0, 8, 3).astype(float)
    point = Point(price, gone)
    for group in range(3):
        counts = np.arange(9.0)
        there = [price.at(np.where(np.arange(3) == group, count, point.gone)) for count in counts]
        assert point.varying(group, counts) == pytest.approx(np.array(there))
        point.move(group, 5.0)
        assert point.cost == pytest.approx(price.at(np.where(np.arange(3) <= group, 5.0, gone)))


@pytest.mark.parametrize("seed", range(5))
def test_budgets_of_tables_are_met_about_as_well_as_can_be(seed: int) -> None:
    random = np.random.default_rng(seed)
    price = random_price(random, 3)
    curves = [Curve(np.arange(9.0), np.concatenate([[0], np.sort(random.random(8))])) for _ in range(3)]
    all_ = [np.array(each, dtype=float) for each in itertools.product(range(9), repeat=3)]
    least, most = min(map(price.at, all_)), price.whole
    budget = Budget(price, least + 0.5 * (most - least))
    gone = allocate(curves, [budget])
    assert gone is not None
    assert price.at(gone.astype(float)) <= budget.limit

    def loss(at: Any) -> float:
        return sum(curve.loss[int(count)] for curve, count in zip(curves, at, strict=True))

    best = min(loss(each) for each in all_ if price.at(each) <= budget.limit)
    assert loss(gone) <= 1.6 * best + 0.1


def test_a_kernel_is_measured_once_and_more_of_it_takes_longer() -> None:
    narrow, wide = ((1, count, 24, 24) for count in (16, 128))
    settings = (1, 1), (1, 1, 1, 1), (1, 1)
    few = kernel_milliseconds(narrow, RowLayer((16, 16, 3, 3), *settings))
    many = kernel_milliseconds(wide, RowLayer((128, 128, 3, 3), *settings))
    assert 0 < few < many
    assert kernel_milliseconds(narrow, RowLayer((16, 16, 3, 3), *settings)) == few
    assert kernel_milliseconds((50, 64), RowLayer((32, 64))) > 0
    assert kernel_milliseconds((1, 32, 8, 8), RowLayer((32, 1, 3, 3), *settings, groups=32)) > 0


def test_a_model_whose_layers_alone_take_all_its_time() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    units = gz.WidthStudy(model, (torch.randn(2, 3, 8, 8),), effort="fast").units
    price = latency_price(units, 1.0, lambda image, layer: 1.0)
    assert price.whole == pytest.approx(1.0)
    assert price.at(np.full(price.groups, 4.0)) <= price.whole
