"""`mode="train"`: the result computes the training form after `.train()` and the eval form after `.eval()`."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from planting import double, plant, randomize_, relative, state_of
from torch import Tensor, nn
from training_nets import Adapted, DropPath

import graphzip as gz

HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])
NOTHING = gz.Plan([])
Run = Callable[[Any, Tensor], Any]


class Detector(nn.Module):
    """Raw maps and an auxiliary head in training, decoded scores in eval; batch norms everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.neck = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 5, 1)
        self.aux = nn.Sequential(nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Any:
        low = self.body(x)
        y = self.neck(self.drop(low))
        boxes, scores = self.boxes(y), self.scores(y)
        if self.training:
            return {"boxes": boxes, "scores": scores, "aux": self.aux(low), "maps": [low, boxes.mean((2, 3))]}
        return torch.cat([boxes.sigmoid() * torch.arange(1.0, 5.0).view(4, 1, 1), scores.softmax(1)], 1).flatten(2)


def detector() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = double(Detector()), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    randomize_(model, 0, (x,))
    return model, x


def run(model: nn.Module, x: Tensor, *, training: bool) -> Any:
    """What a copy gives, with the same random numbers."""
    twin = copy.deepcopy(model).train(training)
    torch.manual_seed(1)
    return twin(x)


def assert_alike(model: nn.Module, made: nn.Module, x: Tensor, tolerance: float = 1e-11) -> None:
    for training in (False, True):
        assert relative(run(model, x, training=training), run(made, x, training=training)) <= tolerance


def test_each_mode_has_its_form() -> None:
    model, x = detector()
    compiled = gz.compile(model, NOTHING, (x,), mode="train")
    assert compiled.report.notes == ()
    assert_alike(model, compiled.module, x)
    assert_alike(model, compiled.module, torch.randn(5, 3, 8, 8, dtype=torch.float64))
    assert compiled.module.state_dict().keys() == model.state_dict().keys()
    assert isinstance(compiled.module.get_submodule("aux.1"), nn.BatchNorm2d)


def test_duplicates_merge_without_loss_in_both_forms() -> None:
    model, x = detector()
    groups = gz.channel_groups(model, (x,), mode="train")
    clusters = plant(model, groups, 0)
    assert {"neck.0", "aux.0"} <= clusters.keys()
    assert not groups["body.0"].mergeable  # the training form returns it
    assert gz.channel_groups(model, (x,))["body.0"].mergeable
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), (x,), mode="train")
    assert_alike(model, compiled.module, x)
    assert_alike(model, compiled.module, torch.randn(1, 3, 8, 8, dtype=torch.float64))


def test_statistics_are_updated_once_in_training() -> None:
    model, x = detector()
    made = gz.compile(model, NOTHING, (x,), mode="train").module
    twin = copy.deepcopy(model)
    for each in (made, twin):
        each.train()
        each(x)
    for name, tensor in state_of(twin).items():
        assert torch.allclose(made.state_dict()[name], tensor, rtol=1e-12), name


