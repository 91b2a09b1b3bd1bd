"""`CrossDomainShare`: two models of one architecture share the weights of channels that do alike."""

from __future__ import annotations

import copy
import functools
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from domain_pairs import CHANNELS, CLUSTERS, DATA, EXAMPLE, models, network, prepared
from torch import Tensor, nn

import graphzip as gz
from graphzip_passes.cross_domain.pooled_features import rows_of_input
from graphzip_passes.cross_domain.proximal import growl_proximal
from graphzip_passes.cross_domain.share import CrossDomainSharePass
from graphzip_passes.cross_domain.similarity import growl


@functools.cache
def one_shot() -> gz.Compiled:
    return prepared().convert()


def inputs(number: int = 0) -> dict[str, Tensor]:
    return {name: each[number] for name, each in DATA.items()}


def train(ready: gz.Prepared, optimizer: torch.optim.Optimizer, steps: int = 4, *, tasks: int = 2) -> None:
    for number in range(steps):
        out = ready(**inputs(number % 3))
        loss = sum((out[name] - 1).square().mean() for name in list(out)[:tasks]) + ready.regularizer()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def uncalibrated(**options: Any) -> gz.Prepared:
    """With nothing that weights could be fitted to."""
    return gz.prepare(models(), gz.Plan([gz.CrossDomainShare(**{"clusters": CLUSTERS, **options})]), EXAMPLE)


def tied(**options: Any) -> gz.Prepared:
    """At the beginning of the stage "finetune"."""
    ready = prepared(**options)
    for stage in ready.steps():
        if stage == "finetune":
            break
    return ready


def weights(ready: gz.Prepared, layer: str) -> Tensor:
    """Rows: the weights of every input channel, of the first task and then of the second."""
    held = dict(ready.model.named_parameters())
    return torch.cat([held[f"{task}.{layer}.weight"].detach().transpose(0, 1).flatten(1) for task in ("rgb", "depth")])


def assert_exactly_tied(ready: gz.Prepared) -> None:
    numbers = dict(zip(("conv2", "fc1"), torch.split(ready.clusters, [12, 64]), strict=True))
    for layer, number in numbers.items():
        rows = weights(ready, layer)
        for cluster in number.unique():
            members = rows[number == cluster]
            assert bool((members == members[0]).all()), layer
    assert ready.deviation() == 0.0


# ------------------------------------------------------------------------------------------------ stages and training


def test_stages() -> None:
    ready = prepared()
    before = {name: each.clone() for name, each in ready.state_dict().items()}
    seen = []
    for stage in ready.steps():
        seen.append(stage)
        if stage == "regularize":
            out = ready(**inputs())
            expected = {name: model(DATA[name][0]) for name, model in models().items()}
            assert all(torch.equal(out[name], expected[name]) for name in expected)
            assert ready.deviation() == 0.0
            assert set(ready.clusters.tolist()) == {-1}
        else:
            assert_exactly_tied(ready)
    assert seen == ["regularize", "finetune"]
    assert before.keys() == prepared().state_dict().keys()


def test_every_layer_has_exactly_the_clusters_that_were_asked_for() -> None:
    ready = tied()
    conv, linear = torch.split(ready.clusters, [12, 64])
    assert sorted(conv.unique().tolist()) == list(range(5))
    assert sorted(linear.unique().tolist()) == list(range(16))


def test_tying_sets_every_cluster_to_its_centre() -> None:
    """The mean of its weights, each counting as much as the features that it reads."""
    ready = uncalibrated(samples=10_000)
    before = weights(ready, "conv2")
    for stage in ready.steps():
        if stage == "finetune":
            break
        for number in range(3):
            ready.eval()(**inputs(number))
            ready.regularizer()
    read = [
        torch.cat([rows_of_input(model[:3](each), 2, (4, 4)) for each in DATA[name]], dim=1)
        for name, model in ((name, model.eval()) for name, model in models().items())
    ]
    amplitude = torch.cat(read).norm(dim=1)
    number = ready.clusters[:12]
    for cluster in number.unique():
        own = amplitude[number == cluster]
        centre = (own[:, None] * before[number == cluster]).sum(0) / own.sum()
        torch.testing.assert_close(weights(ready, "conv2")[number == cluster][0], centre)


