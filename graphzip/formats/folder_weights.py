"""What models in folders of `transformers` are read from and traced with: tensors by the class's names, and text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from graphzip.errors import ArchiveError, ExampleInputError
from graphzip.formats.huggingface import listed, names_in_files
from graphzip.formats.shards import Shards
from graphzip.graph.batches import each_batch
from graphzip.graph.state import find_aliases
from graphzip_passes.base import Weights

__all__ = ["text_examples", "weights_of"]

logger = logging.getLogger(__name__)

_TOKENS: Final = (2, 8)  # of the example that a model of text is traced with


def weights_of(model: nn.Module, shards: Shards, source: Path, constants: Mapping[str, torch.Tensor]) -> Weights:
    """What gives the tensors of a model, and `constants` of its graph.

    Raises `ArchiveError` where the files lack one, or have another shape.
    """
    state = model.state_dict(keep_vars=True)
    first = find_aliases(model)
    named = names_in_files(model, shards.files)
    stored: dict[str, str] = {}
    for name in state:
        if name in named:
            stored.setdefault(first.get(name, name), named[name])
    missing = [name for name in state if first.get(name, name) not in stored]
    if missing:
        raise ArchiveError(
            f"{source} has no {listed(missing)}, or in several tensors of which {type(model).__name__} makes one; load "
            "the model with from_pretrained, and compile that"
        )
    read_names = {named[name] for name in state if name in named}
    spare = [name for name in shards.files if name not in read_names]
    if spare:
        logger.warning("%s of %s are no part of %s and left out", listed(spare), source, type(model).__name__)

    def read(name: str) -> torch.Tensor:
        if name in constants:
            return constants[name]
        if first.get(name, name) not in stored:
            raise ArchiveError(
                f"{type(model).__name__} computes {name!r}, which cannot be made without its weights; load the model "
                "with from_pretrained, and compile that"
            )
        value, shape = shards(stored[first.get(name, name)]), state[name].shape
        if value.shape != shape:
            raise ArchiveError(f"{source}: {name!r} is {tuple(value.shape)}, where the config says {tuple(shape)}")
        return value

    return read


def text_examples(model: nn.Module, data: Iterable[Any] | None) -> dict[str, torch.Tensor]:
    """Text of the shape of the first batch, or of any."""
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ExampleInputError(
            f"{type(model).__name__} is no model of text alone; give example_inputs, of which the shapes count: "
            f"{{{getattr(model, 'main_input_name', 'x')!r}: torch.empty(..., device='meta')}}"
        )
    if data is None:
        return {"input_ids": torch.zeros(_TOKENS, dtype=torch.int64, device="meta")}
    first = next(each_batch(data))
    if isinstance(first, Mapping):
        return {name: first[name].to("meta") for name in ("input_ids", "attention_mask") if name in first}
    return {"input_ids": (first[0] if isinstance(first, tuple | list) else first).to("meta")}
