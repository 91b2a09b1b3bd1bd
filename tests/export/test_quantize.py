"""int8, float16 and simplified files: they run, are smaller, and are off by no more than is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def compiled() -> gz.Compiled:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()  # fmt: skip
    return gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5)]), (torch.randn(2, 3, 8, 8),))


def outputs(file: Path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return np.asarray(found)


@pytest.mark.parametrize("kind", ["int8", "int8-entropy", "fp16"])
def test_the_file_is_small_and_near(kind: str, tmp_path: Path) -> None:
    slim, data = compiled(), [torch.randn(8, 3, 8, 8) for _ in range(4)]
    plain = slim.export(tmp_path / "plain.onnx")
    report = slim.export(tmp_path / "small.onnx", quantize=kind, calibration=data)
    assert report.quantized == kind.partition("-")[0]
    assert report.max_abs_diff is not None
    assert report.tolerance is not None
    assert 0 < report.max_abs_diff <= report.tolerance
    wanted = [slim.module(x).detach().numpy() for x in data]
    apart = max(float(np.abs(outputs(tmp_path / "small.onnx", x) - y).max()) for x, y in zip(data, wanted, strict=True))
    assert apart == pytest.approx(report.max_abs_diff, rel=1e-5)
    types = {each.data_type for each in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert (onnx.TensorProto.INT8 if "int8" in kind else onnx.TensorProto.FLOAT16) in types
    assert f"(allowed {report.tolerance:.2g})" in str(report)
    assert any(note.startswith(f"{report.quantized}: outputs are off by") for note in report.notes)
    if kind == "fp16":
        assert report.bytes < 0.75 * plain.bytes


def test_an_error_that_is_not_met_leaves_nothing(tmp_path: Path) -> None:
    slim, data = compiled(), [torch.randn(8, 3, 8, 8)]
    with pytest.raises(gz.VerificationError, match=r"int8: outputs are off by .* 1e-06 are allowed"):
        slim.export(tmp_path / "small.onnx", quantize="int8", calibration=data, error=1e-6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": "int4"}, r"quantize: 'int4' is not written; write one of int8, fp16, int8-entropy, int8-minmax"),
        ({"quantize": "fp16-entropy"}, r"quantize: 'fp16-entropy' is not written"),
        ({"quantize": "int8"}, r"quantize='int8' needs calibration data"),
        ({"quantize": "fp16", "error": 0.0}, r"error"),
    ],
)
def test_what_is_not_written_is_said(options: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(gz.GraphZipError, match=said):
        compiled().export(tmp_path / "small.onnx", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_onnxslim_breaks_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxslim = pytest.importorskip("onnxslim")

    def fixed(path: str) -> onnx.ModelProto:
        """Simplified for the example's batch alone."""
        model = onnx.load(path)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        return model

    monkeypatch.setattr(onnxslim, "slim", fixed)
    with pytest.raises(gz.VerificationError, match="fails in onnxruntime"):
        compiled().export(tmp_path / "simple.onnx", simplify=True)
    assert list(tmp_path.iterdir()) == []


def test_onnxslim_keeps_what_the_file_computes(tmp_path: Path) -> None:
    pytest.importorskip("onnxslim")
    slim, x = compiled(), torch.randn(5, 3, 8, 8)
    report = slim.export(tmp_path / "simple.onnx", simplify=True, ir_version=9)
    assert report.quantized is None
    assert report.ir_version == onnx.load(tmp_path / "simple.onnx").ir_version == 9
    (note,) = [note for note in report.notes if note.startswith("simplified: outputs are off by")]
    assert "on 2 batches" in note  # the example, and twice its samples
    assert np.abs(outputs(tmp_path / "simple.onnx", x) - slim.module(x).detach().numpy()).max() < 1e-5
