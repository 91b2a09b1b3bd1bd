"""Layers that are matched by hand or by name share only where their kernels and groups are equal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip.report.page import page_of


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def net(*middle: nn.Module, width: int = 8) -> nn.Module:
    """`middle` between a convolution and a head; all maps have the same size."""
    layers = {"first": nn.Conv2d(3, width, 3, padding=1), "relu": nn.ReLU()}
    layers |= {f"middle{number}" if number else "middle": layer for number, layer in enumerate(middle)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    model.add_module("flat", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.add_module("last", nn.Linear(width, 3))
    return model.double().eval()


def conv(kernel: int, **options: Any) -> nn.Module:
    return nn.Conv2d(8, 8, kernel, padding=kernel // 2, **options)


def data(count: int = 2) -> list[Tensor]:
    return [torch.randn(8, 3, 6, 6, dtype=torch.float64) for _ in range(count)]


def zipped(models: dict[str, nn.Module], **options: Any) -> gz.Compiled:
    batches = dict.fromkeys(models, data())
    return gz.compile(
        models, gz.Plan([gz.Zip(**options)]), {name: (each[0],) for name, each in batches.items()}, calibration=batches
    )


BY_HAND = {"first": "first", "middle": "middle", "last": "last"}


@pytest.mark.parametrize(
    ("one", "two", "told"),
    [
        (conv(3), conv(5), ("a kernel of 5 x 5)", "a kernel of 3 x 3)")),
        (conv(3), conv(1), ("a kernel of 1 x 1)", "a kernel of 3 x 3)")),
        (
            conv(3),
            nn.Conv2d(8, 8, (3, 5), padding=(1, 2)),
            ("a kernel of 3 x 5)", "a kernel of 3 x 3)"),
        ),
        (conv(3), conv(3, groups=2), ("a kernel of 3 x 3 in 2 groups)", "a kernel of 3 x 3)")),
        (conv(3, groups=4), conv(3, groups=2), ("in 2 groups)", "in 4 groups)")),
        (conv(3), conv(3, groups=8), ("in 8 groups)", "a kernel of 3 x 3)")),
    ],
)
@pytest.mark.parametrize("metric", ["hessian", "euclidean"])
def test_layers_that_cannot_share_are_named(one: nn.Module, two: nn.Module, told: tuple[str, str], metric: str) -> None:
    theirs, ours = map(re.escape, told)
    text = (
        rf"passes\[0\].zip.match\['b'\]\['middle'\]: 'middle' of task 'b' \(.*{theirs} cannot share weights with "
        rf"'middle' of task 'a' \(.*{ours}; match layers with equal kernels and groups, or leave the two out"
    )
    with pytest.raises(gz.PlanError, match=text):
        zipped({"a": net(one), "b": net(two)}, match={"b": BY_HAND}, metric=metric)


def test_a_linear_layer_and_a_convolution_are_not_matched() -> None:
    crossed = {"first": "last", "last": "first"}
    with pytest.raises(gz.PlanError, match=r"2 problems.*\n.*'last' of task 'b' \(linear\) cannot share .*\n.*'first'"):
        zipped({"a": net(), "b": net()}, match={"b": crossed})


def test_every_task_is_looked_at() -> None:
    models = {"a": net(conv(3)), "b": net(conv(3)), "c": net(conv(5))}
    with pytest.raises(gz.PlanError, match=r"zip.match\['c'\]\['middle'\]: 'middle' of task 'c'"):
        zipped(models, match={"b": BY_HAND, "c": BY_HAND})


@pytest.mark.parametrize(
    "other",
    [
        lambda: conv(5),
        lambda: conv(3, groups=2),
        lambda: conv(3, groups=8),
        lambda: nn.Sequential(conv(1), conv(1)),
    ],
)
def test_layers_of_one_name_that_differ_stay_as_they_are(other: Callable[[], nn.Module]) -> None:
    """The layer before them may be shared, and both networks compute what they did."""
    one, two = net(conv(3, groups=4)), net(other())
    two.get_submodule("first").load_state_dict(one.get_submodule("first").state_dict())
    found = zipped({"a": one, "b": two}, match={"b": {"first": "first"}})
    x = data()[0]
    for name, model in (("a", one), ("b", two)):
        torch.testing.assert_close(found.task(name)(x), model(x), rtol=1e-9, atol=1e-9)


def test_grouped_layers_of_one_name_are_matched_where_their_groups_are_equal() -> None:
    models = {"a": net(conv(3, groups=2)), "b": net(conv(3, groups=4))}
    found = zipped(models)
    assert "middle" not in found.report.to_dict()["passes"][0]["zip"]["layers"]
    same = zipped({"a": net(conv(3, groups=2)), "b": net(conv(3, groups=2))})
    assert "middle" in same.report.to_dict()["passes"][0]["zip"]["layers"]


# --- why nothing is shared of a layer --------------------------------------------------------------------------------


class Turned(nn.Module):
    """A layer of every kind that shares nothing, between two that do."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 1)
        self.apart = conv(kernel)
        self.twice = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.apart(self.up(self.first(x).relu()).relu()).relu()
        x = self.twice(x) + self.twice.weight.sum()
        return self.last(x.mean((2, 3)))


