"""prepare, train, convert, compile, and what comes out of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from planting import relative
from torch import Tensor, nn

import graphzip as gz
from graphzip.report.report import Report

pytestmark = pytest.mark.usefixtures("seeded")

IMAGE = (2, 3, 8, 8)
NOTHING = gz.Plan([])
HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])


class Small(nn.Module):
    """Two groups of eight and six channels and a head; `drop` and `bn1` follow the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.bn1(self.conv1(x)).relu()).relu().mean((2, 3))
        out: Tensor = self.head(self.drop(x))
        return out


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, *IMAGE[1:])


def train_a_little(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        loss = (model(image(8)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def equal_states(left: nn.Module, right: nn.Module) -> bool:
    one, other = left.state_dict(), right.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- prepare, train, convert -----------------------------------------------------------------------------------------


def test_prepare_copies_the_users_module() -> None:
    model = Small()
    prepared = gz.prepare(model, HALF, (image(),))
    assert isinstance(prepared, gz.Prepared)
    assert type(prepared.model) is Small
    assert equal_states(prepared.model, model)
    assert {name for name, _ in prepared.named_parameters()} == {
        f"model.{name}" for name, _ in model.named_parameters()
    }
    held = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not held & {tensor.data_ptr() for tensor in prepared.state_dict().values()}
    x = image()
    assert torch.equal(prepared.eval()(x), model.eval()(x))
    assert [name for name, _ in prepared.named_children()] == ["model"]


@pytest.mark.parametrize("training", [True, False])
def test_a_prepared_model_has_the_mode_of_the_users(training: bool) -> None:
    model = Small().train(training)
    prepared = gz.prepare(model, HALF, (image(),))
    assert prepared.training == prepared.model.training == training


def test_training_goes_into_the_result() -> None:
    model = Small()
    prepared = gz.prepare(model, HALF, (image(),))
    train_a_little(prepared)
    prepared.collapse_()
    x = image()
    expected = prepared.eval()(x).detach()
    result = prepared.convert().module.eval()
    assert relative(expected, result(x)) < 1e-5
    assert int(result.bn1.num_batches_tracked) == 3
    assert relative(expected, gz.compile(model, HALF, (x,)).module.eval()(x)) > 1e-3


def test_training_goes_into_a_result_without_passes() -> None:
    prepared = gz.prepare(Small(), NOTHING, (image(),))
    train_a_little(prepared)
    trained = copy.deepcopy(prepared.model)
    prepared.to(torch.float64)
    result = prepared.convert().module
    assert equal_states(result, trained.double())


def test_loaded_weights_go_into_the_result() -> None:
    other = Small()
    for assign in (False, True):
        prepared = gz.prepare(Small(), HALF, (image(),))
        prepared.load_state_dict({f"model.{name}": t.clone() for name, t in other.state_dict().items()}, assign=assign)
        prepared.collapse_()
        expected = copy.deepcopy(prepared.model).eval()
        x = image()
        assert relative(expected(x), prepared.convert().module.eval()(x)) < 1e-5
        assert torch.equal(expected.head.bias, other.head.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "plan", [NOTHING, gz.Plan([gz.ClusterMerge(keep=0.5), gz.FoldBatchNorm(), gz.ClusterMerge(keep=0.7)])]
)
def test_a_prepared_model_may_be_moved(plan: gz.Plan, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Small().eval()
    prepared = gz.prepare(model, plan, (image(),), calibration=[image()])
    prepared.to(dtype)
    compiled = prepared.convert()
    assert {p.dtype for p in compiled.module.parameters()} == {dtype}
    assert compiled.example_inputs[0].dtype == dtype
    x = image().to(dtype)
    assert compiled.module(x).dtype == dtype
    compiled.save(tmp_path / "model")
    loaded = gz.load(tmp_path / "model").module
    assert torch.equal(loaded(x), compiled.module(x))


def test_a_dtype_that_the_graph_fixes_is_refused() -> None:
    model = Net(lambda m, x: F.conv2d(m.a(x), torch.ones(1, 6, 3, 3), torch.ones(1)), a=nn.Conv2d(3, 6, 1))
    prepared = gz.prepare(model, NOTHING, (image(),))
    prepared.to(torch.float64)
    with pytest.raises(
        gz.RewriteError, match=r"moved to a dtype or device that its graph does not fit .*prepare it th"
    ):
        prepared.convert()


def test_a_result_may_be_moved_and_saved(tmp_path: Path) -> None:
    compiled = gz.compile(Small().eval(), HALF, (image(),))
    compiled.module.half()
    compiled.save(tmp_path / "model")
    x = image().half()
    assert torch.equal(gz.load(tmp_path / "model").module(x), compiled.module(x))


def test_every_submodule_keeps_its_mode() -> None:
    model = Small().train()
    model.bn1.eval()
    prepared = gz.prepare(model, gz.Plan([gz.ClusterMerge(keep=0.5), gz.ClusterMerge(keep=0.5)]), (image(),))
    prepared.eval()
    module = prepared.convert().module
    assert module.training
    assert not module.bn1.training
    assert module.drop.training
    assert not any(inner.training for inner in gz.compile(model.eval(), HALF, (image(),)).module.modules())


def test_stages_are_trained_one_after_the_other() -> None:
    model, seen = Small(), []

    def train(prepared: gz.Prepared, stage: str) -> None:
        seen.append((stage, type(prepared.model).__name__, prepared.model.conv1.weight.shape[0]))
        train_a_little(prepared)

    plan = gz.Plan([gz.ClusterMerge(keep={"conv1": 0.5}), gz.FoldBatchNorm(), gz.ClusterMerge(keep={"conv1": 0.5})])
    compiled = gz.compile(model, plan, (image(),), train=train)
    assert [stage for stage, _, _ in seen] == ["cluster_merge", "fold_batch_norm", "cluster_merge"]
    assert [width for _, _, width in seen] == [8, 4, 4]
    assert compiled.module.conv1.weight.shape == (2, 3, 3, 3)
    assert [(group.name, group.before, group.after) for group in compiled.report.groups] == [
        ("conv1", 8, 4),
        ("conv1", 4, 2),
    ]


def test_convert_runs_the_stages_not_yet_taken() -> None:
    plan = gz.Plan([gz.ClusterMerge(keep=0.5), gz.FoldBatchNorm()])
    model, x = Small().eval(), image()
    prepared = gz.prepare(model, plan, (x,))
    steps = prepared.steps()
    assert next(steps) == "cluster_merge"
    assert prepared.model.conv1.weight.shape[0] == 8
    assert next(steps) == "fold_batch_norm"
    assert prepared.model.conv1.weight.shape[0] == 4
    assert equal_states(prepared.convert().module, gz.compile(model, plan, (x,)).module)
    assert list(prepared.steps()) == []


def test_training_after_the_last_stage_counts() -> None:
    prepared = gz.prepare(Small(), HALF, (image(),))
    for _ in prepared.steps():
        pass
    assert prepared.model.conv1.weight.shape[0] == 4
    train_a_little(prepared)
    assert equal_states(prepared.convert().module, prepared.model)


def test_an_optimizer_of_an_earlier_stage_is_refused() -> None:
    prepared = gz.prepare(Small(), gz.Plan([gz.ClusterMerge(keep=0.5), gz.FoldBatchNorm()]), (image(),))
    steps = prepared.steps()
    next(steps)
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.1)
    prepared(image()).sum().backward()
    optimizer.step()
    next(steps)
    with pytest.raises(
        gz.GraphZipError, match=r"made for a stage that has ended.*prepared\.optimizer\(\.\.\.\) in every"
    ):
        optimizer.step()
    prepared.optimizer(torch.optim.SGD, lr=0.1).step()


def test_an_optimizer_is_refused_after_convert() -> None:
    prepared = gz.prepare(Small(), HALF, (image(),))
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.1)
    prepared.convert()
    with pytest.raises(gz.GraphZipError, match="made for a stage that has ended"):
        optimizer.step()


def test_two_merges_in_a_row_keep_names() -> None:
    model, x = Small().eval(), image()
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5), gz.ClusterMerge(keep=2)]), (x,))
    assert compiled.module.state_dict().keys() == model.state_dict().keys()
    assert [(group.name, group.before, group.after) for group in compiled.report.groups] == [
        ("conv1", 8, 4), ("conv2", 6, 3), ("conv1", 4, 2), ("conv2", 3, 2)
    ]  # fmt: skip
    assert compiled.module.head.weight.shape == (4, 2)


