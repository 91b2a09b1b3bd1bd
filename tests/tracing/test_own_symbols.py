"""Joined and loaded graphs do not depend on the sizes of the example: every open size has a symbol of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planting import relative
from torch import Tensor, nn

import graphzip as gz
from graphzip.export.archive import load_archive
from graphzip.graph.traced import Traced
from graphzip.rewrite.join_models import join, task_of
from graphzip.rewrite.refresh import refresh
from graphzip.tracing.trace import trace

onnx = pytest.importorskip("onnx")

AUTO = torch.export.Dim.AUTO

pytestmark = pytest.mark.usefixtures("seeded")


class Tokens(nn.Module):
    """Rows and positions are both open, and are laid one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x).relu()
        flat = self.middle(y.reshape(-1, 8)).view(x.shape[0], x.shape[1], 8)
        return self.last(flat + y), y.mean((1, 2))


class Pairs(nn.Module):
    """Two inputs of equally many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made: Tensor = self.last(self.first(x) * self.second(y))
        return made


def shown(traced: Traced) -> list[Any]:
    """Every node with its sizes, symbols numbered in the order in which they come."""
    names: dict[str, str] = {}
    found: list[Any] = []
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        sizes: list[str] = []
        for size in value.shape if isinstance(value, Tensor) else ():
            text = str(size)
            symbols = sorted(map(str, size.node.expr.free_symbols)) if isinstance(size, torch.SymInt) else []
            for symbol in symbols:
                text = text.replace(symbol, names.setdefault(symbol, f"size{len(names)}"))
            sizes.append(text)
        found.append((str(node.target), sizes))
    return found


def traced_with(rows: int, places: int) -> Traced:
    return trace(Tokens().eval(), (torch.randn(rows, places, 5),), dynamic_shapes=({0: AUTO, 1: AUTO},))


@pytest.mark.parametrize(("rows", "places"), [(5, 5), (2, 2), (5, 2)])
def test_a_joint_graph_is_the_same_for_other_examples(rows: int, places: int) -> None:
    known = shown(join({"a": traced_with(3, 7), "b": traced_with(4, 6)}))
    joint = join({"a": traced_with(rows, places), "b": traced_with(rows, places)})
    assert shown(joint) == known
    assert {text for _, sizes in known for text in sizes} >= {"size0", "size1", "size2", "size3"}


@pytest.mark.parametrize("rows", [2, 5])
def test_sizes_that_must_be_equal_stay_one_symbol(rows: int) -> None:
    first = trace(Pairs().eval(), (torch.randn(rows, 5), torch.randn(rows, 5)))
    joint = join({"a": first, "b": traced_with(rows, rows)})
    shapes = [node.meta["val"].shape for node in joint.graph.nodes if node.op == "placeholder"]
    assert shapes[0][0] == shapes[1][0]
    assert len({str(size) for shape in shapes for size in shape[:-1]}) == 3


@pytest.mark.parametrize(("rows", "places"), [(2, 2), (5, 5), (2, 5)])
def test_a_loaded_graph_is_the_same_for_other_examples(rows: int, places: int, tmp_path: Path) -> None:
    def loaded(rows: int, places: int) -> list[Any]:
        x = torch.randn(rows, places, 5)
        path = tmp_path / f"{rows}_{places}.gz"
        gz.compile(Tokens().eval(), gz.Plan([]), (x,), dynamic_shapes=({0: AUTO, 1: AUTO},)).save(path)
        traced = load_archive(path).traced
        refresh(traced)
        return shown(traced)

    assert loaded(rows, places) == loaded(3, 7)


def test_conditions_go_with_the_task_whose_inputs_they_name() -> None:
    joint = join({"a": traced_with(3, 7), "ba": trace(Pairs().eval(), (torch.randn(4, 5), torch.randn(4, 5)))})
    assert joint.conditions == ("ba_y.shape[0] == ba_x.shape[0]",)
    assert task_of(joint, "a").conditions == ()
    assert task_of(joint, "ba").conditions == ("y.shape[0] == x.shape[0]",)


@pytest.mark.parametrize("several", [False, True])
def test_an_example_of_one_row_is_one_when_it_is_loaded(several: bool, tmp_path: Path) -> None:
    x = torch.randn(1, 4, 5)
    models: Any = {"a": Tokens().eval(), "b": Tokens().eval()} if several else Tokens().eval()
    plan = gz.Plan([gz.Zip(share=0.0)] if several else [])
    example: Any = {"a": (x,), "b": (x,)} if several else (x,)
    options: Any = {"calibration": {"a": [x], "b": [x]}} if several else {}
    compiled = gz.compile(models, plan, example, **options)
    compiled.save(tmp_path / "model.gz")
    loaded = gz.load(tmp_path / "model.gz")
    loaded.save(tmp_path / "again.gz")
    for number, each in enumerate((compiled, loaded, gz.load(tmp_path / "again.gz"))):
        each.export(tmp_path / f"{number}.onnx", dynamic_batch=False)
        graph = onnx.load(tmp_path / f"{number}.onnx").graph
        assert [value.type.tensor_type.shape.dim[0].dim_value for value in graph.input] == [1] * (1 + several)
    if not several:
        assert relative(compiled.module(x), loaded.module(x)) == 0.0
        assert loaded.module(x.expand(3, -1, -1))[0].shape == (3, 4, 3)