def test_clusters_set_by_hand_are_tied_by_their_mean() -> None:
    ready = uncalibrated()
    before = weights(ready, "conv2")
    by_hand = torch.cat([torch.arange(12) % 5, torch.arange(64) % 16])
    for stage in ready.steps():
        if stage == "regularize":
            ready.clusters.copy_(by_hand)
        else:
            tied_rows = weights(ready, "conv2")
    for cluster in range(5):
        own = by_hand[:12] == cluster
        torch.testing.assert_close(tied_rows[own], before[own].mean(0).expand(int(own.sum()), -1))


@pytest.mark.parametrize("regularizer", ["normalized", "plain", "simple", "growl"])
def test_the_regularizer_reaches_the_weights_of_both_models(regularizer: str) -> None:
    ready = prepared(regularizer=regularizer, strength=2.0, scaling="absolute")
    ready(**inputs())
    ready.regularizer().backward()
    for task in ("rgb", "depth"):
        gradient = ready.get_parameter(f"model.{task}.conv2.weight").grad
        assert gradient is not None
        assert float(gradient.abs().sum()) > 0.0


def test_strength_multiplies_the_term() -> None:
    found = []
    for strength in (1.0, 3.0):
        ready = prepared(regularizer="simple", strength=strength, scaling="absolute")
        ready(**inputs())
        found.append(float(ready.regularizer().detach()))
    assert found[1] == pytest.approx(3 * found[0])


def test_training_with_the_regularizer_brings_it_down() -> None:
    ready = prepared(strength=1.0, regularizer="simple", scaling="absolute")
    optimizer = ready.optimizer(torch.optim.Adam, lr=3e-3)
    found = []
    for _ in range(15):
        ready(**inputs())
        term = ready.regularizer()
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        found.append(float(term.detach()))
    assert found[-1] < 0.9 * found[0]


def test_without_a_regularizer_the_term_is_zero() -> None:
    ready = prepared(regularizer=None)
    ready(**inputs())
    assert float(ready.regularizer()) == 0.0


def test_an_optimizer_made_before_there_are_clusters_is_refused() -> None:
    ready = prepared()
    steps = ready.steps()
    next(steps)
    optimizer = ready.optimizer(torch.optim.SGD, lr=0.1)
    optimizer.step()
    next(steps)
    with pytest.raises(gz.GraphZipError, match="made for a stage that has ended"):
        optimizer.step()
    assert_exactly_tied(ready)


def test_the_term_is_zero_while_fine_tuning() -> None:
    ready = tied()
    ready(**inputs())
    assert float(ready.regularizer()) == 0.0


def test_what_is_noted_does_not_grow_with_the_image() -> None:
    ready = gz.prepare(
        {name: nn.Sequential(*list(model)[:6]) for name, model in models().items()},
        gz.Plan([gz.CrossDomainShare(clusters={"3": 5}, pool=[2, 2], samples=16)]),
        EXAMPLE,
    )
    assert ready._progress.active is not None
    active = ready._progress.active.constraint
    assert isinstance(active, CrossDomainSharePass)
    ready(**inputs())
    assert active._trimmed.take("3").shape == (12, 16)


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda ready: ready.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda ready: ready.optimizer(torch.optim.Adam, lr=1e-2),
    "adamw": lambda ready: ready.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_clusters_stay_together_exactly(make: Any) -> None:
    ready = tied()
    before = weights(ready, "conv2")
    optimizer = make(ready)
    for _ in range(3):
        train(ready, optimizer)
        assert_exactly_tied(ready)
    assert not torch.equal(before, weights(ready, "conv2"))


def test_clusters_stay_together_where_one_task_alone_is_trained() -> None:
    ready = tied()
    train(ready, ready.optimizer(torch.optim.SGD, lr=0.05), tasks=1)
    assert_exactly_tied(ready)


def test_a_step_is_that_of_the_mean_gradient() -> None:
    """Eq. 12."""
    ready = tied()
    number, before = ready.clusters[:12], weights(ready, "conv2")
    optimizer = ready.optimizer(torch.optim.SGD, lr=0.1)
    out = ready(**inputs())
    sum(each.square().mean() for each in out.values()).backward()
    held = dict(ready.model.named_parameters())
    gradients = [held[f"{task}.conv2.weight"].grad for task in ("rgb", "depth")]
    rows = torch.cat([each.clone().transpose(0, 1).flatten(1) for each in gradients if each is not None])
    optimizer.step()
    for cluster in number.unique():
        expected = before[number == cluster] - 0.1 * rows[number == cluster].mean(0)
        torch.testing.assert_close(weights(ready, "conv2")[number == cluster], expected)


