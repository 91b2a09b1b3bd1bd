"""A submodule that was compiled goes back into its model; what else knows a scope."""

from __future__ import annotations

from pathlib import Path

import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from torch import nn

import graphzip as gz

HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.name_of_it = "mine"
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 1e9:
            raise ValueError("too much")
        found: torch.Tensor = self.head(self.body(x))
        return found


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4)


def test_a_compiled_submodule_goes_back(x: torch.Tensor, tmp_path: Path) -> None:
    model = Model().eval()
    compiled = gz.compile(model, HALF, (x,), scope="body")
    expected = compiled.module(x)
    compiled.save(tmp_path / "body.graphzip")
    alone = gz.compile(model.body, HALF, (x,))
    for back in (
        compiled.put_back(model),
        gz.load(tmp_path / "body.graphzip").put_back(model),
        alone.put_back(model, "body"),
    ):
        assert type(back) is Model
        assert back.name_of_it == "mine"
        assert back.get_submodule("body.0").out_features == 4
        torch.testing.assert_close(back(x), expected)
        with pytest.raises(ValueError, match="too much"):
            back(1e10 * torch.ones(5, 4))
    assert model.body[0].out_features == 8


def test_what_cannot_go_back_is_refused(x: torch.Tensor) -> None:
    compiled = gz.compile(Model().eval().body, HALF, (x,))
    with pytest.raises(gz.GraphZipError, match="put_back needs the scope"):
        compiled.put_back(Model())
    with pytest.raises(gz.NotFoundError, match="Model has no submodule 'bodi'; did you mean 'body'"):
        compiled.put_back(Model(), "bodi")
    with pytest.raises(gz.GraphZipError, match="scope: 3 is not a name"):
        compiled.put_back(Model(), 3)  # type: ignore[arg-type]
    nets = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}
    joint = gz.compile(nets, gz.Plan([gz.Zip(share=1.0)]), dict.fromkeys(nets, (x,)))
    with pytest.raises(gz.GraphZipError, match="several were compiled"):
        joint.put_back(Model(), "body")


def test_a_submodule_is_widened(x: torch.Tensor) -> None:
    model = Model().eval()
    wide = gz.widen(model, (x,), 2.0, scope="body")
    assert wide.get_submodule("body.0").out_features == 16
    assert wide.get_submodule("head.0").out_features == 8
    torch.testing.assert_close(wide(x), model(x))


def test_a_submodule_is_distilled_alone(x: torch.Tensor) -> None:
    model = Model().eval()
    student = gz.compile(model, HALF, (x,), scope="body").module
    head = [each.clone() for each in student.get_submodule("head").parameters()]
    batches = [torch.randn(16, 4) for _ in range(4)]
    losses = gz.distill(student, model, batches, epochs=20, rate=0.05, scope="body")
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(head, student.get_submodule("head").parameters(), strict=True))
    with pytest.raises(gz.NotFoundError, match="scope: student has no submodule 'bodi'"):
        gz.distill(student, model, batches, scope="bodi")
    with pytest.raises(gz.GraphZipError, match="labels: with a scope"):
        gz.distill(student, model, batches, labels=0.5, scope="body")
    with pytest.raises(gz.ExampleInputError, match=r"'body\.0' gives other outputs in the student"):
        gz.distill(student, model, batches, scope="body.0")


class Chooses(nn.Module):
    """Gives numbers, as many as the values decide."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))

    def forward(self, x: torch.Tensor) -> list[float]:
        return [value for value in self.backbone(x).mean((1, 2, 3)).tolist() if value > 0]


def test_a_part_of_what_cannot_be_exported_is_exported_alone(tmp_path: Path) -> None:
    images = torch.randn(3, 3, 8, 8)
    compiled = gz.compile(
        Chooses().eval(), HALF, (images,), scope="backbone", calibration=[images], dynamic_shapes="height,width"
    )
    assert compiled.report.drift is None
    assert "outputs on the calibration data are no tensors, so how far they moved is unknown" in compiled.report.notes
    for kind in (torch.float32, torch.bfloat16, torch.float32):
        compiled.module.to(kind)
        report = compiled.export(tmp_path / "part.onnx")
        assert report.verified
        said = "the file holds 'backbone' alone, for the whole model cannot be exported: Chooses returns no tensor"
        assert any(note.startswith(said) for note in report.notes)
        assert compiled.verify(tmp_path / "part.onnx").verified
    session = onnxruntime.InferenceSession(str(tmp_path / "part.onnx"), providers=["CPUExecutionProvider"])
    assert [isinstance(size, str) for size in session.get_inputs()[0].shape] == [True, False, True, True]


def test_results_that_are_another_number_of_tensors_are_told_of() -> None:
    class Rows(Chooses):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
            found = self.backbone(x).mean((1, 2, 3))
            return [
                value for value in found if value > found.mean() * self.backbone.get_submodule("0").out_channels / 8
            ]

    images = torch.randn(6, 3, 8, 8)
    report = gz.compile(Rows().eval(), HALF, (images,), scope="backbone", calibration=[images]).report
    assert not report.lossless
