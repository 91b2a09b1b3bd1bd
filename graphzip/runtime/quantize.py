"""Files that are made of a verified one: int8 by onnxruntime's own quantizer, float16, and simplified by onnxslim.

int8 is static quantization in QDQ form: weights per channel, activations at scales that are taken from calibration
data (entropy: Migacz, "8-bit Inference with TensorRT", 2017; percentile: what all but a few values stay below). What is
written computes something else than the module, so it is compared with it on data and within an error that is stated.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from graphzip.arguments import number
from graphzip.errors import ExportError, GraphZipError, VerificationError
from graphzip.export.optional_packages import require
from graphzip.export.report import ExportReport
from graphzip.export.runs import session_of, short
from graphzip.files import staged
from graphzip.progress import step

__all__ = ["Rework", "export_reworked", "rework_of"]

ERRORS: Final = {"int8": 0.1, "fp16": 0.01, "": 1e-4}
"""How far outputs may be off, of the largest output, where nothing else is asked for."""

KINDS: Final = ("int8", "fp16")
METHODS: Final = ("percentile", "entropy", "minmax")
_NAMES: Final = {"percentile": "Percentile", "entropy": "Entropy", "minmax": "MinMax"}

Feed = dict[str, Any]


@dataclass(frozen=True)
class Rework:
    """What is asked for: the `kind` of numbers (empty: they stay), how scales are found, the largest error that is
    allowed, and whether onnxslim simplifies the graph before.
    """

    kind: str
    method: str
    error: float
    simplify: bool = False

    def __str__(self) -> str:
        return " ".join([*(["simplified"] if self.simplify else []), *([self.kind] if self.kind else [])])


def rework_of(quantize: str | None, error: float | None, *, simplify: bool, several: bool, has_data: bool) -> Rework:
    """What arguments of `Compiled.export` ask for. Raises `ExportError` where they do not fit each other."""
    kind, _, method = (quantize or "").partition("-")
    method = method or METHODS[0]
    if (
        (quantize is not None and kind not in KINDS)
        or method not in METHODS
        or (kind == "fp16" and "-" in str(quantize))
    ):
        known = ", ".join([*KINDS, *(f"int8-{method}" for method in METHODS[1:])])
        raise ExportError(f"quantize: {quantize!r} is not written; write one of {known}, or leave it out")
    if several:
        raise ExportError("quantize and simplify are for a single model; export each task of a joint one by itself")
    if kind == "int8" and not has_data:
        raise ExportError("quantize='int8' needs calibration data: pass calibration=, a list of batches")
    allowed = ERRORS[kind] if error is None else number(error, "error", above=0.0)
    return Rework(kind, method, allowed, simplify)


def export_reworked(
    path: Path,
    asked: Rework,
    write: Callable[[Path], ExportReport],
    answers: Callable[[], Sequence[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]],
) -> ExportReport:
    """Let `write` make and verify the file in float, rework it, and put it at `path` once it has been compared.

    `answers` gives pairs of the inputs of the file and what the module gives for them, on which it is calibrated and
    compared. Raises `ExportError` where a tool fails, `MissingDependencyError` without it, `VerificationError` where
    outputs are off by more than the error that is allowed; then nothing is written.
    """
    with tempfile.TemporaryDirectory() as folder, staged(path, ExportError) as target:
        plain, batches = Path(folder) / "float.onnx", answers()
        report = write(plain)
        names = [each.name for each in session_of(plain).get_inputs()]
        feeds = [dict(zip(names, (leaf.cpu().numpy() for leaf in inputs), strict=True)) for inputs, _ in batches]
        if asked.simplify:
            step("simplifying")
            _carried_out("simplify: onnxslim", lambda: _simplify(plain, plain if asked.kind else target))
        if asked.kind:
            step(f"quantizing to {asked.kind}")
            what = f"quantize={asked.kind!r}: onnxruntime's quantizer"
            _carried_out(what, lambda: _quantize(plain, target, asked, feeds))
        step("comparing outputs in onnxruntime")
        _keep_format(target, report)
        worst, scale = _apart(target, feeds, [outputs for _, outputs in batches])
        share = worst / scale if scale else worst
        if not share <= asked.error:
            raise VerificationError(
                f"{asked}: outputs are off by {share:.3g} of the largest output, {asked.error:g} are allowed; give "
                "more calibration data, another method= or a larger error=; nothing was written"
            )
        size = sum(file.stat().st_size for file in target.parent.iterdir())
    note = (
        f"{asked}: outputs are off by {share:.2g} of the largest output at most on {len(batches)} batches "
        f"({asked.error:g} allowed)"
    )
    return replace(
        report, path=path, bytes=size, max_abs_diff=worst, tolerance=asked.error * scale, notes=(*report.notes, note),
        quantized=asked.kind or None, external_data=False, batches=(), shapes=(),
    )  # fmt: skip


def _carried_out(what: str, work: Callable[[], None]) -> None:
    try:
        with _quiet():
            work()
    except GraphZipError:
        raise
    except Exception as error:  # of tools that raise whatever comes
        raise ExportError(f"{what} fails: {short(error)}; nothing was written") from error


def _simplify(source: Path, target: Path) -> None:
    slimmed = require("onnxslim").slim(str(source))
    require("onnx").save(slimmed, target)


def _keep_format(file: Path, wanted: ExportReport) -> None:
    """Let a file that a tool wrote have the version of the format that it was exported in, or the next one it needs."""
    onnx = require("onnx")
    model = onnx.load(file)
    model.ir_version = max(wanted.ir_version, onnx.helper.find_min_ir_version_for(model.opset_import, True))
    onnx.save(model, file)


def _quantize(plain: Path, target: Path, asked: Rework, feeds: Sequence[Feed]) -> None:
    onnx = require("onnx")
    if asked.kind == "fp16":
        from onnxruntime.transformers import float16

        onnx.save(float16.convert_float_to_float16(onnx.load(plain), keep_io_types=True), target)
        return
    from onnxruntime import quantization

    class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self.left, None)

    quantization.quantize_static(
        plain,
        target,
        _Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=getattr(quantization.CalibrationMethod, _NAMES[asked.method]),
    )


def _apart(file: Path, feeds: Sequence[Feed], wanted: Sequence[Sequence[torch.Tensor]]) -> tuple[float, float]:
    """The largest difference of an output, and the largest output; an infinite difference where one is not finite."""
    session, worst, scale = session_of(file), 0.0, 0.0
    for feed, outputs in zip(feeds, wanted, strict=True):
        try:
            given = session.run(None, feed)
        except Exception as error:
            raise VerificationError(f"the reworked file fails in onnxruntime: {short(error)}") from error
        for found, output in zip(given, outputs, strict=True):
            reference = output.detach().cpu().double().numpy()
            apart = float(np.abs(found.astype(np.float64) - reference).max(initial=0.0))
            worst = max(worst, apart) if np.isfinite(apart) else np.inf
            scale = max(scale, float(np.abs(reference).max(initial=0.0)))
    return worst, scale


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer prints, and logs its advice on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
