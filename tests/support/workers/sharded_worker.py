"""One process of the test of training that is spread over processes: trains every case and saves what it ends with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import domain_pairs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import graphzip as gz

STEPS, BATCH = 4, 8


def network(seed: int = 0) -> nn.Module:
    """In eval mode, so that the gradient of a batch is the mean of those of its parts; sizes that cannot be halved."""
    torch.manual_seed(seed)
    convs = nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 7, 3), nn.ReLU()
    return nn.Sequential(*convs, nn.ConvTranspose2d(7, 5, 2), nn.Flatten(), nn.Linear(125, 3)).double().eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(STEPS, BATCH, 3, 8, 8, dtype=torch.float64, generator=generator))


def place() -> tuple[int, int]:
    """The number of this process, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@dataclass(frozen=True)
class Case:
    """A plan, and the optimizer that it is trained with."""

    plan: Callable[[], gz.Plan]
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01})

    def prepared(self, seed: int = 0) -> gz.Prepared:
        plan = self.plan()
        if any(options.joins for options in plan.passes):
            rank, world = place()
            own = {name: [batch.chunk(world)[rank] for batch in each] for name, each in domain_pairs.DATA.items()}
            return gz.prepare(domain_pairs.models(), plan, domain_pairs.EXAMPLE, calibration=own)
        return gz.prepare(network(seed), plan, (batches()[0],))

    def bound(self, ready: gz.Prepared) -> torch.optim.Optimizer:
        return ready.optimizer(self.optimizer, steps=STEPS, **self.options)


ADAM = {"lr": 0.01}
CASES = {
    "csgd": Case(lambda: gz.Plan([gz.ClusterMerge(keep=0.5, strength=2.0)])),
    "auto": Case(lambda: gz.Plan([gz.ClusterMerge(keep=0.5, strength="auto")]), torch.optim.AdamW, ADAM),
    "gradient": Case(lambda: gz.Plan([gz.ClusterMerge(keep=0.4, strength=0.5, pull="gradient")])),
    "twice": Case(lambda: gz.Plan([gz.ClusterMerge(keep=0.5, strength=1.0), gz.PruneChannels(keep=0.7)])),
    "lasso": Case(lambda: gz.Plan([gz.PruneChannels(keep=0.5, regularizer="lasso", strength=0.1)])),
    "scales": Case(
        lambda: gz.Plan([gz.PruneChannels(keep={"0": 0.5}, regularizer="bn_scale", criterion="bn_scale", strength=0.1)])
    ),
    "growing": Case(lambda: gz.Plan([gz.PruneChannels(keep=0.5, regularizer="growing", strength=1.0)])),
    "atoms": Case(lambda: gz.Plan([gz.AtomFactorize(atoms=4)]), torch.optim.Adam, ADAM),
    "slices": Case(lambda: gz.Plan([gz.SliceGenerate(force=True)]), torch.optim.Adam, ADAM),
    "growl": Case(
        lambda: gz.Plan([gz.CrossDomainShare(clusters=domain_pairs.CLUSTERS, regularizer="growl", strength=0.01)])
    ),
}


def sharded(model: nn.Module) -> nn.Module:
    """Layer by layer, and what is left."""
    for layer in [each for each in model.modules() if [*each.parameters(recurse=False)]]:
        fully_shard(layer)
    return fully_shard(model)


def step(ready: gz.Prepared, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """On this process's part of a batch."""
    rank, world = place()
    if ready.tasks:
        parts = {name: each[number % 3].chunk(world)[rank] for name, each in domain_pairs.DATA.items()}
        loss = torch.stack([(out - 1).square().mean() for out in model(**parts).values()]).sum()
    else:
        loss = (model(batches()[number].chunk(world)[rank]) - 1).square().mean()
    optimizer.zero_grad()
    (loss + ready.regularizer()).backward()
    optimizer.step()


def spread(ready: gz.Prepared, how: str) -> nn.Module:
    """What is called in training."""
    if how == "fsdp":
        sharded(ready.model)
    return DistributedDataParallel(ready) if how == "ddp" else ready


def trained(case: Case, how: str) -> dict[str, Any]:
    """What a training ends with: numbers that were told on the way, and the weights of the result."""
    ready, told = case.prepared(), []
    ready.eval()
    for _ in ready.steps():
        model = spread(ready, how)
        optimizer = case.bound(ready)
        for number in range(STEPS):
            step(ready, model, optimizer, number)
            told += [ready.deviation(), ready.residual(), float(ready.regularizer().detach())]
        with torch.no_grad():
            model(**{name: each[0] for name, each in domain_pairs.DATA.items()}) if ready.tasks else model(batches()[0])
        ready.pull_(0.5)
        told.append(ready.deviation())
    result = ready.convert()
    return {"told": told, "state": result.module.state_dict(), "steps": ready.history[-1].step}


def zipped(how: str) -> dict[str, Any]:
    """A model that was zipped, trained as any other."""
    nets = {"a": network(0), "b": network(1)}
    rank, world = place()
    data = {name: batches()[:1][rank::world] for name in nets}
    zipped = gz.compile(nets, gz.Plan([gz.Zip()]), dict.fromkeys(nets, (batches()[0],)), calibration=data).module
    model: nn.Module = (
        fully_shard(zipped) if how == "fsdp" else DistributedDataParallel(zipped) if how == "ddp" else zipped
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches():
        part = batch.chunk(world)[rank]
        optimizer.zero_grad()
        torch.stack([(out - 1).square().mean() for out in model(a=part, b=part).values()]).sum().backward()
        optimizer.step()
    return {"state": {name: gathered(value) for name, value in zipped.state_dict().items()}}


def gathered(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def saved(folder: Path, how: str, case: Case) -> None:
    """Half of a training, whose checkpoint every process writes its part of."""
    ready = case.prepared()
    model, optimizer = spread(ready, how), case.bound(ready)
    for number in range(STEPS // 2):
        step(ready, model, optimizer, number)
    state, moments = get_state_dict(ready, optimizer)
    dcp.save({"model": state, "optimizer": moments}, checkpoint_id=folder)


def resumed(folder: Path, how: str, case: Case) -> dict[str, Any]:
    """The other half, begun by a model with weights of its own, which would have been clustered in another way."""
    ready = case.prepared(seed=9)
    model, optimizer = spread(ready, how), case.bound(ready)
    state, moments = get_state_dict(ready, optimizer)
    found = {"model": state, "optimizer": moments}
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(ready, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    for number in range(STEPS // 2, STEPS):
        step(ready, model, optimizer, number)
    return {"told": [ready.deviation()], "clusters": ready.clusters, "state": ready.convert().module.state_dict()}


def apart() -> str:
    """What is said where processes have weights, and so clusters, of their own."""
    ready = CASES["csgd"].prepared(seed=dist.get_rank())
    sharded(ready.model)
    try:
        CASES["csgd"].bound(ready)
    except gz.GraphZipError as error:
        return str(error)
    return "nothing"


def done(folder: Path, task: str) -> Any:
    """`csgd fsdp`: a case, and how it is spread; or `csgd resumed`, `zip ddp`, `apart`."""
    name, _, how = task.partition(" ")
    if name == "apart":
        return apart()
    if name == "zip":
        return zipped(how)
    if how == "resumed":
        saved(folder / name, "fsdp", CASES[name])
        return resumed(folder / name, "fsdp", CASES[name])
    return trained(CASES[name], how)


def main(folder: Path, tasks: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {task: done(folder, task) for task in tasks.split(",")}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
