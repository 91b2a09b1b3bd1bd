"""Write a module as ONNX: whole, verified, and without traces of the machine it was made on."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphzip.errors import ExportError, VerificationError
from graphzip.export.capture import Captured, capture
from graphzip.export.convert import FileVersion, convert, external_files, needs_two_files, save
from graphzip.export.example import Example, Free, tensor_leaves
from graphzip.export.optional_packages import require
from graphzip.export.refusals import refuse
from graphzip.export.report import ExportReport
from graphzip.export.verify import Verification, read_model, verify_file
from graphzip.files import check_target, staged
from graphzip.global_lock import ALONE
from graphzip.graph.copies import share_copy
from graphzip.progress import step

__all__ = ["Built", "ExportReport", "build", "check_onnx", "export_mode", "export_onnx"]

_LOUD = ("torch.onnx", "torch.export", "torch.fx", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")
_NOTHING = "nothing was written. Please report it; verify=False writes the file all the same, for inspection"


def export_onnx(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    example_kwargs: dict[str, Any] | None = None,
    free: Free | None = None,
    version: FileVersion | None = None,
    dynamic_batch: bool = True,
    verify: bool = True,
    by_task: bool = False,
    same_input: bool = False,
) -> ExportReport:
    """Export `module` in eval form; the module itself stays as it is, its mode included.

    Inputs keep the names of `forward`'s arguments, outputs are `output`, `output_1`, ... or the keys of a dict. `free`
    has for every tensor of the example the dimensions that may have another size; without it these are the first ones
    that have the example's batch size. The first is named `batch`, others after their input, `x_2`, and so is a batch
    of which not every size is taken; where the module's graph holds a size, the file does, too, and the report says so.
    Without `dynamic_batch` first dimensions stay those of the example. Sizes that the module refuses the file refuses,
    too; where it cannot, that is noted. `version` is by default what the exporter recommends. With `verify` the file is
    compared with the module before it is put in place.

    Raises `ExportError` where the module cannot be exported as asked or the place cannot be written to,
    `VerificationError` where the file is something else; either way nothing is written.
    """
    target = check_target(path, ExportError)
    _check_tuple(example_inputs)
    with export_mode(verify=verify):
        example = Example.of(example_inputs, example_kwargs or {}, free=free, dynamic_batch=dynamic_batch)
        built = build(module, example, version=version, by_task=by_task, same_input=same_input)
        external = needs_two_files(built.model)
        found: Verification | None = None
        with staged(target, ExportError) as temporary:
            save(built.model, temporary, external=external)
            if verify:
                found = built.verified(temporary)
            size = sum(file.stat().st_size for file in temporary.parent.iterdir())
    return built.report(target, size, external=external, found=found)


def check_onnx(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    example_kwargs: dict[str, Any] | None = None,
    by_task: bool = False,
    same_input: bool = False,
    shared: Collection[str] = (),
) -> ExportReport:
    """Compare the file at `path` with `module`, as `export_onnx` does; sizes are free where they are so in the file.

    Raises `VerificationError` where the file is not this module, or is no ONNX model at all. The file stays.
    """
    _check_tuple(example_inputs)
    source = Path(path)
    there = read_model(source)
    with export_mode(verify=True):
        example = _example_of_file(there, example_inputs, example_kwargs or {})
        options: dict[str, Any] = {"by_task": by_task, "same_input": same_input, "shared": shared}
        try:
            built = build(module, example, version=FileVersion(there.opset_imports.get("")), **options)
        except ExportError:  # written by another version, in an opset that this one does not write
            try:
                built = build(module, example, version=None, **options)
            except ExportError as error:
                raise VerificationError(f"{source.name} is not the module: {error}") from error
        found = built.compared(source, fresh=False)
    files = external_files(there, source.parent)
    size = sum(file.stat().st_size for file in {source, *files})
    report = built.report(source, size, external=bool(files), found=found)
    return replace(report, opset=int(there.opset_imports.get("", 0)), ir_version=int(there.ir_version))


def _example_of_file(there: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """The example with the sizes that are fixed in the file, and free where sizes are free there."""
    inputs = [value for value in there.graph.inputs if value.name not in there.graph.initializers]
    leaves = tensor_leaves((args, kwargs))
    shapes = [list(value.shape) if value.shape is not None else None for value in inputs]
    if [None if shape is None else len(shape) for shape in shapes] != [leaf.dim() for leaf in leaves]:
        theirs = ", ".join(f"{value.name} {value.shape}" for value in inputs)
        ours = ", ".join(str(list(leaf.shape)) for leaf in leaves)
        raise VerificationError(f"the file takes {theirs or 'nothing'}, and the module {ours or 'nothing'}")
    sizes = [[size if isinstance(size, int) else None for size in shape or ()] for shape in shapes]
    free = [[dim for dim, size in enumerate(each) if size is None] for each in sizes]
    example = replace(Example.of(args, kwargs, free=free), asked=False)
    wanted = [
        [own if size is None else size for own, size in zip(leaf.shape, each, strict=True)]
        for leaf, each in zip(example.leaves, sizes, strict=True)
    ]
    same = all(list(leaf.shape) == shape for leaf, shape in zip(example.leaves, wanted, strict=True))
    return example if same else example.resized(wanted)


def _check_tuple(example_inputs: Any) -> None:
    if not isinstance(example_inputs, tuple):
        raise ExportError(
            f"example_inputs must be a tuple of positional arguments, got {type(example_inputs).__name__}; "
            "for a single input write (x,)"
        )


@dataclass(frozen=True)
class Built:
    """An ONNX model before it is written, the module that it must agree with, and what that was traced to.

    `again` builds another module in the same way. `unchecked` are conditions on sizes that the module checks and the
    model does not.
    """

    model: Any
    skeleton: nn.Module
    captured: Captured
    unchecked: tuple[str, ...]
    again: Callable[[nn.Module], Built]

    def verified(self, path: Path) -> Verification:
        """Compare the file at `path`, which this model was written to, with the module."""
        try:
            return self.compared(path, fresh=True)
        except VerificationError as error:
            raise VerificationError(f"{error}; {_NOTHING}") from error

    def compared(self, path: Path, *, fresh: bool) -> Verification:
        """As `verify_file` does."""
        return verify_file(path, self.skeleton, self.captured, self.model, fresh=fresh, convert=self._twin)

    def _twin(self, twin: nn.Module) -> tuple[Captured, Any]:
        built = self.again(twin)
        return built.captured, built.model

    def report(self, path: Path, size: int, *, external: bool, found: Verification | None) -> ExportReport:
        notes = [*self.captured.notes]
        if self.unchecked:
            needed = " and ".join(self.unchecked)
            notes.append(f"the module takes only inputs with {needed}; the file cannot refuse others")
        found = found or Verification()
        return ExportReport(
            path=path,
            bytes=size,
            opset=int(self.model.opset_imports[""]),
            ir_version=int(self.model.ir_version),
            external_data=external,
            max_abs_diff=found.max_abs_diff,
            tolerance=found.tolerance,
            batches=found.batches,
            dynamic_batch=bool(self.captured.sizes.batches),
            inputs=self.captured.shapes,
            shapes=found.shapes,
            unchecked=tuple(found.unchecked),
            notes=(*notes, *found.notes),
        )


def build(
    module: nn.Module,
    example: Example,
    *,
    version: FileVersion | None,
    by_task: bool = False,
    same_input: bool = False,
    shared: Collection[str] = (),
) -> Built:
    """Convert `module` inside `export_mode`. Tensors with the names `shared` stay as they are, for others read them.

    A module of several tasks gives a dictionary `by_task`; each has inputs of its own unless it is the `same_input`.
    """
    skeleton = share_copy(module).eval()
    step("tracing what is exported")
    captured = capture(skeleton, example, by_task=by_task, same_input=same_input)
    again = functools.partial(
        build, example=example, version=version, by_task=by_task, same_input=same_input, shared=shared
    )
    step("converting it to ONNX")
    model = convert(captured, version=version or FileVersion(), shared=shared)
    return Built(model, skeleton, captured, tuple(refuse(model, captured)), again)


@contextlib.contextmanager
def export_mode(*, verify: bool) -> Iterator[None]:
    """Independent of the caller's grad mode, without fused attention, with nothing on stdout; one thread at a time."""
    for package in ("onnx", "onnxscript", "onnx_ir", *(("onnxruntime",) if verify else ())):
        require(package)
    with ALONE, _silence():
        yield


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            contextlib.redirect_stdout(sys.stderr),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
