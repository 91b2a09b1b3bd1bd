"""Tensors filled with one number, single steps of recurrent layers, and unpooling: all of them as wide as is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from planting import assert_lossless, relative
from torch import Tensor, nn

import graphzip as gz
from graphzip.tracing.trace import trace

pytestmark = pytest.mark.usefixtures("seeded")

WORDS = (3, 4, 8)

STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: torch.zeros(x.shape[0], 12, dtype=x.dtype),
    "zeros of a number": lambda x: torch.zeros(x.size(0), 12).to(x.dtype),
    "new_zeros": lambda x: x.new_zeros(x.shape[0], 12),
    "ones": lambda x: torch.ones((x.shape[0], 12), dtype=x.dtype),
    "full": lambda x: x.new_full((x.shape[0], 12), 0.25),
    "one row, spread": lambda x: torch.zeros(1, 12, dtype=x.dtype).expand(x.shape[0], -1),
    "filled in place": lambda x: torch.empty(x.shape[0], 12, dtype=x.dtype).fill_(0.5),
    "zeroed in place": lambda x: x.new_empty(x.shape[0], 12).zero_(),
    "like another": lambda x: torch.zeros_like(x.flatten(1)[:, :12]),
}


def gated(start: Callable[[Tensor], Tensor]) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = start(x)
        for t in range(x.shape[1]):
            h = torch.sigmoid(m.gate(x[:, t])) * h + m.new(x[:, t])
        return m.last(h)

    return Net(run, gate=nn.Linear(8, 12), new=nn.Linear(8, 12), last=nn.Linear(12, 3)).eval()


@pytest.mark.parametrize("name", STARTS)
def test_a_state_that_is_filled_shrinks_with_what_is_added_to_it(name: str) -> None:
    found = assert_lossless(gated(STARTS[name]), (torch.randn(WORDS),))
    assert found.groups["gate"].mergeable, found.groups["gate"].reason


def cells(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], 12, dtype=x.dtype)
        for t in range(x.shape[1]):
            if isinstance(m.cell, nn.LSTMCell):
                h, c = m.cell(m.first(x[:, t]).relu(), (h, c))
            else:
                h = m.cell(m.first(x[:, t]).relu(), h)
        return m.last(h + c)

    return Net(run, first=nn.Linear(8, 6), cell=make(6, 12, **options), last=nn.Linear(12, 3)).eval()


CELLS = {
    "gru": lambda: cells(nn.GRUCell),
    "gru without biases": lambda: cells(nn.GRUCell, bias=False),
    "lstm": lambda: cells(nn.LSTMCell),
    "lstm without biases": lambda: cells(nn.LSTMCell, bias=False),
    "tanh": lambda: cells(nn.RNNCell),
    "relu": lambda: cells(nn.RNNCell, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", CELLS)
def test_units_of_single_steps_shrink(name: str, tmp_path: Path) -> None:
    model = CELLS[name]()
    found = assert_lossless(model, (torch.randn(WORDS),))
    assert {group.name for group in found.groups if group.mergeable} == {"first", "cell.weight_ih"}
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), (torch.randn(WORDS),))
    assert compiled.module.get_parameter("cell.weight_hh").shape[1] == 6
    assert compiled.export(tmp_path / "cell.onnx").verified


@pytest.mark.parametrize("name", CELLS)
def test_steps_have_the_gradients_that_they_had(name: str) -> None:
    model = CELLS[name]().double()
    x = torch.randn(WORDS, dtype=torch.float64)
    twin = trace(copy.deepcopy(model), (x,)).module
    for net in (model, twin):
        net(x).square().sum().backward()
    own, other = dict(model.named_parameters()), dict(twin.named_parameters())
    assert own.keys() == other.keys()
    assert relative([p.grad for p in own.values()], [other[key].grad for key in own]) < 1e-12


def test_two_layers_that_start_from_one_state_are_not_coupled() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        start = torch.zeros(1, x.shape[0], 6)
        return m.last(torch.cat([m.one(x, start)[0], m.other(x, start)[0]], -1))

    layers = {name: nn.GRU(8, 6, batch_first=True) for name in ("one", "other")}
    model = Net(run, **layers, last=nn.Linear(12, 3)).eval()
    groups = gz.channel_groups(model, (torch.randn(WORDS),))
    assert [group.size for group in groups if group.mergeable] == [6, 6]
    plan = gz.Plan([gz.ClusterMerge(keep={"one.weight_hh_l0": 2, "other.weight_hh_l0": 5})])
    compiled = gz.compile(model, plan, (torch.randn(WORDS),))
    assert compiled.module(torch.randn(5, 4, 8)).shape == (5, 4, 3)


def test_zeros_like_a_tensor_are_not_coupled_to_it() -> None:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.one(x)
        return m.first(y.relu()), m.second(torch.maximum(m.other(x), torch.zeros_like(y)))

    model = Net(run, one=nn.Linear(8, 6), other=nn.Linear(8, 6), first=nn.Linear(6, 2), second=nn.Linear(6, 2)).eval()
    found = assert_lossless(model, (torch.randn(3, 8),))
    assert {group.name for group in found.groups if group.mergeable} == {"one", "other"}


def test_a_mask_that_many_read_is_made_once() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        mask = torch.ones(130, 130).tril()
        scores = x @ x.mT
        return m.last((scores * mask + scores.relu() * mask) @ x)

    model = Net(run, last=nn.Linear(8, 3)).eval()
    traced = trace(model, (torch.randn(2, 130, 8),))
    assert sum(node.target is torch.ops.aten.ones.default for node in traced.graph.nodes) == 1


# --- unpooling -----------------------------------------------------------------------------------------------------

UNPOOLED: dict[str, tuple[int, Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "1d": (1, F.max_pool1d, F.max_unpool1d, {}),
    "2d": (2, F.max_pool2d, F.max_unpool2d, {}),
    "3d": (3, F.max_pool3d, F.max_unpool3d, {}),
    "overlapping": (2, F.max_pool2d, F.max_unpool2d, {"stride": 1}),
    "with a border": (2, F.max_pool2d, F.max_unpool2d, {"stride": 2, "padding": 1}),
}


def unpooled(name: str) -> tuple[nn.Module, Tensor]:
    rank, pool, unpool, options = UNPOOLED[name]
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]

    def run(m: Any, x: Tensor) -> Tensor:
        y, places = pool(m.first(x).relu(), 3, return_indices=True, **options)
        return m.last(unpool(m.second(y), places, 3, output_size=x.shape[2:], **options))

    model = Net(run, first=conv(3, 8, 1), second=conv(8, 8, 1), last=conv(8, 2, 1)).eval()
    return model, torch.randn(2, 3, *[6] * rank)


@pytest.mark.parametrize("name", UNPOOLED)
def test_unpooling_puts_every_channel_where_it_was(name: str, tmp_path: Path) -> None:
    model, x = unpooled(name)
    double = copy.deepcopy(model).double()
    traced = trace(double, (x.double(),)).module
    other = torch.randn(5, *x.shape[1:], dtype=torch.float64)
    torch.testing.assert_close(traced(other), double(other), rtol=1e-12, atol=1e-12)
    found = assert_lossless(model, (x,))
    assert {group.name for group in found.groups if group.mergeable} == {"first"}
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), (x,))
    assert compiled.export(tmp_path / "unpooled.onnx").verified


def test_unpooling_follows_the_size_of_an_image() -> None:
    model, x = unpooled("2d")
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    compiled = gz.compile(model, gz.Plan([]), (x,), dynamic_shapes=((dynamic,),))
    other = torch.randn(3, 3, 12, 9)
    torch.testing.assert_close(compiled.module(other), model(other))


def test_numbers_that_stand_in_the_code_are_cut_like_buffers(tmp_path: Path) -> None:
    """Also in the file; channels that are equal but for such a number are not merged without loss."""
    run = lambda m, x: m.use(m.make(x) * torch.tensor([2.0, 2, 3, 4]) + torch.tensor([0.5] * 4))  # noqa: E731
    model = Net(run, make=nn.Linear(3, 4), use=nn.Linear(4, 2)).eval()
    with torch.no_grad():
        for value in (model.make.weight, model.make.bias):
            value[1:] = value[0]
    x = torch.randn(5, 3)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters={"make": [[0, 1], [2], [3]]})]), (x,))
    assert compiled.module.make.out_features == 3
    assert relative(model(x), compiled.module(x)) <= 1e-6
    assert compiled.export(tmp_path / "slim.onnx").verified
    compiled.save(tmp_path / "slim.graphzip")
    assert torch.equal(gz.load(tmp_path / "slim.graphzip").module(x), compiled.module(x))
    found = gz.compile(model, gz.Plan([gz.Minimize()]), (x,)).module
    assert found.make.out_features == 3


WRITES: dict[str, Callable[[Any, Tensor, Tensor], None]] = {
    "by a number": lambda out, h, t: out.__setitem__((slice(None), t), h),
    "as a part": lambda out, h, t: out.__setitem__((slice(None), slice(t, t + 1)), h[:, None]),
    "in place": lambda out, h, t: out[:, t].add_(h),
    "by a list": lambda out, h, t: out.__setitem__((slice(None), [t]), h[:, None]),
}


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("start", [torch.zeros, torch.ones])
def test_states_that_are_written_into_a_tensor_of_all_steps(way: str, start: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        out = start(x.shape[0], 4, 12, dtype=x.dtype)
        h = x.new_zeros(x.shape[0], 12)
        for t in range(3):
            h = torch.tanh(m.new(x[:, t]) + m.old(h))
            WRITES[way](out, h, t)
        return m.last(out)

    model = Net(run, new=nn.Linear(8, 12), old=nn.Linear(12, 12), last=nn.Linear(12, 3)).eval()
    found = assert_lossless(model, (torch.randn(WORDS),))
    assert found.groups["new"].mergeable, found.groups["new"].reason
