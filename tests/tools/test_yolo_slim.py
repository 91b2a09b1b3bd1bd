"""The example that slims a YOLO: random weights, and pictures of noise."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow
cv2 = pytest.importorskip("cv2")
ultralytics = pytest.importorskip("ultralytics")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set with four pictures, each with one object."""
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(4):
        picture = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "data" / "images" / f"{number}.png"), picture)
        (tmp_path / "data" / "labels" / f"{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    text = f"path: {tmp_path / 'data'}\ntrain: images\nval: images\nnames:\n" + "".join(
        f"  {number}: kind{number}\n" for number in range(80)
    )
    (tmp_path / "data.yaml").write_text(text)
    return tmp_path / "data.yaml"


def example() -> Any:
    path = Path(__file__).parents[2] / "examples" / "yolo_slim.py"
    spec = importlib.util.spec_from_file_location("yolo_slim", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_a_slim_yolo_trains_is_judged_and_exported(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = example()
    wide = ultralytics.YOLO("yolo11n.yaml")
    slim = script.slimmed(wide, 0.5, torch.rand(2, 3, 64, 64))
    widths = {name: tuple(value.shape) for name, value in slim.model.named_parameters()}
    assert widths["model.0.conv.weight"] == (8, 3, 3, 3)
    count = sum(value.numel() for value in slim.model.parameters())
    assert count < 0.5 * sum(value.numel() for value in wide.model.parameters())
    options = {"data": str(data), "imgsz": 64, "batch": 2, "workers": 0, "device": "cpu", "plots": False}
    slim.train(trainer=script.trainer_of(slim), epochs=1, amp=False, project=str(tmp_path / "runs"), **options)
    assert {name: tuple(value.shape) for name, value in slim.model.named_parameters()} == widths
    assert slim.val(**options).box.map >= 0
    file = Path(slim.export(format="onnx", imgsz=64, simplify=False))
    assert file.exists()
