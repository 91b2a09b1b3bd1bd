"""A generator of kernel slices in a file of its own, to start other networks from."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase

import safetensors
import safetensors.torch
import torch
from torch import nn

from graphzip.arguments import check_module, check_name
from graphzip.boundary import public
from graphzip.errors import ArchiveError, GraphZipError
from graphzip.files import staged
from graphzip.graph.layers.factored import SliceConv

__all__ = ["save_generator"]


@public
def save_generator(model: nn.Module, path: str | os.PathLike[str], *, layer: str = "*") -> None:
    """Write the generator of `model`, `(elements of a slice, numbers per code)`, to a safetensors file.

    `model` is a prepared or compiled model with layers that `SliceGenerate` made; `SliceGenerate(generator=path)` reads
    the file (CSG, "Associative Convolutional Layers", section 4.3). Where a model has several generators, `layer`, a
    glob of layer names, says which one.

    Raises `GraphZipError` where the layers that match have no generator or more than one, `ArchiveError` where the file
    cannot be written.
    """
    check_module(model)
    check_name(layer, "layer")
    found: dict[int, torch.Tensor] = {}
    for name, inner in model.named_modules():
        if isinstance(inner, SliceConv) and fnmatchcase(name, layer):
            found[id(inner.generator)] = inner.generator
    if not found:
        raise GraphZipError(
            f"no layer that matches {layer!r} has a generator; pass a model that SliceGenerate was applied to"
        )
    if len(found) > 1:
        raise GraphZipError(f"layers that match {layer!r} have {len(found)} generators; name one of them with layer=")
    (generator,) = found.values()
    tensors = {"generator": generator.detach().cpu().float().contiguous().clone()}
    with staged(path, ArchiveError) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "graphzip generator"})
