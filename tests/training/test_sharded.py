"""Training that is spread over processes, by FSDP2 and by DistributedDataParallel, is the training of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import domain_pairs
import numpy as np
import pytest
import sharded_worker
import torch
import torch.distributed as dist
from sharded_worker import CASES, STEPS, batches, network, resumed, sharded, step, trained, zipped
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import graphzip as gz
from graphzip.numeric.sharded import part_of, whole
from graphzip.training.sharding import only_makes_state

WORKER = Path(sharded_worker.__file__)
QUICK = ("csgd fsdp", "csgd ddp", "auto resumed", "apart")
ALL = (*(f"{name} {how}" for name in (*CASES, "zip") for how in ("fsdp", "ddp")), "csgd resumed", "auto resumed")


def run(folder: Path, processes: int, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """What every process ends with."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    given = [*command, str(WORKER), str(folder), ",".join(tasks)]
    done = subprocess.run(given, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def check_as_one(found: list[dict[str, Any]], tasks: tuple[str, ...], folder: Path) -> None:
    """Every process has what one process alone ends with; a checkpoint of theirs goes on in that, too."""
    for task in tasks:
        name, _, how = task.partition(" ")
        if how == "resumed":
            wanted = resumed(folder / name, "alone", CASES[name])
            through = trained(CASES[name], "alone")["told"][3 * (STEPS - 1)]
            assert wanted["told"] == [pytest.approx(through, rel=1e-9)], task
        else:
            wanted = zipped("alone") if name == "zip" else trained(CASES[name], "alone")
        for each in found:
            assert each[task].get("told", []) == pytest.approx(wanted.get("told", []), rel=1e-9, abs=1e-12), task
            assert each[task].get("steps") == wanted.get("steps"), task
            for key, value in wanted["state"].items():
                torch.testing.assert_close(each[task]["state"][key], value, rtol=1e-10, atol=1e-10, msg=f"{task} {key}")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Two of them, sharded and data-parallel, and on from a checkpoint of torch.distributed.checkpoint."""
    found = run(tmp_path, 2, QUICK)
    check_as_one(found, QUICK[:-1], tmp_path)
    for each in found:
        assert each["apart"].startswith("the processes decided different things, for their weights or calibration data")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_everything_that_trains(tmp_path: Path, processes: int) -> None:
    """Of four processes one has nothing of the smallest parameters."""
    check_as_one(run(tmp_path, processes, ALL), ALL, tmp_path)


# --- one process, which is a mesh, too -------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def prepared(plan: gz.Plan | None = None, **given: Any) -> gz.Prepared:
    plan = plan or CASES["csgd"].plan()
    return gz.prepare(network(), plan, (batches()[0],), **given)


def sgd(ready: gz.Prepared) -> torch.optim.Optimizer:
    return ready.optimizer(torch.optim.SGD, lr=0.05)


def test_weights_are_held_once(group: None) -> None:
    """The graph lets go of the whole weights that a process would train a part of; `convert` fetches them."""
    ready = prepared()
    sharded(ready.model)
    sgd(ready)
    traced = ready._progress.traced.module
    assert all(each.is_meta for each in traced.parameters())
    ready.collapse_()
    assert all(each.is_meta for each in traced.parameters())
    assert ready.deviation() == pytest.approx(0.0, abs=1e-25)
    assert not any(each.is_meta for each in ready.convert().module.parameters())


def test_a_step_follows_a_look_at_the_model(group: None) -> None:
    """A run without a backward pass leaves whole copies of parameters, which are none to train."""
    found = []
    for looks in (False, True):
        ready = prepared()
        fully_shard(ready.model)
        optimizer = sgd(ready)
        for number in range(2):
            loss = (ready(batches()[number]) - 1).square().mean()
            loss.backward()
            if looks:
                with torch.no_grad():
                    ready(batches()[0])
            optimizer.step()
            optimizer.zero_grad()
        found.append(ready.deviation())
    assert found[0] == found[1]


def test_a_kernel_of_factors_is_that_of_the_weights_now(group: None) -> None:
    """In eval mode it is kept elsewhere; whole parameters come and go in the same memory here."""
    ready = prepared(CASES["atoms"].plan())
    ready.eval()
    fully_shard(ready.model)
    optimizer = ready.optimizer(torch.optim.SGD, lr=0.5)
    with torch.no_grad():
        before = ready(batches()[0])
    step(ready, ready, optimizer, 0)
    with torch.no_grad():
        after = ready(batches()[0])
    assert not torch.equal(before, after)
    torch.testing.assert_close(ready.convert().module.eval()(batches()[0]), after)


def test_empty_weights_leave_the_clusters(group: None) -> None:
    ready = prepared()
    clusters = ready.clusters.clone()
    ready.to_empty(device="cpu")
    assert torch.equal(ready.clusters, clusters)


def test_the_step_that_makes_a_state_moves_nothing() -> None:
    """That of torch.distributed.checkpoint; a step at a learning rate of zero with gradients is none."""
    ready = prepared(CASES["auto"].plan())
    optimizer = ready.optimizer(torch.optim.AdamW, lr=0.0, steps=4)
    before = {name: value.clone() for name, value in ready.state_dict().items()}
    for each in ready.parameters():
        each.grad = torch.zeros_like(each)
    assert only_makes_state(optimizer)
    optimizer.step(closure=None)
    assert all(torch.equal(value, before[name]) for name, value in ready.state_dict().items())
    assert len(ready.history) == 0
    assert not only_makes_state(optimizer)


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_rates_that_are_zero(rate: Any) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=rate)
    assert only_makes_state(optimizer)
    parameter.grad = torch.ones(2)
    assert not only_makes_state(optimizer)


def test_parts_are_those_of_the_mesh(group: None) -> None:
    mesh = DeviceMesh("cpu", [0])
    tensor = torch.arange(6.0).reshape(3, 2)
    part = part_of(distribute_tensor(tensor, mesh, [Shard(1)]), "weight")
    assert part is not None
    assert (part.dim, part.start, part.stop) == (1, 0, 2)
    copy = distribute_tensor(tensor, mesh, [Replicate()])
    assert part_of(copy, "weight") is None
    assert torch.equal(whole(copy), tensor)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_optimizer_of_before(group: None) -> None:
    ready = prepared()
    optimizer = sgd(ready)
    sharded(ready.model)
    with pytest.raises(gz.GraphZipError, match="made before fully_shard, and would train nothing; make it with"):
        step(ready, ready, optimizer, 0)


def test_a_model_that_is_sharded_already(group: None) -> None:
    model = network()
    fully_shard(model)
    with pytest.raises(gz.TraceError, match="the model is sharded by fully_shard; pass the model before it is"):
        gz.prepare(model, CASES["csgd"].plan(), (batches()[0],))


def test_a_parameter_that_is_spread(group: None) -> None:
    model = network()
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), DeviceMesh("cpu", [0]), [Shard(0)]))
    with pytest.raises(gz.TraceError, match=r"'0.weight' is spread over processes \(a DTensor\)"):
        gz.prepare(model, CASES["csgd"].plan(), (batches()[0],))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stage_that_is_not_sharded_again(group: None, wrapped: bool) -> None:
    """A stage that rewrites a model gives one that is whole, which processes would train each for itself."""
    ready = prepared(CASES["twice"].plan())
    stages = ready.steps()
    next(stages)
    fully_shard(ready if wrapped else ready.model)
    next(stages)
    said = "prepared.model, not on prepared, at" if wrapped else "prepared.model at the beginning of every stage"
    with pytest.raises(gz.GraphZipError, match=said):
        sgd(ready)


def test_a_part_of_a_model_is_not_rewritten(group: None) -> None:
    ready = gz.prepare(nn.Sequential(network()), CASES["csgd"].plan(), (batches()[0],), scope="0")
    sharded(ready.model)
    with pytest.raises(gz.GraphZipError, match="scope='0' is a part of the model, so it is not rewritten there; load"):
        ready.convert()


def test_a_share_of_a_gradient_that_is_spread(group: None) -> None:
    plan = gz.Plan([gz.CrossDomainShare(clusters=domain_pairs.CLUSTERS, scaling="relative")])
    ready = gz.prepare(domain_pairs.models(), plan, domain_pairs.EXAMPLE)
    sharded(ready.model)
    ready(**{name: each[0] for name, each in domain_pairs.DATA.items()})
    with pytest.raises(gz.GraphZipError, match="scaling: 'relative' compares gradients of whole parameters"):
        ready.regularizer()


def test_files_have_whole_weights(group: None, tmp_path: Path) -> None:
    compiled = gz.compile(network(), CASES["csgd"].plan(), (batches()[0],))
    sharded(compiled.module)
    writes: list[Callable[[], Any]] = [
        lambda: compiled.export(tmp_path / "net.onnx"),
        lambda: compiled.save(tmp_path / "net.gz"),
    ]
    for write in writes:
        with pytest.raises(gz.GraphZipError, match=r"the module is spread over processes .* and a file has all of it"):
            write()
    assert [each.name for each in tmp_path.iterdir()] == ["store"]


def test_tensors_that_are_cut_twice(group: None) -> None:
    mesh = DeviceMesh("cpu", np.zeros((1, 1), dtype=np.int64))
    for placements in ([Shard(0), Shard(0)], [Shard(0), Partial()]):
        tensor = DTensor.from_local(torch.ones(4, 2), mesh, placements, run_check=False)
        with pytest.raises(gz.GraphZipError, match=r"weight is spread over processes as .* leave out the other ways"):
            part_of(tensor, "weight")
