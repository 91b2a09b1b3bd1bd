"""What is computed from calibration data: every pass with every option that reads data, and plans, on a share of it."""

from __future__ import annotations

import os
import signal
import sys
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pass_cases import alike, case_of, network, residual
from torch import Tensor, nn

import graphzip as gz
from graphzip.plan.criteria import CRITERIA
from graphzip_passes.prune import criteria  # noqa: F401 (registers those that graphzip brings)
from graphzip_passes.registry import BUILT_IN
from graphzip_passes.zip import readings

SIZES = (6, 6, 6, 6, 3)
EXAMPLE = (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)),)

Found = dict[str, Any]


def batches(seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Images and classes; the last batch is smaller."""
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 6, 6, generator=random), torch.randint(4, (size,), generator=random)) for size in SIZES
    ]


def loss(outputs: Tensor, classes: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, classes)


def score(module: nn.Module) -> float:
    """Made of the weights alone."""
    return -float(sum(each.detach().double().square().sum() for each in module.parameters()))


def single() -> dict[str, tuple[gz.PassOptions, Callable[[], nn.Module], dict[str, Any]]]:
    """Options for one model, the model, and further arguments."""
    data: dict[str, Any] = {"keep": 0.5, "compensate": "data"}
    found: dict[str, tuple[gz.PassOptions, Callable[[], nn.Module], dict[str, Any]]] = {
        "cluster_merge": (gz.ClusterMerge(keep=0.5), network, {}),
        "cluster_merge activations": (gz.ClusterMerge(features="activations", **data), network, {}),
        "cluster_merge both": (gz.ClusterMerge(features="both", **data), network, {}),
        "drop_blocks": (gz.DropBlocks(keep=1), residual, {}),
        "low_rank": (gz.LowRank(rank=0.25, method="data-svd"), network, {}),
        "low_rank cp": (gz.LowRank(rank=0.25, method="cp-spatial"), network, {}),
        "atom_factorize": (gz.AtomFactorize(atoms=4, force=True, weighted=True), network, {}),
        "slice_generate": (gz.SliceGenerate(slice=(4, 4, 3, 3), code=8, force=True, weighted=True), network, {}),
        "prune_channels": (gz.PruneChannels(criterion="taylor", **data), network, {"loss": loss}),
    }
    for kind in BUILT_IN:
        case = case_of(kind)
        if not case.options.joins:
            found.setdefault(kind, (case.options, case.model, {}))
    for name in sorted(CRITERIA):
        found[f"prune {name}"] = (gz.PruneChannels(keep=0.5, criterion=name), network, {})
        if name in {"taylor", "fisher", "hessian"}:
            found[f"prune {name} loss"] = (gz.PruneChannels(keep=0.5, criterion=name), network, {"loss": loss})
    return found


def several() -> dict[str, gz.PassOptions]:
    """Options for two models."""
    found: dict[str, gz.PassOptions] = {
        "zip": gz.Zip(places=4),
        "cross_domain_share": gz.CrossDomainShare(clusters={"3": 8}, regularizer="simple", pool=(2, 2)),
    }
    return {kind: case_of(kind).options for kind in BUILT_IN if case_of(kind).options.joins} | found


def quick(share: Callable[[list[Any]], list[Any]]) -> Found:
    """What is done most, on one trace."""
    model = gz.trace(network(), EXAMPLE)
    data: dict[str, Any] = {"keep": 0.5, "compensate": "data"}
    passes = [gz.ClusterMerge(keep=0.5), gz.PruneChannels(criterion="taylor", **data)]
    found = {
        each.kind: told(gz.compile(model, gz.Plan([each]), calibration=share(batches()), loss=loss)) for each in passes
    }
    study = gz.WidthStudy(model, calibration=share(batches()))
    losses = {f"{each.group} at {width}": loss for each in study.measure() for width, loss in each.points}
    return found | {"plan": {"plan": study.plan(macs=0.6).to_dict(), "losses": losses}, "zip": told(zipped(share))}


def zipped(share: Callable[[list[Any]], list[Any]]) -> gz.Compiled:
    """Two models that differ; of the samples that changes are tried on there are more than are kept."""
    models, draw = alike(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in models["b"].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    data = {"a": share(batches()), "b": share(batches(3))}
    with unittest.mock.patch.object(readings, "_APART", 60):
        return gz.compile(models, gz.Plan([gz.Zip(places=4)]), {"a": EXAMPLE, "b": EXAMPLE}, calibration=data)


def plans(share: Callable[[list[Any]], list[Any]]) -> Found:
    """Plans for a budget, and what was measured for them."""
    found: Found = {}
    cases: dict[str, dict[str, Any]] = {
        "plan": {},
        "plan thorough": {"effort": "thorough"},
        "plan prune": {"passes": [gz.PruneChannels(compensate="data")]},
        "plan ranks": {"passes": [gz.LowRank(method="data-svd")]},
        "plan score": {"effort": "fast", "evaluate": score},
    }
    for name, options in cases.items():
        study = gz.WidthStudy(network(), EXAMPLE, calibration=share(batches()), **options)
        losses = {f"{each.group} at {width}": loss for each in study.measure() for width, loss in each.points}
        found[name] = {"plan": study.plan(macs=0.6).to_dict(), "losses": losses}
    return found


def everything(share: Callable[[list[Any]], list[Any]]) -> Found:
    """By case the weights of the result and how far its outputs moved."""
    found: Found = {}
    traces = {make: gz.trace(make(), EXAMPLE) for make in (network, residual)}
    for name, (options, make, more) in single().items():
        model = traces.get(make) or gz.trace(make(), EXAMPLE)
        found[name] = told(gz.compile(model, gz.Plan([options]), calibration=share(batches()), **more))
    inputs = {"a": EXAMPLE, "b": EXAMPLE}
    for name, options in several().items():
        data = {"a": share(batches()), "b": share(batches(3))}
        found[name] = told(gz.compile(alike(), gz.Plan([options]), inputs, calibration=data))
    return found | plans(share)


def empty_shares(share: Callable[[list[Any]], list[Any]]) -> Found:
    """With one batch, which is not enough for all."""
    model = gz.trace(network(), EXAMPLE)
    passes = [gz.ClusterMerge(keep=0.5), gz.LowRank(rank=0.25, method="data-svd"), gz.AtomFactorize(force=True)]
    found = {
        f"empty {each.kind}": told(gz.compile(model, gz.Plan([each]), calibration=share(batches()[:1])))
        for each in passes
    }
    inputs, data = {"a": EXAMPLE, "b": EXAMPLE}, {"a": share(batches()[:1]), "b": share(batches(3)[:1])}
    found["empty zip"] = told(gz.compile(alike(), gz.Plan([gz.Zip(places=4)]), inputs, calibration=data))
    study = gz.WidthStudy(model, calibration=share(batches()[:1]))
    study.measure()
    return found | {"empty plan": {"plan": study.plan(macs=0.6).to_dict(), "losses": {}}}


def told(compiled: gz.Compiled) -> Found:
    return {"weights": dict(compiled.module.state_dict()), "drift": compiled.report.drift}


def errors(rank: int) -> dict[str, str]:
    """What is said where ranks do not fit together, by case: the type and the text."""
    plan, data = gz.Plan([gz.ClusterMerge(keep=0.5)]), [batches()[rank][:1]]
    broken = [(torch.full((2, 3, 6, 6), torch.nan),)]
    other = network()
    with torch.no_grad():
        next(other.parameters()).add_(float(rank))

    def fails(work: Callable[[], Any]) -> str:
        try:
            work()
        except gz.GraphZipError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def too_wide() -> Any:
        return gz.compile(network(), plan, EXAMPLE, calibration=[torch.zeros(2, 5, 6, 6)] if rank else data)

    def late() -> Any:
        dist.barrier()
        try:
            with gz.processes(timeout=0.2):
                return gz.compile(network(), plan, EXAMPLE, calibration=data) if rank == 0 else None
        finally:
            dist.barrier()

    def alone() -> Any:
        with gz.processes(alone=True):
            return gz.compile(network(), plan, EXAMPLE, calibration=data) if rank == 0 else None

    return {
        "nan": fails(lambda: gz.compile(network(), plan, EXAMPLE, calibration=broken if rank else data)),
        "shape": fails(too_wide),
        "none": fails(lambda: gz.compile(network(), plan, EXAMPLE, calibration=[])),
        "model": fails(lambda: gz.compile(other, plan, EXAMPLE, calibration=data)),
        "seed": fails(lambda: gz.compile(network(), plan, EXAMPLE, calibration=data, seed=rank)),
        "tune": fails(lambda: gz.compile(network(), plan, EXAMPLE, calibration=data, tune=True)),
        "late": fails(late),
        "alone": fails(alone),
        "after all": fails(lambda: gz.compile(network(), plan, EXAMPLE, calibration=data)),
    }


def measured(rank: int, cache: Path, *, killed: bool) -> Found:
    """A study with a cache, in which the last process is killed after some measurements where that is asked for."""
    counts: list[int] = []

    def told(done: int, of: int, what: str) -> None:
        if what.startswith("measuring"):
            counts.append(of)
            if killed and rank == 1 and done == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    study = gz.WidthStudy(network(), EXAMPLE, calibration=batches()[rank::2], effort="thorough", cache=cache)
    study.measure(told)
    return {"plan": study.plan(macs=0.6).to_dict(), "turns": max(counts, default=0)}


def main(folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)

    def share(data: list[Any]) -> list[Any]:
        return data[rank::size]

    found: Found
    if what == "everything":
        found = {"everything": everything(share)}
    elif what == "quick":
        found = {"quick": quick(share) | empty_shares(share), "errors": errors(rank)}
    else:
        found = measured(rank, folder / "cache.jsonl", killed=what == "killed")
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
