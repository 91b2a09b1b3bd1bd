"""Forwards that are random in eval mode: channels with draws of their own stay, and the report names the operator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from planting import double, plant, relative, state_of
from torch import Tensor, nn

import graphzip as gz
from graphzip.graph.randomness import random_nodes
from graphzip.tracing.trace import trace

Middle = Callable[[Tensor], Tensor]

OWN_DRAWS: dict[str, Middle] = {
    "dropout": lambda y: F.dropout(y, 0.5),
    "dropout of a fresh module": lambda y: nn.Dropout(0.5)(y),
    "dropout of channels": lambda y: F.dropout2d(y, 0.5),
    "alpha_dropout": lambda y: F.alpha_dropout(y, 0.5, training=True),
    "feature_alpha_dropout": lambda y: F.feature_alpha_dropout(y, 0.5, training=True),
    "rrelu": lambda y: F.rrelu(y, 0.1, 0.9, training=True),
    "randn_like": lambda y: y + torch.randn_like(y),
    "rand": lambda y: y * torch.rand(y.shape[0], 16, 1, 1, dtype=y.dtype),
    "randn of one sample": lambda y: y + torch.randn(16, 1, 1, dtype=y.dtype),
    "bernoulli": lambda y: y * torch.bernoulli(y.sigmoid()),
    "normal": lambda y: torch.normal(y, 1.0),
    "poisson": lambda y: torch.poisson(y.relu()),
    "gumbel_softmax": lambda y: F.gumbel_softmax(y, dim=1),
    "multinomial": lambda y: y * torch.multinomial(y.mean((2, 3)).softmax(1), 1)[..., None, None],
    "randperm": lambda y: y[:, torch.randperm(16)],
    "uniform_": lambda y: y * torch.empty_like(y).uniform_(),
    "normal_": lambda y: y + torch.zeros_like(y).normal_(),
    "dropout in place": lambda y: F.dropout(y * 2, 0.5, inplace=True),
}
SHARED_DRAWS: dict[str, Middle] = {
    "noise per position": lambda y: y + torch.randn(y.shape[0], 1, 8, 8, dtype=y.dtype),
    "scale per sample": lambda y: y * torch.rand(y.shape[0], 1, 1, 1, dtype=y.dtype),
    "one number": lambda y: y * torch.rand((), dtype=y.dtype),
    "rows drop out": lambda y: F.dropout2d(y.permute(0, 2, 3, 1), 0.5).permute(0, 3, 1, 2),
}
QUIET: dict[str, Middle] = {
    "dropout asleep": lambda y: F.dropout(y, 0.5, training=False),
    "no dropout": lambda y: F.dropout(y, 0.0),
    "everything drops out": lambda y: y + F.dropout(y, 1.0),
    "rrelu asleep": lambda y: F.rrelu(y, 0.1, 0.9),
    "rrelu of one slope": lambda y: F.rrelu(y, 0.5, 0.5, training=True),
    "unread": lambda y: (torch.rand(3), y)[1],
}


class Between(nn.Module):
    """A convolution, something, and a convolution that reads it."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def between(middle: Middle) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return double(Between(middle)), (torch.randn(3, 3, 8, 8, dtype=torch.float64),)


def run(model: nn.Module, *inputs: Tensor) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(*inputs)


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_channels_with_draws_of_their_own_stay(name: str) -> None:
    model, inputs = between(OWN_DRAWS[name])
    group = gz.channel_groups(model, inputs)["first"]
    assert not group.mergeable
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), inputs)
    (note,) = compiled.report.notes
    assert "random" in note
    assert "test_randomness.py" in note
    assert relative(run(model, *inputs), run(compiled.module, *inputs)) <= 1e-12


