"""Channels in rare places: picked alone, laid in runs, the last of their heads, of complex numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Net
from planting import assert_lossless, plant, randomize_, relative
from torch import Tensor, nn

import graphzip as gz
from graphzip.graph.guards import check_sizes, holds, parse

ORDER = torch.tensor([3, 1, 0, 2, 7, 5, 4, 6])

Read = Callable[[Any, Tensor], Any]


def between(read: Read, width: int = 8, inputs: int = 8) -> nn.Module:
    """`last(read(relu(first(x))))` with `width` channels between."""
    return Net(lambda m, x: m.last(read(m, m.first(x).relu())), first=nn.Linear(5, width), last=nn.Linear(inputs, 3))


PICKED: dict[str, Read] = {
    "one several times": lambda m, y: y + y[:, [5, 5]].mean(1, keepdim=True),
    "one": lambda m, y: y + y.index_select(1, torch.tensor([5])),
    "two in turns": lambda m, y: y + y[:, [5, 2, 5, 2]].mean(1, keepdim=True),
    "one of each row": lambda m, y: y + y.view(-1, 2, 4)[:, :, [1, 1, 1, 1]].mean((1, 2))[:, None],
}


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", PICKED)
def test_picked_channels_stay_where_they_are(name: str, seed: int) -> None:
    model = between(PICKED[name])
    found = assert_lossless(model, (torch.randn(4, 5),), seed, fraction=0.7, trains=False)
    assert found.clusters


@pytest.mark.usefixtures("seeded")
def test_a_channel_picked_alone_is_pinned() -> None:
    groups = gz.channel_groups(between(PICKED["one several times"]), (torch.randn(4, 5),))
    assert [(group.size, group.mergeable) for group in groups if group.name.startswith("first")] == [
        (7, True),
        (1, False),
    ]
    assert "picks single channels" in str(groups["first#2"].reason)


RUNS: dict[str, Read] = {
    "out of order": lambda m, y: y.repeat_interleave(2, -1).index_select(-1, ORDER),
    "in order": lambda m, y: y.repeat_interleave(2, -1),
    "one behind the other": lambda m, y: y.repeat(1, 2).index_select(-1, ORDER),
    "twice out of order": lambda m, y: y.repeat_interleave(2, -1)[:, ORDER].index_select(-1, ORDER),
}


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("factor", [2.0, 1.5])
@pytest.mark.parametrize("name", RUNS)
def test_widened_channels_that_lie_in_runs(name: str, factor: float) -> None:
    model, x = between(RUNS[name], width=4).double().eval(), torch.randn(4, 5, dtype=torch.float64)
    wide = gz.widen(model, (x,), factor)
    assert wide.first.weight.shape[0] == 4 * factor  # type: ignore[union-attr, operator]
    assert relative(model(x), wide(x)) < 1e-12


def grouped(kind: str) -> nn.Module:
    """Four heads of queries for one of keys and values, without a copy of these per head."""

    def heads(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        if kind == "broadcast":
            q = q.unflatten(1, (1, 4))
            mixed = ((q @ k[:, :, None].mT).softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)
        elif kind == "einsum":
            mixed = torch.einsum("bhqk,bkd->bhqd", torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]).softmax(-1), v[:, 0])
        else:
            rows = q.reshape(q.shape[0], 1, -1, 4)
            mixed = ((rows @ k.mT) @ v).reshape(q.shape)
        result: Tensor = m.last(mixed.transpose(1, 2).flatten(2))
        return result

    return Net(heads, q=nn.Linear(8, 16), k=nn.Linear(8, 4), v=nn.Linear(8, 4), last=nn.Linear(16, 5))


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("kind", ["broadcast", "einsum", "rows"])
def test_heads_of_one_channel(kind: str) -> None:
    """Heads are that narrow when all their channels are merged, of queries and keys and of values."""
    model, x = grouped(kind).double().eval(), torch.randn(2, 6, 8, dtype=torch.float64)
    randomize_(model, 0, (x,))
    groups = gz.channel_groups(model, (x,))
    one = {group.name: [list(block) for block in group.blocks] for group in groups if group.mergeable}
    assert set(one) == {"q", "v"}
    plant(model, groups, 0, fraction=1.0)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parts in one.items():
            for place in (place for channel in parts[0] for place in groups[name].slices(channel)):
                if place.role != "consumer":
                    first = groups[name].slices(parts[0][0])
                    source = next(each for each in first if each.param == place.param)
                    value = named[place.param].select(place.dim, source.index).clone()
                    named[place.param].select(place.dim, place.index).copy_(value)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=one)]), (x,))
    assert compiled.module.v.weight.shape == (1, 8)  # type: ignore[union-attr]
    assert relative(model(x), compiled.module(x)) < 1e-12


SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "var": lambda z: z.var(1),
    "std": lambda z: z.std(1, keepdim=True),
    "var_mean": lambda z: torch.var_mean(z, 1)[0],
    "biased": lambda z: z.var(1, correction=0),
    "over the batch": lambda z: z.var((0, 1)),
    "norm": lambda z: torch.linalg.vector_norm(z, dim=1),
    "mean": lambda z: z.mean(1).abs(),
}


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("name", SPREADS)
def test_spreads_of_complex_channels(name: str) -> None:
    first, last = nn.Linear(5, 8, dtype=torch.complex128), nn.Linear(8, 3, dtype=torch.complex128)
    model = Net(lambda m, x: (m.last(m.first(x)).abs(), SPREADS[name](m.first(x))), first=first, last=last).eval()
    x = torch.randn(4, 5, dtype=torch.complex128)
    with torch.no_grad():
        for kept, gone in ((0, 1), (0, 2), (3, 4)):
            first.weight[gone], first.bias[gone] = first.weight[kept], first.bias[kept]
    group = gz.channel_groups(model, (x,))["first"]
    assert group.mergeable == (name != "over the batch")
    if group.mergeable:
        parts = [[0, 1, 2], [3, 4], [5], [6], [7]]
        compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters={"first": parts})]), (x,))
        for batch in (x, x[:3]):
            for before, after in zip(model(batch), compiled.module(batch), strict=True):
                assert after.dtype == before.dtype
                assert relative(before, after) < 1e-12


def merged_at_open_size(model: nn.Module, x: Tensor, *planted: str) -> gz.Compiled:
    """With duplicates merged in these groups and others, of pictures like `x` whose height and width are open."""
    auto = torch.export.Dim.AUTO
    options: Any = {"dynamic_shapes": ({0: auto, 2: auto, 3: auto},)}
    clusters = plant(model, gz.channel_groups(model, (x,), **options), 0, fraction=0.7)
    assert {*planted} <= clusters.keys()
    return gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), (x,), **options)


class Windows(nn.Module):
    """A view into windows whose sizes are numbers, of a picture whose sizes are open."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).permute(0, 2, 3, 1)
        windows = y.view(y.shape[0], 2, 2, 3, 2, 8).transpose(2, 3).contiguous().view(-1, 4, 8)
        made: Tensor = self.last(self.middle(windows).relu())
        return made


