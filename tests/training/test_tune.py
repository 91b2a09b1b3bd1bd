"""Tuning: a slim model comes closer to the original on data that it has not seen, and never goes farther away."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nets import Net
from process_state import changed, snapshot
from torch import Tensor, nn

import graphzip as gz
from graphzip.calls import Signature
from graphzip.training.tune import divided

HALF = gz.Plan([gz.ClusterMerge(keep=0.5)])


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)
    )


def choosing() -> nn.Module:
    """The same in every run, so that its choices differ from sample to sample."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(lambda m, x: m.net(x).argmax(1).float(), net=net())


def data(count: int = 8) -> list[Tensor]:
    return [torch.randn(32, 6) for _ in range(count)]


def distance(model: nn.Module, compiled: gz.Compiled, *x: Tensor) -> float:
    with torch.no_grad():
        wanted, given = copy.deepcopy(model).eval()(*x), copy.deepcopy(compiled.module).eval()(*x)
    return float((wanted - given).double().square().mean() / wanted.double().var())


def compiled_of(model: nn.Module, batches: list[Any], tune: Any = True, **options: Any) -> gz.Compiled:
    first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    return gz.compile(model, HALF, first, calibration=batches, tune=tune, **options)


def test_outputs_come_closer_on_samples_that_were_not_seen() -> None:
    model, batches, unseen = net(), data(), torch.randn(500, 6)
    before = copy.deepcopy(model.state_dict())
    plain = gz.compile(model, HALF, (batches[0],), calibration=batches)
    tuned = compiled_of(model, batches, gz.Tune(epochs=40, rate=3e-3))
    assert distance(model, tuned, unseen) < 0.8 * distance(model, plain, unseen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert tuned.module.training == model.training
    found = tuned.report.tuning
    assert found is not None
    assert (found.samples, found.held_out) == (224, 32)
    assert 0 < found.after < found.before
    text = f"tuned for {found.epoch} epochs over 224 samples: on 32 others the outputs are off by "
    assert text in str(tuned.report)
    assert tuned.report.to_dict()["tuning"]["epoch"] == found.epoch
    assert type(tuned.report).from_dict(tuned.report.to_dict()) == tuned.report
    assert plain.report.tuning is None


def test_what_stays_is_what_was_judged_an_average_that_falls_evenly(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "graphzip.training.tune")
    model, batches = net(), data()
    options = gz.Tune(epochs=16, rate=3e-2, patience=16)
    compiled = compiled_of(model, batches, options)
    found = compiled.report.tuning
    assert found is not None
    signatures = {"": Signature.of(model, gz.trace(model.eval(), (batches[0],)).call)}
    (held_out,) = divided({"": batches}, signatures, options, splits=True, seed=0).judging[""]
    outputs = [copy.deepcopy(each).eval()(held_out) for each in (model, compiled.module)]
    every = model(torch.cat(batches))
    loss = (outputs[0] - outputs[1]).square().mean() / every.var(correction=0)
    assert float(loss.detach()) == pytest.approx(found.after, rel=1e-4)
    told = [float(match[1]) for match in re.finditer(r"epoch \d+, loss (\S+)", caplog.text)]
    half = told[len(told) // 2 :]
    assert all(later < 1.05 * earlier for earlier, later in itertools.pairwise(half))


def test_what_is_worse_is_not_kept() -> None:
    model, batches = net(), data()
    wild = compiled_of(model, batches, gz.Tune(epochs=2, rate=10.0)).report.tuning
    assert wild is not None
    assert (wild.epoch, wild.after) == (0, wild.before)
    compiled = compiled_of(model, batches, gz.Tune(epochs=2, rate=10.0))
    assert "tuning gained nothing on 32 samples that were held out" in str(compiled.report)


def test_the_file_and_the_archive_have_the_tuned_weights(tmp_path: Any) -> None:
    model, batches = net(), data()
    compiled = compiled_of(model, batches, gz.Tune(epochs=5, rate=3e-3))
    compiled.save(tmp_path / "slim.graphzip")
    assert compiled.export(tmp_path / "slim.onnx").verified
    again = gz.load(tmp_path / "slim.graphzip")
    x = torch.randn(4, 6)
    assert torch.equal(again.module(x), copy.deepcopy(compiled.module).eval()(x))
    assert again.report.tuning == compiled.report.tuning


def test_a_seed_gives_the_same_weights_and_the_process_stays_as_it_was() -> None:
    model, batches = net(), data()
    for each in model.parameters():
        each.requires_grad_(False)
    compiled_of(model, batches, 1)
    before = snapshot()
    both = [compiled_of(model, batches, 3, seed=7).module.state_dict() for _ in range(2)]
    assert not changed(before, snapshot())
    assert all(torch.equal(value, both[1][name]) for name, value in both[0].items())
    other = compiled_of(model, batches, 3, seed=8).module
    assert any(not torch.equal(value, both[0][name]) for name, value in other.state_dict().items())
    assert not any(each.requires_grad or each.grad is not None for each in other.parameters())


def test_it_ends_where_it_is_stopped() -> None:
    model, batches = net(), data()
    compiled_of(model, batches, 1)
    before, weights = snapshot(), copy.deepcopy(model.state_dict())

    def stop(done: int, everything: int, text: str) -> None:
        if "tuning" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled_of(model, batches, gz.Tune(), progress=stop)
    assert not changed(before, snapshot())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_progress_and_augmentation_are_called() -> None:
    said: list[tuple[int, int, str]] = []
    seen: list[tuple[int, ...]] = []

    def augment(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x + 0.1 * torch.randn_like(x)

    options = gz.Tune(epochs=2, batch=50, augment=augment)
    compiled_of(net(), data(), options, progress=lambda *told: said.append(told))
    tuning = [each for each in said if each[2].startswith("tuning")]
    assert [each[:2] for each in tuning] == [(1, 2), (2, 2)]
    assert "on held-out samples" in tuning[0][2]
    assert seen == 2 * [(50, 6), (50, 6), (50, 6), (50, 6), (24, 6)] or sorted(seen) == sorted(
        2 * [*4 * [(50, 6)], (24, 6)]
    )


@pytest.mark.parametrize("given", [None, torch.zeros(4, 5)])
def test_augmentation_that_gives_no_inputs(given: Any) -> None:
    with pytest.raises(gz.PlanError, match=r"tune\.augment: the model does not take what it gives \("):
        compiled_of(net(), data(), gz.Tune(epochs=1, augment=lambda x: given))


def test_it_ends_when_nothing_gets_better() -> None:
    said: list[tuple[int, int, str]] = []
    options = gz.Tune(epochs=50, rate=10.0, patience=2)
    compiled_of(net(), data(2), options, progress=lambda *told: said.append(told))
    assert [done for done, _, text in said if text.startswith("tuning")] == [1, 2]


# --- models of all kinds ----------------------------------------------------------------------------------------------


class Words(nn.Module):
    """Integers and floats in, a dictionary out, one of whose entries is made of integers; weights are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.mix = nn.Linear(12 + 2, 16)
        self.back = nn.Linear(16, 12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor, extra: Tensor) -> dict[str, Any]:
        hidden = torch.cat([self.embed(words).mean(1), extra], 1)
        features = self.back(self.mix(hidden).relu())
        return {"logits": self.head(features), "features": (features, words.sum(1))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_several_inputs_and_outputs_of_any_type(dtype: torch.dtype) -> None:
    model = Words().to(dtype).eval()
    batches = [(torch.randint(11, (16, 5)), torch.randn(16, 2).to(dtype)) for _ in range(6)]
    plan = gz.Plan([gz.ClusterMerge(keep={"mix": 0.5})])
    compiled = gz.compile(model, plan, batches[0], calibration=batches, tune=gz.Tune(epochs=15, rate=3e-3))
    assert compiled.report.tuning is not None
    assert compiled.report.tuning.after < compiled.report.tuning.before
    module = compiled.module
    assert {each.dtype for each in module.parameters()} == {dtype}
    assert module.get_submodule("head").weight is module.get_submodule("embed").weight


def test_the_tuned_form_of_a_model_that_differs_in_training_is_that_of_eval() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.extra = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Any:
            x = self.body(x).tanh()
            return (self.head(x), self.extra(x)) if self.training else self.head(x)

    model = Twice().train()
    compiled = compiled_of(model, data(), gz.Tune(epochs=10, rate=3e-3), mode="train")
    assert compiled.report.tuning is not None
    assert compiled.report.tuning.after < compiled.report.tuning.before
    assert compiled.module.training
    assert len(compiled.module(torch.randn(2, 6))) == 2


def test_several_models_are_tuned_together() -> None:
    nets = {name: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).eval() for name in ("one", "other")}
    batches = {name: data() for name in nets}
    inputs = {name: (each[0],) for name, each in batches.items()}
    compiled = gz.compile(
        nets, gz.Plan([gz.Zip(share=1.0)]), inputs, calibration=batches, tune=gz.Tune(epochs=20, rate=3e-3)
    )
    found = compiled.report.tuning
    assert found is not None
    assert found.after < found.before
    assert (found.samples, found.held_out) == (448, 64)
    one, other = (compiled.task(name).get_submodule("0").weight for name in nets)
    assert one is other


def test_a_part_of_a_model_is_tuned_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 6), net(), nn.Linear(3, 2)).eval()
    compiled = compiled_of(model, data(), gz.Tune(epochs=10, rate=3e-3), scope="1")
    assert compiled.report.tuning is not None
    assert compiled.report.tuning.after < compiled.report.tuning.before
    for name in ("0.weight", "2.bias"):
        assert torch.equal(compiled.module.state_dict()[name], model.state_dict()[name])
    assert not torch.equal(compiled.module.get_submodule("1.5").weight, model.get_submodule("1.5").weight)


def test_batches_of_a_model_with_a_fixed_one_stay_whole() -> None:
    model = Net(lambda m, x: m.last(m.first(x).tanh().reshape(32, 16)), first=nn.Linear(6, 16), last=nn.Linear(16, 3))
    compiled = compiled_of(model.eval(), data(5), gz.Tune(epochs=10, rate=3e-3, batch=4))
    assert compiled.report.tuning is not None
    assert (compiled.report.tuning.samples, compiled.report.tuning.held_out) == (128, 32)


def test_outputs_that_do_not_matter_are_left_out() -> None:
    model = Net(lambda m, x: {"wild": m.wild(x), "net": m.net(x)}, net=net(), wild=nn.Linear(6, 2)).eval()
    compiled = compiled_of(model, data(), gz.Tune(epochs=10, rate=3e-3), outputs="net")
    assert compiled.report.tuning is not None
    assert compiled.report.tuning.after < compiled.report.tuning.before


def test_infinite_outputs_are_left_out() -> None:
    mask = torch.tensor([0.0, -torch.inf, 0.0])
    model = Net(lambda m, x: m.net(x) + mask, net=net()).eval()
    compiled = compiled_of(model, data(), gz.Tune(epochs=10, rate=3e-3))
    assert compiled.report.tuning is not None
    assert compiled.report.tuning.after < compiled.report.tuning.before


def test_tuning_a_model_that_is_trained_in_between() -> None:
    model, batches = net(), data()
    prepared = gz.prepare(model, HALF, (batches[0],), calibration=batches, tune=gz.Tune(epochs=10, rate=3e-3))
    assert copy.deepcopy(prepared).convert().report.tuning == prepared.convert().report.tuning


def test_labels_stay_with_their_samples() -> None:
    x, labels = torch.randn(192, 6), torch.arange(192)
    found = divided(
        {"": list(zip(x.split(32), labels.split(32), strict=True))}, {"": Signature(1)}, gz.Tune(), splits=True, seed=0
    )
    for part in (found.training, found.judging):
        assert all(torch.equal(x[numbers], rows) for rows, numbers in part[""])
    compiled = gz.compile(
        net(),
        gz.Plan([gz.PruneChannels(criterion="taylor")]),
        (x[:2],),
        calibration=list(zip(x.split(32), (labels % 3).split(32), strict=True)),
        loss=torch.nn.functional.cross_entropy,
        tune=gz.Tune(epochs=5, rate=3e-3),
    )
    assert compiled.report.tuning is not None
    assert compiled.report.tuning.after < compiled.report.tuning.before


def test_samples_are_held_out_at_random_and_once() -> None:
    batches = [torch.arange(32.0 * start, 32 * (start + 1)).reshape(32, 1) for start in range(3)]
    found = divided(
        {"": [(each, 1) for each in batches]}, {"": Signature(1)}, gz.Tune(held_out=0.25), splits=True, seed=0
    )
    held, left = (torch.cat([x for x, _ in part[""]]).flatten() for part in (found.judging, found.training))
    assert sorted([*held.tolist(), *left.tolist()]) == list(range(96))
    assert len(held) == 24
    assert len(set((held // 32).tolist())) == 3
    whole = divided({"": batches}, {"": Signature(1)}, gz.Tune(), splits=False, seed=0)
    assert [len(part[""]) for part in (whole.training, whole.judging)] == [2, 1]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "batches", "tune", "message"),
    [
        (net(), None, True, "tune needs calibration data: pass calibration=, a list of batches, or leave tune out"),
        (net(), [torch.randn(1, 6)], 3, "tune holds out some of calibration, which has one sample; give more of them"),
        (net(), [torch.randn(4, 6)], "yes", "tune: 'yes' says nothing; write True, a number of epochs, or graphzip.T"),
        (net(), [torch.randn(4, 6)], 0, "tune.epochs: 0 is out of range; write an int from 1 to 10000"),
        (
            Net(lambda m, x: m.net(x).argmax(1), net=net()),
            [torch.randn(4, 6)],
            True,
            "tune: the original's outputs are no floating-point numbers that differ on calibration",
        ),
        (
            choosing(),
            [torch.randn(64, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(8)],
            True,
            "tune: no output has a gradient by the model's parameters; leave tune out",
        ),
    ],
    ids=["no data", "one sample", "a word", "no epochs", "integers", "no gradient"],
)
def test_what_cannot_be_tuned_is_refused(model: nn.Module, batches: Any, tune: Any, message: str) -> None:
    model = copy.deepcopy(model).eval()
    with pytest.raises(gz.GraphZipError, match=re.escape(message)):
        gz.compile(model, HALF, (torch.randn(4, 6),), calibration=batches, tune=tune)


@pytest.mark.parametrize(
    "options",
    [{"rate": 0.0}, {"batch": 0}, {"held_out": 1.0}, {"patience": 0}, {"augment": 3}],
    ids=lambda options: next(iter(options)),
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(gz.GraphZipError, match=f"^tune.{next(iter(options))}: "):
        gz.Tune(**options)
