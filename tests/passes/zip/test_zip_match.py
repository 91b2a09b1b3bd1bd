"""Layers that are matched by hand or by name share only where their kernels and groups are equal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphzip as gz


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
