"""Mixtures of experts: rows sorted by the expert that is chosen for each, and the widths that experts have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planting import assert_lossless, relative
from torch import Tensor, nn

import graphzip as gz
from graphzip.numeric.grouped_mm import grouped_mm


class Mixture(nn.Module):
    """Gated experts in two stacked weights, of which each token gets two."""

    def __init__(self, width: int = 8, inner: int = 12, count: int = 4, multiply: Any = grouped_mm) -> None:
        super().__init__()
        self.entry, self.router, self.head = nn.Linear(5, width), nn.Linear(width, count), nn.Linear(width, 3)
        self.up = nn.Parameter(torch.randn(count, 2 * inner, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(count, width, inner) / inner**0.5)
        self.count, self.multiply = count, multiply

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        experts, order = chosen.reshape(-1).sort()
        ends = torch.histc(experts.float(), bins=self.count, min=0, max=self.count - 1).cumsum(0, dtype=torch.int32)
        gate, up = self.multiply(x[order // 2], self.up.transpose(1, 2), offs=ends).chunk(2, -1)
        made = self.multiply(nn.functional.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=x.device)
        made = (made * weights.reshape(-1)[order, None])[back]
        return self.head(x + made.view(x.shape[0], 2, x.shape[1]).sum(1))


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return (torch.randn(6, 5),)


def test_widths_inside_experts_shrink_without_loss(inputs: tuple[Tensor, ...]) -> None:
    lossless = assert_lossless(Mixture(), inputs)
    assert lossless.clusters.keys() == {"entry", "up"}
    assert {group.size for group in lossless.groups if group.mergeable} >= {8, 12}


def test_the_products_of_torch_are_those_of_graphzip(inputs: tuple[Tensor, ...]) -> None:
    model = Mixture(inner=16, multiply=torch.nn.functional.grouped_mm).bfloat16().eval()  # torch traces no other dtype
    inputs = (inputs[0].bfloat16(),)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), inputs)
    assert compiled.module.up.shape[1:] == (16, 4)
    same = gz.compile(model, gz.Plan([]), inputs)
    with torch.no_grad():
        assert relative(model(*inputs), same.module(*inputs)) <= 1e-2


def test_a_slim_mixture_is_exported_saved_and_loaded(inputs: tuple[Tensor, ...], tmp_path: Path) -> None:
    compiled = gz.compile(Mixture(inner=10), gz.Plan([gz.ClusterMerge(keep=0.7)]), inputs)
    assert compiled.module.up.shape[1:] == (14, 5)
    assert compiled.export(tmp_path / "slim.onnx").verified
    compiled.save(tmp_path / "slim.graphzip")
    with torch.no_grad():
        assert relative(compiled.module(*inputs), gz.load(tmp_path / "slim.graphzip").module(*inputs)) == 0.0


def test_rows_behind_the_last_end_are_zero_and_gradients_are_right() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 5])
    assert not grouped_mm(x, weight, ends)[5:].any()
    assert torch.autograd.gradcheck(lambda x, weight: grouped_mm(x, weight, ends), (x, weight))
    torch.library.opcheck(grouped_mm, (x, weight, ends))


class Routed(nn.Module):
    """One expert for each token, looked up or multiplied in as `mix` says."""

    def __init__(self, mix: Any, width: int = 8, count: int = 4) -> None:
        super().__init__()
        self.entry, self.router, self.head = nn.Linear(5, width), nn.Linear(width, count), nn.Linear(width, 3)
        self.experts = nn.Parameter(torch.randn(count, width, width))
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.entry(x))
        scores = self.router(x).sigmoid()
        return self.head(self.mix(x, scores, self.experts, scores.topk(1, -1)[1]))


def looked_up(x: Tensor, scores: Tensor, experts: Tensor, chosen: Tensor) -> Tensor:
    return (x[:, None] @ experts[chosen[:, 0]]).squeeze(1) * scores.gather(1, chosen)


def one_hot(x: Tensor, scores: Tensor, experts: Tensor, chosen: Tensor) -> Tensor:
    picked = nn.functional.one_hot(chosen.squeeze(-1), experts.shape[0]).to(x.dtype)
    return torch.einsum("be,ebo->bo", picked * scores, torch.einsum("bi,eio->ebo", x, experts))


def dead(model: nn.Module, number: int) -> nn.Module:
    """The model with an expert of zeros that is never picked."""
    with torch.no_grad():
        model.router.weight[number] = 0
        model.router.bias[number] = -1e3
        for weight in (getattr(model, name) for name in ("experts", "up", "down") if hasattr(model, name)):
            weight[number] = 0
    return model


KINDS = {"sorted": Mixture, "looked up": lambda: Routed(looked_up), "one hot": lambda: Routed(one_hot)}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_channels_that_may_go(kind: str, inputs: tuple[Tensor, ...]) -> None:
    model = KINDS[kind]().double()
    inputs = (inputs[0].double(),)
    groups = gz.channel_groups(model, inputs)
    router = groups["router"]
    assert (router.size, router.mergeable, router.exact) == (4, True, False)
    assert router.least == (2 if kind == "sorted" else 1)
    plan = gz.Plan([gz.PruneChannels(keep={"router": 3})])
    compiled = gz.compile(dead(model, 2), plan, inputs)
    assert compiled.module.router.out_features == 3
    more = torch.randn(17, 5, dtype=torch.float64)
    with torch.no_grad():
        for x in (*inputs, more):
            assert relative(model(x), compiled.module(x)) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_experts_may_change_places(kind: str, inputs: tuple[Tensor, ...]) -> None:
    model = KINDS[kind]().double()
    x = inputs[0].double()
    before = model(x)
    state = dict(model.named_parameters())
    router = gz.channel_groups(model, (x,))["router"]
    order = [2, 0, 3, 1]
    with torch.no_grad():
        for name, dim in {(each.param, each.dim) for each in router.slices(0)}:
            state[name].copy_(state[name].index_select(dim, torch.tensor(order)))
    assert relative(before, model(x)) <= 1e-12


NOT_FOLLOWED = {
    "a comparison": lambda x, scores, experts, chosen: x * (chosen > 1),
    "another number": lambda x, scores, experts, chosen: x * (chosen == 4),
    "truth": lambda x, scores, experts, chosen: x * chosen.bool(),
    "arithmetic": lambda x, scores, experts, chosen: x * chosen,
    "another table": lambda x, scores, experts, chosen: x * torch.arange(4.0, device=x.device)[chosen],
    "other counts": lambda x, scores, experts, chosen: x * torch.histc(chosen.float(), bins=5, min=0, max=4)[:1],
    "another one hot": lambda x, scores, experts, chosen: x * nn.functional.one_hot(chosen.squeeze(1), 6)[:, :1],
}


@pytest.mark.parametrize("use", NOT_FOLLOWED)
def test_what_else_is_done_with_their_numbers_pins_experts(use: str, inputs: tuple[Tensor, ...]) -> None:
    groups = gz.channel_groups(Routed(NOT_FOLLOWED[use]), inputs)
    assert not groups["router"].mergeable


def test_numbers_that_the_model_returns_pin_experts(inputs: tuple[Tensor, ...]) -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.router(x).topk(1)[1]

    assert "output" in gz.channel_groups(Chooses(), inputs)["router"].reason


def test_as_many_experts_stay_as_are_picked(inputs: tuple[Tensor, ...]) -> None:
    slim = gz.compile(Mixture(), gz.Plan([gz.ClusterMerge(keep=0.1)]), inputs)
    assert slim.module.router.out_features == 2
    assert not slim.report.lossless
    for wanted in ({"keep": {"router": 1}}, {"clusters": {"router": [[0, 1, 2, 3]]}}):
        with pytest.raises(gz.PlanError, match="of which the data pick 2; keep at least 2"):
            gz.compile(Mixture(), gz.Plan([gz.ClusterMerge(**wanted)]), inputs)
    assert gz.channel_groups(Mixture(count=2), inputs)["router"].reason == "2 of its 2 channels are picked by the data"
    with pytest.raises(gz.PlanError, match="'router' cannot grow: copies of channels that the data pick from"):
        gz.widen(Mixture(), inputs, {"router": 2.0})
