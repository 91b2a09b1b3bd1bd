"""Models, plans and training steps for the tests of pickling; other processes import them from here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import graphzip as gz

BATCH = 4


class Residual(nn.Module):
    """Norms, a shortcut, a dropout, a buffer that is not saved, a tied weight, and a layer read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.back, self.drop = nn.Conv2d(12, 8, 3, padding=1), nn.Dropout(0.2)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 4)
        self.register_buffer("scale", torch.rand(8) + 1, persistent=False)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.back(self.inner(x))
        y = self.drop(x.mean((2, 3)) * self.scale)
        return self.head(self.second(self.first(y).relu()))


class Auxiliary(Residual):
    """Gives more in training than in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return (y, self.aux(x.mean((2, 3)).repeat(1, 3)[:, :8])) if self.training else y


def network(seed: int = 0, kind: type[nn.Module] = Residual) -> nn.Module:
    torch.manual_seed(seed)
    model = kind().double()
    for _ in range(2):
        model(torch.randn(8, 3, 8, 8, dtype=torch.float64))
    return model


def batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=generator) for _ in range(3)]


@dataclass(frozen=True)
class Case:
    """How a model is prepared: of one model, or of several by task."""

    passes: list[Any]
    tasks: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[[int], nn.Module] = network

    def prepared(self) -> gz.Prepared:
        plan = gz.Plan(self.passes)
        if not self.tasks:
            return gz.prepare(self.make(0), plan, (batches()[0],), **{"calibration": batches(1), **self.options})
        models = {task: self.make(number) for number, task in enumerate(self.tasks)}
        data = {task: batches(number + 1) for number, task in enumerate(self.tasks)}
        return gz.prepare(models, plan, {task: (batches()[0],) for task in self.tasks}, calibration=data)

    def inputs(self, number: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of a call."""
        if not self.tasks:
            return (batches()[number],), {}
        return (), {task: batches(at)[number] for at, task in enumerate(self.tasks)}


def inner_model(seed: int) -> nn.Module:
    """A model whose part `1` is to be compiled."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 3, 1), network(seed), nn.Linear(4, 2)).double()


CASES: dict[str, Case] = {
    "cluster_merge": Case([gz.ClusterMerge(keep=0.5, exclude=["head*"])]),
    "data": Case([gz.ClusterMerge(keep=0.5, compensate="data")]),
    "both_forms": Case([gz.ClusterMerge(keep=0.5)], options={"mode": "train"}, make=lambda n: network(n, Auxiliary)),
    "scope": Case([gz.ClusterMerge(keep=0.5)], options={"scope": "1"}, make=inner_model),
    "prune": Case([gz.PruneChannels(keep=0.5)]),
    "minimize": Case([gz.Minimize()]),
    "low_rank": Case([gz.LowRank(rank=0.25)]),
    "fold": Case([gz.FoldBatchNorm()], make=lambda n: network(n).eval()),
    "atom": Case([gz.AtomFactorize(force=True)]),
    "slice": Case([gz.SliceGenerate(force=True)]),
    "merge_then_slice": Case([gz.ClusterMerge(keep=0.5), gz.SliceGenerate(force=True)]),
    "zip": Case([gz.Zip()], tasks=("a", "b")),
    "share": Case([gz.CrossDomainShare(exclude=["first", "second"])], tasks=("a", "b")),
}


def train(prepared: gz.Prepared, case: Case, model: nn.Module | None = None, state: Any = None) -> Any:
    """Three steps with an optimizer, which begins in `state` where one is given; the state that it ends in."""
    optimizer = prepared.optimizer(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-4)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    torch.manual_seed(3)
    for number in range(3):
        args, kwargs = case.inputs(number)
        loss = total((model or prepared)(*args, **kwargs)) + prepared.regularizer()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def total(outputs: Any) -> Tensor:
    return torch.stack([(leaf - 1).square().mean() for leaf in leaves(outputs)]).sum()


def leaves(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        for each in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from leaves(each)


def observed(module: nn.Module, case: Case) -> dict[str, Any]:
    """All that a module is and does: its state in order, and what it computes and learns in either mode."""
    twin = copy.deepcopy(module)
    found: dict[str, Any] = {
        "names": [name for name, _ in twin.named_modules(remove_duplicate=False)],
        "modes": [inner.training for inner in module.modules()],
        "parameters": {name: (p, p.requires_grad) for name, p in twin.named_parameters(remove_duplicate=False)},
        "buffers": dict(twin.named_buffers()),
        "saved": list(twin.state_dict()),
        "distinct": [name for name, _ in twin.named_parameters()],
    }
    found = copy.deepcopy(found)
    args, kwargs = case.inputs()
    for training in (False, True):
        twin.train(training)
        torch.manual_seed(5)
        outputs = twin(*args, **kwargs)
        total(outputs).backward()
        found[f"outputs in {training}"] = [leaf.detach() for leaf in leaves(outputs)]
        found[f"gradients in {training}"] = {name: p.grad for name, p in twin.named_parameters()}
    found["after"] = twin.state_dict()
    return found
