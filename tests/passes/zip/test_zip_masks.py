"""Sparse networks stay sparse while they are zipped and trained between layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphzip as gz

pytestmark = pytest.mark.usefixtures("seeded")


def network(*, sparse: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        for layer in model if sparse else ():
            if isinstance(layer, nn.Linear):
                layer.weight[torch.rand_like(layer.weight) < 0.6] = 0.0
    return model


def zeros(compiled: gz.Compiled, task: str) -> list[float]:
    layers = [layer for layer in compiled.task(task).modules() if isinstance(layer, nn.Linear)]
    return [float((layer.weight == 0).double().mean()) for layer in layers]


def trained(*, sparse: bool, optimizer: Any, steps: int, share: float = 1.0) -> gz.Compiled:
    torch.manual_seed(0)
    nets = {name: network(sparse=sparse) for name in "ab"}
    data = {name: torch.randn(64, 8) for name in nets}
    plan = gz.Plan([gz.Zip(share=share)])
    prepared = gz.prepare(
        nets, plan, {name: (x[:2],) for name, x in data.items()}, calibration={k: [v] for k, v in data.items()}
    )
    for _ in prepared.steps():
        stepping = optimizer(prepared)
        for _ in range(steps):
            loss = sum((each - 1.0).square().mean() for each in prepared(**data).values())
            stepping.zero_grad()
            loss.backward()
            stepping.step()
    return prepared.convert()


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_zeros_survive_the_training(kind: Any, share: float) -> None:
    def own(prepared: gz.Prepared) -> torch.optim.Optimizer:
        return prepared.optimizer(kind, lr=0.01, weight_decay=1e-3)

    once, after = (trained(sparse=True, optimizer=own, steps=steps, share=share) for steps in (0, 5))
    for task in "ab":
        found = zeros(after, task)
        assert min(found) > 0.3
        assert found[-1] == zeros(once, task)[-1]  # the heads, whose masks no partner changes
    heads = [each.task("a").get_submodule("4") for each in (once, after)]
    assert not torch.equal(heads[0].weight, heads[1].weight)


def test_dense_networks_and_other_optimizers_train_all_they_have() -> None:
    dense = trained(sparse=False, optimizer=lambda ready: ready.optimizer(torch.optim.SGD, lr=0.01), steps=3)
    plain = trained(sparse=True, optimizer=lambda ready: torch.optim.Adam(ready.parameters(), 0.01), steps=3)
    assert all(zeros(dense, task) == [0.0, 0.0, 0.0] for task in "ab")
    assert all(max(zeros(plain, task)) < 0.2 for task in "ab")  # units that are never active have no gradient