def test_domains_in_different_parameter_groups_are_refused() -> None:
    ready = tied()
    held = dict(ready.model.named_parameters())
    groups = [{"params": [each for name, each in held.items() if name.startswith(task)]} for task in ("rgb", "depth")]
    optimizer = ready.optimizer(torch.optim.SGD, groups, lr=0.1)
    with pytest.raises(gz.GraphZipError, match=r"rgb\.conv2\.weight and depth.conv2.weight share clusters"):
        train(ready, optimizer, 1)


def test_a_checkpoint_brings_the_clusters_back() -> None:
    first = tied()
    train(first, first.optimizer(torch.optim.SGD, lr=0.05))
    second = prepared(regularizer="simple")
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.clusters, first.clusters)
    assert list(second.steps())[:1] == ["finetune"]
    left, right = first.convert().module(**inputs()), second.convert().module(**inputs())
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("regularizer", ["normalized", "simple", "growl"])
def test_a_training_goes_on_from_a_checkpoint_to_the_bit(regularizer: str) -> None:
    """Inside the first stage: embeddings, their optimizers, features, strength and random numbers are in the state."""

    def optimizer_of(ready: gz.Prepared) -> torch.optim.Optimizer:
        return ready.optimizer(torch.optim.Adam, lr=1e-3)

    def converted(ready: gz.Prepared) -> dict[str, Tensor]:
        return {**ready.state_dict(), **ready.convert().module.state_dict()}

    first, second = (prepared(regularizer=regularizer, samples=7) for _ in range(2))
    stages = first.steps(), second.steps()
    assert [next(stage) for stage in stages] == ["regularize"] * 2
    optimizer = optimizer_of(first)
    train(first, optimizer, 13)
    buffer = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    state, moments = torch.load(buffer, weights_only=True)
    train(first, optimizer, 12)
    second.load_state_dict(state)
    resumed = optimizer_of(second)
    resumed.load_state_dict(moments)
    train(second, resumed, 12)
    expected, found = converted(first), converted(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_state_of_another_training_is_refused() -> None:
    ready = prepared(regularizer="normalized")
    train(ready, ready.optimizer(torch.optim.SGD, lr=0.1), 2)
    state = ready.state_dict()
    damaged = {name: tensor for name, tensor in state.items() if not name.startswith("progress.features.random")}
    with pytest.raises(gz.WeightsError, match=r"the loaded state is of a training with another plan, or damaged"):
        prepared(regularizer="normalized").load_state_dict(damaged)


@pytest.mark.parametrize("regularizer", ["normalized", "plain", "simple", "growl"])
@pytest.mark.parametrize("scale", [1.0, 64.0], ids=["plain", "scaled"])
def test_strength_is_a_share_of_the_gradient_of_the_loss(regularizer: str, scale: float) -> None:
    """Also where a gradient scaler multiplies both."""
    ready = prepared(regularizer=regularizer, strength=0.3)
    shares = []
    for _ in range(3):
        out = ready(**inputs())
        loss, term = sum((each - 1).square().mean() for each in out.values()), ready.regularizer()
        parameters = list(ready.model.parameters())
        norms = []
        for each in (term, loss):
            found = torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True)
            norms.append(sum(float(gradient.square().sum()) for gradient in found if gradient is not None) ** 0.5)
        shares.append(norms[0] / norms[1])
        (scale * (loss + term)).backward()
    assert shares[0] == 0.0
    assert shares[2] == pytest.approx(0.3, rel=0.05 if regularizer in ("simple", "growl") else 0.5)


def test_growl_is_a_proximal_step_of_the_optimizer() -> None:
    """It sets rows to zero and lets others have one norm, and lowers the penalised objective as no other point does."""
    torch.manual_seed(0)
    rows, strength = torch.randn(9, 4, dtype=torch.float64) * torch.linspace(0.1, 2.0, 9)[:, None], 2.7
    found = growl_proximal(rows, strength)

    def objective(point: Tensor) -> float:
        return float(0.5 * (point - rows).square().sum() + strength * growl(point))

    least = objective(found)
    for _ in range(200):
        assert objective(found + 0.05 * torch.randn_like(found)) > least
    assert 0 < int((found.norm(dim=1) == 0).sum()) < 9
    ready = prepared(regularizer="growl", strength=20.0)
    optimizer = ready.optimizer(torch.optim.SGD, lr=0.05)
    assert float(ready.regularizer()) == 0.0
    train(ready, optimizer, 20)
    assert any(bool((weights(ready, layer).norm(dim=1) == 0).any()) for layer in CLUSTERS)


