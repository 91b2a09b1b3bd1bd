"""Distillation: the student comes closer to the teacher, and nothing else is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphzip as gz


def nets() -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
        student = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.0), nn.Linear(6, 3)).eval()
    return student, teacher


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    return list(zip(x.split(32), torch.zeros(256, dtype=torch.int64).split(32), strict=True))


def test_a_student_comes_closer() -> None:
    student, teacher = nets()
    before = copy.deepcopy(teacher.state_dict())
    losses = gz.distill(student, teacher, batches(), epochs=20, rate=0.05)
    assert len(losses) == 20
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not student.training


def test_labels_count_as_much_as_they_are_told_to() -> None:
    student, teacher = nets()
    gz.distill(student, teacher, batches(), epochs=10, rate=0.05, labels=1.0)
    x = torch.cat([x for x, _ in batches()])
    assert (student(x).argmax(1) == 0).float().mean() > 0.95


def test_labels_that_are_not_there() -> None:
    student, teacher = nets()
    message = r"labels are asked for, but a batch has none; give batches \(x, y\) or labels=0"
    with pytest.raises(gz.ExampleInputError, match=message):
        gz.distill(student, teacher, [torch.randn(2, 4)], labels=0.5)


def test_an_optimizer_of_one_s_own_is_used_as_it_is() -> None:
    student, teacher = nets()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.0)
    before = copy.deepcopy(student.state_dict())
    gz.distill(student, teacher, batches(), optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
