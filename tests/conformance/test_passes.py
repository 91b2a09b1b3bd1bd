"""What every pass has to do: those that graphzip brings, and one of a user's own. A new one is here with its line."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ensures import ensures
from own_passes import registered
from pass_cases import PassCase, ZeroSmall, case_of, zero_small
from torch import nn

import graphzip as gz
from graphzip.graph.state import named_state
from graphzip.graph.traced import Traced
from graphzip_passes.base import PASSES, pass_of
from graphzip_passes.registry import BUILT_IN

PLANS = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "plans.md").read_text(encoding="utf-8")
KINDS = [*BUILT_IN, "zero_small"]

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> Iterator[PassCase]:
    with registered(ZeroSmall, zero_small):
        yield case_of(request.param)


def test_a_plan_file_holds_it(case: PassCase, tmp_path: Path) -> None:
    plan = gz.Plan([case.options])
    plan.save(tmp_path / "plan.yaml")
    assert gz.Plan.load(tmp_path / "plan.yaml") == plan
    assert gz.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert gz.Plan.from_dict({"version": 1, "passes": [case.options.kind]}) == gz.Plan([type(case.options)()])


def test_what_it_gives_holds(case: PassCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is sound, names, inputs and outputs are as before, and nothing is lost where nothing should be."""
    seen = ensures(case, monkeypatch)
    model = case.model()
    compiled = case.compile(model)
    (outcome,) = seen
    assert compiled.report.changed
    assert compiled.report.lossless == outcome.lossless
    assert ("not lossless: " in str(compiled.report)) != outcome.lossless
    assert outcome.lossless or outcome.loss in str(compiled.report)
    if outcome.lossless:
        torch.testing.assert_close(case.outputs(compiled.module), case.outputs(model), rtol=1e-4, atol=1e-5)


def test_its_report_is_text_and_json(case: PassCase) -> None:
    report = case.compile(case.model()).report
    assert "parameters" in str(report)
    assert all(str(table) in str(report) for table in report.tables)
    assert [list(each) for each in report.passes] == [[case.options.kind]]
    again = type(report).from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    assert str(again) == str(report)


def test_it_is_saved_and_loaded(case: PassCase, tmp_path: Path) -> None:
    compiled = case.compile(case.model())
    compiled.save(tmp_path / "slim.graphzip")
    if case.options.kind not in BUILT_IN:
        del PASSES[type(case.options)]  # a report is plain data: the pass need not be known where it is read
    loaded = gz.load(tmp_path / "slim.graphzip")
    assert loaded.report == compiled.report
    torch.testing.assert_close(case.outputs(loaded.module), case.outputs(compiled.module))


def trained(prepared: gz.Prepared, case: PassCase, steps: int) -> gz.Prepared:
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.01)
    for _ in range(steps):
        inputs = case.inputs
        out = prepared(**{name: each[0] for name, each in inputs.items()}) if prepared.tasks else prepared(*inputs)
        terms = out.values() if prepared.tasks else [out]
        loss = sum(term.square().mean() for term in terms) + prepared.regularizer()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prepared


def test_it_resumes_from_a_checkpoint(case: PassCase) -> None:
    model = case.model()
    first = trained(case.prepare(model), case, 3)
    second = case.prepare(model, seed=1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.seed = first.seed
    torch.testing.assert_close(second.state_dict(), first.state_dict())
    ready = [trained(each, case, 2).convert() for each in (first, second)]
    if case.options.kind != "cross_domain_share":  # the features of the last batches are not in a checkpoint
        torch.testing.assert_close(case.outputs(ready[0].module), case.outputs(ready[1].module))
    assert ready[0].report.after == ready[1].report.after


def test_it_is_copied_and_pickled_while_it_is_trained(case: PassCase) -> None:
    prepared = trained(case.prepare(case.model()), case, 1)
    twins = [copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))]
    expected = case.outputs(prepared.convert().module)
    for twin in twins:
        torch.testing.assert_close(case.outputs(twin.convert().module), expected)


def snapshot(model: Any) -> Any:
    models = model if isinstance(model, dict) else {"": model}
    state = {name: {key: (id(t), t.clone()) for key, t in named_state(each)} for name, each in models.items()}
    rest = [
        (name, type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for each in models.values()
        for name, module in each.named_modules()
    ]
    return state, rest


def assert_untouched(model: Any, before: Any) -> None:
    state, rest = snapshot(model)
    assert rest == before[1]
    for name, tensors in before[0].items():
        assert [(key, held[0]) for key, held in state[name].items()] == [
            (key, held[0]) for key, held in tensors.items()
        ]
        assert all(torch.equal(state[name][key][1], held[1]) for key, held in tensors.items())


@pytest.mark.parametrize("train", [False, True])
def test_the_users_model_stays_as_it_was(case: PassCase, train: bool) -> None:
    model = case.model()
    before = snapshot(model)
    case.compile(model, **({"train": lambda prepared, stage: trained(prepared, case, 1)} if train else {}))
    assert_untouched(model, before)


@pytest.mark.parametrize("when", ["before it is done", "after it is done"])
def test_an_interrupt_leaves_the_users_model_as_it_was(
    case: PassCase, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = pass_of(case.options, "here")

    def interrupted(*given: Any) -> Any:
        if when == "after it is done":
            known.function(*given)
        raise KeyboardInterrupt

    monkeypatch.setitem(PASSES, type(case.options), replace(known, function=interrupted))
    model = case.model()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        case.compile(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_the_manual_and_the_package_name_it(kind: str) -> None:
    home, _, name = BUILT_IN[kind].partition(":")
    assert f"| `{name}`, `{kind}` |" in PLANS
    options = getattr(gz, name)
    assert (options.kind, options.__doc__ is not None) == (kind, True)
    assert pass_of(options(), "here").function.__module__ == home


def test_a_pass_that_is_in_no_table_yet_is_tried_with_its_defaults() -> None:
    case = case_of("fold_batch_norm")
    assert case.options == gz.FoldBatchNorm()
    assert isinstance(case.model(), nn.Module)
    assert isinstance(case.compile(case.model()).traced, Traced)