@pytest.mark.parametrize("name", ["dropout", "bernoulli", "poisson", "dropout of channels", "randn_like"])
def test_the_reason_names_the_random_operator(name: str) -> None:
    model, inputs = between(OWN_DRAWS[name])
    reason = gz.channel_groups(model, inputs)["first"].reason
    assert reason is not None
    assert "draws random numbers" in reason
    assert "test_randomness.py" in reason


@pytest.mark.parametrize("name", SHARED_DRAWS)
def test_channels_that_share_their_draws_merge_without_loss(name: str) -> None:
    model, inputs = between(SHARED_DRAWS[name])
    groups = gz.channel_groups(model, inputs)
    clusters = plant(model, groups, 0)
    assert "first" in clusters
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), inputs)
    assert compiled.module.first.out_channels < 16
    assert relative(run(model, *inputs), run(compiled.module, *inputs)) <= 1e-12
    (note,) = compiled.report.notes
    assert "random" in note


@pytest.mark.parametrize("name", QUIET)
def test_what_never_draws_is_not_reported(name: str) -> None:
    model, inputs = between(QUIET[name])
    compiled = gz.compile(model, gz.Plan([]), inputs)
    assert compiled.report.notes == ()
    assert random_nodes(compiled.traced.graph) == []
    assert gz.channel_groups(model, inputs)["first"].mergeable


class Attention(nn.Module):
    """Attention that drops out of its weights in every mode."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return self.o(y.transpose(1, 2).flatten(2))


def test_attention_that_drops_out_keeps_its_heads_and_loses_width() -> None:
    torch.manual_seed(0)
    model, x = double(Attention(0.3)), torch.randn(2, 5, 12, dtype=torch.float64)
    groups = gz.channel_groups(model, (x,))
    assert not any(group.mergeable for group in groups if group.whole_blocks)
    clusters = plant(model, groups, 0)
    assert clusters
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), (x,))
    assert compiled.module.v.out_features < 12
    assert relative(run(model, x), run(compiled.module, x)) <= 1e-12
    assert any("scaled_dot_product_attention" in note for note in compiled.report.notes)
    still = gz.channel_groups(double(Attention(0.0)), (x,))
    assert any(group.mergeable for group in still if group.whole_blocks)


def test_weights_that_are_drawn_anew_stay() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.mean + m.spread * torch.randn_like(m.spread)
        return m.last(F.linear(x, weight))  # type: ignore[no-any-return]

    parts = {name: nn.Parameter(torch.randn(8, 4)) for name in ("mean", "spread")}
    model, x = Net(forward, **parts, last=nn.Linear(8, 2)).eval(), torch.randn(3, 4)
    groups = gz.channel_groups(model, (x,))
    assert not any(group.mergeable for group in groups)


def test_a_recurrent_layer_below_a_dropout_of_eval_stays() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.last = nn.LSTM(4, 8, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(8, 2)

        def train(self, mode: bool = True) -> Restless:
            super().train(mode)
            self.cells.train()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.cells(x)[0])  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = double(Restless()), torch.randn(3, 5, 4, dtype=torch.float64)
    groups = gz.channel_groups(model, (x,))
    below = [group for group in groups if any("_l0" in each.param for each in group.slices(0))]
    assert below
    assert not any(group.mergeable for group in below)
    clusters = plant(model, groups, 0)
    assert clusters
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), (x,))
    assert relative(run(model, x), run(compiled.module, x)) <= 1e-12
    assert any("dropout (node" in note and "random" in note for note in compiled.report.notes)


def test_random_operators_of_a_graph_come_in_order() -> None:
    model, inputs = between(lambda y: F.dropout(y + torch.randn_like(y), 0.5) + 0 * torch.rand(1).item())
    names = [str(node.target) for node in random_nodes(trace(model, inputs).graph)]
    assert names[:2] == ["aten.randn_like.default", "aten.dropout.default"]


def test_a_merge_does_not_touch_the_model() -> None:
    model, inputs = between(SHARED_DRAWS["noise per position"])
    before = copy.deepcopy(state_of(model))
    gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), inputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(model).items())
