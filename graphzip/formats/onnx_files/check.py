"""Does a module compute what the ONNX file computes it is made of? Compared in onnxruntime, at two batch sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx

from graphzip.errors import ArchiveError, ExampleInputError
from graphzip.export.optional_packages import require
from graphzip.export.runs import session_of, short
from graphzip.formats.onnx_files.operators import Unsupported
from graphzip.formats.onnx_files.reading import OnnxFile

__all__ = ["check_same", "run_module"]

_NEAR: Final = 1e-3
"""Of the largest number of a tensor. Two correct runs in float32 differ by about a thousandth of that, a wrong
operator by about all of it; what differs more than this in the middle of the model is named."""
_NEAR_OF: Final = {torch.float16: 3e-2, torch.bfloat16: 2e-1}


def check_same(file: OnnxFile, module: fx.GraphModule, calls: Sequence[Mapping[str, Tensor]]) -> None:
    """Compare the outputs for inputs by the file's names.

    Raises `ArchiveError` with the first node that gives something else, `ExampleInputError` where onnxruntime does not
    take the inputs.
    """
    session = _session(file, file.path)
    for call in calls:
        expected = _run(file, session, call)
        found = run_module(file, module, call)
        wrong = [name for name in file.outputs if not _near(found[name], expected[name])]
        if wrong:
            raise ArchiveError(
                f"{file.path}: {_blame(file, module, call) or f'the output {wrong[0]!r}'} gives something else in "
                "PyTorch than in onnxruntime; write the model as a program (torch.export.save) or give the code that "
                "builds it"
            )


def run_module(file: OnnxFile, module: fx.GraphModule, call: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of the module by the file's names. Raises `ExampleInputError` where it fails."""
    try:
        with torch.no_grad():
            found = module(*(call[each.name] for each in file.inputs))
    except Unsupported as error:
        raise ArchiveError(f"{file.path}: {error}; give the code that builds the model") from error
    except Exception as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in call.items())
        raise ExampleInputError(
            f"{file.path} fails on inputs of {shapes}: {short(error)}; give other sizes="
        ) from error
    return dict(zip(file.outputs, found.values(), strict=True))


def _session(file: OnnxFile, source: Path | bytes) -> Any:
    try:
        return session_of(source)
    except Exception as error:
        raise ArchiveError(f"{file.path} cannot be run by onnxruntime: {short(error)}") from error


def _run(file: OnnxFile, session: Any, call: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [each.name for each in session.get_outputs()]
    try:
        results = session.run(names, {name: value.numpy() for name, value in call.items()})
    except Exception as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in call.items())
        raise ExampleInputError(
            f"{file.path} does not take inputs of {shapes} in onnxruntime: {short(error)}; give other sizes="
        ) from error
    return {name: torch.from_numpy(value) for name, value in zip(names, results, strict=True)}


def _near(found: Any, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return False
    one, other = (torch.nan_to_num(each.double(), posinf=0.0, neginf=0.0) for each in (found, expected))
    scale = float(other.abs().max()) if other.numel() else 0.0
    return not other.numel() or float((one - other).abs().max()) <= _NEAR_OF.get(expected.dtype, _NEAR) * scale + 1e-30


def _blame(file: OnnxFile, module: fx.GraphModule, call: Mapping[str, Tensor]) -> str | None:
    """The first node of the file whose results differ."""
    onnx = require("onnx")
    proto = onnx.ModelProto()
    proto.CopyFrom(file.proto)
    del proto.graph.output[:]
    ours = _Values(module).of([call[each.name] for each in file.inputs])
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in ours)
    try:
        expected = _run(file, _session(file, proto.SerializeToString()), call)
    except Exception:  # of a file beyond 2 GB, which has no bytes in one piece
        return None
    for node in file.proto.graph.node:
        if any(name in ours and not _near(ours[name], expected[name]) for name in node.output):
            return f"the node {node.name or node.output[0]!r}, operator {node.op_type},"
    return None


class _Values(fx.Interpreter):
    """Runs a module and keeps what each node gives that has a name in the file."""

    def of(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        self.kept: dict[str, Tensor] = {}
        with torch.no_grad():
            self.run(*inputs)
        return self.kept

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if "onnx" in n.meta and isinstance(found, Tensor):
            self.kept[n.meta["onnx"]] = found
        return found
