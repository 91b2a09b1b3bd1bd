"""Trimmed features: pooled, sampled, the same numbers in all tasks, of bounded size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import graphzip as gz
from graphzip_passes.cross_domain.pooled_features import KEPT, Trimmed, rows_of_input


def pair() -> dict[str, nn.Module]:
    return {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}


def watched(samples: int = 6) -> tuple[Trimmed, dict[str, nn.Module]]:
    trimmed, modules = Trimmed(["a", "b"], (2, 2), samples, 0), pair()
    trimmed.watch("layer", modules, 0)
    return trimmed, modules


def batch(size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def test_feature_maps_are_pooled_and_become_rows() -> None:
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)
    rows = rows_of_input(x, 2, (2, 2))
    assert rows.shape == (3, 2 * 4)
    torch.testing.assert_close(rows[1, :4], x[0, 1].unfold(0, 2, 2).unfold(1, 2, 2).mean((2, 3)).flatten())
    assert rows_of_input(x, 2, (8, 2)).shape == (3, 2 * 8)


def test_maps_of_one_dimension_and_positions_of_linear_layers() -> None:
    assert rows_of_input(torch.zeros(2, 3, 20), 1, (2, 2)).shape == (3, 2 * 4)
    assert rows_of_input(torch.zeros(2, 7, 5), 0, (2, 2)).shape == (5, 14)


def test_the_same_numbers_are_kept_of_every_task() -> None:
    trimmed, modules = watched()
    for module in modules.values():
        module(batch())
    found = trimmed.take("layer")
    assert found.shape == (8, 6)
    assert torch.equal(found[:4], found[4:])


def test_numbers_are_drawn_anew_for_every_batch() -> None:
    trimmed, modules = watched()
    found = []
    for _ in range(2):
        for module in modules.values():
            module(batch())
        found.append(trimmed.take("layer"))
    assert not torch.equal(found[0], found[1])


def test_few_numbers_are_all_kept_in_order() -> None:
    trimmed, modules = watched(samples=16)
    for module in modules.values():
        module(batch())
    assert torch.equal(trimmed.take("layer")[:4], batch().t())


def test_gradients_reach_what_was_read() -> None:
    trimmed, modules = watched()
    x = batch().requires_grad_()
    for module in modules.values():
        module(x)
    trimmed.take("layer").sum().backward()
    assert x.grad is not None
    assert int((x.grad != 0).any(1).sum()) == 6


def test_evaluation_is_not_noted() -> None:
    trimmed, modules = watched()
    with torch.no_grad():
        for module in modules.values():
            module(batch())
    with pytest.raises(gz.ExampleInputError, match="layer: there are no features of 'a', 'b'"):
        trimmed.take("layer")


def test_a_batch_that_was_not_taken_is_forgotten() -> None:
    trimmed, modules = watched(samples=16)
    for seed in (1, 2):
        for module in modules.values():
            module(batch(seed=seed))
    assert torch.equal(trimmed.take("layer")[:4], batch(seed=2).t())


def test_the_last_batches_are_remembered() -> None:
    trimmed, modules = watched(samples=400)
    for seed in range(5):
        for module in modules.values():
            module(batch(400, seed))
        trimmed.take("layer")
    remembered = trimmed.remembered("layer")
    assert remembered is not None
    assert remembered.shape == (8, 800)
    assert not remembered.requires_grad
    assert torch.equal(remembered[:4, -400:], batch(400, 4).t())


def test_calibration_comes_task_by_task() -> None:
    trimmed, modules = watched(samples=16)
    with torch.no_grad(), trimmed.collecting():
        for module in modules.values():
            for seed in range(3):
                module(batch(seed=seed))
    remembered = trimmed.remembered("layer")
    assert remembered is not None
    assert torch.equal(remembered[:4], torch.cat([batch(seed=seed) for seed in range(3)]).t())
    assert torch.equal(remembered[:4], remembered[4:])


def test_as_much_calibration_as_is_needed_is_kept() -> None:
    trimmed, modules = watched(samples=400)
    with torch.no_grad(), trimmed.collecting():
        for module in modules.values():
            for seed in range(9):
                module(batch(500, seed))
    remembered = trimmed.remembered("layer")
    assert remembered is not None
    assert KEPT <= remembered.shape[1] < KEPT + 400


def test_nothing_is_noted_after_leaving() -> None:
    trimmed, modules = watched()
    trimmed.leave()
    assert not any(module._forward_pre_hooks for module in modules.values())


def test_a_copy_of_the_model_notes_for_itself() -> None:
    trimmed, modules = watched()
    copied, twins = copy.deepcopy((trimmed, modules))
    for module in twins.values():
        module(batch())
    assert copied.take("layer").shape == (8, 6)
    with pytest.raises(gz.ExampleInputError):
        trimmed.take("layer")


def test_half_precision_is_compared_in_float32() -> None:
    trimmed, modules = watched()
    for module in modules.values():
        trimmed.note("layer", "a" if module is modules["a"] else "b", batch().bfloat16(), 0)
    assert trimmed.take("layer").dtype == torch.float32
