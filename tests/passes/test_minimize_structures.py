"""`Minimize` finds what is redundant in products, in front of norms, in heads, recurrences and rows of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planting import randomize_, relative
from torch import Tensor, nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")

Kinds = dict[str, dict[str, int]]


class Net(nn.Module):
    """Named layers, and a function of them and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def gated() -> Net:
    def run(net: Any, x: Tensor) -> Tensor:
        found: Tensor = net.down(F.silu(net.gate(x)) * net.up(x))
        return found

    return Net(run, gate=nn.Linear(6, 8), up=nn.Linear(6, 8), down=nn.Linear(8, 6))


def prepared(model: nn.Module, plant: Callable[[Any], Any]) -> nn.Module:
    model = model.double().eval()
    randomize_(model, 0)
    with torch.no_grad():
        plant(model)
    return model


def assert_found(model: nn.Module, x: Tensor, kinds: Kinds) -> None:
    """Exactly that is found, and no output changes at two batch sizes."""
    compiled = gz.compile(model, gz.Plan([gz.Minimize()]), (x,))
    assert compiled.report.passes[0]["minimize"]["channels"] == kinds
    assert compiled.report.lossless
    for each in (x, torch.cat([x, x.flip(0), x])):
        assert relative(model(each), compiled.module(each)) < 1e-9


def silence(layer: Any, channel: int, bias: float = 0.0) -> None:
    layer.weight[channel] = 0.0
    layer.bias[channel] = bias


def copy_row(layer: Any, source: int, target: int, factor: float = 1.0) -> None:
    layer.weight[target] = factor * layer.weight[source]
    layer.bias[target] = factor * layer.bias[source]


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- constant


@pytest.mark.parametrize(("bias", "after"), [(-1.0, 1), (0.0, 1), (0.7, 0)])
def test_a_batch_norm_with_a_scale_of_zero(bias: float, after: int) -> None:
    """What it leaves goes into the next biases, but for a number in front of padding."""

    def plant(net: Any) -> None:
        net[1].weight[3], net[1].bias[3] = 0.0, bias

    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    net = prepared(nn.Sequential(*layers), plant)
    assert_found(net, vectors(2, 3, 9, 9), {"0": {"constant": after}} if after else {})


def test_a_factor_of_zero() -> None:
    """A gated channel is zero where one of its factors is, whatever the other one is."""

    def plant(net: Any) -> None:
        silence(net.up, 3)
        silence(net.gate, 5)  # silu(0) is zero
        silence(net.gate, 6, 0.5)  # silu(0.5) is not

    assert_found(prepared(gated(), plant), vectors(3, 6), {"gate": {"constant": 2}})


def test_a_depthwise_kernel_of_zeros() -> None:
    def plant(net: Any) -> None:
        silence(net[2], 1, -1.0)
        silence(net[2], 4, 0.5)

    layers = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    assert_found(prepared(nn.Sequential(*layers), plant), vectors(2, 3, 7, 7), {"0": {"constant": 2}})


def test_readers_miss_a_channel_each_in_its_own_way() -> None:
    """One is deaf to it; the other reads what is always zero behind a gate."""

    def plant(net: Any) -> None:
        net.left.weight[:, 2] = 0.0
        net.scale[2] = 0.0

    def two(net: Any, x: Tensor) -> Tensor:
        made = net.stem(x)
        found: Tensor = net.left(made) + net.right(made * net.scale)
        return found

    scale = nn.Parameter(torch.rand(8) + 0.5)
    net = Net(two, stem=nn.Linear(6, 8), left=nn.Linear(8, 3), right=nn.Linear(8, 3), scale=scale)
    assert_found(prepared(net, plant), vectors(3, 6), {"stem": {"constant": 1}})


# ------------------------------------------------------------------------------------------------- over channels


def streamed(norm: nn.Module) -> Net:
    def stream(net: Any, x: Tensor) -> Tensor:
        made = net.stem(x)
        made = made + net.scale * net.out(F.gelu(net.inner(net.norm(made))))
        found: Tensor = net.head(net.norm(made))
        return found

    layers = {"stem": nn.Linear(6, 8), "inner": nn.Linear(8, 9), "out": nn.Linear(9, 8), "head": nn.Linear(8, 3)}
    return Net(stream, **layers, norm=norm, scale=nn.Parameter(torch.rand(8) + 0.5))


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)])
def test_zeros_of_a_residual_stream_go_and_its_norms_count_them(norm: Any) -> None:
    def plant(net: Any) -> None:
        for channel in (2, 4, 6):
            silence(net.stem, channel)
            net.scale[channel] = 0.0
        net.norm.weight[[2, 6]] = 0.0
        if net.norm.__class__ is nn.LayerNorm:
            net.norm.bias[2], net.norm.bias[6] = 0.0, 0.7  # which goes into two biases
        for reader in (net.inner, net.head):
            reader.weight[:, 4] = 0.0

    net = prepared(streamed(norm), plant)
    assert_found(net, vectors(5, 6), {"stem": {"dead": 1, "constant": 2}})


