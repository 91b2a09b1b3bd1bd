"""Several models at once: prepare, compile, tasks, report, joint files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import Net
from own_passes import registered
from tie import Tie, tie
from torch import Tensor, nn

import graphzip as gz
from graphzip.report.report import Report
from graphzip.rewrite.join_models import join, module_of, task_of
from graphzip.tracing.trace import trace


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with registered(Tie, tie), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def network(classes: int) -> nn.Module:
    def run(net: Any, x: Tensor) -> Any:
        return net.head(net.bn(net.conv(x)).relu().mean((2, 3)))

    return Net(run, conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), head=nn.Linear(8, classes))


def two_inputs() -> nn.Module:
    def run(net: Any, x: Tensor, scale: Tensor) -> Any:
        y = net.conv(x).mean((2, 3)) * scale
        return {"score": net.head(y), "features": y}

    return Net(run, conv=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 2))


PLAN = gz.Plan([Tie()])
INPUTS = {"a": (torch.randn(2, 3, 8, 8),), "b": (torch.randn(1, 3, 10, 10),)}


def models() -> dict[str, nn.Module]:
    return {"a": network(4).eval(), "b": network(6).eval()}


def compiled() -> gz.Compiled:
    return gz.compile(models(), PLAN, INPUTS)


def test_join_and_take_apart() -> None:
    given = {"a": network(4).eval(), "b": two_inputs().eval()}
    inputs: dict[str, Any] = {"a": INPUTS["a"], "b": (torch.randn(3, 3, 8, 8), torch.randn(3, 8))}
    traced = {name: trace(given[name], inputs[name]) for name in given}
    joint = join(traced)
    joint.graph.lint()
    assert [spec.name for spec in joint.inputs] == ["a_inputs_0", "b_inputs_0", "b_inputs_1"]
    results = joint.module(a=inputs["a"][0], b=inputs["b"])
    module = module_of(joint).eval()
    for name, model in given.items():
        expected = model(*inputs[name])
        alone = module_of(task_of(joint, name)).eval()(*inputs[name])
        torch.testing.assert_close([results[name], alone], [expected, expected])
    torch.testing.assert_close(module(a=inputs["a"][0], b=inputs["b"]), results)


def test_prepared_trains_what_was_given() -> None:
    given = models()
    before = copy.deepcopy(given["a"].state_dict())
    prepared = gz.prepare(given, PLAN, INPUTS)
    assert prepared.tasks == ("a", "b")
    assert {name.split(".")[1] for name, _ in prepared.named_parameters()} == {"a", "b"}
    out = prepared(a=INPUTS["a"][0], b=INPUTS["b"][0])
    torch.testing.assert_close(out, {name: given[name](*INPUTS[name]) for name in given})
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.1)
    (out["a"].square().mean() + out["b"].square().mean()).backward()
    optimizer.step()
    result = prepared.convert()
    torch.testing.assert_close(given["a"].state_dict(), before)
    torch.testing.assert_close(result.task("b").head.weight, prepared.task("b").head.weight)  # type: ignore[union-attr]
    assert not torch.equal(result.task("a").head.weight, given["a"].head.weight)  # type: ignore[arg-type]


def test_tasks_share_parameters() -> None:
    result = compiled()
    assert result.tasks == ("a", "b")
    a, b = result.task("a"), result.task("b")
    assert isinstance(a.conv, nn.Conv2d)
    assert a.conv.weight is b.conv.weight  # type: ignore[union-attr]
    assert a.head.weight is not b.head.weight  # type: ignore[union-attr]
    torch.testing.assert_close(
        result.module(a=INPUTS["a"][0], b=INPUTS["b"][0]), {"a": a(*INPUTS["a"]), "b": b(*INPUTS["b"])}
    )
    b.train()
    assert b.bn.training
    assert not a.bn.training


def test_report() -> None:
    calibration = {name: [torch.cat([*inputs, *inputs])] for name, inputs in INPUTS.items()}
    report = gz.compile(models(), PLAN, INPUTS, calibration=calibration).report
    own = {"a": 8 * 27 + 8 + 16 + 36, "b": 8 * 27 + 8 + 16 + 54}
    assert {name: task.after.params for name, task in report.tasks.items()} == own
    assert report.before.params == sum(own.values())
    assert report.after.params == sum(own.values()) - 8 * 27 - 8
    assert report.after.macs == report.before.macs == 8 * 27 * (36 + 64) + 32 + 48
    assert report.tasks["a"].drift == 0.0
    assert report.drift == report.tasks["b"].drift
    assert report.drift is not None
    assert report.drift > 0.0
    assert Report.from_dict(report.to_dict()) == report
    assert "together" in str(report)


def test_save_and_load(tmp_path: Path) -> None:
    result = compiled()
    result.save(tmp_path / "joint.safetensors")
    loaded = gz.load(tmp_path / "joint.safetensors")
    assert loaded.tasks == result.tasks
    assert loaded.report == result.report
    assert loaded.task("a").conv.weight is loaded.task("b").conv.weight  # type: ignore[union-attr]
    for name, inputs in INPUTS.items():
        torch.testing.assert_close(loaded.task(name)(*inputs), result.task(name)(*inputs))
    assert loaded.export(tmp_path / "joint.onnx").verified


def test_joint_export(tmp_path: Path) -> None:
    result = compiled()
    report = result.export(tmp_path / "joint.onnx")
    assert report.verified
    model = onnx.load(tmp_path / "joint.onnx")
    assert [value.name for value in model.graph.input] == ["a_inputs_0", "b_inputs_0"]
    assert [value.name for value in model.graph.output] == ["a_output", "b_output"]
    kernels = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [8, 3, 3, 3]]
    assert len(kernels) == 1
    batches = [value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input]
    assert batches == ["a_batch", "b_batch"]
    session = onnxruntime.InferenceSession(tmp_path / "joint.onnx", providers=["CPUExecutionProvider"])
    xa, xb = torch.randn(3, 3, 8, 8), torch.randn(5, 3, 10, 10)
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, {names[0]: xa.numpy(), names[1]: xb.numpy()})
    np.testing.assert_allclose(found[0], result.task("a")(xa).detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(found[1], result.task("b")(xb).detach().numpy(), atol=1e-5)


def test_joint_export_of_several_inputs_and_named_outputs(tmp_path: Path) -> None:
    given = {"a": network(4).eval(), "b": two_inputs().eval()}
    inputs: dict[str, Any] = {"a": INPUTS["a"], "b": (torch.randn(3, 3, 8, 8), torch.randn(3, 8))}
    result = gz.compile(given, PLAN, inputs)
    assert result.export(tmp_path / "joint.onnx").verified
    graph = onnx.load(tmp_path / "joint.onnx").graph
    assert [value.name for value in graph.input] == ["a_inputs_0", "b_inputs_0", "b_inputs_1"]
    assert [value.name for value in graph.output] == ["a_output", "b_score", "b_features"]


def test_export_per_task(tmp_path: Path) -> None:
    result = gz.compile({"a": wide(), "b": wide()}, PLAN, {name: (torch.randn(2, 3, 8, 8),) for name in "ab"})
    folder = tmp_path / "out"
    report = result.export(folder, per_task=True)
    assert sorted(path.name for path in folder.iterdir()) == ["a.onnx", "b.onnx", "weights.data"]
    assert report.verified
    assert [each.path.name for each in report.tasks] == ["a.onnx", "b.onnx"]
    assert report.bytes == sum(path.stat().st_size for path in folder.iterdir())
    kernel = 4 * 64 * 27
    assert (folder / "weights.data").stat().st_size < kernel + 8000
    assert str(report).startswith(f"{folder}: ")
    assert "in 3 files" in str(report)
    assert report.to_dict()["tasks"][1]["path"] == str(folder / "b.onnx")
    x = torch.randn(3, 3, 8, 8)
    for name in result.tasks:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(found, result.task(name)(x).detach().numpy(), atol=1e-5)


def wide() -> nn.Module:
    def run(net: Any, x: Tensor) -> Any:
        return net.head(net.conv(x).relu().mean((2, 3)))

    return Net(run, conv=nn.Conv2d(3, 64, 3), head=nn.Linear(64, 4)).eval()


def test_one_input_for_all_is_computed_once(tmp_path: Path) -> None:
    result = gz.compile({"a": wide(), "b": wide()}, PLAN, {name: (torch.randn(2, 3, 8, 8),) for name in "ab"})
    assert result.export(tmp_path / "one.onnx", same_input=True).verified
    graph = onnx.load(tmp_path / "one.onnx").graph
    assert [value.name for value in graph.input] == ["inputs_0"]
    assert [value.name for value in graph.output] == ["a_output", "b_output"]
    assert [node.op_type for node in graph.node].count("Conv") == 1
    x = torch.randn(3, 3, 8, 8)
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    for name, found in zip("ab", session.run(None, {"inputs_0": x.numpy()}), strict=True):
        np.testing.assert_allclose(found, result.task(name)(x).detach().numpy(), atol=1e-5)


def test_one_input_for_models_of_other_inputs(tmp_path: Path) -> None:
    message = r"same_input: task 'b' takes Nx3x10x10, task 'a' takes Nx3x8x8; export them with inputs of their own"
    with pytest.raises(gz.ExportError, match=message):
        compiled().export(tmp_path / "one.onnx", same_input=True)
    with pytest.raises(gz.GraphZipError, match="per_task and same_input exclude each other"):
        compiled().export(tmp_path / "out", per_task=True, same_input=True)
    alone = gz.compile(wide(), gz.Plan([]), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(gz.GraphZipError, match="same_input is for joint models; a single model was compiled"):
        alone.export(tmp_path / "one.onnx", same_input=True)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compiled()
    with torch.no_grad():
        monkeypatch.setattr("graphzip.export.onnx.verify_file", fail)
        with pytest.raises(gz.VerificationError, match="on purpose"):
            result.export(tmp_path / "out", per_task=True)
        with pytest.raises(gz.VerificationError, match="on purpose"):
            result.export(tmp_path / "joint.onnx")
    assert list(tmp_path.iterdir()) == []


def fail(*_: Any, **__: Any) -> None:
    raise gz.VerificationError("on purpose")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("here")
    with pytest.raises(gz.ExportError, match="out is a file; with per_task give the name of a directory"):
        compiled().export(tmp_path / "out", per_task=True)


def test_a_pass_of_one_model_works_on_each_task() -> None:
    plan = gz.Plan([gz.ClusterMerge(keep=0.5, exclude=["b.*"]), gz.FoldBatchNorm(), Tie()])
    given = {"a": network(4).eval(), "b": network(6).eval()}
    given["b"].conv = nn.Conv2d(3, 4, 3)
    given["b"].bn, given["b"].head = nn.BatchNorm2d(4).eval(), nn.Linear(4, 6)
    result = gz.compile(given, plan, INPUTS)
    assert [(group.name, group.before, group.after) for group in result.report.groups] == [("a.conv", 8, 4)]
    assert result.task("a").conv.weight is result.task("b").conv.weight  # type: ignore[union-attr]


ONE = (torch.randn(2, 3, 8, 8),)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            (models(), gz.Plan([gz.ClusterMerge()]), INPUTS),
            gz.PlanError,
            "several models were given, but no pass of the plan joins models; give one nn.Module",
        ),
        (
            (network(4), PLAN, ONE),
            gz.PlanError,
            r"passes\[0\].tie joins several models, but one was given; give a mapping from task names to models",
        ),
        (({"a": network(4)}, PLAN, INPUTS), gz.GraphZipError, r"needs at least two tasks, got \['a'\]; add the others"),
        (
            (models(), PLAN, ONE),
            gz.ExampleInputError,
            "example_inputs is a tuple, but several models were given; pass a mapping with the keys 'a', 'b'",
        ),
        (
            (models(), PLAN, {"a": ONE, "c": ONE}),
            gz.ExampleInputError,
            "example_inputs has the keys 'a', 'c', the models have 'a', 'b'; give one entry per task",
        ),
        ((models(), PLAN), gz.ExampleInputError, "no example inputs: pass a mapping, example_inputs="),
        (({"a": network(4), "graph": network(4)}, PLAN, INPUTS), gz.GraphZipError, "'graph' cannot name a task"),
        (({"a": network(4), "b": "net"}, PLAN, INPUTS), gz.GraphZipError, "task 'b': expected a torch.nn.Module, got"),
        (
            (models(), PLAN, {"a": ONE, "b": (torch.randn(2, 5, 8, 8),)}),
            gz.ExampleInputError,
            "task 'b': Net itself fails on the example inputs",
        ),
    ],
)
def test_what_does_not_fit(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        gz.prepare(*arguments)


def test_keywords_that_do_not_fit() -> None:
    with pytest.raises(gz.ExampleInputError, match="calibration has the keys 'a', the models have 'a', 'b'"):
        gz.prepare(models(), PLAN, INPUTS, calibration={"a": [ONE]})
    with pytest.raises(gz.PlanError, match="scope names a submodule of one model, but several were given; give the"):
        gz.prepare(models(), PLAN, INPUTS, scope="conv")
    with pytest.raises(gz.GraphZipError, match="no task 'd'; there are: 'a', 'b'"):
        gz.prepare(models(), PLAN, INPUTS).task("d")


def test_models_without_tensors_are_saved_and_loaded(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.relu(), x], 1)

    x = torch.randn(4, 3)
    nets = {"one": Doubled(), "two": Doubled()}
    compiled = gz.compile(nets, gz.Plan([gz.Zip()]), dict.fromkeys(nets, (x,)))
    compiled.save(tmp_path / "nothing.graphzip")
    loaded = gz.load(tmp_path / "nothing.graphzip")
    torch.testing.assert_close(loaded.module(x, x)["two"], Doubled()(x))
