"""Queries and keys: their basis is changed, so that scores come out as near as products of fewer channels can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphzip as gz
from graphzip.analysis.groups import Analysed
from graphzip.tracing.trace import trace
from graphzip_passes.parts import compensation
from graphzip_passes.parts.score_pairs import groups_of_scores, score_pairs

pytestmark = pytest.mark.usefixtures("seeded")

HEADS, WIDTH, FEATURES = 2, 8, 16


class Attention(nn.Module):
    """Self-attention; `keys` heads have keys and values of their own, `between` acts on queries and keys."""

    def __init__(self, keys: int = HEADS, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.keys, self.between = keys, between
        self.q = nn.Linear(FEATURES, HEADS * WIDTH)
        self.k, self.v = (nn.Linear(FEATURES, keys * WIDTH) for _ in range(2))
        self.o = nn.Linear(HEADS * WIDTH, 5)

    def heads(self, x: Tensor, count: int) -> Tensor:
        return x.view(x.shape[0], -1, count, WIDTH).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x), HEADS), self.heads(self.k(x), self.keys), self.heads(self.v(x), self.keys)
        if self.between is not None:
            q, k = self.between(q), self.between(k)
        out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.keys != HEADS)
        return self.o(out.transpose(1, 2).flatten(2))


def net(**options: Any) -> nn.Module:
    model = Attention(**options).double().eval()
    with torch.no_grad():
        model.q.weight.mul_(3)
        model.k.weight.mul_(3)
    return model


def data() -> list[Tensor]:
    return [torch.randn(8, 12, FEATURES, dtype=torch.float64) for _ in range(3)]


def of_rank(model: Any, rank: int) -> None:
    """Let the keys of every head lie in so few dimensions."""
    with torch.no_grad():
        for head in range(model.keys):
            rows = slice(head * WIDTH, (head + 1) * WIDTH)
            mix = torch.randn(WIDTH, rank).double() @ torch.randn(rank, WIDTH).double()
            model.k.weight[rows] = mix @ model.k.weight[rows]
            model.k.bias[rows] = mix @ model.k.bias[rows]


def compiled(model: nn.Module, keep: int, calibration: list[Tensor], **options: Any) -> gz.Compiled:
    plan = gz.Plan([gz.ClusterMerge(keep={"q": keep}, **options)])
    return gz.compile(model, plan, (calibration[0],), calibration=calibration)


def error(model: nn.Module, slim: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = model(x)
        return float((slim(x) - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("keys", [HEADS, 1])
def test_scores_of_low_rank_stay_as_they_are(keys: int) -> None:
    model, calibration = net(keys=keys), data()
    of_rank(model, 3)
    found = compiled(model, 3 * keys, calibration)
    assert found.module.get_submodule("k").out_features == 3 * keys
    assert found.module.get_submodule("q").out_features == 3 * HEADS
    assert error(model, found.module, torch.randn(4, 12, FEATURES, dtype=torch.float64)) < 1e-20
    with_channels_that_stay = compiled(model, 3 * keys, calibration, clustering="kmeans", compensate="data")
    assert error(model, with_channels_that_stay.module, calibration[0]) > 1e-3


def test_scores_are_as_near_as_can_be() -> None:
    """What is missing of them is what the singular values say that are left out."""
    model, calibration = net(), data()
    slim = compiled(model, 6, calibration).module
    x = torch.cat(calibration)

    def scores(of: Any, count: int) -> list[Tensor]:
        with torch.no_grad():
            q, k = (of.get_submodule(name)(x).flatten(0, 1).reshape(-1, HEADS, count) for name in "qk")
        k = k - k.mean(0)
        return [q[:, head] @ k[:, head].T for head in range(HEADS)]

    told = slim.get_buffer("scaled_dot_product_attention_multiplicity")
    counts: Any = told.reshape(-1, 3).expand(HEADS, 3).double()
    with torch.no_grad():
        slim.get_parameter("q.weight").mul_(counts.reshape(-1, 1))
        slim.get_parameter("q.bias").mul_(counts.reshape(-1))
    for wanted, given in zip(scores(model, WIDTH), scores(slim, 3), strict=True):
        values = torch.linalg.svdvals(wanted[:200, :])
        assert values[WIDTH:].max() < 1e-9
        best = torch.linalg.svdvals(wanted)[3:].square().sum()
        assert (wanted - given).square().sum() == pytest.approx(float(best), rel=1e-6)


def test_channels_that_are_alike_are_merged_without_loss() -> None:
    model, calibration = net(), data()
    with torch.no_grad():
        for layer in (model.get_submodule("q"), model.get_submodule("k")):
            for value in layer.parameters():
                value.view(HEADS, 2, 4, -1)[:, 1] = value.view(HEADS, 2, 4, -1)[:, 0]
    found = compiled(model, 8, calibration)
    assert found.report.lossless
    assert error(model, found.module, calibration[0]) < 1e-25


@pytest.mark.parametrize(
    "between",
    [lambda x: x.relu(), lambda x: x.roll(1, 3) + x, lambda x: x + x.new_ones(())],
    ids=["relu", "roll", "sum"],
)
def test_what_acts_on_channels_keeps_them(between: Callable[[Tensor], Tensor]) -> None:
    traced = trace(net(between=between), (data()[0],))
    assert score_pairs(traced, Analysed.of(traced).analysis) == []


def test_queries_that_something_else_reads_keep_their_channels() -> None:
    class Read(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.q(x).mean(2, keepdim=True)

    traced = trace(Read().eval(), (data()[0].float(),))
    assert score_pairs(traced, Analysed.of(traced).analysis) == []


def test_groups_of_scores_are_told() -> None:
    traced = trace(net(), (data()[0],))
    known = Analysed.of(traced)
    (pair,) = score_pairs(traced, known.analysis)
    assert [layer.name for layer in pair.layers] == ["q.weight", "k.weight"]
    assert groups_of_scores([pair], known.groups) == {"q"}


def test_pruned_queries_and_keys_stay_what_they_are() -> None:
    model, calibration = net(), data()
    plan = gz.Plan([gz.PruneChannels(keep={"q": 8}, criterion="l2", compensate="data")])
    slim = gz.compile(model, plan, (calibration[0],), calibration=calibration).module
    rows = {tuple(row) for row in model.get_parameter("q.weight").tolist()}
    assert {tuple(row) for row in slim.get_parameter("q.weight").tolist()} < rows


def test_heads_that_go_leave_the_basis_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(compensation, "turned")
    model, calibration = net(), data()
    plan = gz.Plan([gz.ClusterMerge(keep={"q#2": 1})])
    slim = gz.compile(model, plan, (calibration[0],), calibration=calibration).module
    assert slim.get_submodule("q").out_features == WIDTH
    assert error(model, slim, calibration[0]) < 1.0
    with pytest.raises(gz.GraphZipError, match="turned"):
        compiled(model, 8, calibration)
