"""What all tests share: one thread per test process and reproducible property tests."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("graphzip", deadline=None, derandomize=True)
settings.load_profile("graphzip")
