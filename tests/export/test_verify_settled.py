"""A network whose batch norms never saw data hardly moves its outputs: its operators are compared all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from references import reference
from torch import nn

import graphzip as gz
from graphzip.export import onnx as exporter
from graphzip.export.outputs import Judged, judge
from graphzip.export.verify import _settles


class Fading(nn.Module):
    """Layers that let the signal fade, and a head whose bias hides what is left; decoded with a grid of its own."""

    def __init__(self, depth: int = 16, *, offset: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for at in range(depth):
            layers += [nn.Conv2d(8 if at else 3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()]
        self.body, self.head, self.offset = nn.Sequential(*layers), nn.Conv2d(8, 6, 1), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(self.body(x)).flatten(2)
        grid = torch.arange(y.shape[2]).type_as(y) + 0.5
        boxes = y[:, :2] + torch.stack([grid, grid.flip(0)]).unsqueeze(0)
        return torch.cat([boxes * y.new_full((y.shape[2],), 4.0), y[:, 2:].sigmoid()], 1) + self.offset


def fading(**options: Any) -> gz.Compiled:
    torch.manual_seed(0)
    model = Fading(**options).eval()
    nn.init.constant_(model.head.bias, -3.0)  # type: ignore[arg-type]
    return gz.compile(model, gz.Plan([]), (torch.rand(2, 3, 8, 8),))


def test_operators_are_compared_in_a_twin_whose_batch_norms_fit(tmp_path: Path) -> None:
    path = tmp_path / "fading.onnx"
    result = fading()
    before = {name: tensor.clone() for name, tensor in result.module.state_dict().items()}
    report = result.export(path)
    assert report.verified, report.unchecked
    assert any("its batch norms do not fit" in note for note in report.notes)
    assert result.verify(path).verified
    assert all(torch.equal(before[name], tensor) for name, tensor in result.module.state_dict().items())
    model = onnx.load(path)
    kernel = next(each for each in model.graph.initializer if each.name == "body.3.weight")
    array = numpy_helper.to_array(kernel).copy()
    array.flat[5] *= 1.001
    kernel.CopyFrom(numpy_helper.from_array(array, kernel.name))
    onnx.save(model, path)
    with pytest.raises(gz.VerificationError, match=r"numbers of .*body\.3\.weight"):
        result.verify(path)


def test_what_hides_the_output_in_the_twin_too_is_said(tmp_path: Path) -> None:
    report = fading(offset=1e7).export(tmp_path / "hidden.onnx")
    assert not report.verified
    assert "rounding" in report.unchecked[0] or "the same for all inputs" in report.unchecked[0]


def test_a_wrong_conversion_of_a_fading_network_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = exporter.convert

    def wrong(*args: Any, **kwargs: Any) -> Any:
        model = convert(*args, **kwargs)
        norm = [node for node in model.graph if node.op_type == "Sigmoid"][3]
        norm.outputs[0].replace_all_uses_with(norm.inputs[0])
        return model

    monkeypatch.setattr(exporter, "convert", wrong)
    with pytest.raises(gz.VerificationError, match="with batch norms that fit the example"):
        fading().export(tmp_path / "wrong.onnx")


def test_constants_that_depend_on_no_weight_are_traced(tmp_path: Path) -> None:
    """A grid that borrows its type from an activation, whatever the batch."""
    report = fading(depth=1).export(tmp_path / "grid.onnx")
    assert report.verified, report.unchecked
    assert report.notes == ()


def test_a_row_of_few_large_entries_is_a_check() -> None:
    """Scores of a class that occurs twice: the rest is far below, and moves little."""
    wanted = torch.full((4, 2, 60), 1e-5, dtype=torch.float32)
    wanted[:, 0] = 3.0 * torch.rand(4, 60, generator=torch.Generator().manual_seed(0))
    wanted[:, 1, :3] = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) * 1e-2
    wanted[:, 1] *= 1 + 0.2 * torch.rand(4, 60, generator=torch.Generator().manual_seed(2))
    other = wanted.roll(1, 0)
    checked = judge(
        reference(wanted, changed=wanted * 1.001, exact=[wanted.double() + 1e-8, other.double()]), [wanted, other]
    )
    assert checked.strong
    assert checked.unchecked == []


def test_a_sigmoid_far_from_zero_is_no_other_model(tmp_path: Path) -> None:
    """A runtime computes it to so many digits behind the point; a channel that is all tail is off by a share of it."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 1)
    with torch.no_grad():
        layer.bias[5] = -12.0
    result = gz.compile(nn.Sequential(layer, nn.SiLU()).eval(), gz.Plan([]), (torch.randn(2, 3, 64, 64),))
    assert result.export(tmp_path / "tail.onnx").max_abs_diff < 1e-5


@pytest.mark.parametrize(
    ("old", "new", "settles"),
    [
        ((True, False, False), (False, True, False), True),
        ((True, False, False), (True, False, False), False),
        ((False,), (True, True, False), True),
        ((False,), (True, False, False), False),
        ((False,), (True,), True),
    ],
)
def test_half_of_what_showed_nothing_has_to_show_in_the_twin(
    old: tuple[bool, ...], new: tuple[bool, ...], settles: bool
) -> None:
    def judged(shows: tuple[bool, ...], **options: Any) -> Judged:
        said = [] if all(shows) else ["something"]
        dim = 1 if len(shows) > 1 else None
        return Judged("y", 0.0, 0.0, strong=any(shows), unchecked=said, shows=shows, dim=dim, **options)

    assert _settles(judged(old), judged(new)) is settles
    assert not _settles(judged(old, finite=False), judged(new))
