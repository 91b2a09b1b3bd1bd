"""The benchmark of minimisation prunes what it says, keeps zeros, and moves no output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_tools import bench_modules
from torch import Tensor

MODULES = ("minimize", "cifar")


@pytest.fixture(scope="module")
def tool() -> Any:
    for modules in bench_modules(*MODULES):
        yield modules["minimize"]


def data(size: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    made = [(torch.randn(count, *size), torch.arange(count) % 10) for count in (128, 64)]
    return made[0], made[1]


@pytest.mark.parametrize(("net", "size"), [("mlp", (1, 28, 28)), ("convnext", (3, 32, 32))])
def test_cycles_take_out_zeros_and_move_nothing(tool: Any, net: str, size: tuple[int, ...]) -> None:
    make = tool.SUBJECTS[net].make
    subject = tool.Subject(make, lambda *_: data(size), epochs=1, rate=1e-3, decay=1e-4, share=0.9, cycles=2)
    rows = tool.run(subject, Path(), 128)
    assert [row.stored for row in rows] == sorted((row.stored for row in rows), reverse=True)
    assert rows[2].stored < rows[0].stored
    assert rows[2].nonzero < 0.05 * rows[0].nonzero
    assert all(row.moved < 1e-5 for row in rows)
    assert tool.table(net, rows).row_count == 3


def test_the_smallest_weights_go_and_zeros_stay_zero(tool: Any) -> None:
    model = tool.mlp(Path())
    with torch.no_grad():
        model[1].weight.mul_(0.01)
    tool.pruned_(model, 0.5)
    assert (
        0.45 < float((torch.cat([p.flatten() for p in model.parameters() if p.dim() > 1]) == 0).float().mean()) < 0.55
    )
    assert float((model[1].weight == 0).float().mean()) > float((model[3].weight == 0).float().mean())
    zero = model[1].weight == 0
    tool.trained(model, data((1, 28, 28))[0], tool.SUBJECTS["mlp"])
    assert bool((model[1].weight[zero] == 0).all())
