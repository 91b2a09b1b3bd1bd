"""A file refuses the sizes that the module refuses, and says why; the others it computes as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from nets import Net
from own_passes import registered
from tie import Tie, tie
from torch import Tensor, nn
from torch.export import Dim

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def net(run: Callable[..., Tensor]) -> nn.Module:
    return Net(run, a=nn.Linear(8, 12), b=nn.Linear(12, 3)).eval()


def run(path: Path, *inputs: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(np.asarray(session.run(None, feed)[0]))


def assert_alike(model: nn.Module, path: Path, *inputs: Tensor) -> None:
    """The file computes what the module computes, or refuses what it refuses."""
    why = refused(model, *inputs)
    if not why:
        torch.testing.assert_close(run(path, *inputs), model(*inputs))
        return
    with pytest.raises(Exception, match="refused unless") as caught:
        run(path, *inputs)
    assert str(caught.value).partition("refused unless ")[2].partition("'")[0] in why


def refused(model: nn.Module, *inputs: Tensor) -> str:
    try:
        model(*inputs)
    except gz.InputShapeError as error:
        return str(error)
    return ""


CASES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "more than one": lambda m, x: m.b(m.a(x) * 2 if x.shape[0] > 1 else m.a(x)),
    "not one": lambda m, x: m.b(m.a(x) * 2 if x.shape[0] != 1 else m.a(x)),
    "even": lambda m, x: m.b(m.a(x) * 2 if x.shape[0] % 2 == 0 else m.a(x)),
    "at most": lambda m, x: m.b(m.a(x) * 2 if x.shape[0] <= 5 else m.a(x)),
    "a square": lambda m, x: m.b(m.a(x) * 2 if x.shape[0] * x.shape[0] - 3 > 4 else m.a(x)),
    "halves": lambda m, x: m.b(m.a(x) * 2 if (x.shape[0] + 1) // 2 != 3 else m.a(x)),
    "either": lambda m, x: m.b(m.a(x) * 2 if x.shape[0] >= 3 and x.shape[0] < 6 else m.a(x)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_takes_the_batches_that_the_module_takes(name: str, tmp_path: Path) -> None:
    compiled = gz.compile(net(CASES[name]), gz.Plan([gz.ClusterMerge(keep=0.5)]), (torch.randn(4, 8),))
    report = compiled.export(tmp_path / "net.onnx")
    assert report.verified
    assert not any("cannot refuse" in note for note in report.notes)
    for batch in (1, 2, 3, 4, 5, 6, 7):
        assert_alike(compiled.module, tmp_path / "net.onnx", torch.randn(batch, 8))
    assert compiled.verify(tmp_path / "net.onnx").verified


def test_the_report_says_that_a_batch_of_one_is_refused(tmp_path: Path) -> None:
    compiled = gz.compile(net(CASES["more than one"]), gz.Plan([]), (torch.randn(4, 8),))
    report = compiled.export(tmp_path / "net.onnx")
    assert report.inputs["inputs_0"] == ("inputs_0_0", 8)
    assert any("takes no batch of one" in note and "the file refuses it, too" in note for note in report.notes)


def test_a_batch_of_which_every_size_is_taken_keeps_its_name(tmp_path: Path) -> None:
    compiled = gz.compile(net(lambda m, x: m.b(m.a(x))), gz.Plan([]), (torch.randn(4, 8),))
    report = compiled.export(tmp_path / "net.onnx")
    assert report.inputs["inputs_0"] == ("batch", 8)
    assert b"refused unless" not in (tmp_path / "net.onnx").read_bytes()


def test_other_dimensions_are_refused_too(tmp_path: Path) -> None:
    model = net(lambda m, x: m.b(m.a(x) * (2 if x.shape[1] > 3 else 1)))
    dynamic = (({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},),)
    compiled = gz.compile(model, gz.Plan([]), (torch.randn(4, 5, 8),), dynamic_shapes=dynamic)
    assert compiled.export(tmp_path / "net.onnx").verified
    for length in (2, 3, 4, 6):
        assert_alike(compiled.module, tmp_path / "net.onnx", torch.randn(3, length, 8))


def test_a_part_of_a_model_refuses_by_the_sizes_of_the_whole(tmp_path: Path) -> None:
    inner = net(CASES["more than one"])
    model = Net(lambda m, x: m.inner(x.flatten(0, 1)), inner=inner).eval()
    compiled = gz.compile(model, gz.Plan([]), (torch.randn(4, 3, 8),), scope="inner")
    compiled.export(tmp_path / "net.onnx")
    compiled = gz.compile(Net(lambda m, x: m.inner(x), inner=inner), gz.Plan([]), (torch.randn(4, 8),), scope="inner")
    compiled.export(tmp_path / "net.onnx")
    for batch in (1, 2, 4):
        assert_alike(compiled.module, tmp_path / "net.onnx", torch.randn(batch, 8))


@pytest.mark.parametrize("per_task", [False, True])
def test_every_task_refuses_for_itself(per_task: bool, tmp_path: Path) -> None:

    def task(run: Callable[[Any, Tensor], Tensor]) -> nn.Module:
        return Net(run, conv=nn.Conv1d(3, 6, 1), b=nn.Linear(8, 3)).eval()

    models = {
        "one": task(lambda m, x: m.b(m.conv(x) * 2 if x.shape[0] > 1 else m.conv(x))),
        "two": task(lambda m, x: m.b(m.conv(x))),
    }
    with registered(Tie, tie):
        compiled = gz.compile(models, gz.Plan([Tie()]), {name: (torch.randn(4, 3, 8),) for name in models})
    path = tmp_path / ("files" if per_task else "both.onnx")
    compiled.export(path, per_task=per_task)
    lone, several = torch.randn(1, 3, 8), torch.randn(3, 3, 8)
    if per_task:
        assert_alike(compiled.task("one"), path / "one.onnx", lone)
        assert_alike(compiled.task("one"), path / "one.onnx", several)
        assert_alike(compiled.task("two"), path / "two.onnx", lone)
    else:
        with pytest.raises(Exception, match="refused unless"):
            run(path, lone, several)
        torch.testing.assert_close(run(path, several, lone), compiled.task("one")(several))
