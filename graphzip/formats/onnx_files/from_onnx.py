"""ONNX files as models to compile."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from graphzip.boundary import public
from graphzip.errors import ArchiveError, ExampleInputError
from graphzip.files import as_path
from graphzip.formats.onnx_files.build import build
from graphzip.formats.onnx_files.check import check_same
from graphzip.formats.onnx_files.naming import identifier
from graphzip.formats.onnx_files.reading import OnnxFile, OnnxInput, read

__all__ = ["from_onnx"]

_BATCHES: Final = (2, 3)
_GUESSES: Final = {4: (64, 224, 32), 5: (16, 32)}  # of a free height or width, by the number of dimensions
_LENGTHS: Final = (16, 32, 64)


@public
def from_onnx(
    path: str | os.PathLike[str], *, sizes: Mapping[str, int] | None = None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module that the ONNX file at `path` is, in eval mode, and example inputs: `compile(module, plan, inputs)`.

    Convolutions, linear layers, norms, embeddings and recurrences are those of `torch.nn`, with the names that the
    file's weights or nodes have. Inputs are taken by their names in the file; outputs are a mapping by theirs, so that
    a file exported of it replaces the old one. (What is no name in Python has underscores: `input.1` is `input_1`.)

    The module is run beside the file in onnxruntime, at two batch sizes where the file leaves the batch free, and must
    give the same. `sizes` are those of free dimensions in examples, by their names in the file (`{"height": 64}`);
    without it a usual size is tried. The first dimension of an input, where it is free, is the batch.

    Raises `ArchiveError` for a file that is no ONNX model, or with the node and operator that cannot be converted or
    gives something else; `ExampleInputError` where no size that was tried fits.
    """
    file = read(as_path(path, ArchiveError))
    _check_sizes(file, sizes or {})
    module = build(file)
    refusal: ExampleInputError | None = None
    for guess in _guesses(file):
        try:
            calls = [_example(file, batch, {**guess, **(sizes or {})}) for batch in _batches(file)]
            check_same(file, module, calls)
        except ExampleInputError as error:
            refusal = refusal or error
        else:
            return module, {identifier(name): value for name, value in calls[0].items()}
    assert refusal is not None
    raise refusal


def _check_sizes(file: OnnxFile, sizes: Mapping[str, int]) -> None:
    free = {each for value in file.inputs for each in value.sizes if isinstance(each, str)}
    for name, size in sizes.items():
        if name not in free or not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ExampleInputError(
                f"sizes[{name!r}] is {size!r}; give sizes of at least 1 for free dimensions of the file, which are: "
                f"{', '.join(sorted(free)) or 'none'}"
            )


def _batches(file: OnnxFile) -> tuple[int, ...]:
    return _BATCHES if any(not isinstance(each.sizes[0], int) for each in file.inputs if each.sizes) else _BATCHES[:1]


def _guesses(file: OnnxFile) -> Iterator[dict[str, int]]:
    """Sizes of free dimensions that are not the batch."""
    first = {each.sizes[0] for each in file.inputs if each.sizes}
    free: dict[str, tuple[int, ...]] = {}
    for each in file.inputs:
        for size in each.sizes:
            if isinstance(size, str) and size not in first:
                free[size] = _GUESSES.get(len(each.sizes), _LENGTHS)
    for chosen in itertools.zip_longest(*free.values()) if free else [()]:
        yield {name: size or free[name][-1] for name, size in zip(free, chosen, strict=True)}


def _example(file: OnnxFile, batch: int, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {each.name: _random(each, batch, sizes, generator) for each in file.inputs}


def _random(each: OnnxInput, batch: int, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    usual = _GUESSES.get(len(each.sizes), _LENGTHS)[0]
    free = [batch if k == 0 else sizes.get(name, usual) for k, name in enumerate(map(_name, each.sizes))]
    shape = [size if isinstance(size, int) else other for size, other in zip(each.sizes, free, strict=True)]
    if each.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(each.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(each.dtype)


def _name(size: int | str | None) -> str:
    return size if isinstance(size, str) else ""
