"""What all tests share: one thread per test process and reproducible property tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("graphzip", deadline=None, derandomize=True)
settings.load_profile("graphzip")


@pytest.fixture
def seeded() -> Iterator[None]:
    """The random state is that of seed 0, and afterwards what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-corpus", action="store_true", help="write tests/corpus.json anew")
