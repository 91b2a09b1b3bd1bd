"""Distillation: the student comes closer to the teacher, and nothing else is touched."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

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


class Tagger(nn.Module):
    """Called by name, with an object that holds the logits of every place, as models of transformers are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embed(input_ids) * attention_mask[..., None]))


def tagged(*, labels: bool) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        ids = torch.randint(0, 11, (8, 5), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones(8, 5)}
        found.append(batch | ({"labels": ids % 3} if labels else {}))
    return found


@pytest.mark.parametrize("labels", [0.0, 0.5, 1.0])
def test_batches_may_be_inputs_by_name(labels: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, student = Tagger(12), Tagger(6)
    data = tagged(labels=labels > 0)
    losses = gz.distill(student, teacher, data, epochs=30, rate=0.5, temperature=1.0, labels=labels)
    assert losses[-1] < 0.5 * losses[0]
    if labels == 1.0:
        found = student(data[0]["input_ids"], data[0]["attention_mask"]).logits.argmax(-1)
        assert (found == data[0]["labels"]).float().mean() > 0.9


def test_labels_that_are_not_there_by_name() -> None:
    with pytest.raises(gz.GraphZipError, match=re.escape("a batch has none under 'labels'; or use labels=0")):
        gz.distill(Tagger(6), Tagger(12), tagged(labels=False), labels=0.5)
