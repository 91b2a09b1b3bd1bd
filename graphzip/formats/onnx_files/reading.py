"""What is in an ONNX file: parsed, checked, with functions in place of their calls and the shapes that are known."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from graphzip.errors import ArchiveError
from graphzip.export.optional_packages import require
from graphzip.export.runs import short
from graphzip.files import is_file
from graphzip.formats.onnx_files.layers import Weight
from graphzip.formats.onnx_files.operators import DTYPES

__all__ = ["OnnxFile", "OnnxInput", "attributes_of", "read", "weight_of"]

_FIRST_OPSET: Final = 7  # before that, operators broadcast otherwise


@dataclass(frozen=True)
class OnnxInput:
    """A tensor that a file reads; a size is a number, the name of a free one, or `None`."""

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str | None, ...]


@dataclass(frozen=True)
class OnnxFile:
    """A parsed file: `proto` is its model, `ranks` are the numbers of dimensions of tensors in it, where known."""

    path: Path
    proto: Any
    opset: int
    inputs: tuple[OnnxInput, ...]
    outputs: tuple[str, ...]
    ranks: Mapping[str, int]


def read(path: Path) -> OnnxFile:
    """Raises `ArchiveError` where there is no ONNX model, or one that PyTorch has no types or operators for."""
    if not is_file(path):
        raise ArchiveError(f"{path} does not exist or is not a file; give an ONNX file")
    onnx = require("onnx")
    try:
        model = onnx.load(str(path))  # which reads weights of files in the same folder alone
        model = require("onnx.inliner").inline_local_functions(model)
    except Exception as error:
        raise ArchiveError(f"{path} cannot be read as an ONNX model: {short(error)}") from error
    opset = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0)
    if opset < _FIRST_OPSET:
        raise ArchiveError(f"{path} is of opset {opset}; write it with opset {_FIRST_OPSET} or later, such as 20")
    stored = {each.name for each in model.graph.initializer}
    inputs = tuple(_input(path, each) for each in model.graph.input if each.name not in stored)
    if not inputs or not model.graph.output:
        raise ArchiveError(f"{path} has no inputs or no outputs; there is nothing to compile")
    outputs = tuple(each.name for each in model.graph.output)
    return OnnxFile(path, model, opset, inputs, outputs, _ranks(model))


def _input(path: Path, value: Any) -> OnnxInput:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type not in DTYPES or not kind.HasField("shape"):
        raise ArchiveError(f"{path}: the input {value.name!r} is no tensor of numbers with a known rank")
    sizes = (each.dim_value if each.HasField("dim_value") else (each.dim_param or None) for each in kind.shape.dim)
    return OnnxInput(value.name, DTYPES[kind.elem_type], tuple(sizes))


def _ranks(model: Any) -> dict[str, int]:
    with contextlib.suppress(Exception):  # a file beyond 2 GB fails; layers that need the ranks say so
        model = require("onnx.shape_inference").infer_shapes(model)
    known = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {
        each.name: len(each.type.tensor_type.shape.dim) for each in known if each.type.tensor_type.HasField("shape")
    }


def weight_of(tensor: Any, *, trainable: bool = True) -> Weight:
    """A stored tensor. Raises `ValueError` where its numbers have no type in torch."""
    onnx = require("onnx")
    if tensor.data_type not in DTYPES:
        raise ValueError(f"{tensor.name!r} holds numbers of a type that torch has not")
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        found = torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor), dtype=np.float32)).bfloat16()
    else:
        found = torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor)))
    return Weight(found, tensor.name, trainable and found.is_floating_point())


def attributes_of(node: Any) -> dict[str, Any]:
    """The attributes of an operator: numbers, texts, lists of them, and tensors as `Weight`s.

    Raises `ValueError` for those that are graphs.
    """
    onnx = require("onnx")
    found: dict[str, Any] = {}
    for each in node.attribute:
        value = onnx.helper.get_attribute_value(each)
        if each.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            raise ValueError("it runs a part of the model or does not, as the data has it")
        if each.type == onnx.AttributeProto.TENSOR:
            value = weight_of(value, trainable=False)
        elif each.type == onnx.AttributeProto.STRING:
            value = value.decode("utf-8", "replace")
        elif each.type == onnx.AttributeProto.STRINGS:
            value = [text.decode("utf-8", "replace") for text in value]
        elif each.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
            value = list(value)
        found[each.name] = value
    return found
