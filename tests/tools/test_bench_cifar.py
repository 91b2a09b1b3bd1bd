"""What the CIFAR benchmark compares is comparable, and it says what it lacks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture(scope="module")
def bench() -> Any:
    pytest.importorskip("PIL")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("csgd_cifar")
    for name in ("csgd_cifar", "cifar"):
        sys.modules.pop(name, None)


def test_projected_shortcuts_compute_what_padding_does(bench: Any) -> None:
    torch.manual_seed(0)
    model = bench.CifarResNet(1).eval()
    projected = bench.with_projections(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), projected(x))
    assert bench.macs(projected) == bench.macs(model)
    assert sum(isinstance(module, bench.Shortcut) for module in projected.modules()) == 2


def test_augmented_images_are_moved_and_mirrored(bench: Any) -> None:
    images = torch.arange(64 * 3 * 32 * 32, dtype=torch.float32).view(64, 3, 32, 32) + 1
    found = importlib.import_module("cifar").augmented(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for image, moved in zip(padded, found, strict=True):
        windows = [image[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        assert any(torch.equal(moved, w) or torch.equal(moved, w.flip(2)) for w in windows)
    assert len({bool(moved[0, 16, 8] < moved[0, 16, 9]) for moved in found}) == 2


def test_missing_data_is_said(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAPHZIP_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["csgd_cifar.py", "--threads", "1"])
    assert bench.main() == 0
    assert f"skipped: {tmp_path / 'cifar10_jpeg.npz'} is missing" in capsys.readouterr().err