@pytest.mark.usefixtures("seeded")
def test_windows_of_a_picture_of_open_size() -> None:
    model, x = Windows().double().eval(), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    compiled = merged_at_open_size(model, x, "first", "middle")
    for batch in (x, x[:1], torch.randn(5, 3, 4, 6, dtype=torch.float64)):
        assert relative(model(batch), compiled.module(batch)) < 1e-12
    for sizes in ((8, 3), (3, 8), (2, 12)):  # as many positions, which the model takes, too
        other = torch.randn(2, 3, *sizes, dtype=torch.float64)
        with contextlib.suppress(gz.InputShapeError):
            assert relative(model(other), compiled.module(other)) < 1e-12


class ShuffledBehindConvolutions(nn.Module):
    """A channel shuffle of pictures of open size, which are so much smaller there that two pixels would leave none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(self.first(x).relu())
        batch, _, height, width = y.shape
        y = y.reshape(batch, 2, 4, height, width).permute(0, 2, 1, 3, 4).flatten(1, 2)
        made: Tensor = self.last(y.relu())
        return made


@pytest.mark.usefixtures("seeded")
def test_a_shuffle_of_pictures_of_open_size() -> None:
    model, x = ShuffledBehindConvolutions().double().eval(), torch.randn(2, 3, 9, 11, dtype=torch.float64)
    compiled = merged_at_open_size(model, x, "first", "grouped")
    assert any(node.target is torch.ops.aten.index_select.default for node in compiled.module.graph.nodes)
    for sizes in ((9, 11), (6, 7), (20, 7)):
        other = torch.randn(3, 3, *sizes, dtype=torch.float64)
        assert relative(model(other), compiled.module(other)) < 1e-12


def test_a_condition_that_cannot_be_computed_does_not_hold() -> None:
    text = "12 % (x.shape[0] - 1) == 0"
    assert holds(text, {"x": torch.zeros(4)})
    assert not holds(text, {"x": torch.zeros(1)})
    with pytest.raises(gz.InputShapeError, match="path that needs"):
        check_sizes((text,), (parse(text),), ("x",), torch.zeros(1))


def test_of_channels_and_positions_that_a_layer_makes_channels_shrink_down_to_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.along, self.use = nn.Conv1d(3, 6, 1), nn.Linear(5, 7), nn.Linear(42, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.use(torch.relu(self.along(torch.relu(self.first(x)))).flatten(1))

    model, x = Net().double(), torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        for value in model.first.parameters():
            value.copy_(value[:1].expand_as(value))
    slim = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.01)]), (x,))
    assert slim.module.use.in_features == 7
    assert torch.allclose(slim.module(x), model(x), rtol=0, atol=1e-12)


class SplitAttention(nn.Module):
    """A grouped convolution makes two halves, which are weighed against each other and added up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.conv, self.norm = nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(16)
        self.inner, self.weigh = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.first(x))).relu()
        halves = x.unflatten(1, (2, 8))
        weights = self.weigh(self.inner(halves.sum(1).mean((2, 3), keepdim=True)).relu())
        weights = weights.view(-1, 1, 2, 8).transpose(1, 2).softmax(1).reshape(-1, 2, 8, 1, 1)
        return self.last((halves * weights).sum(1))


@pytest.mark.parametrize("whole", [0.0, 1.0])
def test_a_channel_of_split_attention_leaves_both_halves(whole: float) -> None:
    found = assert_lossless(SplitAttention(), (torch.randn(2, 3, 5, 5),), whole=whole)
    group = found.groups["conv#2"]
    assert (group.size, group.mergeable, group.exact) == (8, True, True)
    assert "conv#2" in found.clusters
    slim = gz.compile(SplitAttention(), gz.Plan([gz.ClusterMerge(keep=0.5)]), (torch.randn(2, 3, 5, 5),)).module
    assert slim.conv.weight.shape == (8, 2, 3, 3)
