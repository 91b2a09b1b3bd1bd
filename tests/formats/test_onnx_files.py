"""ONNX files as models: what is read is what onnxruntime computes, and what cannot be read is named."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from typer.testing import CliRunner

import graphzip as gz
from graphzip.commands import cli
from graphzip.formats.onnx_files.operators import OPERATORS

HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])
IMAGE: list[int | str] = ["batch", 3, 8, 8]


def weights(**arrays: Any) -> list[Any]:
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]


def normal(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def written(
    path: Path,
    nodes: Sequence[Any],
    stored: Sequence[Any] = (),
    shapes: dict[str, list[int | str]] | None = None,
    *,
    outputs: Sequence[str] = ("y",),
    opset: int = 20,
    dtype: int = TensorProto.FLOAT,
) -> Path:
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in (shapes or {"x": IMAGE}).items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(list(nodes), "net", inputs, results, list(stored))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, str(path))
    return path


def node(kind: str, inputs: str, output: str = "y", **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), output.split(), name=attributes.pop("name", ""), **attributes)


def in_runtime(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    found = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def assert_same(path: Path, sizes: dict[str, int] | None = None) -> nn.Module:
    """The module gives what the file gives, in a batch that it was not checked at."""
    module, inputs = gz.from_onnx(path, sizes=sizes)
    larger = {name: torch.cat([value, value.flip(0), value[:1] * 0 + 1]) for name, value in inputs.items()}
    with torch.no_grad():
        found = module(**larger)
    for name, expected in in_runtime(path, larger).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    return module


# ------------------------------------------------------------------------------------------------- whole networks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish())
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = nn.functional.interpolate(torch.cat([self.left(x), self.right(x).relu()], 1), scale_factor=2.0)
        x = nn.functional.gelu(self.norm(x.flatten(2).transpose(1, 2))).mean(1)
        found: Tensor = self.head(x.view(x.size(0), -1))
        return found


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_what_torch_exports_comes_back_under_its_names(tmp_path: Path, dynamo: bool) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    free: dict[str, Any] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if dynamo else {"dynamic_axes": {"image.1": {0: "batch"}}}
    )
    torch.onnx.export(
        model, (x,), tmp_path / "net.onnx", dynamo=dynamo, input_names=["image.1"], output_names=["scores"], **free
    )
    module, inputs = gz.from_onnx(tmp_path / "net.onnx")
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {"image_1": (2, 3, 8, 8)}
    torch.testing.assert_close(module(x)["scores"], model(x))
    assert {"stem.0.weight", "left.weight", "right.weight", "head.weight"} <= dict(module.named_parameters()).keys()
    assert type(module.get_submodule("right")) is nn.Conv2d
    groups = gz.channel_groups(module, inputs)
    assert groups["stem.0"].mergeable
    assert groups["left"].mergeable
    compiled = gz.compile(module, HALF, inputs)
    assert compiled.report.after.params < 0.7 * compiled.report.before.params
    report = compiled.export(tmp_path / "slim.onnx")
    assert report.verified
    assert list(in_runtime(tmp_path / "slim.onnx", {"image_1": torch.randn(5, 3, 8, 8)})) == ["scores"]
    again, inputs = gz.from_onnx(tmp_path / "slim.onnx")
    torch.testing.assert_close(again(**inputs)["scores"], compiled.module(**inputs)["scores"])


def classifier(path: Path) -> Path:
    """As scikit-learn or Keras would be written: products and sums by hand."""
    return written(
        path,
        [
            node("MatMul", "x w1", "a"),
            node("Add", "a b1", "b"),
            node("Relu", "b", "c"),
            node("Gemm", "c w2 b2", "d", transB=1, name="second"),
            node("Tanh", "d", "e"),
            node("Gemm", "e w3 b3", "f", name="third"),
            node("Softmax", "f", "y"),
        ],
        weights(w1=normal(6, 16), b1=normal(16), w2=normal(12, 16), b2=normal(12), w3=normal(12, 4), b3=normal(1, 4)),
        {"x": ["n", 6]},
    )


def test_products_and_sums_are_linear_layers(tmp_path: Path) -> None:
    module = assert_same(classifier(tmp_path / "net.onnx"))
    linear = [each for each in module.modules() if isinstance(each, nn.Linear)]
    assert [(each.in_features, each.out_features, each.bias is not None) for each in linear] == [
        (6, 16, True),
        (16, 12, True),
        (12, 4, True),
    ]
    compiled = gz.compile(module, HALF, {"x": torch.randn(2, 6)})
    assert compiled.module.get_submodule("second").weight.shape == (6, 8)


def test_the_command_line_takes_a_file(tmp_path: Path) -> None:
    classifier(tmp_path / "net.onnx")
    line = f"compile {tmp_path}/net.onnx --macs 0.5 -o {tmp_path}/slim.onnx"
    result = CliRunner().invoke(cli.app, line.split())
    assert result.exit_code == 0, result.stderr
    found = in_runtime(tmp_path / "slim.onnx", {"x": torch.randn(7, 6)})
    assert {name: value.shape for name, value in found.items()} == {"y": (7, 4)}
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    result = CliRunner().invoke(cli.app, ["inspect", f"{tmp_path}/bad.onnx"])
    assert result.exit_code in (1, 2)
    assert "cannot be read as an ONNX model" in result.stderr


def test_a_module_of_a_file_is_copied_and_pickled(tmp_path: Path) -> None:
    module, inputs = gz.from_onnx(classifier(tmp_path / "net.onnx"))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(**inputs)["y"], module(**inputs)["y"])


def test_a_matrix_that_is_read_twice_stays_one(tmp_path: Path) -> None:
    path = written(
        tmp_path / "net.onnx",
        [node("Gather", "words x", "a"), node("Transpose", "words", "t", perm=[1, 0]), node("MatMul", "a t", "y")],
        weights(words=normal(7, 4)),
        {"x": ["n", 5]},
        dtype=TensorProto.INT64,
    )
    module = assert_same(path)
    assert len(list(module.parameters())) == 1
    assert {type(each) for each in module.children()} == {nn.Embedding, nn.Linear}


def test_equal_biases_that_a_file_holds_once_are_two(tmp_path: Path) -> None:
    nodes = [node("Gemm", "x w b", "a"), node("Gemm", "a v b", "y")]
    stored = weights(w=normal(6, 6), v=normal(6, 6) + 1, b=np.zeros(6, np.float32))
    module = assert_same(written(tmp_path / "net.onnx", nodes, stored, {"x": ["n", 6]}))
    assert len(list(module.parameters())) == 4


def test_several_outputs_have_their_names(tmp_path: Path) -> None:
    nodes = [node("Split", "x parts", "left right", axis=1), node("Exp", "left", "up"), node("Identity", "right", "r")]
    path = written(tmp_path / "net.onnx", nodes, weights(parts=[2, 4]), {"x": ["n", 6]}, outputs=["r", "up", "left"])
    module, inputs = gz.from_onnx(path)
    found = module(**inputs)
    assert list(found) == ["r", "up", "left"]
    torch.testing.assert_close(found["up"], inputs["x"][:, :2].exp())
    assert_same(path)


# ------------------------------------------------------------------------------------------------- operators


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "padding at one side": lambda: {
        "nodes": [node("Conv", "x w b", pads=[0, 1, 2, 1], strides=[2, 2])],
        "stored": weights(w=normal(4, 3, 3, 3), b=normal(4)),
    },
    "same padding": lambda: {
        "nodes": [node("Conv", "x w", auto_pad="SAME_LOWER", strides=[2, 2])],
        "stored": weights(w=normal(4, 3, 3, 2)),
    },
    "transposed convolution": lambda: {
        "nodes": [node("ConvTranspose", "x w b", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 0])],
        "stored": weights(w=normal(3, 4, 3, 3), b=normal(4)),
    },
    "batch norm": lambda: {
        "nodes": [node("BatchNormalization", "x s b m v", epsilon=1e-3)],
        "stored": weights(s=normal(3), b=normal(3), m=normal(3), v=np.abs(normal(3))),
    },
    "instance norm": lambda: {
        "nodes": [node("InstanceNormalization", "x s b")],
        "stored": weights(s=normal(3), b=normal(3)),
    },
    "global pooling": lambda: {
        "nodes": [node("GlobalAveragePool", "x", "a"), node("GlobalMaxPool", "x", "b"), node("Concat", "a b", axis=1)]
    },
    "pooling in ceil mode": lambda: {
        "nodes": [node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1)]
    },
    "pooling, padded at one side": lambda: {
        "nodes": [
            node("AveragePool", "x", "a", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
            node("MaxPool", "x", "b", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
            node("Sub", "a b"),
        ]
    },
    "nearest neighbours": lambda: {
        "nodes": [
            node(
                "Resize",
                "x  s".replace("  ", " none "),
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        ],
        "stored": weights(s=np.array([1, 1, 2, 3], np.float32), none=np.zeros(0, np.float32)),
    },
    "nearest neighbours of Keras": lambda: {
        "nodes": [node("Resize", "x none s", nearest_mode="round_prefer_ceil")],
        "stored": weights(s=np.array([1, 1, 1.5, 2.5], np.float32), none=np.zeros(0, np.float32)),
    },
    "bilinear": lambda: {
        "nodes": [node("Resize", "x none none s", mode="linear", coordinate_transformation_mode="align_corners")],
        "stored": weights(s=np.array([2, 3, 13, 5]), none=np.zeros(0, np.float32)),
        "shapes": {"x": [2, 3, 8, 8]},
    },
    "old upsampling": lambda: {
        "nodes": [node("Upsample", "x s")],
        "stored": weights(s=np.array([1, 1, 2, 2], np.float32)),
        "opset": 9,
    },
    "sizes that are computed": lambda: {
        "nodes": [
            node("Shape", "x", "s"),
            node("Gather", "s zero", "n", axis=0),
            node("Unsqueeze", "n axes", "m"),
            node("Concat", "m rest", "t", axis=0),
            node("Reshape", "x t"),
        ],
        "stored": weights(zero=0, axes=[0], rest=[-1]),
    },
    "halves of a size": lambda: {
        "nodes": [
            node("Shape", "x", "s"),
            node("Gather", "s one", "n", axis=0),
            node("Div", "n two", "h"),
            node("Slice", "x zero h one"),
        ],
        "stored": weights(one=[1], two=[2], zero=[0]),
        "shapes": {"x": ["n", 6]},
    },
    "attributes of old versions": lambda: {
        "nodes": [
            node("Squeeze", "x", "a", axes=[1]),
            node("Clip", "a", "b", min=-0.5, max=0.5),
            node("Pad", "b", "c", pads=[0, 1, 0, 2]),
            node("Slice", "c", "d", starts=[1], ends=[6], axes=[1]),
            node("ReduceSum", "d", "e", axes=[1], keepdims=1),
            node("Softmax", "d", "f", axis=1),
            node("Mul", "e f"),
        ],
        "shapes": {"x": ["n", 1, 7]},
        "opset": 9,
    },
    "constants on the left": lambda: {
        "nodes": [
            node("Sub", "one x", "a"),
            node("Div", "two a", "b"),
            node("Less", "one b", "c"),
            node("Where", "c a one"),
        ],
        "stored": weights(one=np.float32(1), two=normal(1, 3, 1, 1)),
    },
    "a softmax of old": lambda: {"nodes": [node("Softmax", "x", axis=2)], "opset": 11},
    "backwards": lambda: {
        "nodes": [node("Slice", "x start end axes steps", "a"), node("CumSum", "a axis")],
        "stored": weights(start=[-1], end=[-1000], axes=[2], steps=[-1], axis=3),
    },
    "scaled product": lambda: {
        "nodes": [node("Gemm", "x w b", alpha=0.5, beta=2.0)],
        "stored": weights(w=normal(6, 4), b=normal(4)),
        "shapes": {"x": ["n", 6]},
    },
    "best of all": lambda: {
        "nodes": [node("TopK", "x k", "v i", axis=1), node("GatherElements", "x i", axis=1)],
        "stored": weights(k=[3]),
        "shapes": {"x": ["n", 6]},
    },
    "depth to space": lambda: {
        "nodes": [node("SpaceToDepth", "x", "a", blocksize=2), node("DepthToSpace", "a", blocksize=2, mode="DCR")]
    },
    "layer and group norm": lambda: {
        "nodes": [
            node("LayerNormalization", "x s", "a", axis=2),
            node("GroupNormalization", "a g b", num_groups=2),
        ],
        "stored": weights(s=normal(6, 5), g=normal(4), b=normal(4)),
        "shapes": {"x": ["n", 4, 6, 5]},
        "opset": 21,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_gives_what_onnxruntime_gives(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    nodes, stored = case.pop("nodes"), case.pop("stored", ())
    path = written(tmp_path / "net.onnx", nodes, stored, case.pop("shapes", None), **case)
    module, inputs = gz.from_onnx(path)
    expected = in_runtime(path, inputs)
    with torch.no_grad():
        found = module(**inputs)
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-5, atol=1e-5)
    gz.channel_groups(module, inputs)


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_recurrences(tmp_path: Path, kind: str, gates: int, direction: str) -> None:
    count, width, inner = (2 if direction == "bidirectional" else 1), 5, 3
    stored = weights(
        w=normal(count, gates * width, inner), r=normal(count, gates * width, width), b=normal(count, 2 * gates * width)
    )
    more = {"linear_before_reset": 1} if kind == "GRU" else {}
    nodes = [
        node(kind, "x w r b", "a h", hidden_size=width, direction=direction, **more),
        node("Transpose", "a", "y", perm=[2, 0, 1, 3]),
    ]
    path = written(tmp_path / "net.onnx", nodes, stored, {"x": [4, 2, inner]}, outputs=["y", "h"])
    module, inputs = gz.from_onnx(path)
    for name, expected in in_runtime(path, inputs).items():
        torch.testing.assert_close(module(**inputs)[name], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- refusals


def refused(tmp_path: Path, nodes: Sequence[Any], stored: Sequence[Any] = (), **options: Any) -> str:
    with pytest.raises(gz.ArchiveError) as found:
        gz.from_onnx(written(tmp_path / "net.onnx", nodes, stored, **options))
    return str(found.value)


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    text = refused(tmp_path, [node("NonZero", "x", name="found")])
    assert "the node 'found', operator NonZero, cannot be converted: graphzip has no such operator" in text
    text = refused(tmp_path, [node("CumSum", "x axis", reverse=1)], weights(axis=1))
    assert "operator CumSum, cannot be converted: a sum from the end" in text
    text = refused(tmp_path, [node("Shape", "x", "s"), node("ReduceMax", "x", "m", keepdims=0), node("Expand", "x x")])
    assert "its shape is computed from data" in text
    text = refused(tmp_path, [node("ConstantOfShape", "s", "a"), node("Add", "x a")], weights(s=[1 << 20, 1 << 20]))
    assert "more numbers than any model needs" in text
    result = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    chosen = helper.make_graph([node("Identity", "x", "z")], "one", [], [result])
    text = refused(
        tmp_path, [node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "c", to=TensorProto.BOOL),
                   node("If", "c", "y", then_branch=chosen, else_branch=chosen)]
    )  # fmt: skip
    assert "operator If, cannot be converted: it runs a part of the model or does not" in text


def test_an_operator_of_others_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "net.onnx", [helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")])
    model = onnx.load(str(path))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(path))
    with pytest.raises(gz.ArchiveError, match=r"operator Gelu, .* of the domain 'com.microsoft'"):
        gz.from_onnx(path)


def test_a_wrong_operator_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphzip.formats.onnx_files import build

    monkeypatch.setattr(build, "_TABLE", {**build._TABLE, "Exp": torch.expm1})
    nodes = [node("Tanh", "x", "a", name="first"), node("Exp", "a", "b", name="wrong"), node("Abs", "b", name="last")]
    assert "the node 'wrong', operator Exp, gives something else in PyTorch than in onnxruntime" in refused(
        tmp_path, nodes
    )
    assert OPERATORS["Exp"] is torch.exp


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gz.ArchiveError, match="does not exist"):
        gz.from_onnx(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(gz.ArchiveError, match="cannot be read as an ONNX model"):
        gz.from_onnx(tmp_path / "bad.onnx")
    assert "is of opset 6; write it with opset 7 or later" in refused(tmp_path, [node("Relu", "x")], opset=6)


def test_weights_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    (tmp_path / "model").mkdir()
    path = written(tmp_path / "model" / "net.onnx", [node("Add", "x w")], weights(w=normal(4)), {"x": ["n", 4]})
    model = onnx.load(str(path))
    held = model.graph.initializer[0]
    held.ClearField("raw_data")
    held.data_location = TensorProto.EXTERNAL
    held.external_data.add(key="location", value="../secret")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(gz.ArchiveError, match="cannot be read as an ONNX model"):
        gz.from_onnx(path)


def test_free_sizes_are_tried_or_given(tmp_path: Path) -> None:
    path = written(
        tmp_path / "net.onnx",
        [node("Conv", "x w"), ],
        weights(w=normal(4, 3, 3, 3)),
        {"x": ["n", 3, "height", "width"]},
    )  # fmt: skip
    assert gz.from_onnx(path)[1]["x"].shape == (2, 3, 64, 64)
    assert gz.from_onnx(path, sizes={"height": 12, "width": 9})[1]["x"].shape == (2, 3, 12, 9)
    with pytest.raises(gz.ExampleInputError, match=r"sizes\['depth'\] is 3; .* which are: height, n, width"):
        gz.from_onnx(path, sizes={"depth": 3})
    with pytest.raises(gz.ExampleInputError, match=r"fails on inputs of x \[2, 3, 2, 2\]|does not take inputs"):
        gz.from_onnx(path, sizes={"height": 2, "width": 2})
