"""Models whose weights are too large for one file: 2 GiB is where protobuf ends, some bytes in most tests here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from graphzip.export import convert
from graphzip.export import onnx as exporter
from graphzip.export.onnx import check_onnx, export_onnx


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setattr(convert, "SINGLE_FILE_LIMIT", 100)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def locations(path: Path) -> set[str]:
    """Where the graph says that its weights are."""
    stored = onnx.load(path, load_external_data=False).graph.initializer
    return {entry.value for each in stored for entry in each.external_data if entry.key == "location"}


def test_the_folder_may_be_moved(tmp_path: Path) -> None:
    module, x = net(), torch.randn(3, 8)
    (tmp_path / "here").mkdir()
    assert export_onnx(module, (x,), tmp_path / "here" / "model.onnx").verified
    (name,) = locations(tmp_path / "here" / "model.onnx")
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{8}\.data", name)
    assert sorted(file.name for file in (tmp_path / "here").iterdir()) == ["model.onnx", name]
    (tmp_path / "here").rename(tmp_path / "there")
    session = onnxruntime.InferenceSession(tmp_path / "there" / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, module(x).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert check_onnx(module, (x,), tmp_path / "there" / "model.onnx").verified


def test_an_interrupt_leaves_the_files_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_onnx(net(), (torch.randn(3, 8),), tmp_path / "model.onnx")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def stopped(model: Any, path: Path, *, external: bool) -> None:
        assert external
        (path.parent / "half.data").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(net(), (torch.randn(3, 8),), tmp_path / "model.onnx")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_onnxruntime_reads_otherwise_is_compared_in_a_file_of_its_own(tmp_path: Path) -> None:
    """A twin in float32 of a model in bfloat16 is as large, and protobuf does not write it, either."""
    report = export_onnx(net(torch.bfloat16), (torch.randn(3, 8, dtype=torch.bfloat16),), tmp_path / "model.onnx")
    assert report.external_data
    assert report.max_abs_diff is not None
    assert "bfloat16 read as float32" in " ".join(report.notes)
    assert len(list(tmp_path.iterdir())) == 2


LARGE = """
import json, resource, sys
import onnxruntime, torch
from torch import nn
from graphzip.export.onnx import export_onnx

wide = 16640
net = nn.Sequential(nn.utils.skip_init(nn.Linear, wide, wide), nn.ReLU(), nn.utils.skip_init(nn.Linear, wide, wide))
torch.manual_seed(0)
for parameter in net.eval().parameters():
    parameter.data.uniform_(-wide ** -0.5, wide ** -0.5)
size = sum(parameter.nbytes for parameter in net.parameters())
x = torch.randn(2, wide)
report = export_onnx(net, (x,), sys.argv[1], verify=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.no_grad():
    wanted = net(x)
del net
session = onnxruntime.InferenceSession(sys.argv[1])
found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
apart = float((found - wanted).abs().max() / wanted.abs().max())
print(json.dumps([size, report.bytes, report.external_data, apart, peak]))
"""


@pytest.mark.slow
def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    """Its outputs are compared here: verification holds the weights in float64 besides, which is a lot at this size."""
    path = tmp_path / "large.onnx"
    done = subprocess.run([sys.executable, "-c", LARGE, str(path)], check=True, capture_output=True, text=True)
    size, written, external, apart, peak = json.loads(done.stdout.splitlines()[-1])
    assert size > 2**31
    assert size < written < size + 2**20
    assert external
    assert apart < 1e-5
    assert peak < 2.5 * size, f"{peak / size:.2f} times the weights"
    (name,) = locations(path)
    assert (tmp_path / name).stat().st_size + path.stat().st_size == written
