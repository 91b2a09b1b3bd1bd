"""What all tests share: one thread per test process and reproducible property tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("graphzip", deadline=None, derandomize=True)
settings.load_profile("graphzip")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-corpus", action="store_true", help="write tests/corpus.json anew")