def test_the_report_says_why_nothing_is_shared_of_a_layer() -> None:
    models = {"a": Turned(3).double().eval(), "b": Turned(5).double().eval()}
    compiled = zipped(models)
    report = compiled.report
    alone = report.passes[0]["zip"]["alone"]
    assert alone == {
        "last": "its channels are an output of the model",
        "a.apart": "no other model has a layer of its kind in its place, or match does not name it",
        "b.apart": "it is of another kind than that of task 'a'",
        **dict.fromkeys(("a.up", "b.up"), "it is a transposed convolution"),
        **dict.fromkeys(("a.twice", "b.twice"), "another operator reads its weight, too"),
    }
    assert set(report.passes[0]["zip"]["layers"]) == {"first"}
    (table,) = report.tables
    assert table.columns == ("layer", "shared parameters", "why nothing is shared")
    lines = str(report).splitlines()
    assert any(line.split() == ["first", "100.0", "%"] for line in lines)
    for name, reason in alone.items():
        assert any(line.startswith(name) and line.endswith(reason) for line in lines)
    assert all(reason.replace("'", "&#39;") in page_of(report) for reason in alone.values())
    assert gz.Report.from_dict(report.to_dict()) == report


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exclude": ["middle"]}, "the plan excludes it"),
        ({"share": {"middle": 0.0, "*": 1.0}}, "the plan shares nothing of it"),
    ],
)
def test_a_layer_that_the_plan_leaves_alone_says_so(options: dict[str, Any], reason: str) -> None:
    compiled = zipped({"a": net(conv(3)), "b": net(conv(3))}, **options)
    assert compiled.report.passes[0]["zip"]["alone"]["middle"] == reason


def test_a_weight_that_both_have_already_is_named() -> None:
    shared = conv(3)
    models = {"a": net(shared), "b": net(shared)}
    compiled = zipped(models)
    coupled = "a weight that several models have already couples its channels"
    assert compiled.report.passes[0]["zip"]["alone"] == {
        "a.middle": "several models have its weight already",
        "first": coupled,
        "last": "its channels are an output of the model",
    }
    assert compiled.report.lossless


def reader(seed: int, width: int = 6) -> nn.Module:
    """A table of embeddings and layers that read it; the second one writes to what the table gives."""
    torch.manual_seed(seed)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, width)
            self.up, self.down, self.head = nn.Linear(width, 8), nn.Linear(8, width), nn.Linear(width, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            found: Tensor = self.head((x + self.down(self.up(x).relu())).mean(1))
            return found

    return Reader().double().eval()


@pytest.mark.parametrize("width", [6, 4])
def test_what_embeddings_give_is_matched_by_position(width: int) -> None:
    """Else no layer would read anything that is shared, and none could be paired."""
    models, ids = {"a": reader(0), "b": reader(1, width)}, torch.arange(10).reshape(2, 5)
    given = dict.fromkeys(models, (ids,))
    compiled = gz.compile(models, gz.Plan([gz.Zip()]), given, calibration={key: [ids] for key in models})
    layers = compiled.report.passes[0]["zip"]["layers"]
    assert {name: layers[name]["channels"].get("b.up") for name in layers} == {"up": 8, "down": None}
    assert [layers[name]["parameters"] for name in layers] == [
        [8 * (6 + width) + 16, 8 * 6 + 8],
        [8 * (6 + width) + 6 + width, 8 * 6 + 6],
    ]
    twin = {"a": models["a"], "b": reader(0)}
    same = gz.compile(twin, gz.Plan([gz.Zip()]), given, calibration={key: [ids] for key in models})
    with torch.no_grad():
        for name, model in twin.items():
            torch.testing.assert_close(same.module.get_submodule(name)(ids), model(ids), rtol=0.0, atol=1e-6)
