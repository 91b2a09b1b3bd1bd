"""ONNX files: what is in them, how they are checked, and that nothing is left behind when a check fails."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import graphzip as gz
from graphzip.errors import ExportError, MissingDependencyError, PlanError, VerificationError
from graphzip.export import convert
from graphzip.export import onnx as exporter
from graphzip.export.convert import FileVersion
from graphzip.export.onnx import ExportReport, check_onnx, export_onnx
from graphzip.files import staged, write_text


class Net(nn.Module):
    """Convolution, batch norm, dropout; one weight tied, and one equal to it without being tied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 3)
        self.norm = nn.BatchNorm2d(40)
        self.drop = nn.Dropout(0.5)
        self.first = nn.Linear(40, 40)
        self.tied = nn.Linear(40, 40)
        self.tied.weight = self.first.weight
        self.equal = nn.Linear(40, 40)
        self.equal.weight = nn.Parameter(self.first.weight.detach().clone())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(torch.relu(self.norm(self.stem(image))).mean((2, 3)))
        hidden = torch.tanh(self.first(hidden))
        return self.equal(torch.relu(self.tied(hidden)))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Lambda(nn.Module):
    """A module without weights; `forward` is given."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Exported:
    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.module = Net().train()
        self.state = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        self.path = folder / "net.onnx"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.report = export_onnx(self.module, (torch.randn(1, 3, 6, 6),), self.path)
        self.printed = printed.getvalue()
        self.model = onnx.load(self.path)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("net"))


def sizes(value: Any) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def run(path: Path, **inputs: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()}))


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_report_says_what_was_written(net: Exported) -> None:
    report = net.report
    assert report.path == net.path
    assert report.bytes == net.path.stat().st_size
    assert report.opset == next(entry.version for entry in net.model.opset_import if entry.domain == "")
    assert not report.external_data
    assert report.dynamic_batch
    assert report.verified
    assert report.batches == (1, 2, 3)
    assert report.max_abs_diff is not None
    assert report.tolerance is not None
    assert report.max_abs_diff <= report.tolerance < 1e-4
    assert "verified in onnxruntime at batch 1, 2, 3: largest difference" in str(report)
    assert report.to_dict()["path"] == str(net.path)


def test_nothing_is_printed_and_nothing_else_is_written(net: Exported) -> None:
    assert net.printed == ""
    assert left_in(net.path.parent) == ["net.onnx"]


def test_the_module_is_left_alone(net: Exported) -> None:
    assert all(part.training for part in net.module.modules())
    for name, tensor in net.module.state_dict().items():
        assert torch.equal(tensor, net.state[name])
    assert "forward" not in vars(net.module)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.module.parameters())


def test_no_path_of_this_machine_is_in_the_file(net: Exported) -> None:
    data = net.path.read_bytes()
    for place in (os.getcwd(), str(Path.home()), str(net.path.parent), torch.__path__[0], __file__, "site-packages"):
        assert place.encode() not in data
    assert not net.model.metadata_props
    assert not any(node.doc_string or node.metadata_props for node in net.model.graph.node)


def test_inputs_and_outputs_are_named_and_the_batch_is_free(net: Exported) -> None:
    (image,), (output,) = net.model.graph.input, net.model.graph.output
    assert (image.name, sizes(image)) == ("image", ["batch", 3, 6, 6])
    assert (output.name, sizes(output)) == ("output", ["batch", 40])
    x = torch.randn(7, 3, 6, 6)
    with torch.no_grad():
        expected = net.module.eval()(x)
    net.module.train()
    np.testing.assert_allclose(run(net.path, image=x)[0], expected.numpy(), atol=1e-6)


def test_equal_weights_are_stored_once(net: Exported) -> None:
    square = [tensor.name for tensor in net.model.graph.initializer if list(tensor.dims) == [40, 40]]
    assert len(square) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(mode: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Linear()
    x = torch.randn(2, 4, requires_grad=True)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        export_onnx(module, (x,), tmp_path / "a.onnx", verify=False)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    export_onnx(module, (x,), tmp_path / "b.onnx", verify=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


class Structured(nn.Module):
    def forward(self, parts: dict[str, torch.Tensor], *, scale: torch.Tensor) -> dict[str, Any]:
        left, right = parts["left"], parts["right"]
        return {"left": left * scale, "both": [right, left + right], "none": None, "five": 5, "twice": left * scale}


def test_nested_inputs_and_outputs(rows: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "dict.onnx"
    parts = {"left": rows, "right": rows}
    report = export_onnx(Structured(), (parts,), path, example_kwargs={"scale": rows[:1].repeat(2, 1)})
    graph = onnx.load(path).graph
    assert report.verified
    assert [value.name for value in graph.input] == ["parts_left", "parts_right", "scale"]
    assert [value.name for value in graph.output] == ["left", "both_0", "both_1", "twice"]
    assert all(sizes(value) == ["batch", 4] for value in (*graph.input, *graph.output))
    left, right, scale = torch.randn(3, 5, 4)
    found = run(path, parts_left=left, parts_right=right, scale=scale)
    np.testing.assert_allclose(found[2], (left + right).numpy(), rtol=1e-6)


def test_tuple_outputs_are_numbered(rows: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "tuple.onnx"
    export_onnx(Lambda(lambda x: (x, x + 1, None, torch.cat([x, x]))), (rows,), path)
    outputs = onnx.load(path).graph.output
    assert {value.name: sizes(value) for value in outputs} == {
        "output": ["batch", 4],
        "output_1": ["batch", 4],
        "output_3": ["2*batch", 4],
    }


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self.embed(ids).mean(1) * weights.sum()
        return hidden, hidden.argmax(1), hidden > 0


def test_integers_stay_in_range_and_integer_outputs_are_equal(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 9, 3]])
    report = export_onnx(Tokens(), (ids, torch.ones(2)), tmp_path / "tokens.onnx")
    graph = onnx.load(tmp_path / "tokens.onnx").graph
    assert report.batches == (1, 2, 3)
    assert {value.name: sizes(value) for value in graph.input} == {"ids": ["batch", 3], "weights": [2]}


@pytest.mark.parametrize("opset", [18, 21])
def test_the_requested_opset_is_written(opset: int, rows: torch.Tensor, tmp_path: Path) -> None:
    report = export_onnx(Linear(), (rows,), tmp_path / "model.onnx", version=FileVersion(opset))
    written = onnx.load(tmp_path / "model.onnx").opset_import[0].version
    assert report.opset == written == opset


def test_the_requested_format_is_written(rows: torch.Tensor, tmp_path: Path) -> None:
    module = Linear()
    report = export_onnx(module, (rows,), tmp_path / "model.onnx", version=FileVersion(18, 8))
    assert report.ir_version == onnx.load(tmp_path / "model.onnx").ir_version == 8
    assert report.verified
    assert check_onnx(module, (rows,), tmp_path / "model.onnx").ir_version == 8


@pytest.mark.parametrize(("opset", "ir"), [(21, 9), (18, 7), (18, 99)])
def test_a_format_that_cannot_hold_the_opset_is_refused(
    opset: int, ir: int, rows: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(
        ExportError, match=rf"^ir_version: {ir} is not written with opset {opset}; write one from \d+ to"
    ):
        export_onnx(Linear(), (rows,), tmp_path / "model.onnx", version=FileVersion(opset, ir))


def test_an_opset_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"cannot be written in ONNX opset 11; the exporter can write opset 18 to \d+"
    ):
        export_onnx(Net(), (torch.randn(2, 3, 6, 6),), tmp_path / "model.onnx", version=FileVersion(11))
    assert left_in(tmp_path) == []


@pytest.fixture
def two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "SINGLE_FILE_LIMIT", 1000)


@pytest.mark.usefixtures("two_files")
def test_large_weights_go_to_a_second_file(tmp_path: Path) -> None:
    report = export_onnx(Net(), (torch.randn(2, 3, 6, 6),), tmp_path / "big.onnx")
    graph, weights = left_in(tmp_path)
    assert graph == "big.onnx"
    assert re.fullmatch(r"big\.onnx\.[0-9a-f]{8}\.data", weights)
    assert report.external_data
    assert "in two files" in str(report)
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert run(tmp_path / "big.onnx", image=torch.randn(3, 3, 6, 6))[0].shape == (3, 40)
    export_onnx(Net(), (torch.randn(2, 3, 6, 6),), tmp_path / "big.onnx")
    other = left_in(tmp_path)
    assert len(other) == 2, "the weights of the export before are gone"
    assert other[1] != weights


def perturb_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the writer change one number of a weight by a thousandth."""
    save = exporter.save

    def corrupt(model: Any, path: Path, *, external: bool) -> None:
        ir = importlib.import_module("onnx_ir")
        value = next(value for name, value in model.graph.initializers.items() if name.endswith("weight"))
        array = value.const_value.numpy().copy()
        array.flat[array.size // 2] *= 1.001
        value.const_value = ir.tensor(array)
        save(model, path, external=external)

    monkeypatch.setattr(exporter, "save", corrupt)


@pytest.mark.usefixtures("two_files")
def test_a_mismatch_keeps_the_files_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_onnx(Net(), (torch.randn(2, 3, 6, 6),), tmp_path / "big.onnx", verify=False)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    perturb_weight(monkeypatch)
    with pytest.raises(VerificationError, match=r"1 of 1080 numbers of weight 'stem.weight' .*; nothing was"):
        export_onnx(Net(), (torch.randn(2, 3, 6, 6),), tmp_path / "big.onnx")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_without_verification_the_report_says_so(rows: torch.Tensor, tmp_path: Path) -> None:
    report = export_onnx(Linear(), (rows,), tmp_path / "model.onnx", verify=False)
    assert report.max_abs_diff is None
    assert report.tolerance is None
    assert report.batches == ()
    assert not report.verified
    assert report.to_dict()["verified"] is False
    assert str(report).endswith("not verified")


def test_a_model_without_a_batch(tmp_path: Path) -> None:
    report = export_onnx(Lambda(lambda x: x * 2), (torch.tensor(3.0),), tmp_path / "scalar.onnx")
    assert report.verified
    assert not report.dynamic_batch
    assert report.batches == ()


def test_names_that_meet_are_told_apart(rows: torch.Tensor, tmp_path: Path) -> None:
    export_onnx(Lambda(lambda x: {"x": x + 1}), (rows,), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["x", "x_1"]


def test_half_precision_is_verified_where_onnxruntime_can(rows: torch.Tensor, tmp_path: Path) -> None:
    report = export_onnx(Linear().half(), (rows.half(),), tmp_path / "half.onnx")
    assert report.verified


def test_what_onnxruntime_cannot_run_is_not_called_verified(tmp_path: Path) -> None:
    module, x = Net().double(), torch.randn(2, 3, 6, 6).double()
    with pytest.raises(ExportError, match=r"onnxruntime cannot load .* convert the module to float32 .* verify=False"):
        export_onnx(module, (x,), tmp_path / "model.onnx")
    assert left_in(tmp_path) == []


def test_bfloat16_is_read_as_float32(tmp_path: Path) -> None:
    report = export_onnx(Net().bfloat16(), (torch.randn(2, 3, 6, 6).bfloat16(),), tmp_path / "model.onnx")
    assert report.verified
    x = torch.randn(2, 4).bfloat16()
    mixed = Lambda(lambda x: (x.reshape(-1, 2, 2) + torch.tensor(0.3, dtype=torch.bfloat16)).float().exp())
    assert export_onnx(mixed, (x,), tmp_path / "mixed.onnx").verified
    drawn = export_onnx(Lambda(lambda x: x + torch.randn_like(x)), (x,), tmp_path / "drawn.onnx")
    assert any("random, in bfloat16" in why for why in drawn.unchecked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_compiled_module_may_be_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)).eval()
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep={"0": 0.5})]), (torch.randn(2, 3, 4, 4),))
    compiled.module.to(dtype)
    assert compiled.export(tmp_path / "slim.onnx").verified
    assert compiled.example_inputs[0].dtype == dtype
    compiled.save(tmp_path / "slim.graphzip")
    again = gz.load(tmp_path / "slim.graphzip")
    assert again.verify(tmp_path / "slim.onnx").verified
    again.module.float()
    assert again.export(tmp_path / "float.onnx").verified


