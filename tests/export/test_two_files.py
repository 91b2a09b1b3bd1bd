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

from graphzip.export import convert, runs
from graphzip.export import onnx as exporter
from graphzip.export.example import Case
from graphzip.export.onnx import check_onnx, export_onnx
from graphzip.export.runs import Run


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


class Asks(nn.Module):
    """Reads weights in several ways, and asks them for what is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.rnn = nn.Linear(8, 6), nn.LSTM(6, 4, batch_first=True)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.inner.weight
        half = weight.shape[0] // 2
        x = x.to(weight.dtype) @ torch.cat([weight[half:], weight[:half]]).T + self.inner.bias
        return self.rnn(x[:, None])[0].flatten(1) * self.scale.view_as(self.scale)


@pytest.mark.parametrize("make", [net, Asks])
def test_large_weights_are_not_copied_for_references(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are changed where they are read, which gives the same."""
    torch.manual_seed(0)
    module, case = make().eval(), Case((torch.randn(3, 8),), {})
    calls = [Run("example", case, [module(*case.args)])]

    def found() -> list[torch.Tensor]:
        exact = runs._exactly(module, calls)
        assert exact is not None
        assert exact[0][0].dtype == torch.float64
        return [*exact[0], *runs._jittered(module, case, runs._rounding, 1)]

    copied = found()
    assert not torch.equal(copied[1], calls[0].outputs[0])
    monkeypatch.setattr(runs, "_LARGE", 1)
    before = [parameter.clone() for parameter in module.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(found(), copied, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))
    with runs._twin(module, lambda leaf, number: leaf.double(), torch.float64) as twin:
        assert all(one is other for one, other in zip(twin.parameters(), module.parameters(), strict=True))


LARGE = """
import json, sys
from pathlib import Path
import onnxruntime, torch
from torch import nn
from graphzip.export import convert
from graphzip.export.onnx import export_onnx

path, wide, verify = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "verify"
if verify:
    convert.SINGLE_FILE_LIMIT = wide

def peak():
    found = Path("/proc/self/status").read_text().partition("VmHWM:")[2]
    return 1024 * int(found.split()[0])

def network(wide):
    inner = (nn.utils.skip_init(nn.Linear, wide, wide) for _ in range(4))
    net = nn.Sequential(next(inner), nn.ReLU(), next(inner), nn.ReLU(), next(inner), nn.ReLU(), next(inner))
    torch.manual_seed(0)
    for parameter in net.eval().parameters():
        parameter.data.uniform_(-wide ** -0.5, wide ** -0.5)
    return net

export_onnx(network(8), (torch.randn(2, 8),), path, verify=verify)  # what libraries take is no matter here
Path("/proc/self/clear_refs").write_text("5")
before = peak()
net, x = network(wide), torch.randn(2, wide)
size = sum(parameter.nbytes for parameter in net.parameters())
report = export_onnx(net, (x,), path, verify=verify)
most = peak() - before
with torch.no_grad():
    wanted = net(x)
del net
session = onnxruntime.InferenceSession(path)
found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
apart = float((found - wanted).abs().max() / wanted.abs().max())
print(json.dumps([size, report.bytes, report.external_data, report.verified, apart, most]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("wide", "how", "most"), [(4096, "verify", 3.0), (12000, "write", 2.5)])
def test_what_large_files_take_of_memory(wide: int, how: str, most: float, tmp_path: Path) -> None:
    """In sizes of the weights; the second of them are more than two gigabytes."""
    path = tmp_path / "large.onnx"
    command = [sys.executable, "-c", LARGE, str(path), str(wide), how]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    size, written, external, verified, apart, peak = json.loads(done.stdout.splitlines()[-1])
    assert size > 2**31 or how == "verify"
    assert size < written < size + 2**20
    assert external
    assert verified == (how == "verify")
    assert apart < 1e-5
    assert peak < most * size, f"{peak / size:.2f} times the weights"
    (name,) = locations(path)
    assert (tmp_path / name).stat().st_size + path.stat().st_size == written
