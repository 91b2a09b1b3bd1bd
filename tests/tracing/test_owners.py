"""Modules that a model reaches by other ways than their names, and modules with several names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Net
from planting import assert_lossless, mergeable_share
from torch import Tensor, nn

import graphzip as gz
from graphzip.tracing.trace import trace

pytestmark = pytest.mark.usefixtures("seeded")


def layers(shared: nn.Module | None = None) -> list[nn.Module]:
    """Two blocks of four layers that share their activation, and `shared` if it is given."""
    act = nn.Tanh()
    tails: tuple[nn.Module, nn.Module] = (nn.Identity(), nn.Identity()) if shared is None else (shared, shared)
    return [
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), tails[0], act),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), tails[1], act),
    ]


def net(run: Callable[..., Any], **parts: Any) -> nn.Module:
    return Net(lambda m, x: m.o(run(m, x).mean((2, 3))), **parts, o=nn.Linear(8, 3)).eval()


def one_by_one(*parts: Callable[[Any], Any]) -> Callable[..., Any]:
    def run(m: Any, x: Tensor) -> Tensor:
        for part in parts:
            for layer in part(m.q):
                x = layer(x)
        return x

    return run


class Slicing(nn.Module):
    """A container of its own kind."""

    def __init__(self, inner: list[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def __getitem__(self, part: slice) -> nn.Sequential:
        return nn.Sequential(*list(self.inner)[part])


SEQUENCES: dict[str, Callable[..., Any]] = {
    "halves": lambda m, x: m.q[4:](m.q[:4](x)),
    "negative": lambda m, x: m.q[-4:](m.q[:-4](x)),
    "last": lambda m, x: m.q[-1](m.q[:-1](x)),
    "slices of slices": lambda m, x: m.q[2:][2:](m.q[:6][:4](x)),
    "whole": lambda m, x: m.q[:](x),
    "forward": lambda m, x: m.q[4:].forward(m.q[:4].forward(x)),
    "made anew": lambda m, x: nn.Sequential(*m.q)(x),
    "joined": lambda m, x: (m.q[:4] + m.q[4:])(x),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_parts_of_a_sequence(name: str) -> None:
    model = net(SEQUENCES[name], q=nn.Sequential(*layers()))
    found = assert_lossless(model, (torch.randn(2, 3, 6, 6),))
    assert mergeable_share(found.groups) == 1.0
    assert found.groups.names[:2] == ("q.0", "q.4")
    module = found.compiled.module
    assert isinstance(module.get_submodule("q.1"), nn.BatchNorm2d)
    assert isinstance(module.get_submodule("q.5"), nn.BatchNorm2d)
    owners = {node.meta["owner"] for node in trace(model, (torch.randn(2, 3, 6, 6),)).graph.nodes if node.meta["owner"]}
    assert owners <= {name for name, _ in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize(
    "run",
    [
        one_by_one(lambda q: q[:4], lambda q: q[4:]),
        one_by_one(lambda q: q[:-4], lambda q: reversed(list(q[-1:3:-1]))),
        one_by_one(lambda q: q[:2], lambda q: q[2:5], lambda q: [q[-3], *q[6:]]),
        one_by_one(lambda q: q[::1]),
    ],
)
def test_parts_of_a_list(run: Callable[..., Any]) -> None:
    found = assert_lossless(net(run, q=nn.ModuleList(layers())), (torch.randn(2, 3, 6, 6),))
    assert mergeable_share(found.groups) == 1.0


@pytest.mark.parametrize("name", ["halves", "whole"])
@pytest.mark.parametrize("shared", [nn.Dropout(0.3), nn.RReLU(), nn.Dropout2d(0.2), nn.BatchNorm2d(8)])
def test_a_module_shared_by_two_parts(shared: nn.Module, name: str) -> None:
    model, x = net(SEQUENCES[name], q=nn.Sequential(*layers(shared))), torch.randn(2, 3, 6, 6)
    random = not isinstance(shared, nn.BatchNorm2d)
    if not isinstance(shared, nn.RReLU):
        assert mergeable_share(assert_lossless(model, (x,)).groups) == 1.0
    module = gz.compile(model, gz.Plan([]), (x,)).module
    assert [type(inner) for inner in module.modules()].count(type(shared)) == (1 if random else 3)
    assert torch.equal(module(x), model(x))
    torch.manual_seed(3)
    expected = model.train()(x)
    torch.manual_seed(3)
    assert torch.allclose(module.train()(x), expected), "both calls of the shared module follow the mode"
    assert torch.equal(module(x), module(x)) != random


def test_other_ways_to_a_module() -> None:
    act = nn.ReLU()
    conv = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
    ways: dict[str, nn.Module] = {
        "dict": net(
            lambda m, x: m.q["b"](m.q["act"](m.q["a"](x))),
            q=nn.ModuleDict({"a": conv[0], "act": act, "b": conv[1], "other": act}),
        ),
        "names": net(lambda m, x: m.b(m.second(m.a(x))), a=conv[0], first=act, second=act, b=conv[1]),
        "plain dict": net(lambda m, x: m.b({"act": act}["act"](m.a(x))), a=conv[0], b=conv[1]),
        "created": net(lambda m, x: m.b(nn.GELU()(m.a(x))), a=conv[0], b=conv[1]),
        "created sequence": net(lambda m, x: nn.Sequential(m.a, act, m.b)(x), a=conv[0], b=conv[1]),
        "functional_call": net(
            lambda m, x: torch.func.functional_call(m.b, {"weight": m.w}, (m.a(x).relu(),)),
            a=conv[0],
            b=conv[1],
            w=nn.Parameter(torch.randn(8, 8, 3, 3)),
        ),
        "nested": net(
            lambda m, x: m.q[1][1:](m.q[1][:1](m.q[0](x))), q=nn.Sequential(conv[0], nn.Sequential(act, conv[1]))
        ),
        "own container": net(lambda m, x: m.q[1:](m.q[:1](x)), q=Slicing([conv[0], nn.Sequential(act, conv[1])])),
        "by name": net(lambda m, x: m.get_submodule("b")(m.a(x).relu()), a=conv[0], b=conv[1]),
        "children": net(lambda m, x: next(iter(m.q.children()))(x).relu(), q=nn.Sequential(conv[0])),
    }  # fmt: skip
    for name, model in ways.items():
        found = assert_lossless(model, (torch.randn(2, 3, 6, 6),), unused=lambda parameter: parameter == "b.weight")
        assert mergeable_share(found.groups) == 1.0, name


def test_encoder_layers_of_a_sliced_list() -> None:
    encoders = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))

    def run(m: Any, x: Tensor) -> Tensor:
        for layer in m.layers[1:]:
            x = layer(x)
        for layer in m.layers[:1]:
            x = layer(x)
        return m.o(x)

    model = Net(run, layers=encoders, o=nn.Linear(8, 3)).eval()
    assert_lossless(model, (torch.randn(2, 5, 8),))
    names = gz.channel_groups(model, (torch.randn(2, 5, 8),)).names
    assert {f"layers.{number}.linear1" for number in range(3)} <= set(names)