def test_a_wrong_operator_of_bfloat16_is_found(tmp_path: Path) -> None:
    module, x = Linear().bfloat16(), torch.randn(2, 4).bfloat16()
    export_onnx(module, (x,), tmp_path / "model.onnx")
    with torch.no_grad():
        next(module.parameters()).mul_(1.5)
    with pytest.raises(gz.VerificationError):
        check_onnx(module, (x,), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("module", "example", "message"),
    [
        (Linear(), (torch.ones(2, 5),), "Linear fails on the example inputs: .*; pass inputs it accepts"),
        (Linear(), [torch.ones(2, 4)], r"must be a tuple of positional arguments, got list; .* write \(x,\)"),
        (Lambda(lambda x: None), (torch.ones(2, 4),), "Lambda returns no tensor"),
        (
            Lambda(lambda x: torch.complex(x, x)),
            (torch.ones(2, 4),),
            "no complex numbers; pass and return torch.view_as_real",
        ),
        (
            Lambda(lambda x: x if x.sum() > 0 else -x),
            (torch.ones(2, 4),),
            "Lambda cannot be traced for export: .*; make its control flow independent",
        ),
        (
            Lambda(torch.special.bessel_j0),
            (torch.ones(2, 4),),
            "exporter of PyTorch cannot convert the model: No ONNX function found for .*bessel_j0.*; replace that part",
        ),
    ],
)
def test_what_cannot_be_exported_says_why(module: nn.Module, example: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(module, example, tmp_path / "model.onnx")
    assert left_in(tmp_path) == []


def test_results_that_are_no_tensors_are_not_in_the_file(rows: torch.Tensor, tmp_path: Path) -> None:
    model = Lambda(lambda x: {"count": x.shape[0], "twice": 2 * x, "more": [3, None, "text", x + 1]})
    compiled = gz.compile(model, gz.Plan([]), (rows,))
    report = compiled.export(tmp_path / "model.onnx")
    assert report.verified
    assert "not in the file, which gives tensors alone: count, more_0, more_2" in report.notes
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == ["twice", "more_3"]
    assert compiled.module(rows)["more"][:3] == [3, None, "text"]


def test_a_missing_package_names_the_pip_line(
    rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="onnxruntime is not installed; run: pip install onnxruntime"):
        export_onnx(Linear(), (rows,), tmp_path / "model.onnx")
    assert export_onnx(Linear(), (rows,), tmp_path / "model.onnx", verify=False).bytes > 0


class Untouched(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the place is checked before the module runs")


def refuse(path: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(Untouched(), (torch.ones(2),), path)


def test_the_place_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "missing" / "model.onnx", "the directory .*missing does not exist; create it first")
    refuse(tmp_path, "is a directory; give the name of a file in it")
    refuse(tmp_path / "file" / "model.onnx", "file is not a directory; choose another place")
    monkeypatch.setattr(os, "access", lambda *_: False)
    refuse(tmp_path / "model.onnx", "is not writable; choose another place")


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    write_text(path, "old", PlanError)
    with pytest.raises(ZeroDivisionError), staged(path, PlanError) as temporary:
        temporary.write_text(f"new {1 // 0}")
    assert path.read_text() == "old"
    with (
        pytest.raises(PlanError, match=r"cannot write .*plan\.yaml: disk full; free some space"),
        staged(path, PlanError),
    ):
        raise OSError(28, "disk full")
    write_text(path, "new", PlanError)
    assert path.read_text() == "new"
    assert left_in(tmp_path) == ["plan.yaml"]


def write_three(path: Path) -> None:
    with staged(path, ExportError) as temporary:
        temporary.write_text("new a")
        temporary.with_name("a.data").write_text("new data")
        temporary.with_name("a.more").write_text("more")


def test_companion_files_are_replaced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old a")
    replace = os.replace

    def fail_on_the_last(source: Path, target: Path) -> None:
        if Path(source).parent.name == "new" and Path(target).name == "a.more":
            raise OSError(5, "input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_the_last)
    with pytest.raises(ExportError, match="input/output error"):
        write_three(tmp_path / "a")
    assert left_in(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old a"


def test_a_directory_that_cannot_hold_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_all(**_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse_all)
    with pytest.raises(PlanError, match=r"cannot write .*: Permission denied; .* choose another place"):
        write_text(tmp_path / "plan.yaml", "text", PlanError)


def test_report_is_plain_data() -> None:
    report = ExportReport(Path("m.onnx"), 2_500_000, 20, True, 1e-6, 5e-6, (1, 2), True)
    assert str(report) == (
        "m.onnx: 2.50 MB in two files, opset 20, any batch, verified in onnxruntime at batch 1, 2: "
        "largest difference 1e-06 (tolerance 5e-06)"
    )


# --- attention -------------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """Attention over queries, keys and values of a shape, with a mask of another."""

    def __init__(self, lead: tuple[int, ...], mask: tuple[int, ...] | None = None, **options: Any) -> None:
        super().__init__()
        self.parts = nn.Linear(8, 24)
        self.lead, self.options = lead, options
        self.register_buffer("mask", None if mask is None else torch.rand(mask) > 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.parts(x)
        q, k, v = (x.unflatten(0, (-1, *self.lead)) if self.lead else x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, self.mask, **self.options)


@pytest.mark.parametrize(
    ("lead", "mask", "options"),
    [
        ((), None, {}),
        ((), (5, 5), {}),
        ((), None, {"is_causal": True, "scale": 0.3}),
        ((3,), (3, 5, 5), {}),
        ((2, 3), None, {"is_causal": True}),
        ((2, 3), (5, 5), {}),
        ((2, 3), (3, 5, 5), {"scale": 0.5}),
    ],
)
def test_attention_over_any_number_of_dimensions(
    lead: tuple[int, ...], mask: tuple[int, ...] | None, options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = Attends(lead, mask, **options).eval()
    count = 2 * int(np.prod(lead, dtype=int))
    report = export_onnx(module, (torch.randn(count, 5, 8),), tmp_path / "model.onnx")
    assert report.verified, report
    x = torch.randn(3 * count, 5, 8)
    (found,) = run(tmp_path / "model.onnx", x=x)
    np.testing.assert_allclose(found, module(x).detach(), rtol=1e-4, atol=1e-5)


def test_attention_of_one_sequence(tmp_path: Path) -> None:
    class One(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k)

    inputs = (torch.randn(4, 8), torch.randn(6, 8))
    assert export_onnx(One(), inputs, tmp_path / "model.onnx", dynamic_batch=False).verified


# --- the optimizer of the exporter -----------------------------------------------------------------------------------


class Halves(nn.Module):
    """Parts of an open batch, which the constant folding of the exporter fails at."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return torch.cat([y, y.flip(0)]).chunk(2)[0]


@pytest.mark.parametrize("fails", [False, True])
def test_what_cannot_be_optimized_is_written_as_it_is(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    if fails:
        monkeypatch.setattr("graphzip.export.convert._optimize", refuse)
    module = Halves().eval()
    assert export_onnx(module, (torch.randn(4, 1, 6, 6),), tmp_path / "model.onnx").verified
    x = torch.randn(3, 1, 6, 6)
    (found,) = run(tmp_path / "model.onnx", x=x)
    np.testing.assert_allclose(found, module(x).detach(), rtol=1e-4, atol=1e-5)
