"""Sizes in exported files: free where tracing left them free, verified there, fixed where the model fixes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import sympy
import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import graphzip as gz
from graphzip.export.example import Case, Example, OpenSizes, make_case, wishes
from graphzip.export.onnx import export_onnx

EMPTY = gz.Plan([])
FREE = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}


class Fn(nn.Module):
    """Layers by name, and a forward given as a function of the module and its input."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def seeded(function: Callable[..., Any], **layers: Callable[[], nn.Module]) -> Fn:
    torch.manual_seed(0)
    return Fn(function, **{name: make() for name, make in layers.items()}).eval()


def shapes_in(path: Path) -> list[list[int | str]]:
    inputs = onnx.load(path).graph.input
    return [[size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in inputs]


def run(path: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {each.name: tensor.numpy() for each, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(each) for each in session.run(None, feed)]


def convolutions() -> Fn:
    return seeded(
        lambda net, x: net.o(net.n(net.a(x)).relu()),
        a=lambda: nn.Conv2d(3, 16, 3, padding=1),
        n=lambda: nn.BatchNorm2d(16),
        o=lambda: nn.Conv2d(16, 3, 1),
    )


def test_height_and_width_that_were_asked_for_are_free_in_the_file(tmp_path: Path) -> None:
    module, path = convolutions(), tmp_path / "free.onnx"
    result = gz.compile(module, EMPTY, (torch.randn(4, 3, 8, 8),), dynamic_shapes=(FREE,))
    report = result.export(path)
    assert report.verified, report
    assert shapes_in(path) == [["batch", 3, "x_2", "x_3"]]
    assert report.inputs == {"x": ("batch", 3, "x_2", "x_3")}
    assert {"x": (4, 3, 9, 10)} in report.shapes
    assert {each["x"][0] for each in report.shapes} == {1, 4, 5}
    for shape in ((1, 3, 12, 10), (7, 3, 5, 31)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(path, x)[0], module(x), rtol=1e-4, atol=1e-5)
    assert result.verify(path).shapes == report.shapes


def test_a_fixed_batch_and_free_sizes(tmp_path: Path) -> None:
    path = tmp_path / "free.onnx"
    result = gz.compile(
        convolutions(), EMPTY, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    )
    report = result.export(path)
    assert report.verified, report
    assert not report.dynamic_batch
    assert shapes_in(path) == [[4, 3, "x_2", "x_3"]]
    assert any("the batch is fixed at 4" in note for note in report.notes)
    assert result.export(path, dynamic_batch=False).inputs == report.inputs


def test_sizes_that_must_fit_are_found(tmp_path: Path) -> None:
    """A model of two scales takes even sizes only, and the second size is one."""
    module = seeded(
        lambda net, x: torch.nn.functional.interpolate(net.d(x), scale_factor=4) + net.a(x),
        d=lambda: nn.Conv2d(3, 8, 4, stride=4),
        a=lambda: nn.Conv2d(3, 8, 1),
    )
    report = gz.compile(module, EMPTY, (torch.randn(2, 3, 8, 8),), dynamic_shapes=(FREE,)).export(tmp_path / "m.onnx")
    assert report.verified, report
    assert {"x": (2, 3, 12, 16)} in report.shapes


def test_a_batch_that_is_not_promised_is_not_verified_and_the_report_says_so(tmp_path: Path) -> None:
    module = seeded(lambda net, x: net.o(x).reshape(x.shape[0] // 2, 2, 3).sum(1), o=lambda: nn.Linear(8, 3))
    report = gz.compile(module, EMPTY, (torch.randn(4, 8),)).export(tmp_path / "pairs.onnx")
    assert report.verified, report
    assert report.dynamic_batch
    assert set(report.batches) == {4, 6}
    assert any("takes no batch of one" in note for note in report.notes)


def test_a_batch_with_a_guard_is_exported(tmp_path: Path) -> None:
    module = seeded(
        lambda net, x: net.o(net.a(x).relu().reshape(-1, 80)), a=lambda: nn.Conv2d(1, 5, 3), o=lambda: nn.Linear(80, 4)
    )
    x = torch.randn(4, 1, 10, 10)
    path = tmp_path / "guarded.onnx"
    report = gz.compile(module, EMPTY, (x,)).export(path)
    assert report.verified, report
    assert report.dynamic_batch
    torch.testing.assert_close(run(path, x[:3])[0], module(x[:3]), rtol=1e-4, atol=1e-5)


def test_a_model_of_one_sample_is_written_with_a_batch_of_one(tmp_path: Path) -> None:
    module = seeded(
        lambda net, x: net.o(net.a(x).relu().view(1, -1)),
        a=lambda: nn.Conv2d(3, 8, 3, padding=1),
        o=lambda: nn.Linear(512, 3),
    )
    path = tmp_path / "one.onnx"
    report = gz.compile(module, EMPTY, (torch.randn(1, 3, 8, 8),)).export(path)
    assert report.verified, report
    assert report.batches == (1,)
    assert shapes_in(path) == [[1, 3, 8, 8]]
    assert any("the batch is fixed at 1" in note for note in report.notes)


@pytest.mark.parametrize("size", [1, 3])
def test_without_a_dynamic_batch_it_is_that_of_the_example(size: int, tmp_path: Path) -> None:
    module = seeded(lambda net, x: net.o(x), o=lambda: nn.Linear(8, 3))
    result = gz.compile(module, EMPTY, (torch.randn(size, 8),))
    report = result.export(tmp_path / "fixed.onnx", dynamic_batch=False)
    assert report.verified, report
    assert shapes_in(tmp_path / "fixed.onnx") == [[size, 8]]
    assert report.batches == (size,)
    assert report.notes == ()
    assert result.verify(tmp_path / "fixed.onnx").batches == (size,)
    assert result.export(tmp_path / "free.onnx").batches == ((1, 2, 3) if size == 1 else (1, 3, 4))


def test_a_batch_that_the_graph_fixes_is_fixed_in_the_file(tmp_path: Path) -> None:
    path, x = tmp_path / "model.onnx", torch.randn(2, 4)
    report = export_onnx(Fn(lambda _, x: x.reshape(2, 2, 2).sum(-1)), (x,), path)
    assert report.verified, report
    assert not report.dynamic_batch
    assert report.batches == (2,)
    assert "a fixed batch" in str(report)
    assert report.notes[0].startswith("the batch is fixed at 2 in the file")
    assert shapes_in(path) == [[2, 4]]


class Two(nn.Module):
    """Two inputs whose batches have nothing to do with each other, or must be equal."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.a, self.b, self.tied = nn.Linear(8, 4), nn.Linear(8, 4), tied

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.a(x) + self.b(y) if self.tied else (self.a(x), self.b(y))


@pytest.mark.parametrize(("tied", "names"), [(True, ["batch", "batch"]), (False, ["batch", "y_batch"])])
def test_batches_are_equal_where_the_model_makes_them_so(tied: bool, names: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Two(tied=tied).eval()
    path = tmp_path / "two.onnx"
    report = gz.compile(module, EMPTY, (torch.randn(3, 8), torch.randn(3, 8))).export(path)
    assert report.verified, report
    assert [shape[0] for shape in shapes_in(path)] == names
    if not tied:
        assert any(shapes["x"][0] != shapes["y"][0] for shapes in report.shapes)


def test_a_bag_of_embeddings_and_a_result_that_is_written_out(tmp_path: Path) -> None:
    bag = seeded(lambda net, x: net.o(net.e(x)), e=lambda: nn.EmbeddingBag(10, 16), o=lambda: nn.Linear(16, 3))
    report = gz.compile(bag, EMPTY, (torch.randint(0, 10, (4, 5)),)).export(tmp_path / "bag.onnx")
    assert report.verified, report

    def written(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.o(x)
        z = torch.empty_like(y)
        torch.add(y, 1, out=z)
        return z

    out = seeded(written, o=lambda: nn.Linear(8, 3))
    assert export_onnx(out, (torch.randn(4, 8),), tmp_path / "out.onnx").verified


@dataclass
class Found(OrderedDict[str, Any]):
    """What libraries return: a dataclass that is a dictionary, registered without names for its parts."""

    sample: torch.Tensor | None = None
    score: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("sample", "score"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Pair:
    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.left, self.right = left, right


pytree.register_pytree_node(
    Found,
    lambda found: (list(found.values()), list(found)),
    lambda values, names: Found(**dict(zip(names, values, strict=True))),
    serialized_type_name="tests.Found",
)
pytree.register_pytree_node(
    Pair,
    lambda pair: ([pair.left, pair.right], None),
    lambda values, _: Pair(*values),
    serialized_type_name="tests.Pair",
)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda net, x: Found(score=net.o(x)), ["score"]),
        (lambda net, x: Found(sample=net.o(x), score=net.o(x).exp()), ["sample", "score"]),
        (lambda net, x: Pair(net.o(x), net.o(x).exp()), ["left", "right"]),
        (lambda net, x: {"all": Pair(net.o(x), (net.o(x).exp(),))}, ["all_left", "all_right_0"]),
    ],
)
def test_outputs_of_classes_are_named_after_their_fields(function: Any, names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    module = seeded(function, o=lambda: nn.Linear(8, 3))
    report = export_onnx(module, (torch.randn(2, 8),), path)
    assert report.verified, report
    assert [output.name for output in onnx.load(path).graph.output] == names


def test_variations_keep_to_the_range_of_the_example() -> None:
    ids, image = torch.tensor([[1, 9], [4, 2]]), torch.rand(2, 3, 4, 4)
    example = Example.of((ids, image, ids), {"side": torch.ones(5)})
    batch = sympy.Symbol("s0", integer=True)
    sizes = OpenSizes(((batch, 2), (batch, 3, 4, 4), (batch, 2), (5,)), {batch: 2})
    wanted = wishes(sizes)
    assert [wish.kind for wish in wanted] == ["example", "values", "batch", "one"]
    cases = [make_case(example, sizes, wish.choices[0], varied=wish.kind != "example") for wish in wanted]
    assert all(isinstance(case, Case) for case in cases)
    assert [case.batch for case in cases if case] == [2, 2, 3, 1]
    for case in cases:
        assert case is not None
        assert set(case.args[0].flatten().tolist()) <= {1, 9, 4, 2}
        assert case.args[0].dtype == torch.int64
        assert image.min() <= case.args[1].min()
        assert case.args[1].max() <= image.max()
        assert torch.equal(case.kwargs["side"], torch.ones(5))
    assert not torch.equal(cases[0].args[1], cases[1].args[1])  # type: ignore[union-attr]
    assert len({id(tensor) for tensor in (*example.leaves, ids)}) == 5


def test_a_constant_example_is_varied_all_the_same() -> None:
    example = Example.of((torch.zeros(2, 5), torch.tensor([[-torch.inf, 0.0], [0.0, 0.0]])), {})
    case = make_case(example, OpenSizes(((2, 5), (2, 2))), {})
    assert case is not None
    assert case.args[0].unique().numel() == 10
    assert not case.args[1].isnan().any()


def test_ids_of_one_row_are_varied_too() -> None:
    ids = torch.arange(12).reshape(1, 12)
    case = make_case(Example.of((ids,), {}, dynamic_batch=False), OpenSizes(((1, 12),)), {})
    assert case is not None
    assert not torch.equal(case.args[0], ids)
    assert np.array_equal(np.sort(case.args[0].numpy()), ids.numpy())
