"""Files of all kinds are checked against the module: of several tasks, in two parts, by other writers, damaged."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from references import reference
from torch import nn

import graphzip as gz
from graphzip.export import convert
from graphzip.export.outputs import judge

EMPTY = gz.Plan([])


class Net(nn.Module):
    def __init__(self, width: int = 8, *, blind: bool = False) -> None:
        super().__init__()
        self.a, self.o, self.blind = nn.Linear(width, 32), nn.Linear(32, 3), blind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.o(self.a(x).relu())
        return y * torch.nan if self.blind else y


def net(width: int = 8, **options: Any) -> nn.Module:
    torch.manual_seed(width)
    return Net(width, **options).eval()


def rows(width: int = 8, count: int = 4) -> tuple[torch.Tensor]:
    return (torch.randn(count, width, generator=torch.Generator().manual_seed(1)),)


@pytest.fixture
def single() -> gz.Compiled:
    return gz.compile(net(), EMPTY, rows())


def alter(path: Path, name: str, factor: float = 1.001) -> None:
    model = onnx.load(path)
    tensor = next(each for each in model.graph.initializer if each.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[3] *= factor
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)


def two() -> gz.Compiled:
    """Two tasks that share half of their first layer, with inputs that are alike."""
    models = {"a": net(8), "b": net(8)}
    with torch.no_grad():
        models["b"].o.weight.mul_(-0.5)  # type: ignore[union-attr,operator]
    plan = gz.Plan([gz.Zip(share=0.5, metric="euclidean")])
    return gz.compile(models, plan, {"a": rows(8), "b": rows(8)})


@pytest.mark.parametrize("same_input", [False, True])
def test_a_joint_file(same_input: bool, tmp_path: Path) -> None:
    result, path = two(), tmp_path / "joint.onnx"
    report = result.export(path, same_input=same_input)
    assert report.verified, report
    again = result.verify(path)
    assert again.verified, again
    assert again.inputs == report.inputs
    assert (list(report.inputs) == ["x"]) is same_input
    name = max(onnx.load(path).graph.initializer, key=lambda each: int(np.prod(each.dims))).name
    alter(path, name)
    with pytest.raises(gz.VerificationError, match="1 of"):
        result.verify(path)


def test_a_file_per_task(tmp_path: Path) -> None:
    result, folder = two(), tmp_path / "tasks"
    report = result.export(folder, per_task=True)
    assert report.verified, report
    again = result.verify(folder)
    assert again.verified, again
    assert again.bytes == report.bytes
    assert set(again.inputs) == {"a_x", "b_x"}
    data = (folder / "weights.data").read_bytes()
    changed = bytearray(data)
    changed[2] ^= 16
    (folder / "weights.data").write_bytes(bytes(changed))
    with pytest.raises(gz.VerificationError, match=r"task '[ab]': .*numbers of"):
        result.verify(folder)
    (folder / "weights.data").unlink()
    with pytest.raises(gz.VerificationError, match=r"task 'a': .* cannot be read as an ONNX model"):
        result.verify(folder)
    (folder / "weights.data").write_bytes(data)
    (folder / "b.onnx").unlink()
    with pytest.raises(gz.VerificationError, match="task 'b': there is no file"):
        result.verify(folder)


def test_weights_in_a_second_file(single: gz.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "SINGLE_FILE_LIMIT", 100)
    path = tmp_path / "big.onnx"
    report = single.export(path)
    assert report.verified
    assert report.external_data
    again = single.verify(path)
    assert again.verified
    assert again.external_data
    assert again.bytes == report.bytes
    data = next(file for file in tmp_path.iterdir() if file != path)
    data.write_bytes(data.read_bytes()[:-50])
    with pytest.raises(gz.VerificationError, match="cannot be read as an ONNX model"):
        single.verify(path)


def test_another_opset_and_a_module_that_was_saved(single: gz.Compiled, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert single.export(path, opset=18).verified
    single.save(tmp_path / "saved.graphzip")
    report = gz.load(tmp_path / "saved.graphzip").verify(path)
    assert report.verified, report
    assert report.opset == 18


def test_a_module_that_was_trained_on_is_another(single: gz.Compiled, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    single.export(path)
    with torch.no_grad():
        single.module.get_submodule("o").bias[1] += 1e-4  # type: ignore[index,operator]
    with pytest.raises(gz.VerificationError, match=r"1 of 3 numbers of weight 'o.bias' differ from the module's"):
        single.verify(path)


def test_a_file_by_another_writer_is_compared_by_content(single: gz.Compiled, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    single.export(path)

    def rewrite(change: Callable[[onnx.ModelProto], None]) -> None:
        model = onnx.load(path)
        model.producer_version = "2.0"
        change(model)
        onnx.save(model, path)

    def apart(model: onnx.ModelProto) -> None:
        """Take the bias of the first layer out of its operator, and call its weight something else."""
        gemm = model.graph.node[0]
        bias, output = gemm.input.pop(), gemm.output[0]
        gemm.output[0] = "product"
        added = onnx.helper.make_node("Add", ["product", bias], [output])
        model.graph.node.insert(1, added)
        model.graph.initializer[0].name = gemm.input[1] = "kernel"

    rewrite(lambda _: None)
    assert single.verify(path).verified
    rewrite(apart)
    report = single.verify(path)
    assert not report.verified
    assert "the graph is not the one that this version of the exporter writes" in report.unchecked[0]
    assert report.max_abs_diff is not None
    alter(path, "kernel")
    with pytest.raises(gz.VerificationError, match=r"kernel|Gemm"):
        single.verify(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"no model at all"), "cannot be read as an ONNX model"),
        (lambda path: path.write_bytes(b""), "cannot be read as an ONNX model"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "cannot be read|is not the"),
        (lambda path: path.unlink(), "there is no file"),
        (lambda path: gz.compile(net(6), EMPTY, rows(6)).export(path), "is not the module: .* has shape"),
        (lambda path: gz.compile(nn.Linear(8, 3), EMPTY, rows()).export(path), "its inputs are input: FLOAT"),
        (lambda path: gz.compile(net(8, blind=True), EMPTY, rows()).export(path), "is not the graph of the module"),
        (lambda path: gz.compile(net(), EMPTY, (torch.randn(4, 5, 8),)).export(path), "the file takes x .*, and the"),
    ],
)
def test_what_is_not_this_model(
    write: Callable[[Path], Any], message: str, single: gz.Compiled, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    single.export(path)
    write(path)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(gz.VerificationError, match=message):
        single.verify(path)
    assert (path.read_bytes() if path.exists() else None) == before
    with pytest.raises(gz.VerificationError, match="is a directory, and a single model was compiled"):
        single.verify(tmp_path)


def test_a_converter_that_loses_weights_is_found_whatever_the_outputs_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = torch.onnx.export

    def zeroed(*args: Any, **kwargs: Any) -> Any:
        ir = importlib.import_module("onnx_ir")
        program = convert(*args, **kwargs)
        for value in program.model.graph.initializers.values():
            value.const_value = ir.tensor(np.zeros_like(value.const_value.numpy()))
        return program

    monkeypatch.setattr(torch.onnx, "export", zeroed)
    result = gz.compile(net(blind=True), EMPTY, rows())
    with pytest.raises(gz.VerificationError, match=r"of weight '.*' differ from the module's.*nothing was written"):
        result.export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_of_half_precision_off_by_a_tenth_is_found(tmp_path: Path) -> None:
    module, path = net().half(), tmp_path / "half.onnx"
    result = gz.compile(module, EMPTY, tuple(each.half() for each in rows()))
    report = result.export(path)
    assert report.verified, report
    assert report.tolerance is not None
    assert report.tolerance < 0.05
    alter(path, "a.weight", 1.1)
    with pytest.raises(gz.VerificationError, match=r"1 of 256 numbers of weight 'a.weight'"):
        result.verify(path)


def test_bfloat16_is_compared_as_float32(tmp_path: Path) -> None:
    module, path = net().bfloat16(), tmp_path / "bfloat16.onnx"
    result = gz.compile(module, EMPTY, tuple(each.bfloat16() for each in rows()))
    report = result.export(path)
    assert report.verified
    assert report.tolerance is not None
    assert report.tolerance < 1e-4
    assert any("onnxruntime has no bfloat16 on the CPU" in note for note in report.notes)
    assert {value.type.tensor_type.elem_type for value in onnx.load(path).graph.input} == {onnx.TensorProto.BFLOAT16}
    with torch.no_grad():
        result.module.get_submodule("a").weight[0, 3] *= 1.1  # type: ignore[index,operator]
    with pytest.raises(gz.VerificationError, match=r"1 of 256 numbers of weight 'a.weight'"):
        result.verify(path)


def test_entries_of_very_different_scales_are_judged_each_on_its_own() -> None:
    scales = torch.tensor([1.0, 1e-6, 3e5])
    wanted = rows(3, 8)[0] * scales
    checked = judge(reference(wanted), [wanted, wanted.roll(1, 0)])
    assert checked.strong
    assert checked.unchecked == []
    off = wanted.clone()
    off[2, 1] *= 1.01
    with pytest.raises(gz.VerificationError, match=r"output 'y' at 1 of dimension 1 .* at batch 8: by"):
        judge(reference(wanted), [off, wanted.roll(1, 0)])


def test_a_huge_constant_beside_others_is_said() -> None:
    wanted = rows(3, 8)[0] * torch.tensor([1.0, 0.0, 1.0]) + torch.tensor([0.0, 1e-7, 1e7])
    checked = judge(reference(wanted), [wanted, wanted.roll(1, 0)])
    assert checked.strong
    assert len(checked.unchecked) == 1
    assert "output 'y' at 2 of dimension 1" in checked.unchecked[0]


def test_what_rounding_turns_over_may_be_turned_over() -> None:
    """Sorted and rounded results: as many entries may flip as flip in float64, and some more."""
    wanted = torch.arange(200.0).reshape(8, 25)
    exact, off = wanted.double().clone(), wanted.clone()
    exact[0, 3], off[1, 4] = 77.0, 99.0
    flipping = reference(wanted, exact=[exact, wanted.roll(1, 0).double()])
    assert judge(flipping, [off, wanted.roll(1, 0)]).strong
    off[:, :2] += 1
    with pytest.raises(gz.VerificationError, match="output 'y' of the file differs from the module at batch 8"):
        judge(flipping, [off, wanted.roll(1, 0)])
    labels = wanted.long()
    whole = reference(labels, exact=[labels, labels.roll(1, 0)], changed=labels, eps=0.0)
    assert judge(whole, [labels, labels.roll(1, 0)]).exact_only
    wrong = labels.clone()
    wrong[3, 3] += 1
    with pytest.raises(gz.VerificationError, match="by 1, where rounding explains at most 0"):
        judge(whole, [wrong, labels.roll(1, 0)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y[:, :2], r"shape \[8, 2\] instead of \[8, 3\]"),
        (lambda y: y.double(), "torch.float64 instead of torch.float32"),
        (lambda y: y.masked_fill(y > 1, torch.nan), "NaN or infinity at other positions"),
    ],
)
def test_shape_type_and_places_of_nan_are_compared(wrong: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    wanted = rows(3, 8)[0]
    with pytest.raises(gz.VerificationError, match=message):
        judge(reference(wanted), [wrong(wanted), wanted.roll(1, 0)])
