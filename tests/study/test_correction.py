"""The correction round: what it tries, and that it keeps the best of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from graphzip.study.allocation import Budget, Curve, allocate
from graphzip.study.correction import bent, corrected
from graphzip.study.cost_model import Price

GROUPS = 5
PRICE = Price(np.ones(GROUPS), (np.eye(GROUPS) / 16,))
CURVES = [Curve(np.arange(16.0), np.arange(16.0) ** 2 * scale) for scale in (1.0, 2.0, 1.0, 3.0, 2.0)]


def split(curves: Sequence[Curve]) -> Any:
    return allocate(curves, [Budget(PRICE, 0.5 * PRICE.whole)])


def test_bent_losses_are_a_power_and_tilted_over_the_depth() -> None:
    found = bent(CURVES, 0.5, 0.7)
    np.testing.assert_allclose(found[2].loss, np.arange(16.0))
    np.testing.assert_allclose(found[0].loss, np.arange(16.0) * np.exp(-0.7))
    np.testing.assert_allclose(found[4].loss, np.arange(16.0) * 2**0.5 * np.exp(0.7))
    np.testing.assert_array_equal(bent(CURVES[:1], 1.0, 5.0)[0].loss, CURVES[0].loss)


@pytest.mark.parametrize(("power", "tilt"), [(1.0, 1.4), (2.0, 0.0), (0.6, -0.7)])
def test_losses_that_were_bent_are_found_again(power: float, tilt: float) -> None:
    """The judge knows what losses are in truth: the round comes nearer to the best split."""
    truth = bent(CURVES, power, tilt)

    def judge(gone: Any, number: int = 0) -> float:
        return float(sum(curve.loss[int(at)] for curve, at in zip(truth, gone, strict=True)))

    found = corrected(CURVES, split, judge, most=30)
    first, best = judge(split(CURVES)), judge(split(truth))
    assert found is not None
    assert judge(found) - best <= 0.2 * (first - best)


def test_the_first_split_stays_where_nothing_is_better_and_none_is_judged_twice() -> None:
    asked: list[tuple[int, ...]] = []

    def judge(gone: Any, number: int) -> float:
        assert number == len(asked)
        asked.append(tuple(gone.tolist()))
        return float(len(asked))

    found = corrected(CURVES, split, judge, most=6)
    np.testing.assert_array_equal(found, split(bent(CURVES, 1.4, 0.0)))
    assert 1 < len(asked) == len(set(asked)) <= 6


def test_nothing_is_judged_where_nothing_may_be_or_the_budget_is_out_of_reach() -> None:
    def judge(gone: Any, number: int) -> float:
        raise AssertionError

    np.testing.assert_array_equal(corrected(CURVES, split, judge, most=0), split(CURVES))
    assert corrected(CURVES, lambda _: None, judge, most=5) is None
