"""What a model computes otherwise in training is in the report, whatever form it has, and nothing else is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Net
from planting import relative, state_of
from torch import Tensor, nn
from torch.nn.utils import prune
from training_nets import Adapted, DropPath

import graphzip as gz

Run = Callable[[Any, Tensor], Any]
NOTHING = gz.Plan([])


class Scaled(nn.Module):
    """Its `train` does more than to set the flag, and its forward does not ask for it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def train(self, mode: bool = True) -> Scaled:
        super().train(mode)
        self.scale = 2.0 if mode else 1.0
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Attention(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.rate = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), rate

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x)[:, None, None] for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.0)
        return y.flatten(1)


def updated(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    if m.training:
        m.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
    return m.o(y - m.mean)


def first_if(condition: Callable[[Any], bool]) -> Run:
    return lambda m, x: m.o(m.a(x).relu() * 2 if condition(m) else m.a(x).relu())


def on_two_lines(condition: Callable[[Any], bool]) -> Run:
    def run(m: Any, x: Tensor) -> Any:
        if condition(m):
            return m.o(m.a(x))
        return m.o(m.a(x))

    return run


def layers(**more: nn.Module | Tensor) -> dict[str, Any]:
    return {"a": nn.Linear(8, 8), "o": nn.Linear(8, 3), **more}


NOTED: dict[str, tuple[Run, dict[str, Any], str]] = {
    "factor": (first_if(lambda m: m.training), {}, "mul at"),
    "and": (first_if(lambda m: m.training and m.a.out_features == 8), {}, "mul at"),
    "flag of another module": (first_if(lambda m: m.a.training), {}, "mul at"),
    "getattr": (first_if(lambda m: getattr(m, "training", False)), {}, "mul at"),
    "number": (lambda m, x: m.o(m.a(x) * (0.5 if m.training else 2)), {}, "mul at"),
    "constant": (lambda m, x: m.o(m.a(x) * torch.tensor([1.0, 2.0 + m.training])[1]), {}, "something else"),
    "operands": (lambda m, x: m.o(m.a(x)) - x[:, :3] if m.training else x[:, :3] - m.o(m.a(x)), {}, "something else"),
    "dictionary": (lambda m, x: {"y": m.o(m.a(x))} if m.training else m.o(m.a(x)), {}, "returns {y: [*, 3]}"),
    "keys": (lambda m, x: {"raw" if m.training else "done": m.o(m.a(x))}, {}, "returns {raw: [*, 3]} in training"),
    "more outputs": (lambda m, x: (m.o(m.a(x)), x) if m.training else m.o(m.a(x)), {}, "([*, 3], [*, 8]) in training"),
    "other shape": (lambda m, x: m.o(m.a(x))[:, : 2 + m.training], {}, "returns [*, 3] in training mode and [*, 2]"),
    "other dtype": (lambda m, x: m.o(m.a(x)).double() if m.training else m.o(m.a(x)), {}, "something else"),
    "drop path": (lambda m, x: m.o(m.drop(m.a(x))), {"drop": DropPath(0.5)}, "'drop' (DropPath) acts only in training"),
    "dropout in a branch": (lambda m, x: m.o(F.dropout(m.a(x)) if m.training else m.a(x)), {}, "dropout at"),
    "other rate": (lambda m, x: m.o(F.dropout(m.a(x), 0.5 if m.training else 0.1, m.training)), {}, "dropout at"),
    "always dropout": (lambda m, x: m.o(F.dropout(m.a(x), 0.5 * m.training)), {}, "dropout at"),
    "noise": (lambda m, x: m.o(m.a(x) + torch.randn_like(x) if m.training else m.a(x)), {}, "randn_like at"),
    "functional rrelu": (lambda m, x: m.o(F.rrelu(m.a(x), training=m.training)), {}, "rrelu at"),
    "instance norm": (
        lambda m, x: m.o(F.instance_norm(m.a(x)[:, None], m.mean, m.var, use_input_stats=m.training)[:, 0]),
        {"mean": torch.zeros(1), "var": torch.ones(1)},
        "instance_norm at",
    ),
    "not in training": (
        lambda m, x: m.o(F.batch_norm(m.a(x), m.mean, m.var, training=not m.training)),
        {"mean": torch.zeros(8), "var": torch.ones(8)},
        "batch_norm at",
    ),
    "running mean": (updated, {"mean": torch.zeros(8)}, "mul_ at"),
    "attention": (lambda m, x: m.o(m.attention(m.a(x))), {"attention": Attention(0.1)}, "'attention' (Attention)"),
    "train overridden": (lambda m, x: m.o(m.scaled(m.a(x))), {"scaled": Scaled()}, "'scaled' (Scaled) computes"),
    "auxiliary head": (
        lambda m, x: (m.o(m.a(x)), m.aux(x)) if m.training else m.o(m.a(x)),
        {"aux": nn.Linear(8, 2)},
        "'aux' (Linear) is not part of the eval graph",
    ),
    "cannot be traced": (
        lambda m, x: {"y": m.o(x)} if m.training and torch.rand(()) < 2 else m.o(m.a(x)),
        {},
        "cannot be traced",
    ),
    "other inputs": (lambda m, x: 1 / 0 if m.training else m.o(m.a(x)), {}, "cannot be run in training mode"),
    "gradients": (first_if(lambda m: torch.is_grad_enabled()), {}, "is_grad_enabled"),
}
QUIET: dict[str, tuple[Run, dict[str, Any]]] = {
    "layers": (
        lambda m, x: m.o(m.drop(m.norm(m.a(x)))),
        {"drop": nn.Dropout(0.3), "norm": nn.BatchNorm1d(8)},
    ),
    "dropout that follows": (lambda m, x: m.o(F.dropout(m.a(x), 0.5, m.training, inplace=True)), {}),
    "batch norm that follows": (
        lambda m, x: m.o(F.batch_norm(m.a(x), m.mean, m.var, training=m.training)),
        {"mean": torch.zeros(8), "var": torch.ones(8)},
    ),
    "a flag without consequence": (lambda m, x: m.o(m.a(x) * (1 + 0 * m.training)), {}),
    "one operator on two lines": (on_two_lines(lambda m: m.training), {}),
    "drop path that keeps everything": (lambda m, x: m.o(m.drop(m.a(x))), {"drop": DropPath(0.0)}),
    "attention without dropout": (lambda m, x: m.o(m.attention(m.a(x))), {"attention": Attention(0.0)}),
    "gradients asked for": (on_two_lines(lambda m: torch.is_grad_enabled()), {}),
    "cumulative average": (
        lambda m, x: m.o(m.norm(m.a(x * (1 + 0 * m.training)))),
        {"norm": nn.BatchNorm1d(8, momentum=None)},
    ),
    "rrelu": (lambda m, x: m.o(m.act(m.a(x)) * (1 + 0 * m.training)), {"act": nn.RReLU()}),
}


def notes_of(run: Run, parts: dict[str, Any]) -> tuple[str, ...]:
    torch.manual_seed(0)
    return gz.compile(Net(run, **layers(**parts)), NOTHING, (torch.randn(3, 8),)).report.notes


@pytest.mark.parametrize("name", NOTED)
def test_what_differs_in_training_is_reported(name: str) -> None:
    run, parts, said = NOTED[name]
    notes = notes_of(run, parts)
    assert said in "\n".join(notes)
    assert len(notes) <= 2


@pytest.mark.parametrize("name", QUIET)
def test_what_does_not_differ_is_not(name: str) -> None:
    assert notes_of(*QUIET[name]) == ()


def test_modules_that_differ_alike_are_told_of_together() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(DropPath(rate) for rate in (0.0, 0.1, 0.2, 0.3))
            self.o = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return self.o(x)  # type: ignore[no-any-return]

    (note,) = gz.compile(Stack(), NOTHING, (torch.randn(3, 8),)).report.notes
    assert note.startswith("'parts.1' (DropPath, and 2 like it) acts only in training and is left out")


def test_a_training_mode_that_does_not_trace_is_run() -> None:
    run, parts, _ = NOTED["cannot be traced"]
    (note,) = notes_of(run, parts)
    assert "it returns {y: [3, 3]}, in eval mode [3, 3]" in note


def test_groups_alone_need_no_second_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[bool] = []

    def forward(m: Any, x: Tensor) -> Any:
        runs.append(m.training)
        return m.o(m.a(x) * 2 if m.training else m.a(x))

    gz.channel_groups(Net(forward, **layers()), (torch.randn(3, 8),))
    assert runs == [False]


def test_what_asks_leaves_nothing_behind() -> None:
    model = Net(first_if(lambda m: m.training), **layers())
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def forward(m: Any, x: Tensor) -> Any:
        return m.o(m.a(x) * (random.random() + np.random.rand()))

    enabled = torch.is_grad_enabled
    notes = gz.compile(Net(forward, **layers()), NOTHING, (torch.randn(3, 8),)).report.notes
    assert "draws numbers from random in eval mode" in "\n".join(notes)
    assert "draws numbers from numpy.random in eval mode" in "\n".join(notes)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    gz.compile(model, NOTHING, (torch.randn(3, 8),))
    assert torch.is_grad_enabled is enabled
    assert "training" not in vars(nn.Module)
    assert vars(model)["training"]


# --- layers whose `train` and `eval` change weights ------------------------------------------------------------------


class Swapped(Adapted):
    """The same with another tensor in place of the weight's."""

    def train(self, mode: bool = True) -> Swapped:
        nn.Linear.train(self, mode)
        if mode == self.merged:
            self.weight.data = self.weight + (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return self


@pytest.mark.parametrize("kind", [Adapted, Swapped])
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_change_with_the_mode(kind: type[Adapted], training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(8, 16), nn.ReLU(), nn.Linear(16, 3)).double().train(training)
    x = torch.randn(3, 8, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in state_of(model).items()}
    want = model(x)
    groups = gz.channel_groups(model, (x,))
    compiled = gz.compile(model, NOTHING, (x,), calibration=[x])
    assert groups["0"].mergeable
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(model).items())
    assert all(module.training == training for module in model.modules())
    assert relative(want, compiled.module.eval()(x)) < 1e-12
    assert compiled.report.drift is not None
    assert compiled.report.drift < 1e-12
    assert "'0' (" in "\n".join(compiled.report.notes)


def test_a_prepared_model_whose_weights_change_with_the_mode_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(8, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    prepared = gz.prepare(model, NOTHING, (x,)).train()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(x).square().sum().backward()
        optimizer.step()
    want = prepared(x)
    assert relative(want, prepared.convert().module.eval()(x)) < 1e-12


# --- modules and parameters under several names ----------------------------------------------------------------------


def test_modules_that_are_held_twice_are_part_of_the_graph() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)])
            self.again = nn.Sequential(*self.layers)
            self.head = nn.Linear(8, 8, bias=False)
            self.head.weight = self.layers[0].weight
            self.extra = nn.Linear(2, 2)
            self.more = nn.Sequential(self.extra)

        def forward(self, x: Tensor) -> Any:
            return self.again(self.head(x))

    (note,) = gz.compile(Twice(), NOTHING, (torch.randn(3, 8),)).report.notes
    assert note == "'extra' (Linear) is not part of the eval graph; its parameters are left out"


@pytest.mark.filterwarnings("ignore:.*assigned during export")
def test_hooks_that_act_in_training_are_reported() -> None:
    model = nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(8, 8)), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))
    )
    notes = gz.compile(model, NOTHING, (torch.randn(3, 8),)).report.notes
    assert [note.partition(" (")[0] for note in notes] == ["'0'", "'1.parametrizations.weight.0'"]
    assert all("spectral norm" in note for note in notes)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated", "ignore:.*assigned during export")
@pytest.mark.parametrize("training", [True, False])
def test_hooks_that_act_in_both_modes_are_kept(training: bool) -> None:
    torch.manual_seed(0)
    pruned = nn.Linear(8, 8)
    with torch.no_grad():
        prune.random_unstructured(pruned, "weight", 0.3)
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), pruned, nn.Linear(8, 3)).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    compiled = gz.compile(model, NOTHING, (x,))
    assert compiled.report.notes == ()
    assert relative(model.train(training)(x), compiled.module.train(training)(x)) < 1e-12
