"""Weights that are computed before every call: weight norm, spectral norm and masks, in the old form and the new."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import graphzip as gz

NOTHING = gz.Plan([])
X = (torch.randn(4, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.c2(self.c1(x).relu()).relu().mean(2))
        return y


def of_both(layer: nn.Module) -> None:
    weight_norm(layer)
    prune.random_unstructured(layer, "bias", 0.3)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": weight_norm,
    "weight_norm of all": lambda layer: weight_norm(layer, dim=None),
    "spectral_norm": spectral_norm,
    "unstructured": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "structured": lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, 0),
    "of a bias": lambda layer: prune.random_unstructured(layer, "bias", 0.3),
    "both": of_both,
    "new weight_norm": parametrizations.weight_norm,
    "new spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
QUICK = ("weight_norm", "spectral_norm", "unstructured", "new weight_norm")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WAYS]


def speech(name: str, *, ran: bool) -> nn.Module:
    torch.manual_seed(0)
    model = Speech().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the old forms
        for layer in (model.c1, model.c2, model.fc):
            WAYS[name](layer)
    if ran:
        model(*X).sum().backward()
        model.zero_grad()
    return model


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("name", EACH)
def test_what_they_compute_is_kept(name: str, ran: bool) -> None:
    model = speech(name, ran=ran)
    before = {key: sorted(inner.__dict__) for key, inner in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = gz.compile(model, NOTHING, X)
    assert before == {key: sorted(inner.__dict__) for key, inner in model.named_modules()}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert set(compiled.module.state_dict()) == set(state)
    trains_alike = "spectral" not in name
    assert trains_alike == (not compiled.report.notes)
    for mode in (False, True):
        if mode <= trains_alike:
            expected, found = model.train(mode)(*X), compiled.module.train(mode)(*X)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
            found.sum().backward()
            expected.sum().backward()
    ours = dict(compiled.module.named_parameters())
    for key, parameter in model.named_parameters():
        if trains_alike:
            torch.testing.assert_close(ours[key].grad, parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", EACH)
def test_identical_channels_merge_without_loss(name: str) -> None:
    model = speech(name, ran=True).eval()
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    clusters = {}
    for group in gz.channel_groups(model, X):
        if group.mergeable:
            clusters[group.name] = [[number, number + 1] for number in range(0, group.size, 2)]
            for number in range(0, group.size, 2):
                for one, other in zip(group.slices(number), group.slices(number + 1), strict=True):
                    if one.role != "consumer":
                        value = held[one.param].detach()
                        value.select(one.dim, other.index).copy_(value.select(one.dim, one.index))
    compiled = gz.compile(model, gz.Plan([gz.ClusterMerge(clusters=clusters)]), X)
    assert compiled.report.changed == (name != "orthogonal")
    torch.testing.assert_close(compiled.module(*X), model(*X), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["weight_norm", "unstructured"])
def test_they_train_are_copied_pickled_and_exported(name: str, tmp_path: Path) -> None:
    x = X[0].float()
    model = speech(name, ran=True).float()
    prepared = gz.prepare(model, gz.Plan([gz.ClusterMerge(keep=0.5, strength=5.0)]), (x,))

    def train(ready: gz.Prepared) -> None:
        optimizer = ready.optimizer(torch.optim.SGD, lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            ready(x).square().mean().backward()
            optimizer.step()

    train(prepared)
    twins = [prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))]
    results = []
    for twin in twins:
        train(twin)
        results.append(twin.convert())
    for result in results[1:]:
        assert torch.equal(result.module(x), results[0].module(x))
    assert results[0].export(tmp_path / "model.onnx").verified


def test_a_tensor_that_was_computed_from_weights_is_copied_without_its_graph() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(4, 4), {"last": [torch.zeros(1)]}

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            self.seen["last"] = [y]
            return y.relu()

    model, x = Keeps(), torch.randn(3, 4)
    expected = model(x)
    kept = model.seen["last"][0]
    for scope in (None, "layer"):
        compiled = gz.compile(model, NOTHING, (x,), scope=scope)
        torch.testing.assert_close(compiled.module(x), expected)
    assert model.seen["last"][0] is kept


def with_fp8(model: nn.Module) -> nn.Module:
    model.c2.weight = nn.Parameter(model.c2.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


def with_compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward)
    return model


def holding_itself(model: nn.Module) -> nn.Module:
    plain = model.forward
    model.forward = lambda x: plain(x)
    return model


def in_inference(model: nn.Module) -> nn.Module:
    with torch.inference_mode():
        return Speech()


REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "fp8": (with_fp8, r"'c2.weight' is float8_e4m3fn, .* convert it to float32"),
    "inference": (in_inference, r"'c1.weight' was made inside torch.inference_mode\(\).* copy.deepcopy\(model\)"),
    "compiled": (torch.compile, r"the model is made by torch.compile; pass .*_orig_mod"),
    "part compiled": (lambda model: nn.Sequential(torch.compile(model)), r"'0' is made by torch.compile"),
    "compiled forward": (with_compiled_forward, r"the model is given a forward made by torch.compile"),
    "parallel": (nn.DataParallel, r"the model is a DataParallel; pass the model inside it"),
    "holds itself": (holding_itself, r"a copy of Speech reads 'c1.weight' of the model itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_worked_on_is_refused_at_once(name: str) -> None:
    make, message = REFUSED[name]
    torch.manual_seed(0)
    model, x = make(Speech()), X[0].float()
    half = gz.Plan([gz.ClusterMerge(keep=0.5)])
    for attempt in (functools.partial(gz.compile, model, half, (x,)), functools.partial(gz.prepare, model, half, (x,))):
        if name == "holds itself" and attempt.func is gz.compile:
            continue  # nothing is copied there
        with pytest.raises(gz.TraceError, match=message):
            attempt(calibration=[x])
    if name == "inference":
        assert gz.compile(copy.deepcopy(model), half, (x,)).report.changed
