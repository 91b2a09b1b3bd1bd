"""From an exported program to an ONNX model: converted, optimized, and without traces of the machine it was made on."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from graphzip.errors import ExportError
from graphzip.export.capture import Captured, first_line, renamed
from graphzip.export.optional_packages import require
from graphzip.export.program_forms import with_four_dimensions, with_sums_as_convolutions, without_idle_squeezes
from graphzip.export.runs import has_bfloat16
from graphzip.files import companion
from graphzip.numeric.grouped_mm import grouped_mm

__all__ = ["FileVersion", "checked_ir", "convert", "external_files", "needs_two_files", "save", "weight_bytes"]

SINGLE_FILE_LIMIT = 2**31 - 2**26
"""Bytes of weights up to which one file is written: protobuf ends at 2 GiB, and the graph itself needs some room."""

logger = logging.getLogger(__name__)

_STANDARD = ("", "ai.onnx")
_LEAST_IR = 8
"""The first version of the format in which initializers are no inputs and functions may be in a file."""

_SMALL = 256
"""Bytes of a constant that is computed wherever possible: shapes and scalars."""


@dataclass(frozen=True)
class FileVersion:
    """What an ONNX file is written in: opset and version of its format; by default what the exporter recommends."""

    opset: int | None = None
    ir: int | None = None


def convert(captured: Captured, *, version: FileVersion, shared: Collection[str] = ()) -> Any:
    """The ONNX model of a captured program. Tensors with the names `shared` stay as they are, for others read them.

    Inputs, outputs and free sizes have the names that they have in `captured`. Raises `ExportError` for an operator
    that cannot be converted, and for a version that cannot be written.
    """
    without_idle_squeezes(captured.program)
    with_four_dimensions(captured.program)
    with_sums_as_convolutions(captured.program)
    model = _convert(captured.program, version.opset, shared)
    _tidy(model, captured.inputs, captured.outputs, captured.symbols)
    if version.ir is not None:
        model.ir_version = checked_ir(version.ir, model.opset_imports)
    return model


def checked_ir(ir: int, opsets: Mapping[str, int]) -> int:
    """A version of the format that can hold these opsets. Raises `ExportError` for one that cannot."""
    onnx = require("onnx")
    needed = [onnx.helper.make_opsetid(domain, number) for domain, number in opsets.items() if domain in _STANDARD]
    least = max(onnx.helper.find_min_ir_version_for(needed), _LEAST_IR)
    if not least <= ir <= onnx.IR_VERSION:
        raise ExportError(
            f"ir_version: {ir} is not written with opset {opsets.get('')}; write one from {least} to "
            f"{int(onnx.IR_VERSION)}, or leave it out"
        )
    return ir


def _convert(program: ExportedProgram, opset: int | None, shared: Collection[str]) -> Any:
    try:
        model = _converted(program, opset)
        try:
            _optimize(model, shared)
        except Exception as error:
            logger.info("the ONNX optimizer fails, so the file is not optimized: %s", first_line(error), exc_info=True)
            model = _converted(program, opset)
            require("onnx_ir.passes.common").InlinePass()(model)
    except Exception as error:
        raise ExportError(
            f"the ONNX exporter of PyTorch cannot convert the model: {_summary(error)}; replace that part of the model"
        ) from error
    written = model.opset_imports.get("")
    if opset is not None and written != opset:
        raise ExportError(
            f"this model cannot be written in ONNX opset {opset}; the exporter can write opset {_possible_opsets()}: "
            "pass one of these, or opset=None for the recommended one"
        )
    return model


def _converted(program: ExportedProgram, opset: int | None) -> Any:
    own = {grouped_mm: _each_matrix_alone}
    converted = torch.onnx.export(
        program,
        (),
        opset_version=opset,
        verbose=False,
        dynamo=True,
        optimize=False,
        custom_translation_table=own,  # type: ignore[arg-type]
    )
    assert converted is not None
    return converted.model


def _each_matrix_alone(input: Any, weight: Any, offs: Any) -> Any:
    """`grouped_mm`: the rows of each matrix times it, one after the other, and zeros for rows behind the last."""
    op: Any = require("onnxscript").opset18
    along = op.Constant(value_ints=[0])
    ends = op.Concat(along, op.Cast(offs, to=7), op.Shape(input, start=0, end=1), axis=0)
    made = []
    for number in range(weight.shape[0] + 1):
        start, end, behind = (op.Constant(value_ints=[number + step]) for step in range(3))
        rows = op.Slice(input, op.Slice(ends, start, end, along), op.Slice(ends, end, behind, along), along)
        matrix = op.Gather(weight, op.Constant(value_int=min(number, weight.shape[0] - 1)), axis=0)
        product = op.MatMul(rows, matrix)
        made.append(product if number < weight.shape[0] else op.Sub(product, product))
    return op.Concat(*made, axis=0)


def _optimize(model: Any, shared: Collection[str]) -> None:
    """What `torch.onnx.export` does by default, but no constant is computed that makes the file bigger."""

    def should_fold(node: Any) -> bool | None:
        reads_shared = any(value is not None and value.name in shared for value in node.inputs)
        return False if reads_shared else _stays_slim(node)

    optimizer = require("onnxscript.optimizer")
    if has_bfloat16(model):  # batch norms that are folded into weights of 8 bits compute something else
        optimizer.inline(model)
        optimizer.fold_constants_ir(model, should_fold=should_fold)
        optimizer.remove_unused_nodes(model)
        return
    optimizer.optimize_ir(model, should_fold=should_fold)
    require("onnxscript.rewriter.onnx_fusions").fuse(model)


def _stays_slim(node: Any) -> bool | None:
    """False for an operator on constants whose results take more room than the constants that it makes superfluous.

    A kernel that is built from shared factors would be stored in full otherwise. `None` leaves it to the optimizer.
    """
    inputs = {id(value): value for value in node.inputs if value is not None}.values()
    gone = sum(
        value.const_value.nbytes for value in inputs if len(value.consumers()) == 1 and value.const_value is not None
    )
    made = 0
    for value in node.outputs:
        sizes = value.shape.dims if value.shape is not None else None
        if sizes is None or value.dtype is None or not all(isinstance(size, int) for size in sizes):
            return None if all(each.const_value.size <= _SMALL for each in inputs) else False
        made += math.prod(sizes) * value.dtype.itemsize
    return None if made <= max(gone, _SMALL) else False


def _possible_opsets() -> str:
    """The range that the version converter handles for every operator: `18 to 25`."""
    ir, onnx, converter = require("onnx_ir"), require("onnx"), require("onnxscript.version_converter")
    possible = []
    for version in range(7, onnx.defs.onnx_opset_version() + 1):
        empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="empty"), ir_version=10)
        with contextlib.suppress(Exception):
            converter.convert_version(empty, version)
            possible.append(version)
    return f"{possible[0]} to {possible[-1]}" if possible else "18"


def _tidy(model: Any, inputs: Sequence[str], outputs: Sequence[str], symbols: Mapping[str, str]) -> None:
    """One copy of equal weights, the names of `forward`, `batch` for the batch, and no metadata."""
    for graph in model.graphs():
        _share_equal_weights(graph)
    _rename(model, inputs, outputs)
    require("onnx_ir.passes.common").NameFixPass()(model)
    for value in _values(model):
        value.metadata_props.clear()
        value.meta.clear()
        value.doc_string = None
        if value.const_value is not None:
            value.const_value = _bare(value.const_value)
        if symbols and value.shape is not None:
            value.shape = _with_names(value.shape, symbols)
    for graph in (*model.graphs(), *model.functions.values()):
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None


def _bare(tensor: Any) -> Any:
    """The constant without a description; one that is held as a protocol buffer cannot be changed."""
    ir = require("onnx_ir")
    if isinstance(tensor, ir.TensorProtoTensor) and not tensor.dtype.is_string():
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
    if not isinstance(tensor, ir.TensorProtoTensor):
        tensor.doc_string = None
        tensor.metadata_props.clear()
    return tensor


def _share_equal_weights(graph: Any) -> None:
    """Keep one of several initializers of the same type, shape and content, under its first name.

    (`onnx_ir`'s hashing pass of the same purpose fails on tensors that are not contiguous, such as LSTM weights.)
    """
    alike: dict[Any, list[Any]] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not tensor.dtype.is_string() and not value.is_graph_output():
            alike.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    for values in alike.values():
        first: dict[bytes, Any] = {}
        for value in values if len(values) > 1 else ():
            content = hashlib.sha256(value.const_value.tobytes()).digest()
            kept = first.setdefault(content, value)
            if kept is not value:
                value.replace_all_uses_with(kept)
                del graph.initializers[value.name]


def _rename(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    taken: set[str] = set()
    for value, name in zip((*model.graph.inputs, *model.graph.outputs), (*inputs, *outputs), strict=True):
        unique, count = name, 1
        while unique in taken:
            unique, count = f"{name}_{count}", count + 1
        taken.add(unique)
        value.name = unique


def _with_names(shape: Any, symbols: Mapping[str, str]) -> Any:
    sizes = [size if isinstance(size, int) else size.value for size in shape]
    return require("onnx_ir").Shape([renamed(size, symbols) if isinstance(size, str) else size for size in sizes])


def _values(model: Any) -> Iterator[Any]:
    for graph in (*model.graphs(), *model.functions.values()):
        yield from graph.inputs
        yield from getattr(graph, "initializers", {}).values()
        for node in graph:
            yield from node.outputs


def weight_bytes(model: Any) -> int:
    """Bytes of all stored tensors: initializers, and constants that are attributes of nodes."""
    return sum(value.const_value.nbytes for value in _values(model) if value.const_value is not None)


def needs_two_files(model: Any) -> bool:
    """Whether the weights are too large for the file of the graph."""
    return weight_bytes(model) > SINGLE_FILE_LIMIT


def external_files(model: Any, folder: Path) -> set[Path]:
    """Files beside the model that hold its weights."""
    external = require("onnx_ir").ExternalTensor
    return {folder / each.const_value.location for each in _values(model) if isinstance(each.const_value, external)}


def save(model: Any, path: Path, *, external: bool) -> None:
    ir = require("onnx_ir")
    ir.save(model, path, format="protobuf", external_data=companion(path.name) if external else None)


def _summary(error: Exception) -> str:
    """What the exporter says below its advice on how to report a bug to PyTorch."""
    _, found, below = str(error).partition("## Exception summary")
    text = below if found else str(error)
    causes = re.findall(r"<class '[^']*'>: (.*)", text)
    return str(causes[0]).partition(". Failure message")[0] if causes else first_line(error)
