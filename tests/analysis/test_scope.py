"""Compiling one submodule inside a model whose whole does not trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planting import relative
from torch import Tensor, nn

import graphzip as gz
from graphzip.tracing.trace import trace

pytestmark = pytest.mark.usefixtures("seeded")

HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.drop = nn.Conv2d(8, 6, 3, padding=1), nn.Dropout(0.5)

    def forward(self, x: Tensor, *, mask: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.conv2(self.bn1(self.conv1(x * mask)).relu())
        return {"features": self.drop(x) * scale}


class Detector(nn.Module):
    """Takes images of different sizes, and its head depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"body": Body()})
        self.norm, self.unused = nn.BatchNorm2d(3), nn.Linear(2, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        x = self.norm(torch.stack([image[:, :8, :8] for image in images]))
        features = self.parts["body"](x, mask=(x > -1).float(), scale=2.0)["features"]
        scores = self.head(features.mean((2, 3)))
        return [score[score > 0] for score in scores]


def images(count: int = 2) -> list[Tensor]:
    return [torch.randn(3, 8 + k, 9) for k in range(count)]


@pytest.fixture
def detector() -> Detector:
    model = Detector().eval()
    with torch.no_grad():
        model.parts["body"].conv1.weight[1] = model.parts["body"].conv1.weight[0]
        model.parts["body"].conv1.bias[1] = model.parts["body"].conv1.bias[0]
    return model


def test_groups_carry_the_full_names(detector: Detector) -> None:
    groups = gz.channel_groups(detector, (images(),), scope="parts.body")
    assert groups.names == ("parts.body.conv1", "parts.body.conv2")
    owned = {place.param for place in groups["parts.body.conv1"].slices(0)}
    state = detector.state_dict().keys()
    assert owned <= state
    assert "parts.body.bn1.running_var" in owned
    assert not groups["parts.body.conv2"].mergeable


def test_what_reaches_the_submodule_is_traced(detector: Detector) -> None:
    traced = trace(detector, (images(1),), scope="parts.body")
    assert traced.scope == "parts.body"
    assert traced.example_inputs[0].shape == (2, 3, 8, 8)
    assert traced.example_kwargs["mask"].shape == (2, 3, 8, 8)
    assert traced.example_kwargs["scale"] == 2.0
    assert [spec.shape for spec in traced.inputs] == [(None, 3, 8, 8), (None, 3, 8, 8), ()]
    assert type(traced.module).__name__ == "Body"


def test_only_the_submodule_changes(detector: Detector) -> None:
    clusters = {"parts.body.conv1": [[0, 1], *([k] for k in range(2, 8))]}
    compiled = gz.compile(detector, gz.Plan([gz.ClusterMerge(clusters=clusters)]), (images(),), scope="parts.body")
    module = compiled.module
    assert type(module) is Detector
    assert module.parts["body"].conv1.weight.shape[0] == 7
    assert module.state_dict().keys() == detector.state_dict().keys()
    for name, tensor in module.state_dict().items():
        if not name.startswith("parts.body."):
            assert torch.equal(tensor, detector.state_dict()[name])
    held = {tensor.data_ptr() for tensor in detector.state_dict().values()}
    assert not held & {tensor.data_ptr() for tensor in module.state_dict().values()}
    for count in (1, 2, 3):
        given = images(count)
        before, after = detector(given), module(given)
        assert isinstance(after, list)
        assert len(after) == count
        for left, right in zip(before, after, strict=True):
            assert relative(left, right) < 1e-5
    assert [(group.name, group.before, group.after) for group in compiled.report.groups] == [("parts.body.conv1", 8, 7)]


def test_training_of_the_whole_model_goes_into_the_result(detector: Detector) -> None:
    detector.train()
    detector.norm.eval()
    prepared = gz.prepare(detector, HALF, (images(),), scope="parts.body")
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(3):
        loss = torch.stack([score.square().sum() for score in prepared(images(4))]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prepared.collapse_()
    expected = prepared.model
    module = prepared.convert().module
    assert not torch.equal(module.head.weight, detector.head.weight)
    assert torch.equal(module.head.weight, expected.head.weight)
    assert int(module.parts["body"].bn1.num_batches_tracked) == 3
    assert module.training
    assert module.parts["body"].drop.training
    assert not module.norm.training
    given = images(3)
    for left, right in zip(expected.eval()(given), module.eval()(given), strict=True):
        assert left.shape == right.shape
        assert relative(left, right) < 1e-5


def test_several_passes_and_calibration(detector: Detector) -> None:
    plan = gz.Plan([gz.ClusterMerge(keep=0.5), gz.FoldBatchNorm(), gz.ClusterMerge(keep=0.5)])
    seen: list[str] = []
    compiled = gz.compile(
        detector, plan, (images(),), scope="parts.body", train=lambda prepared, stage: seen.append(stage)
    )
    assert seen == ["cluster_merge", "fold_batch_norm", "cluster_merge"]
    assert compiled.report.passes[1] == {"fold_batch_norm": {"folded": ["parts.body.conv1"]}}
    assert compiled.module.parts["body"].conv1.weight.shape[0] == 2
    head = nn.Sequential(detector.norm, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    report = gz.compile(head, HALF, (x,), scope="1", calibration=[(x, torch.zeros(2))]).report
    assert not report.changed
    assert report.drift == 0.0


def test_every_name_of_the_submodule_is_replaced() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.again(self.first(x))
            return out

    module = gz.compile(Twice(), HALF, (torch.randn(2, 4),), scope="first").module
    assert module.again is module.first
    assert module.first.get_submodule("0").weight.shape == (4, 4)


def test_the_submodule_is_saved_alone(detector: Detector, tmp_path: Path) -> None:
    compiled = gz.compile(detector, HALF, (images(),), scope="parts.body")
    compiled.save(tmp_path / "body")
    loaded = gz.load(tmp_path / "body")
    x, mask = torch.randn(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    expected = compiled.module.parts["body"](x, mask=mask, scale=2.0)["features"]
    assert torch.equal(loaded.module(x, mask=mask, scale=2.0)["features"], expected)
    loaded.save(tmp_path / "again")
    assert torch.equal(gz.load(tmp_path / "again").module(x, mask=mask, scale=2.0)["features"], expected)
    assert loaded.export(tmp_path / "body.onnx").verified


def test_other_sizes_and_other_constants_are_refused(detector: Detector) -> None:
    body = gz.compile(detector, HALF, (images(),), scope="parts.body").module.parts["body"]
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(gz.InputShapeError, match=r"input 'mask' has shape \(2, 3, 1, 1\), but"):
        body(x, mask=torch.ones(2, 3, 1, 1), scale=2.0)
    with pytest.raises(gz.InputShapeError, match=r"argument 'scale' is 3.0, but the model was compiled for 2.0"):
        body(x, mask=x, scale=3.0)


def test_the_users_model_stays_as_it_is(detector: Detector) -> None:
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    gz.compile(detector, HALF, (images(),), scope="parts.body")
    assert type(detector.parts["body"]) is Body
    assert not detector.parts["body"]._forward_pre_hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in detector.state_dict().items())


# --- refusals --------------------------------------------------------------------------------------------------------


def test_the_whole_model_does_not_trace(detector: Detector) -> None:
    """Scores by value are outputs of unknown size; a branch on them is what cannot be traced."""

    class Deciding(Detector):
        def forward(self, images: list[Tensor]) -> list[Tensor]:
            return [score for score in super().forward(images) if score.sum() > 1]

    model = Deciding().eval()
    with pytest.raises(gz.TraceError, match=r"test_scope.py:\d+ in .*score.sum\(\) > 1.*scope='name.of.submodule'"):
        gz.channel_groups(model, (images(),))
    assert len(gz.channel_groups(model, (images(),), scope="parts.body")) == 2


@pytest.mark.parametrize("scope", ["backbone", "parts.boddy", "norm.weight"])
def test_an_unknown_scope_lists_the_children(detector: Detector, scope: str) -> None:
    with pytest.raises(
        gz.TraceError,
        match=rf"scope '{scope}' is not a submodule of Detector; its children are parts, norm, unused, head",
    ):
        gz.channel_groups(detector, (images(),), scope=scope)


def test_a_scope_that_is_not_run(detector: Detector) -> None:
    with pytest.raises(gz.TraceError, match="scope 'unused' is not run by Detector on the example inputs; choose one"):
        gz.compile(detector, HALF, (images(),), scope="unused")


def test_inputs_that_the_whole_model_refuses(detector: Detector) -> None:
    with pytest.raises(
        gz.ExampleInputError, match=r"Detector fails on the example inputs: .*\(at .*test_scope.py:\d+ in"
    ):
        gz.compile(detector, HALF, ([torch.randn(4, 8, 8)],), scope="parts.body")


# --- a detection model -----------------------------------------------------------------------------------------------


def torchvision_detector() -> tuple[Any, list[Tensor]]:
    detection = pytest.importorskip("torchvision.models.detection")
    make = detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = make(weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=96).eval()
    return model, [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]


def test_a_torchvision_detector_does_not_trace_as_a_whole() -> None:
    model, given = torchvision_detector()
    with pytest.raises(gz.TraceError, match=r"FasterRCNN runs but torch.export cannot trace it: .*scope="):
        gz.channel_groups(model, (given,))


def test_the_backbone_of_a_torchvision_detector() -> None:
    model, given = torchvision_detector()
    plan = gz.Plan([gz.ClusterMerge(keep={"backbone.body.*": 0.5}, clustering="even")])
    compiled = gz.compile(model, plan, (given,), scope="backbone")
    names = [group.name for group in compiled.report.groups]
    assert len(names) > 10
    assert all(name.startswith("backbone.body.") for name in names)
    assert compiled.report.after.params < 0.5 * compiled.report.before.params
    old, new = model.state_dict(), compiled.module.state_dict()
    assert new.keys() <= old.keys()
    changed = {name for name in old if name not in new or old[name].shape != new[name].shape}
    assert changed
    assert all(name.startswith("backbone.") for name in changed)
    assert [set(result) for result in compiled.module(given)] == [{"boxes", "labels", "scores"}] * 2


@pytest.mark.slow
def test_an_unchanged_backbone_detects_the_same() -> None:
    model, given = torchvision_detector()
    module = gz.compile(model, gz.Plan([]), (given,), scope="backbone").module
    for left, right in zip(model(given), module(given), strict=True):
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name])
