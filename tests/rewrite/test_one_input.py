"""Models that are zipped and read the same input compute once what they have in common."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip.analysis.layers import layer_of
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.restore_modules import to_module
from graphzip.graph.traced import Traced
from graphzip.rewrite.one_input import one_input

pytestmark = pytest.mark.usefixtures("seeded")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 16, 3), nn.GELU()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4)),
    )


class Residual(nn.Module):
    """Batch norms are each task's own, and the stream is read in the order that the model has it in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.inner(x).relu()).mean((2, 3)))


SHAPES = {mlp: (24,), cnn: (3, 8, 8), Residual: (3, 8, 8)}


def zipped(make: Any, share: float, tasks: str = "ab", **options: Any) -> gz.Compiled:
    nets = {task: make().double().eval() for task in tasks}
    inputs = {task: (torch.randn(2, *SHAPES[make], dtype=torch.float64),) for task in tasks}
    plan = gz.Plan([gz.Zip(share=share, metric="euclidean", refit=False, **options)])
    return gz.compile(nets, plan, inputs)


def macs(graph: Any) -> int:
    """Of all layers, for one sample."""
    found = 0
    for node in graph.nodes:
        layer = layer_of(node)
        if layer is not None:
            places = concrete_shape(node.meta["val"])[1:]
            found += layer.shape[1] * torch.Size(places).numel() * torch.Size(layer.kernel).numel()
    return found


def products(traced: Traced) -> int:
    return sum(layer_of(node) is not None for node in traced.graph.nodes)


@pytest.mark.parametrize(("share", "tasks"), [(0.3, "ab"), (0.5, "ab"), (0.9, "abc"), (1.0, "ab")])
@pytest.mark.parametrize("make", list(SHAPES))
def test_the_same_is_computed(make: Any, share: float, tasks: str) -> None:
    compiled = zipped(make, share, tasks)
    one = to_module(one_input(compiled.traced)).eval()
    x = torch.randn(5, *SHAPES[make], dtype=torch.float64)
    found = one(x)
    assert list(found) == list(tasks)
    for task in tasks:
        torch.testing.assert_close(found[task], compiled.task(task)(x), rtol=1e-10, atol=1e-12)


def test_every_row_that_tasks_share_is_computed_once() -> None:
    apart, one = (traced := zipped(mlp, 0.5).traced), one_input(traced)
    assert macs(apart.graph) == 2 * (24 * 64 + 64 * 64 + 64 * 5)
    # rows a task has alone, rows of both; then what both read by all rows, and what each reads alone by its own
    assert macs(one.graph) == 24 * 96 + 32 * 96 + 2 * 32 * 64 + 2 * 64 * 5
    assert products(one) == 1 + 3 + 2
    assert sum(each.numel() for each in one.module.parameters() if each.dim() == 2) == macs(one.graph)


def test_what_is_shared_as_a_whole_is_one_chain() -> None:
    one = one_input(zipped(mlp, 1.0).traced)
    assert products(one) == 1 + 1 + 2
    assert not [node for node in one.graph.nodes if node.target is torch.ops.aten.slice.Tensor]


def test_convolutions_give_whole_pieces_that_are_read_as_such() -> None:
    one = one_input(zipped(cnn, 0.5).traced)
    moved = Counter(str(node.target) for node in one.graph.nodes)
    assert moved["aten.slice.Tensor"] == 0
    stem = [node for node in one.graph.nodes if layer_of(node) is not None][:3]
    assert [concrete_shape(node.meta["val"])[1] for node in stem] == [16, 16, 16]
    order = [node for node in one.graph.nodes if node.target is torch.ops.aten.index_select.default]
    assert not [node for node in order if concrete_shape(node.meta["val"])[1:] == (6, 6)]  # weights are ordered


def test_few_rows_in_common_are_not_worth_another_pass() -> None:
    one = one_input(zipped(mlp, 0.05).traced)  # 3 of 64: the second layers stay as they are
    assert macs(one.graph) == 24 * (2 * 64 - 3) + 2 * 64 * 64 + 2 * 64 * 5


def test_layers_that_wait_for_each_other_are_computed_apart() -> None:
    class Two(nn.Module):
        def __init__(self, swapped: bool) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24)
            self.head, self.swapped = nn.Linear(24, 3), swapped

        def forward(self, x: Tensor) -> Tensor:
            first, second = (self.two, self.one) if self.swapped else (self.one, self.two)
            return self.head(second(first(x).relu()).relu())

    nets = {"a": Two(False).double().eval(), "b": Two(True).double().eval()}
    x = torch.randn(3, 24, dtype=torch.float64)
    nets["b"].one, nets["b"].two = nets["a"].one, nets["a"].two
    compiled = gz.compile(nets, gz.Plan([]), dict.fromkeys(nets, (x,)))
    found = to_module(one_input(compiled.traced)).eval()(x)
    for name, net in nets.items():
        torch.testing.assert_close(found[name], net(x))


def test_the_file(tmp_path: Path) -> None:
    nets = {task: cnn().eval() for task in "ab"}
    inputs = {task: (torch.randn(2, 3, 8, 8),) for task in "ab"}
    compiled = gz.compile(nets, gz.Plan([gz.Zip(share=0.5, metric="euclidean", refit=False)]), inputs)
    apart, one = tmp_path / "apart.onnx", tmp_path / "one.onnx"
    compiled.export(apart, verify=False)
    assert compiled.export(one, same_input=True).verified
    assert compiled.verify(one).verified
    numbers = [
        sum(torch.Size(each.dims).numel() for each in onnx.load(file).graph.initializer) for file in (apart, one)
    ]
    assert numbers[1] < 1.05 * numbers[0]


def test_outputs_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = zipped(mlp, 1.0)
    wrong = zipped(mlp, 1.0).traced
    monkeypatch.setattr("graphzip.export.joint.one_input", lambda traced: one_input(wrong))
    with pytest.raises(
        gz.VerificationError, match=r"same_input: task 'a' computed with the others gives something else"
    ):
        compiled.export(tmp_path / "one.onnx", same_input=True)
    assert not list(tmp_path.iterdir())