def test_what_is_not_zero_in_front_of_a_norm_stays() -> None:
    def plant(net: Any) -> None:
        silence(net.stem, 2, 0.5)
        net.scale[2] = 0.0
        net.norm.weight[2] = net.norm.bias[2] = 0.0

    assert_found(prepared(streamed(nn.LayerNorm(8)), plant), vectors(5, 6), {})


def test_zeros_have_no_part_in_means_and_sums() -> None:
    def plant(net: Any) -> None:
        silence(net.stem, 2, -0.5)
        silence(net.stem, 5)
        net.head.weight[:, 3] = 0.0  # the mean hears it

    def mean(net: Any, x: Tensor) -> Tensor:
        made = net.stem(x).relu()
        found: Tensor = net.head(made) * made.mean(-1, keepdim=True) + made.sum(-1, keepdim=True)
        return found

    net = prepared(Net(mean, stem=nn.Linear(6, 8), head=nn.Linear(8, 3)), plant)
    assert_found(net, vectors(3, 6), {"stem": {"constant": 2}})


def test_words_without_a_channel() -> None:
    def plant(net: Any) -> None:
        net.words.weight[:, 3] = net.places[:, 3] = 0.0
        net.norm.weight[3] = net.norm.bias[3] = 0.0

    def read(net: Any, words: Tensor) -> Tensor:
        found: Tensor = net.head(net.norm(net.words(words) + net.places))
        return found

    layers = {"words": nn.Embedding(11, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 3)}
    net = prepared(Net(read, **layers, places=nn.Parameter(torch.randn(7, 8))), plant)
    assert_found(net, torch.randint(0, 11, (2, 7)), {"words": {"constant": 1}})


# ------------------------------------------------------------------------------------------------- heads, recurrences


def attention(net: Any, x: Tensor) -> Tensor:
    batch = x.shape[0]
    q, k, v = net.qkv(x).reshape(batch, 7, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
    found: Tensor = net.out((scores @ v).transpose(1, 2).reshape(batch, 7, 8))
    return found


def test_heads_that_nothing_reads_and_heads_that_are_the_same() -> None:
    def deaf(net: Any) -> None:
        net.out.weight[:, :4] = 0.0

    def same(net: Any) -> None:
        weight, bias = net.qkv.weight.view(3, 2, 4, 8), net.qkv.bias.view(3, 2, 4)
        weight[:, 1], bias[:, 1] = weight[:, 0], bias[:, 0]

    for plant, kind in ((deaf, "dead"), (same, "identical")):
        net = prepared(Net(attention, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8)), plant)
        assert_found(net, vectors(2, 7, 8), {"qkv#2": {kind: 1}})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_units_of_a_recurrence(kind: Any) -> None:
    def plant(net: Any) -> None:
        gates = net.cells.weight_hh_l0.shape[0] // 8
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            rows = getattr(net.cells, name).view(gates, 8, -1)
            rows[:, 6] = rows[:, 1]
        net.cells.weight_hh_l0[:, 3] = 0.0
        net.head.weight[:, 3] = 0.0

    def run(net: Any, x: Tensor) -> Tensor:
        found: Tensor = net.head(net.cells(x)[0])
        return found

    net = prepared(Net(run, cells=kind(5, 8, batch_first=True), head=nn.Linear(8, 3)), plant)
    assert_found(net, vectors(2, 7, 5), {"cells.weight_hh_l0": {"dead": 1, "identical": 1}})


# ------------------------------------------------------------------------------------------------- in proportion


def test_factors_of_products_multiply() -> None:
    def plant(net: Any) -> None:
        copy_row(net.gate, 1, 5)
        copy_row(net.up, 1, 5, -3.0)
        copy_row(net.gate, 2, 6, 2.0)  # silu does not commute with it
        copy_row(net.up, 2, 6)

    assert_found(prepared(gated(), plant), vectors(3, 6), {"gate": {"proportional": 1}})


def test_opposite_channels_where_all_is_linear() -> None:
    def plant(net: Any) -> None:
        copy_row(net[0], 2, 6, -1.0)
        net[1].running_mean[6], net[1].running_var[6] = -net[1].running_mean[2], net[1].running_var[2]
        net[1].weight[6], net[1].bias[6] = 2 * net[1].weight[2], -2 * net[1].bias[2]

    net = prepared(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)), plant)
    assert_found(net, vectors(3, 6), {"0": {"proportional": 1}})


