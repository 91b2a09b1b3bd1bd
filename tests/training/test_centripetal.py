"""Centripetal SGD: the update rule, what training loops do around it, and checkpoints."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_worker
import pytest
import torch
from nets import Net
from planting import randomize_, relative
from residual_net import Residual
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")

STEM = [[0, 3], [1], [2, 4, 5], [6, 7]]
INNER = [[0], [1, 2, 3], [4], [5]]
CLUSTERS = {"stem": STEM, "inner": INNER}


def residual(seed: int = 0) -> Residual:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Residual().double()
    randomize_(model, seed)
    return model.train()


def image(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def prepared(model: nn.Module | None = None, x: Tensor | None = None, **options: Any) -> gz.Prepared:
    options = options if {"clusters", "keep"} & options.keys() else {"clusters": CLUSTERS, **options}
    plan = gz.Plan([gz.ClusterMerge(**options)])
    return gz.prepare(residual() if model is None else model, plan, (image() if x is None else x,))


def lose(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def train(model: gz.Prepared, optimizer: Optimizer, steps: int = 3, like: Callable[[], Tensor] = image) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        lose(model, like()).backward()
        optimizer.step()


# --- the update rule -------------------------------------------------------------------------------------------------


def averaging(clusters: list[list[int]], size: int) -> Tensor:
    """Eq. 19."""
    gamma = torch.zeros(size, size, dtype=torch.float64)
    for members in clusters:
        for m in members:
            gamma[m, members] = 1 / len(members)
    return gamma


def dense_step(
    tensor: Tensor, gradient: Tensor, clusters: list[list[int]], lr: float, decay: float, eps: float
) -> Tensor:
    """Eq. 18 with the matrices of Eq. 19 and 20, slices along dimension 0."""
    gamma = averaging(clusters, len(tensor))
    same = (gamma > 0).double()
    counts = same.sum(1)
    lam = torch.diag(decay + eps - eps / counts) + (same - torch.diag(torch.diag(same))) * (-eps / counts)[:, None]
    w, g = (
        tensor.flatten(1).T if tensor.dim() > 1 else tensor[None],
        gradient.flatten(1).T if tensor.dim() > 1 else gradient[None],
    )
    moved = w - lr * (g @ gamma + w @ lam)
    return moved.T.reshape(tensor.shape)


TIED = {
    **{
        f"{name}": STEM for name in ("stem.weight", "stem.bias", "out.weight", "out.bias", "norm0.weight", "norm0.bias")
    },
    **{f"{name}": INNER for name in ("inner.weight", "norm1.weight", "norm1.bias")},
    "head.weight": [[k] for k in range(4)],
    "head.bias": [[k] for k in range(4)],
}


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_a_pull_inside_the_gradient_is_multiplied_by_momentum(momentum: float, nesterov: bool) -> None:
    """The authors' code: Eq. 6's sum is the gradient of plain SGD with momentum, kept for each member by itself."""
    ready = prepared(strength=0.7, pull="gradient")
    options = {"lr": 0.03, "weight_decay": 0.01, "momentum": momentum, "nesterov": nesterov}
    optimizer = ready.optimizer(SGD, **options)
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in ready.model.named_parameters()}
    plain = SGD(twins.values(), **{**options, "weight_decay": 0.0})
    for _ in range(4):
        optimizer.zero_grad()
        lose(ready, image()).backward()
        for name, p in ready.model.named_parameters():
            assert p.grad is not None
            w, g = twins[name].detach().flatten(1 if p.dim() > 1 else 0), p.grad
            gamma = averaging(TIED[name], len(p))
            mean = (gamma @ g.reshape(len(p), -1)).reshape(p.shape)
            apart = (w.reshape(len(p), -1) - gamma @ w.reshape(len(p), -1)).reshape(p.shape)
            twins[name].grad = mean + 0.01 * twins[name].detach() + 0.7 * apart
        plain.step()
        optimizer.step()
        for name, p in ready.model.named_parameters():
            torch.testing.assert_close(p, twins[name], rtol=1e-12, atol=1e-12)


def test_a_pull_inside_the_gradient_makes_no_promise_of_steps() -> None:
    with pytest.raises(gz.PlanError, match=re.escape("cluster_merge.pull: strength 'auto' brings filters together")):
        prepared(strength="auto", pull="gradient").optimizer(SGD, lr=0.1, steps=10)


def test_a_step_is_equation_18() -> None:
    """Kernels, biases and batch norm parameters of pacesetter and follower; the rest moves as with plain SGD."""
    ready = prepared(strength=0.7)
    optimizer = ready.optimizer(SGD, lr=0.03, weight_decay=0.01)
    assert type(optimizer) is SGD
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in ready.model.named_parameters()}
        optimizer.zero_grad()
        lose(ready, image()).backward()
        gradients = {name: p.grad.clone() for name, p in ready.model.named_parameters()}
        optimizer.step()
        assert before.keys() == TIED.keys()
        for name, parameter in ready.model.named_parameters():
            expected = dense_step(before[name], gradients[name], TIED[name], 0.03, 0.01, 0.7)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14, msg=name)


OPTIMIZERS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"weight_decay": 0.02}),
    (SGD, {"momentum": 0.9, "weight_decay": 0.02}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02}),
    (Adam, {"weight_decay": 0.02}),
    (AdamW, {"weight_decay": 0.02, "amsgrad": True}),
    (torch.optim.RMSprop, {"momentum": 0.5}),
]


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_the_deviation_falls_by_the_same_factor_every_step(cls: type[Optimizer], options: dict[str, Any]) -> None:
    ready = prepared(strength=1.5)
    optimizer = ready.optimizer(cls, lr=0.02, **options)
    factor = (1 - 0.02 * (options.get("weight_decay", 0.0) + 1.5)) ** 2
    for _ in range(20):
        before = ready.deviation()
        train(ready, optimizer, 1)
        assert ready.deviation() == pytest.approx(before * factor, rel=1e-9)


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_identical_filters_stay_bit_identical(cls: type[Optimizer], options: dict[str, Any]) -> None:
    ready = prepared()
    ready.collapse_()
    train(ready, ready.optimizer(cls, lr=0.02, **options), 5)
    for name, parameter in ready.model.named_parameters():
        for members in TIED[name]:
            assert all(torch.equal(parameter[members[0]], parameter[k]) for k in members), name


def test_centres_move_as_the_optimizer_moves_them() -> None:
    """Adam on the averaged gradients of a model whose filters are identical already."""
    ready, twin = prepared(), prepared()
    ready.collapse_()
    twin.collapse_()
    optimizer, plain = ready.optimizer(Adam, lr=0.02), Adam(twin.parameters(), lr=0.02)
    for x in (image(), image()):
        for model, each in ((ready, optimizer), (twin, plain)):
            each.zero_grad()
            lose(model, x).backward()
        for name, parameter in twin.model.named_parameters():
            parameter.grad = torch.einsum("mn,n...->m...", averaging(TIED[name], len(parameter)), parameter.grad)
        optimizer.step()
        plain.step()
    for (name, left), right in zip(ready.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12, msg=name)


def test_running_statistics_come_together() -> None:
    ready = prepared(strength=30.0)
    optimizer = ready.optimizer(SGD, lr=1e-2)
    train(ready, optimizer, 100)
    for norm, clusters in ((ready.model.norm0, STEM), (ready.model.norm1, INNER)):
        for values in (norm.running_mean, norm.running_var):
            for members in clusters:
                torch.testing.assert_close(values[members], values[members[:1]].expand(len(members)))
    x = image()
    expected = ready.eval()(x)
    assert relative(expected, ready.convert().module.eval()(x)) < 1e-9


def test_groups_that_stay_whole_train_as_ever() -> None:
    ready, model = prepared(keep=1.0), residual()
    optimizer, plain = ready.optimizer(SGD, lr=0.1, momentum=0.9), SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in (image(), image()):
        for each, one in ((ready, optimizer), (model, plain)):
            one.zero_grad()
            lose(each, x).backward()
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(ready.parameters(), model.parameters(), strict=True))


def dense() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.one(m.norm1(x).relu())
        x = torch.cat([x, y], 1)
        y = m.two(m.norm2(x).relu())
        return m.head(m.norm3(torch.cat([x, y], 1)).relu().mean((2, 3)))

    model = Net(
        run, stem=nn.Conv2d(3, 4, 3), norm1=nn.BatchNorm2d(4), one=nn.Conv2d(4, 6, 3, padding=1),
        norm2=nn.BatchNorm2d(10), two=nn.Conv2d(10, 4, 1), norm3=nn.BatchNorm2d(14), head=nn.Linear(14, 3),
    ).double().train()  # fmt: skip
    randomize_(model, 0)
    return model.train()


def test_batch_norms_after_a_concatenation_follow_each_producer_at_its_offset() -> None:
    """Figure 8."""
    clusters = {"stem": [[0, 2], [1, 3]], "one": [[0], [1, 5, 3], [2, 4]], "two": [[0, 1, 2, 3]]}
    ready = prepared(dense(), clusters=clusters, strength=1.0)
    expected = {
        "norm1": [[0, 2], [1, 3]],
        "norm2": [[0, 2], [1, 3], [4], [5, 9, 7], [6, 8]],
        "norm3": [[0, 2], [1, 3], [4], [5, 9, 7], [6, 8], [10, 11, 12, 13]],
    }
    before = {name: p.detach().clone() for name, p in ready.model.named_parameters()}
    optimizer = ready.optimizer(SGD, lr=0.1, weight_decay=0.1)
    lose(ready, image()).backward()
    gradients = {name: p.grad.clone() for name, p in ready.model.named_parameters()}
    optimizer.step()
    for norm, parts in expected.items():
        for leaf in ("weight", "bias"):
            name = f"{norm}.{leaf}"
            moved = dense_step(before[name], gradients[name], parts, 0.1, 0.1, 1.0)
            torch.testing.assert_close(ready.model.get_parameter(name).detach(), moved, rtol=1e-12, atol=1e-14)


def test_other_dimensions_than_the_first() -> None:
    """A transposed convolution makes its channels along dimension 1."""
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    ready = prepared(model, clusters={"0": [[0, 2, 3], [1]]}, strength=2.0)
    before, factor = ready.deviation(), 1 - 0.1 * 2.0
    optimizer = ready.optimizer(SGD, lr=0.1)
    centre = ready.model[0].weight.detach()[:, [0, 2, 3]].mean(1)
    lose(ready, image()).backward()
    gradient = ready.model[0].weight.grad[:, [0, 2, 3]].mean(1)
    optimizer.step()
    weight = ready.model[0].weight.detach()
    torch.testing.assert_close(weight[:, [0, 2, 3]].mean(1), centre - 0.1 * gradient)
    assert ready.deviation() == pytest.approx(before * factor**2, rel=1e-12)


# --- the strength ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_auto_brings_filters_together_before_the_end_whatever_the_learning_rate_does(cls: type[Optimizer]) -> None:
    ready = prepared(strength="auto")
    optimizer = ready.optimizer(cls, lr=0.02, steps=40)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    start, found = ready.deviation(), []
    for _ in range(30):
        train(ready, optimizer, 1)
        schedule.step()
        found.append(ready.deviation())
    steps = [later / earlier for earlier, later in zip([start, *found[:20]], found[:20], strict=False)]
    assert steps == pytest.approx([1e-16 ** (1 / 30)] * len(steps), rel=1e-6)
    assert found[-1] <= 1.1e-16 * start


def test_auto_needs_the_number_of_steps() -> None:
    with pytest.raises(gz.PlanError, match=re.escape("passes[0].cluster_merge.strength: 'auto' depends on how long")):
        prepared(strength="auto").optimizer(SGD, lr=0.1)


def test_a_strength_too_weak_for_the_steps_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prepared().optimizer(SGD, lr=0.03, steps=100)
    assert (
        "passes[0].cluster_merge.strength: 0.003 is weak for 100 steps at a learning rate of 0.03: 99 %" in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        prepared(strength=3.0).optimizer(SGD, lr=0.03, steps=100)
    assert not caplog.text


def test_a_schedule_that_leaves_filters_apart_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """At a constant rate the strength would do; the schedule lets the rate fall too soon."""
    for falls, told in ((True, True), (False, False)):
        caplog.clear()
        ready = prepared(strength=5.0)
        optimizer = ready.optimizer(SGD, lr=0.03, steps=60)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.1 if falls else 1.0)
        with caplog.at_level(logging.WARNING, "graphzip_passes"):
            for _ in range(60):
                train(ready, optimizer, 1)
                schedule.step()
        assert ("5 is weak for 60 steps with this schedule of learning rates" in caplog.text) is told
        assert len([each for each in caplog.records if "is weak" in each.getMessage()]) == told


def test_a_pull_beyond_the_centre_ends_there() -> None:
    ready = prepared(strength=100.0)
    start = ready.deviation()
    train(ready, ready.optimizer(SGD, lr=0.1), 1)
    assert ready.deviation() < 1e-28 * start


def test_learning_rate_decay_and_strength_of_each_parameter_group() -> None:
    ready = prepared(strength=1.0)
    model = ready.model
    rest = [p for name, p in model.named_parameters() if name not in {"stem.weight", "inner.weight"}]
    optimizer = ready.optimizer(
        SGD,
        [
            {"params": [model.stem.weight], "lr": 0.2, "weight_decay": 0.3},
            {"params": [model.inner.weight], "strength": 2.0},
            {"params": rest, "lr": torch.tensor(0.05)},
        ],
        lr=0.1,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lose(ready, image()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    settings = {"stem.weight": (0.2, 0.3, 1.0), "inner.weight": (0.1, 0.0, 2.0)}
    for name, parameter in model.named_parameters():
        lr, decay, strength = settings.get(name, (0.05, 0.0, 1.0))
        expected = dense_step(before[name], gradients[name], TIED[name], lr, decay, strength)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-7, atol=1e-9, msg=name)


# --- what training loops do ------------------------------------------------------------------------------------------


def test_learning_rate_schedulers() -> None:
    ready = prepared(strength=2.0)
    optimizer = ready.optimizer(SGD, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for step in range(6):
        before, lr = ready.deviation(), 0.1 * 0.5 ** (step // 2)
        train(ready, optimizer, 1)
        schedule.step()
        assert ready.deviation() == pytest.approx(before * (1 - lr * 2.0) ** 2, rel=1e-9)


def test_accumulated_and_clipped_gradients() -> None:
    """Two halves of a batch and the whole give the same step (in eval mode, where batch norm knows no batch)."""
    ready, twin = prepared(residual().eval()), prepared(residual().eval())
    x = image(8)
    for model, batches in ((ready, [x]), (twin, x.split(4))):
        optimizer = model.optimizer(SGD, lr=0.1)
        for batch in batches:
            (lose(model, batch) / len(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        moved = (
            sum(float((p.detach() - q).square().sum()) for p, q in zip(model.parameters(), before, strict=True)) ** 0.5
        )
        assert 0 < moved < 1e-2
    for left, right in zip(ready.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(fused: bool) -> None:
    """A scaled step is the plain step, and a step that overflows leaves everything where it was."""
    ready, twin = (prepared(residual().float(), torch.randn(4, 3, 8, 8), strength=1.0) for _ in range(2))
    optimizer, plain = (each.optimizer(SGD, lr=0.1, momentum=0.9, fused=fused) for each in (ready, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        optimizer.zero_grad()
        plain.zero_grad()
        scaler.scale(lose(ready, x)).backward()
        scaler.step(optimizer)
        scaler.update()
        lose(twin, x).backward()
        plain.step()
    for left, right in zip(ready.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    before = [p.detach().clone() for p in ready.parameters()]
    optimizer.zero_grad()
    scaler.scale(lose(ready, torch.full((4, 3, 8, 8), 1e38))).backward()
    scaler.step(optimizer)
    for left, right in zip(before, ready.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_closures() -> None:
    ready, twin = prepared(strength=1.0), prepared(strength=1.0)
    optimizer, plain = ready.optimizer(SGD, lr=0.1), twin.optimizer(SGD, lr=0.1)
    x = image()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = lose(ready, x)
        loss.backward()
        return loss

    expected = lose(twin, x)
    expected.backward()
    plain.step()
    assert torch.equal(optimizer.step(closure), expected)
    assert all(torch.equal(a, b) for a, b in zip(ready.parameters(), twin.parameters(), strict=True))


def test_a_compiled_model() -> None:
    ready, twin = prepared(strength=1.0), prepared(strength=1.0)
    compiled = torch.compile(ready, backend="aot_eager")
    optimizer, plain = compiled.optimizer(SGD, lr=0.1, momentum=0.9), twin.optimizer(SGD, lr=0.1, momentum=0.9)
    for x in (image(), image()):
        for model, each in ((compiled, optimizer), (twin, plain)):
            each.zero_grad()
            lose(model, x).backward()
            each.step()
    for left, right in zip(ready.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_frozen_and_unused_parameters_come_together_too() -> None:
    ready = prepared(strength=1.0)
    ready.model.stem.requires_grad_(False)
    rest = [p for p in ready.parameters() if p.requires_grad]
    optimizer = ready.optimizer(SGD, rest, lr=0.1)
    before = ready.deviation()
    ready.model.out.weight.grad = None
    lose(ready, image()).backward()
    ready.model.inner.weight.grad = None
    optimizer.step()
    assert ready.deviation() == pytest.approx(before * 0.9**2, rel=1e-9)
    assert ready.model.inner.weight.grad is None


def test_parameters_that_are_added_later_are_averaged() -> None:
    ready = prepared(strength=1.0)
    rest = [p for name, p in ready.model.named_parameters() if name != "stem.weight"]
    optimizer = ready.optimizer(SGD, rest, lr=0.1)
    train(ready, optimizer, 1)
    optimizer.add_param_group({"params": [ready.model.stem.weight], "weight_decay": 0.5})
    before = ready.model.stem.weight.detach().clone()
    lose(ready, image()).backward()
    gradient = ready.model.stem.weight.grad.clone()
    optimizer.step()
    expected = dense_step(before, gradient, STEM, 0.1, 0.5, 1.0)
    torch.testing.assert_close(ready.model.stem.weight.detach(), expected, rtol=1e-12, atol=1e-14)


def test_a_model_that_changes_its_dtype() -> None:
    ready = prepared(residual().float(), torch.randn(4, 3, 8, 8), strength=1.0)
    optimizer = ready.optimizer(SGD, lr=0.1)
    train(ready, optimizer, 1, lambda: image().float())
    ready.double()
    before = ready.deviation()
    train(ready, optimizer, 1)
    assert ready.deviation() == pytest.approx(before * 0.9**2, rel=1e-9)


def test_optimizers_that_evaluate_the_model_are_refused() -> None:
    with pytest.raises(gz.GraphZipError, match="LBFGS evaluates the model several times a step"):
        prepared().optimizer(torch.optim.LBFGS)


def test_sparse_gradients_are_refused() -> None:
    model = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Embedding(7, 4, sparse=True), b=nn.Linear(4, 3))
    ready = gz.prepare(model, gz.Plan([gz.ClusterMerge(keep=2)]), (torch.arange(5),))
    optimizer = ready.optimizer(SGD, lr=0.1)
    ready(torch.arange(5)).sum().backward()
    with pytest.raises(gz.GraphZipError, match=r"a\.weight has a sparse gradient"):
        optimizer.step()


def test_a_stage_without_clusters_has_a_plain_optimizer() -> None:
    ready = gz.prepare(residual(), gz.Plan([gz.FoldBatchNorm()]), (image(),))
    optimizer = ready.optimizer(SGD, lr=0.1)
    train(ready, optimizer, 1)
    assert len(ready.history) == 1
    assert ready.history[0].deviation == 0.0
    ready.convert()
    assert type(ready.optimizer(SGD, lr=0.1)) is SGD


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_resumed_training_is_bit_exact() -> None:
    """Also into a model whose own weights would have given other clusters."""
    inputs = [image() for _ in range(6)]
    ready = prepared(keep=0.5, strength=1.0)
    optimizer = ready.optimizer(SGD, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)
    for x in inputs[:3]:
        train(ready, optimizer, 1, lambda x=x: x)
    file = io.BytesIO()
    torch.save({"model": ready.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for x in inputs[3:]:
        train(ready, optimizer, 1, lambda x=x: x)

    file.seek(0)
    found = torch.load(file, weights_only=True)
    again = prepared(residual(seed=9), keep=0.5, strength=1.0)
    assert not torch.equal(again.clusters, ready.clusters)
    resumed = again.optimizer(SGD, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)
    again.load_state_dict(found["model"])
    resumed.load_state_dict(found["optimizer"])
    for x in inputs[3:]:
        train(again, resumed, 1, lambda x=x: x)
    for name, value in ready.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    modules = ready.convert().module, again.convert().module
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in modules), strict=True))


def test_clusters_of_another_plan_are_refused() -> None:
    state = prepared(keep=0.25).state_dict()
    with pytest.raises(gz.WeightsError, match="group 'stem': the loaded state has 2 clusters, the plan 4; prepare"):
        prepared(keep=0.5).load_state_dict(state)


def test_the_weights_of_the_original_can_be_loaded() -> None:
    ready, other = prepared(), residual(seed=3)
    clusters = ready.clusters.clone()
    ready.load_state_dict({f"model.{name}": value for name, value in other.state_dict().items()})
    assert torch.equal(ready.clusters, clusters)
    assert all(torch.equal(a, b) for a, b in zip(ready.model.parameters(), other.parameters(), strict=True))


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_data_parallel_training(tmp_path: Path) -> None:
    """Two processes with weights of their own end with those and the clusters of the first, as one process would."""
    worker = Path(__file__).parents[1] / "support" / "workers" / "distributed_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, tmp_path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = distributed_worker.prepared(seed=0)
    before = alone.deviation()
    distributed_worker.train(alone, alone)
    assert not torch.equal(alone.clusters, distributed_worker.prepared(seed=1).clusters)
    for name, value in alone.state_dict().items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert first["deviation"] == pytest.approx(before * (1 - 0.05 * 2) ** (2 * distributed_worker.STEPS), rel=1e-9)
