"""Which convolutions a pass stores as factors, and which of them share.

By default all but the first convolution of the model, 1x1 and depthwise ones, as in ACDC (section 4) and CSG (section
2.1.1). Globs are `fnmatch.fnmatchcase` on layer names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from graphzip.analysis.convs import ConvLayer
from graphzip.graph.state import get_tensor, joined
from graphzip.graph.traced import Traced
from graphzip.plan.problems import plan_error
from graphzip.report.tables import closest

__all__ = ["blocks_of", "convolutions_of", "first_match", "kernel_of", "select"]

logger = logging.getLogger(__name__)


def kernel_of(traced: Traced, name: str) -> torch.Tensor:
    """The kernel of the convolution `name`, which is empty where the model itself is one."""
    return get_tensor(traced.module, joined(name, "weight"))


def convolutions_of(model: nn.Module, layer: ConvLayer) -> list[tuple[str, Any]]:
    """The modules that have the kernel of a layer, with their names."""
    return [(name, model.get_submodule(name)) for name in layer.holders]


def select(
    layers: Sequence[ConvLayer], names: Mapping[str, str], include: Sequence[str], exclude: Sequence[str], *, where: str
) -> list[ConvLayer]:
    """The layers that are meant, in order; `names` gives the name of each in the user's model.

    Raises `PlanError` where a glob matches no convolution, where a layer that is asked for by `include` cannot be
    stored as factors, and where no layer is left.
    """
    known = [names[layer.name] for layer in layers]
    problems = [
        f"{where}.{key}[{position}]: {glob!r} matches no convolution; {closest(glob, known)}"
        for key, globs in (("include", include), ("exclude", exclude))
        for position, glob in enumerate(globs)
        if not any(fnmatchcase(name, glob) for name in known)
    ]
    meant = [
        layer
        for position, layer in enumerate(layers)
        if (_any(names[layer.name], include) if include else position and not layer.pointwise and not layer.depthwise)
        and not _any(names[layer.name], exclude)
    ]
    refused = [layer for layer in meant if layer.reason is not None]
    if include:
        problems += [f"{where}.include: {names[layer.name]!r} cannot be factored: {layer.reason}" for layer in refused]
    for layer in refused:
        logger.warning("%s stays as it is: %s", names[layer.name], layer.reason)
    found = [layer for layer in meant if layer.reason is None]
    if not found and not problems:
        problems.append(
            f"{where}: no convolution is left to factor; name some in include (by default the first convolution, 1x1 "
            "and depthwise ones stay)"
        )
    if problems:
        raise plan_error(problems)
    return found


def _any(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def first_match(name: str, globs: Sequence[str]) -> int:
    """The position of the first glob that matches, or `len(globs)`."""
    return next((position for position, glob in enumerate(globs) if fnmatchcase(name, glob)), len(globs))


def blocks_of(layers: Sequence[ConvLayer]) -> list[int]:
    """The number of each layer's block: a run of layers with equal output channels and feature size (section 3.3)."""
    numbers: list[int] = []
    for position, layer in enumerate(layers):
        before = layers[position - 1] if position else None
        same = before is not None and (before.shape[0], before.feature) == (layer.shape[0], layer.feature)
        numbers.append(numbers[-1] + (not same) if numbers else 0)
    return numbers