def test_the_result_trains_with_a_loss_on_the_training_form_and_is_exported_in_eval_form(tmp_path: Path) -> None:
    model, x = detector()
    compiled = gz.compile(model.float(), HALF, (x.float(),), mode="train")
    module, x = compiled.module.train(), x.float()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    losses = []
    for _ in range(5):
        out = module(x)
        loss = sum(out[key].square().mean() for key in ("boxes", "scores", "aux")) + out["maps"][1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    weights = {name: parameter for name, parameter in module.named_parameters() if parameter.dim() > 1}
    assert not any(torch.equal(before[name], parameter) for name, parameter in weights.items())
    report = compiled.export(tmp_path / "slim.onnx")
    assert report.verified
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(tmp_path / "slim.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative(module.eval()(x), torch.tensor(got)) < 1e-4
    assert module.training is False


def test_weights_go_from_the_trained_form_to_a_result_of_the_eval_form() -> None:
    model, x = detector()
    plan = gz.Plan([gz.ClusterMerge(keep={"neck.0": 0.5})])
    both, alone = gz.compile(model, plan, (x,), mode="train"), gz.compile(model, plan, (x,))
    with torch.no_grad():
        for parameter in both.module.parameters():
            parameter.mul_(1.01)
    left = alone.module.load_state_dict(both.module.state_dict(), strict=False)
    assert not left.missing_keys
    assert all(name.startswith("aux.") for name in left.unexpected_keys)
    assert relative(both.module.eval()(x), alone.module.eval()(x)) < 1e-12


def test_copies_and_files_have_both_forms(tmp_path: Path) -> None:
    model, x = detector()
    compiled = gz.compile(model, HALF, (x,), mode="train")
    compiled.save(tmp_path / "slim.gz")
    loaded = gz.load(tmp_path / "slim.gz").module
    twin = copy.deepcopy(compiled.module)
    buffer = io.BytesIO()
    torch.save(compiled.module.state_dict(), buffer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    for each in (loaded, twin, twin.to(torch.float32).to(torch.float64)):
        tolerance = 1e-12 if each is loaded else 1e-5
        assert_alike(compiled.module, each, x, tolerance)
    assert repr(compiled.module).startswith("Detector(")


def test_costs_are_those_of_the_eval_form() -> None:
    model, x = detector()
    both, alone = (gz.compile(model, NOTHING, (x,), mode=mode).report.before for mode in ("train", "eval"))
    assert both.macs == alone.macs
    assert both.params == sum(parameter.numel() for parameter in model.parameters()) > alone.params


def test_training_before_the_conversion_counts() -> None:
    model, x = detector()
    prepared = gz.prepare(model, gz.Plan([gz.ClusterMerge(keep={"neck.0": 0.5})]), (x,), mode="train").train()
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(x)["aux"].square().mean().backward()
        optimizer.step()
    prepared.collapse_()
    want = [run(prepared.model, x, training=training) for training in (False, True)]
    module = prepared.convert().module
    for training in (False, True):
        assert relative(want[training], run(module, x, training=training)) < 1e-11


def test_a_part_of_a_model_keeps_both_forms() -> None:
    inner, x = detector()
    model = Net(lambda m, images: m.net(images), net=inner)
    compiled = gz.compile(model, NOTHING, (x,), mode="train", scope="net")
    assert_alike(inner, compiled.module.get_submodule("net"), x)


def layers(**more: nn.Module | Tensor) -> dict[str, Any]:
    return {"a": nn.Linear(8, 12), "o": nn.Linear(12, 3), **more}


def updated(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    if m.training:
        m.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return y, m.o(y)
    return m.o(y - m.mean)


SAME: dict[str, tuple[Run, dict[str, Any]]] = {
    "factor": (lambda m, x: m.o(m.a(x) * 2 if m.training else m.a(x)), {}),
    "constants": (lambda m, x: m.o(m.a(x)) * torch.tensor([1.0, 2.0, 3.0 + m.training], dtype=x.dtype), {}),
    "drop path": (lambda m, x: m.o(m.drop(m.a(x))), {"drop": DropPath(0.5)}),
    "two dropouts of one tensor": (
        lambda m, x: (m.o(m.drop(m.a(x))), m.o(m.drop(m.a(x)))) if m.training else m.o(m.drop(m.a(x))),
        {"drop": nn.Dropout(0.5)},
    ),
    "dropout in a branch": (lambda m, x: m.o(F.dropout(m.a(x), 0.3) if m.training else m.a(x)), {}),
    "dropout always": (lambda m, x: m.o(F.dropout(m.a(x), 0.3)) * (1 + m.training), {}),
    "another rate": (lambda m, x: m.o(F.dropout(m.a(x), 0.5 if m.training else 0.1, m.training)), {}),
    "noise": (lambda m, x: m.o(m.a(x) + torch.randn(12, dtype=x.dtype) if m.training else m.a(x)), {}),
    "functional rrelu": (lambda m, x: m.o(F.rrelu(m.a(x), training=m.training)), {}),
    "rrelu": (lambda m, x: m.o(m.act(m.a(x))) * (1 + m.training), {"act": nn.RReLU()}),
    "frozen norm": (
        lambda m, x: m.o(F.batch_norm(m.a(x), m.mean, m.var)) * (1 + m.training),
        {"mean": torch.randn(12), "var": torch.rand(12) + 0.5},
    ),
    "norm in training": (
        lambda m, x: m.o(m.norm(m.a(x))) if m.training else m.o(m.a(x)),
        {"norm": nn.BatchNorm1d(12)},
    ),
    "functional norm in training": (
        lambda m, x: m.o(F.batch_norm(m.a(x), m.mean, m.var, training=m.training)) * (1 + m.training),
        {"mean": torch.randn(12), "var": torch.rand(12) + 0.5},
    ),
    "norm not in training": (
        lambda m, x: m.o(m.a(x)) if m.training else m.o(m.norm(m.a(x))),
        {"norm": nn.BatchNorm1d(12)},
    ),
    "recurrent dropout": (
        lambda m, x: m.o(m.cells(x[:, None])[0][:, 0]),
        {"cells": nn.LSTM(8, 12, num_layers=2, dropout=0.4, batch_first=True)},
    ),
    "attention dropout": (
        lambda m, x: m.o(m.attention(*[m.a(x)[:, None]] * 3)[0][:, 0]),
        {"attention": nn.MultiheadAttention(12, 3, dropout=0.4, batch_first=True)},
    ),
    "running mean that training does not read": (updated, {"mean": torch.randn(12)}),
    "weights tied in training": (
        lambda m, x: F.linear(m.a(x), m.o.weight.flip(0)) if m.training else m.o(m.a(x)),
        {},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_both_forms_compute_what_the_model_does(name: str) -> None:
    run_, parts = SAME[name]
    torch.manual_seed(0)
    model, x = double(Net(run_, **layers(**parts))), torch.randn(4, 8, dtype=torch.float64)
    groups = gz.channel_groups(model, (x,), mode="train")
    clusters = plant(model, groups, 0)
    assert_alike(model, gz.compile(model, NOTHING, (x,), mode="train").module, x)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), (x,), mode="train")
    assert relative(run(model, x, training=False), run(compiled.module, x, training=False)) < 1e-11
    assert run(compiled.module, x, training=True) is not None


def test_channels_that_only_dropout_sets_apart_in_training_merge() -> None:
    for name in ("attention dropout", "recurrent dropout", "dropout in a branch"):
        run_, parts = SAME[name]
        model = Net(run_, **layers(**parts)).eval()
        both, alone = (gz.channel_groups(model, (torch.randn(4, 8),), mode=mode) for mode in ("train", "eval"))
        assert {group.name for group in both if group.mergeable} == {g.name for g in alone if g.mergeable}


def test_noise_of_training_holds_channels() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.o(y + torch.randn_like(y) if m.training else y)

    model, x = Net(forward, **layers()).eval(), torch.randn(4, 8)
    assert gz.channel_groups(model, (x,))["a"].mergeable
    assert not gz.channel_groups(model, (x,), mode="train")["a"].mergeable


def test_a_model_without_another_form_is_an_ordinary_one() -> None:
    model, x = nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.1), nn.BatchNorm1d(12), nn.Linear(12, 3)), torch.randn(4, 8)
    both, alone = (gz.compile(model, HALF, (x,), mode=mode).module for mode in ("train", "eval"))
    assert type(both).__bases__ == type(alone).__bases__
    assert repr(both) == repr(alone)


def test_a_batch_that_one_form_refuses_is_refused_in_that_mode() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.o(m.norm(m.a(x))) if m.training else m.o(m.a(x))

    model = Net(forward, **layers(norm=nn.BatchNorm1d(12))).eval()
    compiled = gz.compile(model, NOTHING, (torch.randn(4, 8),), mode="train")
    assert compiled.module.eval()(torch.randn(1, 8)).shape == (1, 3)
    with pytest.raises((gz.InputShapeError, ValueError)):
        compiled.module.train()(torch.randn(1, 8))


def test_what_cannot_be_kept_is_refused_or_told() -> None:
    x = torch.randn(4, 8)

    def read(m: Any, x: Tensor) -> Any:
        if m.training:
            m.mean.mul_(0.9)
        return m.o(m.a(x) - m.mean)

    def random_branch(m: Any, x: Tensor) -> Any:
        return m.o(m.a(x)) if not m.training or torch.rand(()) < 0.5 else x

    for model, said in (
        (Net(read, **layers(mean=torch.zeros(12))), r"'mean' is written in training \(net_parts.py.*mode='eval'"),
        (Net(random_branch, **layers()), "the training form of Net cannot be traced: .*mode='eval'"),
        (nn.Sequential(Adapted(8, 3)), "change its weights, so its two forms cannot share them"),
    ):
        with pytest.raises(gz.TraceError, match=said):
            gz.compile(model, NOTHING, (x,), mode="train")
    with pytest.raises(gz.GraphZipError, match=r"mode is 'eval' .*got 'both'"):
        gz.channel_groups(nn.Linear(8, 3), (x,), mode="both")
    pair = {"a": nn.Linear(8, 3), "b": nn.Linear(8, 3)}
    with pytest.raises(gz.PlanError, match="mode='train' is for one model"):
        gz.prepare(pair, gz.Plan([gz.Zip()]), {"a": (x,), "b": (x,)}, mode="train")
    (note,) = gz.compile(Net(updated, **layers(mean=torch.zeros(12))), NOTHING, (x,), mode="train").report.notes
    assert note.startswith("'mean' is written in training (net_parts.py")


@pytest.mark.filterwarnings("ignore:.*assigned during export")
def test_spectral_norms_lose_their_step_in_both_forms() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        return (y, y.sum()) if m.training else y

    torch.manual_seed(0)
    parts = {
        "a": nn.utils.spectral_norm(nn.Linear(8, 8)),
        "b": nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)),
    }
    compiled = gz.compile(Net(forward, **parts), NOTHING, (torch.randn(4, 8),), mode="train")
    assert [note.partition(" (")[0] for note in compiled.report.notes] == ["'a'", "'b.parametrizations.weight.0'"]
    assert len(compiled.module.train()(torch.randn(4, 8))) == 2


class Caching(nn.Module):
    """In eval mode it keeps its grid for as long as inputs have the same shape; in training it needs none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.shape: Any = None
        self.grid: Any = torch.empty(0)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x).relu()).flatten(2)
        if self.training:
            return {"raw": y}
        if self.shape != y.shape:
            self.shape, self.grid = y.shape, torch.arange(y.shape[2]).type_as(y)
        return y + self.grid


@pytest.mark.filterwarnings("ignore:.*assigned during export")
def test_a_size_that_only_one_form_fixes_is_fixed_in_both() -> None:
    torch.manual_seed(0)
    model, x = Caching().eval(), torch.randn(2, 3, 8, 8)
    model(x)
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(keep={"a": 8})]), (x,), mode="train")
    torch.testing.assert_close(compiled.module.eval()(x), model.eval()(x))
    torch.testing.assert_close(compiled.module.train()(x)["raw"], model.train()(x)["raw"])
    for module in (compiled.module.eval(), compiled.module.train()):
        with pytest.raises(gz.InputShapeError):
            module(torch.randn(3, 3, 8, 8))
    assert any(
        "batch is fixed" in note or "x.shape[0] == 2" in note or "fixed" in note for note in compiled.report.notes
    )
