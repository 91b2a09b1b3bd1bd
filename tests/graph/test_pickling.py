"""What `pickle`, `torch.save`, `copy` and processes make of results and of prepared models: the same again."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_cases import CASES, Case, observed, train
from spawned_worker import computes, trains
from torch import nn

import graphzip as gz

SUPPORT = Path(__file__).parents[1] / "support"
OTHERS = os.pathsep.join(map(str, (SUPPORT, SUPPORT / "networks", SUPPORT / "workers")))
QUICK = ("cluster_merge", "both_forms", "share")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


WAYS: dict[str, Callable[[Any], Any]] = {"save": saved, "pickle": pickled, "deepcopy": copy.deepcopy, "copy": copy.copy}


def assert_same(one: Any, other: Any, place: str = "") -> None:
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert list(one) == list(other), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}[{number}]")
    else:
        assert one == other, place


@pytest.mark.parametrize("name", EACH)
def test_results_come_back(name: str) -> None:
    case = CASES[name]
    compiled = case.prepared().convert()
    expected = observed(compiled.module, case)
    for way in WAYS.values():
        module = way(compiled.module)
        assert_same(observed(module, case), expected)
        assert_same(observed(pickled(module), case), expected)
        again = way(compiled)
        assert_same(observed(again.module, case), expected)
        assert str(again.report) == str(compiled.report)
        assert again.tasks == compiled.tasks
        assert_same(again.example_inputs, compiled.example_inputs)


@pytest.mark.parametrize("name", EACH)
def test_what_is_prepared_comes_back_and_trains_on(name: str) -> None:
    case = CASES[name]
    for way in (saved, pickled, copy.deepcopy):
        prepared = case.prepared()
        stage = next(prepared.steps())
        state = train(prepared, case)
        twin = way(prepared)
        assert twin.deviation() == prepared.deviation()
        assert len(twin.history) == len(prepared.history)
        results = []
        for each in (prepared, twin):
            train(each, case, state=state)
            for _ in each.steps():
                train(each, case)
            results.append(each.convert())
        assert stage
        assert_same(observed(results[1].module, case), observed(results[0].module, case))
        assert results[1].report.to_dict() == results[0].report.to_dict()


LOADED = """
import os
import sys
import torch

torch.set_num_threads(1)  # as in the process that wrote them: sums are added in the same order
results, prepared, other = sys.argv[1:]
for module, args, kwargs, expected in torch.load(results, weights_only=False):
    torch.testing.assert_close(module.eval()(*args, **kwargs), expected, rtol=0, atol=0)
assert not {"saved_cases", "test_pickling"} & set(sys.modules)
sys.path[:0] = other.split(os.pathsep)
ready, state, optimizer, expected = torch.load(prepared, weights_only=False)
from saved_cases import CASES, Case, observed, train
from spawned_worker import computes, trains
train(ready, CASES["cluster_merge"], state=optimizer)
found = ready.convert().module.state_dict()
assert list(found) == list(expected)
for name, value in found.items():
    torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
"""


def test_another_process_reads_results_without_the_source_of_the_model(tmp_path: Path) -> None:
    results = []
    for name in ("cluster_merge", "both_forms", "atom", "slice", "zip", "share"):
        case = CASES[name]
        module = case.prepared().convert().module
        args, kwargs = case.inputs()
        results.append((module, args, kwargs, copy.deepcopy(module).eval()(*args, **kwargs)))
    torch.save(results, tmp_path / "results.pt")
    case = CASES["cluster_merge"]
    prepared = case.prepared()
    state = train(prepared, case)
    torch.save((prepared, prepared.state_dict(), state, expected_of(prepared, case, state)), tmp_path / "prepared.pt")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "results.pt"), str(tmp_path / "prepared.pt"), OTHERS]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def expected_of(prepared: gz.Prepared, case: Case, state: Any) -> dict[str, Any]:
    """The weights that three more steps and `convert` give."""
    twin = copy.deepcopy(prepared)
    train(twin, case, state=state)
    return dict(twin.convert().module.state_dict())


@pytest.mark.slow
def test_processes_are_sent_modules_and_train_them_together(tmp_path: Path) -> None:
    case = CASES["cluster_merge"]
    module = case.prepared().convert().module
    for number, (work, sent) in enumerate(((computes, module), (trains, module), (trains, case.prepared()))):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.multiprocessing.spawn(work, (sent, folder), nprocs=2)
        found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
        if work is computes:
            torch.testing.assert_close(found, [copy.deepcopy(module).eval()(*case.inputs()[0])] * 2, rtol=0, atol=0)
        else:
            learned = [{name: each[name] for name in each if "running" not in name} for each in found]
            torch.testing.assert_close(*learned, rtol=0, atol=0)


@pytest.mark.parametrize("name", EACH)
def test_symbolic_trace_keeps_the_checks(name: str) -> None:
    case = CASES[name]
    module = case.prepared().convert().module
    args, kwargs = case.inputs()
    for training in (False, True):
        twin = copy.deepcopy(module).train(training)
        traced = torch.fx.symbolic_trace(copy.deepcopy(twin))
        torch.manual_seed(0)
        found = traced(*args, **kwargs)
        torch.manual_seed(0)
        assert_same(found, twin(*args, **kwargs))
        wrong = {task: x[..., :5] for task, x in kwargs.items()}
        with pytest.raises(gz.GraphZipError):
            traced(*(x[..., :5] for x in args), **wrong)


def test_checkpoints_of_the_whole_module_and_its_optimizer(tmp_path: Path) -> None:
    """As Lightning and the Trainer of transformers write them: state, optimizer, schedule, or all of it."""
    case = CASES["cluster_merge"]
    module = case.prepared().convert().module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    wrapped = nn.ModuleDict({"net": module})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def step(net: nn.Module, way: torch.optim.Optimizer) -> None:
        torch.manual_seed(7)
        way.zero_grad()
        net(*case.inputs(1)[0]).square().mean().backward()
        way.step()

    step(module, optimizer)
    checkpoint = {
        "state_dict": wrapped.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "hyper_parameters": {"net": module},
        "whole": (module, optimizer),
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    found = torch.load(tmp_path / "last.ckpt", weights_only=False)
    whole, its_optimizer = found["whole"]
    restored = found["hyper_parameters"]["net"]
    nn.ModuleDict({"net": restored}).load_state_dict(found["state_dict"])
    own = torch.optim.AdamW(restored.parameters(), lr=1.0)
    own.load_state_dict(found["optimizer_states"][0])
    assert restored is whole
    step(whole, its_optimizer)
    step(module, optimizer)
    assert_same(observed(whole, case), observed(module, case))
    average = torch.optim.swa_utils.AveragedModel(module)
    average.update_parameters(module)
    assert_same(average.module.eval()(*case.inputs()[0]), module.eval()(*case.inputs()[0]))