def test_the_regularizer_of_passes_without_one_is_zero() -> None:
    prepared = gz.prepare(Small().double(), HALF, (image().double(),))
    assert prepared.regularizer().item() == 0.0
    assert prepared.regularizer().dtype == torch.float64


# --- results ---------------------------------------------------------------------------------------------------------


def test_the_result_shares_no_storage_with_the_users_model() -> None:
    model = Small()
    for plan in (NOTHING, HALF):
        compiled = gz.compile(model, plan, (image(),))
        held = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        for holder in (compiled.module, compiled.traced.module):
            assert not held & {tensor.untyped_storage().data_ptr() for tensor in holder.state_dict().values()}


LEAVE_THE_MODEL = {
    "merged": gz.ClusterMerge(keep=0.5),
    "even": gz.ClusterMerge(keep=0.5, clustering="even"),
    "fitted": gz.ClusterMerge(keep=0.5, compensate="data"),
    "chosen": gz.ClusterMerge(keep=0.5, clustering="reconstruction", compensate="data"),
    "free": gz.ClusterMerge(keep=0.5, compensate="free"),
    "folded": gz.FoldBatchNorm(),
    "pruned": gz.PruneChannels(keep=0.5),
}


@pytest.mark.parametrize("options", LEAVE_THE_MODEL.values(), ids=LEAVE_THE_MODEL.keys())
@pytest.mark.parametrize("scope", [None, "0"])
def test_without_training_weights_are_not_copied_first(options: Any, scope: str | None) -> None:
    """The result is that of a prepared copy, has none of the model's tensors, and leaves them as they were."""
    model = nn.Sequential(Small()).eval()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    plan, calibration = gz.Plan([options]), [image(8), image(8)]
    compiled = gz.compile(model, plan, (image(),), calibration=calibration, scope=scope)
    prepared = gz.prepare(model, plan, (image(),), calibration=calibration, scope=scope)
    assert equal_states(compiled.module, prepared.convert().module)
    held = {value.untyped_storage().data_ptr() for value, _ in before.values()}
    for holder in (compiled.module, compiled.traced.module):
        assert not held & {value.untyped_storage().data_ptr() for value in holder.state_dict().values()}
    assert all(value is before[name][0] for name, value in model.state_dict(keep_vars=True).items())
    assert all(torch.equal(value, was) for value, was in before.values())


