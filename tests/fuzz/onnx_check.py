"""A result as a file: written, verified by graphzip, and run here at several batch sizes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import graphzip as gz
from fuzz.compare import Problem, apart, leaves, run
from fuzz.context import Context

__all__ = ["exports"]

SIZES = (4, 1, 7)
LOOSE = 2e-3

Float = Callable[[nn.Module], nn.Module]


def exports(c: Context, original: nn.Module | None, remake: Callable[[Float], gz.Compiled]) -> None:
    """The file of a result in float32 computes what it does (and what `original` does) at three batches.

    `remake` compiles anew, with what it is given to bring models into float32.
    """
    import onnxruntime

    with c.in_float32(), tempfile.TemporaryDirectory() as folder:
        c.stage = "float"
        compiled = remake(_float)
        c.stage = "export"
        path = Path(folder) / "model.onnx"
        try:
            report = compiled.export(path)
        except gz.ExportError as error:
            if "No ONNX function found" not in str(error):
                raise
            c.unwritten = True
            return
        c.stage = "onnx"
        if c.program.random:  # numbers cannot be compared
            told = report.notes or report.unchecked or compiled.report.notes
            model = _float(c.model)
            if not told and apart(run(model, c.inputs), run(model, c.inputs)):
                raise Problem("note", "a file of a forward that is random in eval mode has no note")
            return
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for batch in SIZES:
            _compare(c, original, compiled, session, report, batch)


def _float(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).float()


def _compare(
    c: Context, original: nn.Module | None, compiled: gz.Compiled, session: Any, report: Any, batch: int
) -> None:
    inputs = c.make(batch)
    reference = compiled.module if original is None else _float(original)
    try:
        expected = [leaf for leaf in leaves(_call(reference, compiled, inputs)) if isinstance(leaf, Tensor)]
        nudged = tuple(x * (1 + 1e-6 * torch.randn(x.shape)) if x.is_floating_point() else x for x in inputs)
        moved = [leaf for leaf in leaves(_call(reference, compiled, nudged)) if isinstance(leaf, Tensor)]
    except Exception:
        return
    wanted = {each.name: x.numpy() for each, x in _named(session, compiled, inputs)}
    try:
        found = session.run(None, wanted)
    except Exception as error:
        fixed = not report.dynamic_batch or not isinstance(session.get_inputs()[0].shape[0], str)
        if batch != SIZES[0] and (fixed or c.told(compiled)):
            return
        raise Problem("onnx", f"the file fails at batch {batch}: {str(error)[:200]}") from error
    for number, (left, right, again) in enumerate(zip(expected, found, moved, strict=True)):
        _close(left, np.asarray(right), again, f"output {number} of the file at batch {batch}")


def _call(module: nn.Module, compiled: gz.Compiled, inputs: Any) -> Any:
    if not compiled.tasks:
        return run(module, inputs)
    with torch.no_grad():
        return module(**{task: inputs[0] if len(inputs) == 1 else inputs for task in compiled.tasks})


def _named(session: Any, compiled: gz.Compiled, inputs: Any) -> list[tuple[Any, Tensor]]:
    held = {spec.name: x for spec, x in zip(compiled.traced.inputs, inputs, strict=False)}
    held |= dict(zip(("x", "z", "w"), inputs, strict=False))
    held |= {f"{task}_{name}": held[name] for task in compiled.tasks for name in ("x", "z", "w") if name in held}
    return [(each, held[each.name]) for each in session.get_inputs()]


def _close(left: Tensor, right: Any, again: Tensor, what: str) -> None:
    if tuple(left.shape) != tuple(right.shape):
        raise Problem("onnx", f"{what} has shape {tuple(right.shape)}, not {tuple(left.shape)}")
    value = torch.from_numpy(np.array(right)).to(left.dtype)
    if not left.numel():
        return
    if not left.is_floating_point():
        if not torch.equal(left, value) and torch.equal(left, again):
            raise Problem("onnx", f"{what} differs")
        return
    if not torch.equal(left.isfinite(), value.isfinite()):
        raise Problem("onnx", f"{what} is not finite elsewhere")
    finite = left.isfinite() & again.isfinite()
    if not finite.any():
        return
    scale = max(float(left[finite].abs().max()), 1e-20)
    loose = max(LOOSE, 50 * float((left - again)[finite].abs().max()) / scale)
    off = float((left - value)[finite].abs().max()) / scale
    if not off <= loose:
        raise Problem("onnx", f"{what} is off by {off:.2g} (tolerance {loose:.2g})")
