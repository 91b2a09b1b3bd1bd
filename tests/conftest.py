"""What all tests share: one thread per test process and reproducible property tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from graphzip.plan.criteria import CRITERIA
from graphzip_passes.parts.clustering import _CLUSTERINGS

torch.set_num_threads(1)
settings.register_profile("graphzip", deadline=None, derandomize=True)
settings.load_profile("graphzip")


@pytest.fixture(autouse=True)
def own_registrations() -> Iterator[None]:
    """The clusterings and criteria that a test registers are known in that test only."""
    registries: tuple[dict[str, Any], ...] = (_CLUSTERINGS, CRITERIA)
    before = [dict(each) for each in registries]
    yield
    for registry, known in zip(registries, before, strict=True):
        for name in set(registry) - set(known):
            if not getattr(registry[name], "built_in", False):  # its file was imported in the test
                del registry[name]


@pytest.fixture
def seeded() -> Iterator[None]:
    """The random state is that of seed 0, and afterwards what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-corpus", action="store_true", help="write tests/analysis/corpus.json anew")