def test_a_model_that_freezes_itself_keeps_its_flags() -> None:
    class Freezing(Small):
        def train(self, mode: bool = True) -> Freezing:
            for parameter in self.bn1.parameters():
                parameter.requires_grad_(mode)
            super().train(mode)
            return self

    model = Freezing()
    gz.compile(model, gz.Plan([gz.ClusterMerge(keep=0.5, compensate="data")]), (image(),), calibration=[image(8)])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_counts_its_calls_keeps_its_count() -> None:
    class Counting(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                self.calls += 1
            return super().forward(x)

    model = Counting()
    fitted = gz.compile(model, gz.Plan([gz.ClusterMerge(compensate="data")]), (image(),), calibration=[image(8)])
    assert fitted.report.drift is not None
    gz.channel_groups(model, (image(),))
    assert model.calls.item() == 0


def test_the_same_seed_gives_the_same_result() -> None:
    model, x = Small(), image()
    first, again = (gz.compile(model, HALF, (x,), seed=3) for _ in range(2))
    assert equal_states(first.module, again.module)
    assert first.report == again.report
    torch.manual_seed(99)
    assert gz.compile(model, HALF, (x,), seed=3).report == first.report


def test_other_seeds_give_other_clusters() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    found = {
        json.dumps(gz.compile(model, HALF, (torch.randn(2, 4),), seed=seed).report.to_dict()["passes"])
        for seed in range(3)
    }
    assert len(found) > 1


def test_the_report_says_what_changed() -> None:
    model, x = Small(), image()
    compiled = gz.compile(model, HALF, (x,), calibration=[x, image(3)])
    report = compiled.report
    assert report.changed
    assert report.before == gz.cost(model, (x,))
    assert report.after == gz.cost(compiled.module, (x,))
    assert report.drift is not None
    assert 0 < report.drift < 10
    assert [group.name for group in report.groups] == ["conv1", "conv2"]
    assert set(report.passes[0]["cluster_merge"]["clusters"]) == {"conv1", "conv2"}
    text = str(report)
    assert "conv1" in text
    assert "parameters" in text
    assert "not lossless: channels that were not identical became one; outputs moved by " in text


def test_reports_go_through_json() -> None:
    plan = gz.Plan([gz.ClusterMerge(keep=0.5), gz.FoldBatchNorm()])
    for calibration in (None, [image()]):
        report = gz.compile(Small(), plan, (image(),), calibration=calibration).report
        assert Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


@pytest.mark.parametrize(
    "plan",
    [NOTHING, gz.Plan([gz.ClusterMerge(keep=1.0)]), gz.Plan([gz.ClusterMerge(exclude=["*"])]),
     gz.Plan([gz.ClusterMerge(clusters={})])],
)  # fmt: skip
def test_a_compilation_that_changes_nothing_says_so(plan: gz.Plan) -> None:
    model, x = Small().eval(), image()
    compiled = gz.compile(model, plan, (x,), calibration=[x])
    assert not compiled.report.changed
    assert compiled.report.groups == ()
    assert compiled.report.drift == 0.0
    assert compiled.report.before == compiled.report.after
    assert "nothing changed: " in str(compiled.report)
    assert torch.equal(model(x), compiled.module(x))
    assert "nothing changed" not in str(gz.compile(model, HALF, (x,)).report)


def test_saved_results_come_back(tmp_path: Path) -> None:
    compiled = gz.compile(Small().eval(), HALF, (image(),))
    train_a_little(compiled.module)
    compiled.module.eval()
    compiled.save(tmp_path / "model")
    loaded = gz.load(tmp_path / "model")
    x = image(5)
    assert torch.equal(loaded.module(x), compiled.module(x))
    assert loaded.report == compiled.report
    assert not loaded.module.training
    with pytest.raises(gz.InputShapeError, match="compiled for any x 3 x 8 x 8"):
        loaded.module(torch.randn(2, 3, 9, 9))
    with torch.inference_mode():
        inside = gz.load(tmp_path / "model").module
    inside.train()(x).sum().backward()
    assert inside.conv1.weight.grad is not None


def test_conditions_survive_saving(tmp_path: Path) -> None:
    model = Net(lambda m, x: m.a(x) * (2 if x.shape[0] % 2 == 0 else 3), a=nn.Linear(4, 6))
    gz.compile(model, NOTHING, (torch.randn(2, 4),)).save(tmp_path / "model")
    loaded = gz.load(tmp_path / "model")
    x = torch.randn(4, 4)
    assert torch.equal(loaded.module(x), model(x))
    with pytest.raises(gz.InputShapeError, match=r"needs \(inputs_0.shape\[0\] % 2\) == 0"):
        loaded.module(torch.randn(3, 4))


def test_results_export(tmp_path: Path) -> None:
    compiled = gz.compile(Small().eval(), gz.Plan([gz.ClusterMerge(keep=0.5), gz.FoldBatchNorm()]), (image(1),))
    report = compiled.export(tmp_path / "slim.onnx")
    assert isinstance(report, gz.ExportReport)
    assert report.bytes == (tmp_path / "slim.onnx").stat().st_size


def test_results_of_a_single_model_have_no_tasks(tmp_path: Path) -> None:
    compiled = gz.compile(Small(), NOTHING, (image(),))
    assert compiled.tasks == ()
    with pytest.raises(gz.GraphZipError, match=r"no task 'depth': a single model was compiled; use `.module`"):
        compiled.task("depth")
    with pytest.raises(
        gz.GraphZipError, match="per_task is for joint models; a single model was compiled: export to a"
    ):
        compiled.export(tmp_path / "models", per_task=True)
    assert not list(tmp_path.iterdir())


# --- calibration -----------------------------------------------------------------------------------------------------


class Loader:
    """A loader that can be gone through again and counts how often it is."""

    def __init__(self, *batches: Any) -> None:
        self.batches, self.rounds = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.rounds += 1
        yield from self.batches


def test_labels_in_calibration_batches_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="graphzip")
    model, x = Small().eval(), image(5)
    loader = Loader((x, torch.arange(5)), [x + 1, torch.arange(5)])
    with_labels = gz.compile(model, HALF, (image(),), calibration=loader)
    assert with_labels.report.drift == gz.compile(model, HALF, (image(),), calibration=[x, x + 1]).report.drift
    assert loader.rounds == 3
    assert "calibration batches have 2 entries, the model takes 1: the rest is left out" in caplog.text
    with torch.no_grad():
        before = torch.cat([model(x), model(x + 1)])
        after = torch.cat([with_labels.module(x), with_labels.module(x + 1)])
    assert with_labels.report.drift == pytest.approx(float((before - after).abs().max() / before.abs().max()))


