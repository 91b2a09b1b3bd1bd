"""Programs of `torch.export`, also in files: a graph of operators with its weights, as a module to compile."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphzip.boundary import public
from graphzip.errors import ArchiveError
from graphzip.files import is_file
from graphzip.global_lock import ALONE
from graphzip.graph.source import first_line

__all__ = ["from_exported"]

_OBJECTS: Final = ("custom_obj", "opaque")
_SWITCH: Final = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # which torch.load obeys


@public
def from_exported(program: ExportedProgram | str | os.PathLike[str]) -> tuple[nn.Module, Any]:
    """The module that an exported program is, and the inputs it was exported with: `compile(module, plan, inputs)`.

    `program` is what `torch.export.export` gave, or a .pt2 file that `torch.export.save` wrote. Parameters keep their
    names. A batch norm or dropout does what it did when the program was exported, in training mode, too. Sizes that the
    program fixes stay fixed. `torch.export.load` would unpickle what a file asks it to, so a file is read in a way in
    which it unpickles tensors and plain containers alone, and one that holds other objects is refused.

    The inputs are a tuple, or a mapping by name, and `None` where the program does not hold them.

    Raises `ArchiveError` for a file that holds no program, or another form of it than is saved by `torch.export.save`.
    """
    if not isinstance(program, ExportedProgram):
        program = _read(Path(program))
    try:
        unlifted = program.module(check_guards=False)
        assert isinstance(unlifted, fx.GraphModule)
        module = fx.GraphModule(unlifted, unlifted.graph, class_name="Exported")
    except Exception as error:
        raise ArchiveError(f"the program cannot be made a module: {first_line(error)}; export it anew") from error
    example = program.example_inputs
    if example is None:
        return module, None
    args, kwargs = example
    return module, args if not kwargs else dict(zip(_names(module), args, strict=False)) | kwargs


def _names(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.find_nodes(op="placeholder")]


def _read(path: Path) -> ExportedProgram:
    if not is_file(path):
        raise ArchiveError(f"{path} does not exist or is not a file; give a .pt2 file of torch.export.save")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        objects = [name for name in names if any(mark in name for mark in _OBJECTS)]
        if objects:
            raise ArchiveError(f"{path} holds objects that run code when they are read ({objects[0]}); it is not read")
        with ALONE, _tensors_alone():
            return torch.export.load(path)
    except ArchiveError:
        raise
    except Exception as error:
        raise ArchiveError(
            f"{path} cannot be read as a program of torch.export ({first_line(error)}); TorchScript and weights are "
            "none: write it with torch.export.save(torch.export.export(model, inputs), path)"
        ) from error


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """Let `torch.load` unpickle nothing but tensors and plain containers, whoever calls it."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