def test_every_reader_has_a_factor_of_its_own() -> None:
    """Through depthwise kernels in proportion, and a shift that a batch norm takes back."""

    def plant(net: Any) -> None:
        net.stem.weight[5], net.stem.bias[5] = 2 * net.stem.weight[1], 2 * net.stem.bias[1] + 0.3
        for name, factor in (("running_mean", 2.0), ("weight", 1.0), ("bias", 1.0)):
            getattr(net.norm, name)[5] = factor * getattr(net.norm, name)[1]
        net.norm.running_mean[5] += 0.3
        net.norm.running_var[5] = 4 * (net.norm.running_var[1] + net.norm.eps) - net.norm.eps
        copy_row(net.deep, 1, 5, 4.0)

    def forked(net: Any, x: Tensor) -> Tensor:
        made = net.norm(net.stem(x)).relu()
        found: Tensor = net.left(made) + net.right(net.deep(made).relu())
        return found

    layers = {"stem": nn.Conv2d(3, 8, 1), "norm": nn.BatchNorm2d(8), "deep": nn.Conv2d(8, 8, 3, groups=8, padding=1)}
    net = prepared(Net(forked, **layers, left=nn.Conv2d(8, 4, 1), right=nn.Conv2d(8, 4, 1)), plant)
    assert_found(net, vectors(2, 3, 7, 7), {"stem": {"proportional": 1}})


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sum_of_channels_in_proportion_but_for_their_shifts(sign: float) -> None:
    """A shift that only one of the terms has is no proportion; one that the terms have between them is none."""

    def plant(net: Any) -> None:
        for layer in (net.left, net.right):
            copy_row(layer, 1, 5, 2.0)
            copy_row(layer, 2, 6, 2.0)
        net.left.bias[5] += 0.5
        net.left.bias[6] += 0.5
        net.right.bias[6] -= sign * 0.5

    def added(net: Any, x: Tensor) -> Tensor:
        found: Tensor = net.head((net.left(x) + net.right(x) if sign > 0 else net.left(x) - net.right(x)).relu())
        return found

    net = Net(added, left=nn.Linear(6, 8), right=nn.Linear(6, 8), head=nn.Linear(8, 3))
    assert_found(prepared(net, plant), vectors(3, 6), {"left": {"proportional": 1}})


def test_a_mean_over_channels_in_proportion_is_another_one() -> None:
    def mean(net: Any, x: Tensor) -> Tensor:
        made = net.stem(x).relu()
        found: Tensor = net.head(made) * made.mean(-1, keepdim=True)
        return found

    net = prepared(Net(mean, stem=nn.Linear(6, 8), head=nn.Linear(8, 3)), lambda net: copy_row(net.stem, 1, 5, 2.0))
    assert_found(net, vectors(3, 6), {})


# ------------------------------------------------------------------------------------------------- in a row

Rows = list[nn.Module]


@pytest.mark.parametrize(
    ("layers", "joins"),
    [
        ([nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 1)], True),
        ([nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 3, stride=2, padding=1)], True),
        ([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, bias=False)], True),
        ([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1)], False),  # its bias ends at the border
        ([nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 1)], False),
        ([nn.Conv2d(9, 1, 1, bias=False), nn.Conv2d(1, 9, 3)], False),  # would be larger
        ([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1, stride=2)], False),
        ([nn.ConvTranspose2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 1)], False),
    ],
)
def test_convolutions_in_a_row(layers: Rows, joins: bool) -> None:
    model = nn.Sequential(*layers).double().eval()
    x = vectors(2, int(model[0].in_channels), 9, 9)
    compiled = gz.compile(model, gz.Plan([gz.Minimize()]), (x,))
    assert compiled.report.passes[0]["minimize"]["joined"] == ([["0", "1"]] if joins else [])
    assert relative(model(x), compiled.module(x)) < 1e-12


def test_what_stands_beside_a_constant_does_not_grow() -> None:
    def stacked(net: Any, x: Tensor) -> Tensor:
        made = net.stem(x).relu()
        found: Tensor = net.head(torch.stack([made, torch.ones_like(made)], 1).sum(1).relu())
        return found

    net = prepared(Net(stacked, stem=nn.Linear(6, 8), head=nn.Linear(8, 3)), lambda net: copy_row(net.stem, 1, 5, 2.0))
    assert_found(net, vectors(3, 6), {})


def test_a_number_that_a_padded_kernel_reads_stays_at_every_size() -> None:
    """On the example there is a single place, and all of it is border."""

    def plant(net: Any) -> None:
        silence(net[0], 3, 0.5)

    layers = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)
    net = prepared(nn.Sequential(*layers), plant)
    compiled = gz.compile(net, gz.Plan([gz.Minimize()]), (vectors(2, 3, 1, 1),), dynamic_shapes="height,width")
    assert compiled.report.passes[0]["minimize"]["channels"] == {}