def test_outputs_that_are_not_finite_have_no_drift() -> None:
    model = Small()
    plan = gz.Plan([gz.ClusterMerge(keep=0.5, clustering="kmeans", compensate="none")])
    report = gz.compile(model, plan, (image(),), calibration=[image(), image() * float("nan")]).report
    assert report.drift is None
    assert report.notes == ("outputs on the calibration data are not finite, so how far they moved is unknown",)
    assert report.notes[0] in str(report)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(IMAGE), "calibration is a Tensor; pass a list of batches or a DataLoader"),
        ({"x": torch.zeros(IMAGE)}, "calibration is a dict; pass a list of batches"),
        (
            (x for x in [torch.zeros(IMAGE)]),
            "calibration is a generator, which can be gone through only once; pass a list",
        ),
        ([], "calibration yields no batch; pass at least one"),
        ([{"y": torch.zeros(IMAGE)}], "calibration: a batch has no 'x', which the example inputs have; it has y"),
        ([torch.zeros(2, 5, 8, 8)], r"calibration: Small fails on a batch \(\(2, 5, 8, 8\)\): .*make it yield batches"),
        ([()], "calibration: Small fails on a batch"),
    ],
)
def test_calibration_that_does_not_fit_is_refused_before_training(calibration: Any, message: str) -> None:
    with pytest.raises(gz.ExampleInputError, match=message):
        gz.prepare(Small(), HALF, (image(),), calibration=calibration)


