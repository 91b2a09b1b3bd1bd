"""What a checkpoint holds of a training, as tensors by name: parts of it, and how far a random generator is."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["drawn_so_far", "go_on_from", "parts_of"]


def drawn_so_far(random: np.random.Generator) -> Tensor:
    """Bytes, uint8 (n,), from which a generator of the same kind goes on."""
    return torch.tensor(list(json.dumps(random.bit_generator.state).encode()), dtype=torch.uint8)


def go_on_from(random: np.random.Generator, state: Tensor) -> None:
    """Draw what the generator of that state would draw next. Raises `ValueError` or `TypeError` for another state."""
    random.bit_generator.state = json.loads(bytes(state.cpu().tolist()))


def parts_of(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """What has a name that begins with `part.`, without that."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
