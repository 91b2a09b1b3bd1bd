"""Planted duplicates merge losslessly on random networks."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from planting import assert_lossless, mergeable_share
from random_graphs import Program, RandomNet, programs

import graphzip as gz


def check_many(examples: int, most: int) -> None:
    """The property on `examples` programs; most of them must have had something to merge."""
    merged: list[int] = []
    shares: list[float] = []

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(programs(most=most))
    def check(program: Program) -> None:
        model = RandomNet(program)
        try:
            gz.channel_groups(model, model.inputs())
        except gz.GraphZipError:
            assert "write" in program.ops(), "only a write into a view may be refused"
            return
        found = assert_lossless(model, model.inputs(), seed=len(program.steps), alive=False, whole=0.5)
        merged.append(found.merged)
        shares.append(mergeable_share(found.groups))

    check()
    assert sum(count > 0 for count in merged) >= 0.6 * len(merged)
    assert sum(shares) >= 0.45 * len(shares)


def test_random_networks() -> None:
    check_many(50, most=7)


@pytest.mark.slow
def test_many_random_networks() -> None:
    check_many(500, most=14)