def test_calibration_of_another_size_is_refused() -> None:
    with pytest.raises(
        gz.ExampleInputError, match=r"has shape \(2, 3, 12, 12\), but the model was compiled for any x 3"
    ):
        gz.compile(Small(), HALF, (image(),), calibration=[torch.zeros(2, 3, 12, 12)])


# --- arguments -------------------------------------------------------------------------------------------------------


def test_the_plan_may_bring_the_inputs() -> None:
    model = Small().eval()
    plan = gz.Plan([gz.ClusterMerge(keep=0.5)], inputs=[list(IMAGE)])
    assert equal_states(gz.compile(model, plan).module, gz.compile(model, HALF, (image(),)).module)
    half = gz.compile(Small().to(torch.bfloat16), gz.Plan([], inputs=[[1, 3, 8, 8]]))
    assert half.example_inputs[0].dtype == torch.bfloat16
    other = gz.compile(model, plan, (torch.randn(2, 3, 12, 12),))
    assert other.module(torch.randn(1, 3, 12, 12)).shape == (1, 4)


def test_missing_inputs() -> None:
    with pytest.raises(
        gz.ExampleInputError,
        match=r"no example inputs: pass example_inputs=\(x,\), or give the plan `inputs: \[\[1, 3, 224, 224\]\]`",
    ):
        gz.compile(Small(), HALF)


def test_a_mapping_of_models_needs_a_pass_that_joins_them() -> None:
    with pytest.raises(gz.PlanError, match="several models were given, but no pass of the plan joins models; give one"):
        gz.compile({"a": Small(), "b": Small()}, HALF, (image(),))  # type: ignore[arg-type]


def test_what_is_neither_model_nor_plan() -> None:
    with pytest.raises(gz.GraphZipError, match=r"expected a torch.nn.Module, got str; pass the model itself"):
        gz.compile("resnet50", HALF, (image(),))  # type: ignore[arg-type]
    with pytest.raises(gz.PlanError, match=r"expected a graphzip.Plan, got dict; write Plan\(\[...\]\) or Plan.load"):
        gz.prepare(Small(), {"passes": []}, (image(),))  # type: ignore[arg-type]
    with pytest.raises(gz.PlanError, match=r"expected a graphzip.Plan, got ClusterMerge"):
        gz.prepare(Small(), gz.ClusterMerge(), (image(),))  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_pull_takes_a_fraction(fraction: float) -> None:
    with pytest.raises(gz.GraphZipError, match=f"pull_ takes a fraction between 0 and 1, got {fraction}"):
        gz.prepare(Small(), HALF, (image(),)).pull_(fraction)


def test_a_prepared_model_is_done_after_its_stages() -> None:
    prepared = gz.prepare(Small(), HALF, (image(),))
    assert prepared.deviation() > 0
    prepared.convert()
    assert prepared.deviation() == 0.0
    before = copy.deepcopy(prepared.model)
    prepared.collapse_()
    prepared.pull_(0.5)
    assert equal_states(prepared.model, before)