def test_balanced_clusters_have_one_size() -> None:
    (summary,) = (each["cross_domain_share"]["layers"] for each in prepared(balanced=True).convert().report.passes)
    for found in summary.values():
        sizes = [sum(pair) for pair in zip(*found["sizes"].values(), strict=True)]
        assert max(sizes) - min(sizes) <= 1
        assert found["balance"] == pytest.approx(found["channels"] / found["clusters"] / max(sizes))
        assert 0 <= found["channels_in_common"] <= found["channels"]


def test_clusters_of_another_plan_are_refused() -> None:
    state = tied().state_dict()
    state["clusters"] = torch.zeros_like(state["clusters"])
    with pytest.raises(gz.WeightsError, match=r"layer 'conv2': the loaded state has 1 clusters, the plan 5"):
        prepared().load_state_dict(state)
    state["clusters"][12:] = -1
    state["clusters"][:5] = torch.arange(5)
    with pytest.raises(gz.WeightsError, match="some layers only"):
        prepared().load_state_dict(state)


def test_the_same_seed_gives_the_same_models() -> None:
    def trained() -> dict[str, Tensor]:
        ready = prepared()
        for _ in ready.steps():
            train(ready, ready.optimizer(torch.optim.Adam, lr=1e-3))
        return ready.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_like_channels_of_both_domains_share_a_cluster() -> None:
    """Of one network given twice every channel meets its own copy, and nothing changes."""
    twins = {"rgb": network(0), "depth": network(0)}
    data = dict.fromkeys(twins, DATA["depth"])
    plan = gz.Plan([gz.CrossDomainShare(clusters={"conv2": 6})])
    compiled = gz.compile(twins, plan, {name: (data[name][0],) for name in twins}, calibration=data)
    (summary,) = (each["cross_domain_share"]["layers"]["conv2"] for each in compiled.report.passes)
    assert summary["common"] == 6
    assert summary["sizes"] == {"rgb": [1] * 6, "depth": [1] * 6}
    assert compiled.report.drift is not None
    assert compiled.report.drift < 1e-12


# ------------------------------------------------------------------------------------------------ the result


@pytest.mark.parametrize("mode", [True, False])
def test_the_tied_models_and_the_converted_ones_agree(mode: bool) -> None:
    ready = tied()
    train(ready, ready.optimizer(torch.optim.Adam, lr=1e-2))
    ready.train(mode)
    expected = copy.deepcopy(ready)(**inputs(1))
    module = ready.convert().module.train(mode)
    for name, found in module(**inputs(1)).items():
        assert float((found - expected[name]).detach().abs().max()) < 1e-9


def test_shared_weights_are_stored_once_and_read_by_slices() -> None:
    compiled = one_shot()
    tasks = {name: compiled.task(name) for name in ("rgb", "depth")}
    for layer, shape in (("conv2", (8, 5, 3, 3)), ("fc1", (12, 16))):
        held = [dict(task.named_parameters())[f"{layer}.weight"] for task in tasks.values()]
        assert held[0] is held[1]
        assert held[0].shape == shape
    own = [dict(task.named_parameters())["conv2.bias"] for task in tasks.values()]
    assert own[0] is not own[1]
    kept = 6 * (3 + 1) * 9 + 8 * 5 * 9 + 12 * 16 + 2 * 12 * 4
    norms = 2 * 6
    held_once = [each.numel() for name, each in compiled.module.named_parameters() if name.endswith("weight")]
    assert sum(held_once) == kept + norms


def test_each_model_multiplies_for_the_clusters_that_it_uses() -> None:
    compiled = one_shot()
    layers = compiled.report.passes[0]["cross_domain_share"]["layers"]
    used = {
        task: {name: found["private"][task] + found["common"] for name, found in layers.items()} for task in EXAMPLE
    }
    for task, channels in (("rgb", 3), ("depth", 1)):
        macs = 64 * 6 * channels * 9 + 16 * 8 * used[task]["conv2"] * 9 + 12 * used[task]["fc1"] + 4 * 12
        assert gz.cost(compiled.task(task), EXAMPLE[task]).macs == macs
    assert compiled.report.after.macs < compiled.report.before.macs


