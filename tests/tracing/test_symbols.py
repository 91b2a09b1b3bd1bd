"""Numbers that a graph computes with are symbols: of the inputs' sizes, or of what only the data say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from planting import assert_lossless, double, plant, randomize_, relative, tensors
from torch import Tensor, fx, nn

import graphzip as gz
from graphzip.errors import RewriteError
from graphzip.rewrite.refresh import refresh
from graphzip.tracing.trace import trace

YOLOS = ("yolov8n", "yolo11n", "yolo11n-seg", "yolo11n-pose", "yolov10n", "yolo12n", "yolo26n")


class Strides(nn.Module):
    """Scales what it gives by numbers that it reads from a buffer, as detectors do with their strides."""

    strides: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 6, 1)
        self.register_buffer("strides", torch.tensor([8.0, 16.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.conv(x).relu()).flatten(2)
        pair = [torch.full((y.shape[2],), stride.item(), dtype=y.dtype) for stride in self.strides]
        return y * pair[0] - y * pair[1]


class Counts(nn.Module):
    """Repeats its result as often as a buffer says, and asks whether a number is large."""

    times: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)
        self.register_buffer("times", torch.tensor([3, 2]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.head(self.lift(x).relu())
        many, few = (torch.zeros(count.item(), 3, dtype=y.dtype) for count in self.times)
        return y[:1] + many, y[:1] - few


class FixedBatch(nn.Module):
    """Its code fixes the batch, so that the batch is a symbol with a known value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.conv(x).relu())
        assert y.shape[0] == 4
        return y.sigmoid() * y.shape[0]


def test_a_number_read_from_a_tensor_is_no_obstacle() -> None:
    result = assert_lossless(Strides(), (torch.randn(3, 3, 8, 8),), trains=False)
    assert result.merged == 8


def test_a_fixed_batch_is_no_obstacle() -> None:
    model = FixedBatch().double().eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    compiled = gz.compile(
        model, gz.Plan([gz.ClusterMerge(clusters={"conv": [[0, 1], *([k] for k in range(2, 16))]})]), (x,)
    )
    assert compiled.module.get_parameter("conv.weight").shape[0] == 15


def _numbers(graph: fx.Graph) -> list[Any]:
    """What stands for every number and every size in a graph."""
    values = [node.meta.get("val") for node in graph.nodes]
    shapes = [list(value.shape) if isinstance(value, Tensor) else [value] for value in values]
    return [str(number) for shape in shapes for number in shape]


@pytest.mark.parametrize("model", [Strides(), Counts()], ids=["floats", "integers"])
def test_numbers_that_the_data_decide_stay_apart(model: nn.Module) -> None:
    inputs = (torch.randn(4, 3, 8, 8),) if isinstance(model, Strides) else (torch.randn(4, 8),)
    traced = trace(model.eval(), inputs)
    before = _numbers(traced.graph)
    refresh(traced, rewritten=True)
    assert _numbers(traced.graph) == before
    assert len({number for number in before if "u" in number}) >= 2


def test_rows_chosen_by_the_data_keep_the_name_of_their_count() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.lift(x)
            return y[y[:, 0] > 0], y[y[:, 0] < 0]

    traced = trace(Chosen().eval(), (torch.randn(4, 8),))
    before = _numbers(traced.graph)
    refresh(traced, rewritten=True)
    assert _numbers(traced.graph) == before
    assert {"u0", "u1"} <= set(before)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lift(x).relu()
        return y.view(-1, 4, 4).mean(2) * y.shape[0]


@pytest.mark.parametrize("sizes", [[4, 4, 4], [-1, 2, 8]], ids=["a batch of four", "another rank of channels"])
def test_a_rewrite_may_not_fix_the_batch(sizes: list[int]) -> None:
    traced = trace(Wide().eval(), (torch.randn(4, 8),))
    (view,) = (node for node in traced.graph.nodes if node.target is torch.ops.aten.view.default)
    view.update_arg(1, sizes)
    if sizes[0] == -1:
        refresh(traced, rewritten=True)
    else:
        with pytest.raises(RewriteError, match="view"):
            refresh(traced, rewritten=True)


def test_a_rewrite_may_not_change_a_number() -> None:
    traced = trace(Wide().eval(), (torch.randn(4, 8),))
    (number,) = (node for node in traced.graph.nodes if node.target is torch.ops.aten.sym_size.int)
    (view,) = (node for node in traced.graph.nodes if node.target is torch.ops.aten.view.default)
    with traced.graph.inserting_before(number):
        longer = traced.graph.call_function(torch.ops.aten.cat.default, ([number.args[0], number.args[0]],))
    number.update_arg(0, longer)
    assert view.op == "call_function"
    with pytest.raises(RewriteError, match="sym_size"):
        refresh(traced, rewritten=True)


def _yolo(name: str) -> nn.Module:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    kind = {"seg": "SegmentationModel", "pose": "PoseModel"}.get(name.rpartition("-")[2], "DetectionModel")
    torch.manual_seed(0)
    model: nn.Module = getattr(tasks, kind)(f"{name}.yaml", verbose=False)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize("name", YOLOS)
def test_detectors_shrink(name: str, ran: bool) -> None:
    """Planted duplicates merge losslessly, and half of all channels can go; its anchors are numbers of the graph."""
    model, x = double(_yolo(name)), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    randomize_(model, 0, (x,))
    if not ran:
        model.model[-1].shape = None  # type: ignore[index, union-attr]
    groups = gz.channel_groups(model, (x,))
    assert sum(group.size for group in groups if group.mergeable) > 0.85 * sum(group.size for group in groups)
    clusters = plant(model, groups, 0)
    twin = copy.deepcopy(model)
    merged = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), (x,)).module
    half = gz.compile(model.float(), gz.Plan([gz.ClusterMerge(keep=0.5)]), (x.float(),))
    assert half.report.after.params < 0.5 * half.report.before.params
    with torch.no_grad():
        assert all(torch.isfinite(leaf).all() for leaf in tensors(half.module(x.float())))
        for batch in (x,) if ran else (x, torch.rand(3, 3, 64, 64, dtype=torch.float64), x[:1]):
            assert relative(twin(batch), merged(batch)) < 1e-9
