"""Experts in a list, and the ways in which models say which of them a row goes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planting import assert_lossless, relative
from torch import Tensor, nn

import graphzip as gz


def weighted(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """All experts, weighted by a column each."""
    weights = scores.softmax(-1)
    return sum(weights[:, k, None] * expert(x) for k, expert in enumerate(model.experts))


def weighted_by_channel(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """All experts, with a weight for each and another for each channel."""
    weights = scores.softmax(-1)[:, :, None] * model.entry.bias
    return sum(weights[:, k] * expert(x) for k, expert in enumerate(model.experts))


def masked(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """All experts, weighted by what they were chosen for."""
    weights, chosen = scores.softmax(-1).topk(2, -1)
    out = torch.zeros_like(x)
    for k, expert in enumerate(model.experts):
        out = out + (weights * (chosen == k)).sum(-1, keepdim=True) * expert(x)
    return out


def found(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """The rows that chose an expert, found by its number."""
    weights, chosen = scores.softmax(-1).topk(2, -1)
    out = torch.zeros_like(x)
    for k, expert in enumerate(model.experts):
        rows, slot = torch.where(chosen == k)
        out[rows] += weights[rows, slot, None] * expert(x[rows])
    return out


def marked(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """The rows that chose an expert, found in a mask of all."""
    weights, chosen = scores.softmax(-1).topk(2, -1)
    mask = nn.functional.one_hot(chosen, len(model.experts)).permute(2, 1, 0)
    out = torch.zeros_like(x)
    for k, expert in enumerate(model.experts):
        slot, rows = torch.where(mask[k])
        out.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
    return out


def cut(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """All experts, weighted by columns that are cut out."""
    weights = scores.sigmoid()
    weights = weights / weights.sum(-1, keepdim=True)
    return sum(weights[:, k : k + 1] * expert(x) for k, expert in enumerate(model.experts))


def split(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """All experts, weighted by columns that the weights are split into."""
    columns = scores.softmax(-1).split(1, -1)
    return sum(column * expert(x) for column, expert in zip(columns, model.experts, strict=True))


def written(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """The weights of those that were chosen, among zeros."""
    best, chosen = scores.topk(2, -1)
    weights = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))
    return sum(weights[:, k, None] * expert(x) for k, expert in enumerate(model.experts))


def hidden(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """The scores of those that were not chosen are hidden from the softmax."""
    best, chosen = scores.topk(2, -1)
    weights = torch.full_like(scores, -torch.inf).scatter(-1, chosen, best).softmax(-1)
    return sum(weights[:, k : k + 1] * expert(x) for k, expert in enumerate(model.experts))


def switched(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """One expert each, told by its number."""
    weights = scores.softmax(-1)
    chosen, out = weights.argmax(-1, keepdim=True), torch.zeros_like(x)
    for k, expert in enumerate(model.experts):
        out = torch.where(chosen == k, expert(x), out)
    return out * weights.amax(-1, keepdim=True)


class Listed(nn.Module):
    """Four experts behind a router, mixed in as `mix` says."""

    def __init__(self, mix: Any) -> None:
        super().__init__()
        self.entry, self.router, self.head = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(4))
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        return self.head(x + self.mix(self, x, self.router(x)))


FORMS = pytest.mark.parametrize(
    "mix",
    [weighted, weighted_by_channel, masked, found, marked, cut, split, written, hidden, switched],
    ids=lambda mix: mix.__name__,
)


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return (torch.randn(6, 5),)


@FORMS
def test_every_expert_has_a_width_of_its_own(mix: Any, inputs: tuple[Tensor, ...]) -> None:
    lossless = assert_lossless(Listed(mix), inputs, trains=False)
    widths = {name: lossless.groups[name] for name in (f"experts.{k}.0" for k in range(4))}
    assert [(group.size, group.exact) for group in widths.values()] == [(6, True)] * 4


@FORMS
def test_an_expert_that_nothing_chooses_goes_without_loss(mix: Any, inputs: tuple[Tensor, ...]) -> None:
    model = Listed(mix).double()
    with torch.no_grad():
        model.router.weight[2], model.router.bias[2] = 0, -1e3
    x = inputs[0].double()
    compiled = gz.compile(model, gz.Plan([gz.PruneChannels(keep={"router": 3})]), (x,))
    left = {name.split(".")[1] for name, _ in compiled.module.named_parameters() if name.startswith("experts")}
    assert left == {"0", "1", "3"}
    with torch.no_grad():
        for each in (x, torch.randn(17, 5, dtype=torch.float64)):
            assert relative(model(each), compiled.module(each)) <= 1e-12


@pytest.mark.parametrize(
    "mix", [weighted, weighted_by_channel, found, cut, written, switched], ids=lambda mix: mix.__name__
)
def test_half_of_the_experts_are_exported_and_saved(mix: Any, inputs: tuple[Tensor, ...], tmp_path: Path) -> None:
    compiled = gz.compile(Listed(mix), gz.Plan([gz.PruneChannels(keep=0.5)]), inputs)
    shapes = {name: tuple(value.shape) for name, value in compiled.module.named_parameters()}
    assert shapes["router.weight"] == (2, 4)
    assert sorted(shape for name, shape in shapes.items() if name.endswith(".0.weight")) == [(3, 4)] * 2
    assert compiled.export(tmp_path / "slim.onnx").verified
    compiled.save(tmp_path / "slim.graphzip")
    with torch.no_grad():
        assert relative(compiled.module(*inputs), gz.load(tmp_path / "slim.graphzip").module(*inputs)) == 0.0


def test_strengths_of_branches_are_no_router(inputs: tuple[Tensor, ...]) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entry, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.strength = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            x, strength = self.entry(x), torch.sigmoid(self.strength).view(4, -1)
            for k, branch in enumerate(self.branches):
                x = x + strength[k] * branch(x)
            return self.head(x)

    compiled = gz.compile(Branches(), gz.Plan([gz.PruneChannels(keep=0.5)]), inputs)
    shapes = {name: tuple(value.shape) for name, value in compiled.module.named_parameters()}
    assert shapes["strength"] == (4, 4)
    assert sum(name.startswith("branches") for name in shapes) == 8


def test_positions_that_are_no_factors_of_terms_stay(inputs: tuple[Tensor, ...]) -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            both = self.both(x)
            return both[:, 0] + both[:, 1].exp() * x[:, 0]

    assert not gz.channel_groups(Spread(), inputs)["both"].mergeable


def by_its_largest(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """Each row to one expert, read and written by a mask of rows."""
    weights, chosen = scores.softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for k, expert in enumerate(model.experts):
        rows = chosen == k
        out[rows] = expert(x[rows]) * weights[rows].unsqueeze(-1)
    return out


def by_a_column(model: Listed, x: Tensor, scores: Tensor) -> Tensor:
    """The mask of rows is a column of one-hot numbers; the others keep what they are."""
    mask = nn.functional.one_hot(scores.argmax(-1), len(model.experts))
    out = x.clone()
    for k, expert in enumerate(model.experts):
        rows = mask[..., k].bool()
        out[rows] = expert(x[rows]) + x[rows]
        out[~rows] = out[~rows] * 1.5
    return out


@pytest.mark.parametrize("mix", [by_its_largest, by_a_column], ids=lambda mix: mix.__name__)
def test_rows_that_are_written_by_masks(mix: Any, inputs: tuple[Tensor, ...]) -> None:
    """How many rows a mask has only the data decide, and another mask has another number of them."""
    found = assert_lossless(Listed(mix), inputs, trains=False)
    assert {name for name in found.clusters if "experts" in name} == {f"experts.{k}.0" for k in range(4)}