def test_the_result_can_be_trained_and_loaded() -> None:
    module = copy.deepcopy(one_shot().module).train()
    out = module(**inputs())
    sum(each.square().mean() for each in out.values()).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    module.load_state_dict(module.state_dict())


def test_joint_file_and_files_by_task_store_shared_weights_once(tmp_path: Path) -> None:
    """`fc1` is 32 channels wide in each model, 40 numbers each: more than what is folded for being small."""
    given = {name: network(seed, channels, hidden=40).float() for seed, (name, channels) in enumerate(CHANNELS.items())}
    data = {name: [batch.float() for batch in each] for name, each in DATA.items()}
    example = {name: (each[0],) for name, each in data.items()}
    compiled = gz.compile(given, gz.Plan([gz.CrossDomainShare(clusters={"fc1": 20})]), example, calibration=data)
    (used,) = (each["cross_domain_share"]["layers"]["fc1"] for each in compiled.report.passes)
    assert min(used["private"].values()) > 0
    report = compiled.export(tmp_path / "joint.onnx")
    assert report.verified
    assert shapes(tmp_path / "joint.onnx").count([40, 20]) == 1
    compiled.export(tmp_path / "tasks", per_task=True)
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == {"rgb.onnx", "depth.onnx", "weights.data"}
    for task in CHANNELS:
        assert shapes(tmp_path / "tasks" / f"{task}.onnx").count([40, 20]) == 1
    parameters = 4 * sum(each.numel() for each in compiled.module.parameters())
    indices = 8 * sum(each.numel() for each in compiled.module.buffers() if each.dtype == torch.int64)
    assert (tmp_path / "tasks" / "weights.data").stat().st_size < parameters + indices + 64 * 20


def shapes(path: Path) -> list[list[int]]:
    return [list(each.dims) for each in onnx.load(path, load_external_data=False).graph.initializer]


def test_save_and_load(tmp_path: Path) -> None:
    compiled = one_shot()
    compiled.save(tmp_path / "pair.graphzip")
    loaded = gz.load(tmp_path / "pair.graphzip")
    expected = compiled.module.eval()(**inputs())
    assert all(torch.equal(found, expected[name]) for name, found in loaded.module(**inputs()).items())
    names = "rgb.fc1.weight", "depth.fc1.weight"
    held = dict(loaded.module.named_parameters(remove_duplicate=False))
    assert held[names[0]] is held[names[1]]


def test_the_users_models_stay_as_they_are() -> None:
    given = models()
    before = {name: copy.deepcopy(model.state_dict()) for name, model in given.items()}
    plan = gz.Plan([gz.CrossDomainShare(clusters=CLUSTERS)])
    gz.compile(given, plan, EXAMPLE, calibration=DATA)
    for name, model in given.items():
        assert all(torch.equal(each, before[name][key]) for key, each in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_prepared_model_is_not_watched_once_there_are_clusters() -> None:
    assert not any(module._forward_pre_hooks for module in tied().modules())


class Sequence(nn.Module):
    """A convolution over time and a linear layer on every position."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 6, 3), nn.Conv1d(6, 6, 3)
        self.third, self.head = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu()).relu().transpose(1, 2)
        found: Tensor = self.head(self.third(y).relu())
        return found


def test_one_dimension_and_linear_layers_on_positions() -> None:
    pair = {"a": Sequence(0).double(), "b": Sequence(1).double()}
    x = torch.randn(8, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = {"a": [x], "b": [x.flip(2)]}
    ready = gz.prepare(
        pair, gz.Plan([gz.CrossDomainShare(clusters=0.5)]), {n: (d[0],) for n, d in data.items()}, calibration=data
    )
    for stage in ready.steps():
        if stage == "finetune":
            expected = ready(a=x, b=x)
    compiled = ready.convert()
    assert all(float((f - expected[n]).detach().abs().max()) < 1e-9 for n, f in compiled.module(a=x, b=x).items())
    assert [(group.name, group.before, group.after) for group in compiled.report.groups] == [
        ("second", 12, 6),
        ("third", 12, 6),
    ]


# ------------------------------------------------------------------------------------------------ several processes


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["centres", "fitted"])
def test_data_parallel_training(weights: str, tmp_path: Path) -> None:
    """Two processes that see different data agree on clusters, which stay together exactly, and on all parameters."""
    worker = Path(__file__).parents[2] / "support" / "workers" / "domain_worker.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, worker, tmp_path, weights]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["clusters"] == second["clusters"]
    assert first["deviation"] == second["deviation"] == 0.0
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name
