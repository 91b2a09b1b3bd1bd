"""Is an ONNX file the module? Three questions, asked of the file on disk.

Its graph: is it the graph that the module gives, operator by operator, constant by constant (`onnx_equality`)? Its
weights: are they the module's, whatever the converter did to them (`weights`)? Its outputs: in onnxruntime, at several
sizes, are they the module's, and could they have shown that they are not (`outputs`)?
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from graphzip.errors import ExportError, VerificationError
from graphzip.export.capture import Captured
from graphzip.export.convert import needs_two_files, save
from graphzip.export.derandomize import described_draws, is_deterministic, still_model, still_program
from graphzip.export.onnx_equality import difference, interface, rest
from graphzip.export.optional_packages import require
from graphzip.export.outputs import Judged, judge
from graphzip.export.rescaled_twin import settled
from graphzip.export.runs import (
    Refusal,
    Run,
    Runs,
    has_bfloat16,
    in_dtype,
    references,
    run_all,
    run_session,
    session_of,
    short,
    with_float32_example,
    with_float32_model,
)
from graphzip.export.weights import Found, trace_weights
from graphzip.progress import step

__all__ = ["Verification", "read_model", "verify_file"]

logger = logging.getLogger(__name__)

_NAMED = 5


@dataclass
class Verification:
    """What was compared; see `ExportReport`, whose fields these become."""

    max_abs_diff: float | None = None
    tolerance: float | None = None
    batches: tuple[int, ...] = ()
    shapes: tuple[dict[str, tuple[int, ...]], ...] = ()
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_model(path: Path) -> Any:
    """The ONNX model in a file. Raises `VerificationError` where there is none."""
    if not path.is_file():
        raise VerificationError(f"there is no file {path}; give the path that was exported to")
    try:
        model = require("onnx_ir").load(path)
        if not model.graph.outputs:
            raise ValueError("it has no outputs")
        for graph in model.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None and value.const_value.size:
                    value.const_value.tobytes()
                    rest(value.const_value)
    except Exception as error:
        raise VerificationError(f"{path} cannot be read as an ONNX model: {short(error)}") from error
    return model


Convert: TypeAlias = "Callable[[nn.Module], tuple[Captured, Any]]"
"""Captures and converts a twin of a module as the module was."""


def verify_file(
    path: Path, module: nn.Module, captured: Captured, model: Any, *, fresh: bool, convert: Convert
) -> Verification:
    """Compare the file at `path` with `module` in eval mode, which `captured` is traced from and `model` made of.

    The graph of a `fresh` file must be that of `model`, bit by bit, and so must one that the same version of the
    exporter wrote; of others only weights and outputs can be compared. `convert` makes the model of a twin. Raises
    `VerificationError` where the file is another model, `ExportError` where a fresh one cannot be run.
    """
    there = read_model(path)
    found = Verification()
    for what, wanted, own in zip(("inputs", "outputs"), interface(model), interface(there), strict=True):
        if wanted != own:
            raise VerificationError(
                f"{path.name} is not the module: its {what} are {', '.join(own)}, the module's {', '.join(wanted)}"
            )
    step(f"comparing graph and weights of {path.name} with the module")
    weights = trace_weights(there, module, captured.program)
    differs = difference(model, there, () if fresh else weights.computed)
    if weights.wrong:
        raise VerificationError(f"{path.name} is not the module: {weights.wrong[0]}")
    if differs is not None:
        if fresh or _writer(model) == _writer(there) or (weights.missing and weights.untraced):
            raise VerificationError(f"{path.name} is not the graph of the module: {differs}")
        found.unchecked.append(f"the graph is not the one that this version of the exporter writes ({differs})")
    found.unchecked += _weight_sentences(weights)
    if has_bfloat16(there):
        _compare_in_float32(there, module, captured, found)
        return found
    try:
        session = session_of(path, slim=needs_two_files(there))
    except Exception as error:
        reason = f"onnxruntime cannot load the model on the CPU: {short(error, path)}"
        if fresh:
            raise ExportError(
                f"{reason}; so it cannot be verified: convert the module to float32 first, or pass verify=False if the "
                "runtime you ship to supports it"
            ) from error
        if differs is not None:
            raise VerificationError(f"{path.name}: {reason}") from error
        found.unchecked.append(f"the outputs were not compared: {reason}")
        return found
    _compare_outputs(session, there, module, captured, found, convert if differs is None else None)
    return found


def _writer(model: Any) -> tuple[Any, ...]:
    return model.producer_name, model.producer_version, model.opset_imports.get("")


def _weight_sentences(weights: Found) -> list[str]:
    found = []
    if weights.untraced:
        found.append(f"constants of the file that are no weight in a known form: {_listed(weights.untraced)}")
    if weights.missing:
        found.append(f"weights of the module that were not found in the file: {_listed(weights.missing)}")
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(repr(name) for name in names[:_NAMED]) + more


def _compare_outputs(
    session: Any, there: Any, module: nn.Module, captured: Captured, found: Verification, convert: Convert | None
) -> None:
    draws = described_draws(captured.program)
    reference = module
    if draws:
        deterministic = is_deterministic(there)
        still = still_program(captured.program)
        if still is None or not still_model(there):
            found.unchecked.append(f"the outputs were not compared: they are random ({', '.join(draws)})")
            return
        session, reference = _session_of(there), still
        found.unchecked.append(
            f"random operators were held still, so what they draw was not compared: {', '.join(draws)}"
        )
        if deterministic:
            found.notes.append(f"the file draws no random numbers where the module does: {', '.join(draws)}")
    step("comparing outputs in onnxruntime")
    runs = run_all(reference, captured)
    judged = _judged(session, reference, captured, runs)
    if convert is not None and not draws and any(each.unchecked for each in judged):
        _look_again(judged, there, module, captured, runs, convert, found)
    _take(judged, found)
    _take_calls(runs.made, captured, found)
    for refusal in runs.refused:
        _take_refusal(refusal, captured, found, refused=_refuses(session, refusal))


def _compare_in_float32(there: Any, module: nn.Module, captured: Captured, found: Verification) -> None:
    """Compare the outputs of a model in bfloat16 as if both were in float32."""
    if draws := described_draws(captured.program):
        found.unchecked.append(f"the outputs were not compared: they are random, in bfloat16 ({', '.join(draws)})")
        return
    with_float32_model(there)
    try:
        session = _session_of(there)
    except Exception as error:
        found.unchecked.append(f"the outputs were not compared: onnxruntime cannot load the model: {short(error)}")
        return
    _compare_outputs(session, there, in_dtype(module, torch.float32), with_float32_example(captured), found, None)
    found.notes.append(
        "onnxruntime has no bfloat16 on the CPU: graph and weights were compared as they are, and outputs with all of "
        "bfloat16 read as float32"
    )


def _judged(session: Any, module: nn.Module, captured: Captured, runs: Runs) -> list[Judged]:
    wanted = references(module, captured, runs.made)
    results = [run_session(session, run, call) for run, call in zip(runs.made, wanted[0].calls, strict=True)]
    if any(len(outputs) != len(wanted) for outputs in results):
        raise VerificationError(f"the file has {len(results[0])} outputs, where the module has {len(wanted)}")
    return [judge(each, [outputs[k] for outputs in results]) for k, each in enumerate(wanted)]


def _look_again(
    judged: Sequence[Judged],
    there: Any,
    module: nn.Module,
    captured: Captured,
    runs: Runs,
    convert: Convert,
    found: Verification,
) -> None:
    """Judge outputs that show nothing in a twin with settled batch norms, whose model has the operators of the file.

    The file's weights were compared by themselves. Raises `VerificationError` where the twin's model is not the twin.
    """
    largest = max(runs.made, key=lambda run: run.case.batch or 0)
    try:
        twin = settled(module, captured.program, largest.case)
        if twin is None:
            return
        of_twin, model = convert(twin)
        if difference(model, there, weights=False) is not None:
            return
        session, calls = _session_of(model), run_all(twin, of_twin)
    except Exception:
        logger.debug("outputs could not be compared in a twin", exc_info=True)
        return
    try:
        second = _judged(session, twin, of_twin, calls)
    except VerificationError as error:
        raise VerificationError(f"with batch norms that fit the example, {error}") from error
    settled_ones = [old for old, new in zip(judged, second, strict=True) if old.unchecked and _settles(old, new)]
    for old in settled_ones:
        old.unchecked, old.strong = [], True
    if names := [old.name for old in settled_ones]:
        found.notes.append(
            f"inputs hardly move {_listed(names)}, for its batch norms do not fit the example; so the operators of the "
            "file were compared in a twin whose batch norms do, and its weights one by one"
        )


def _settles(old: Judged, new: Judged) -> bool:
    """Whether what an output could not show is shown in the twin: by at least half of those parts that did not."""
    if not (old.finite and new.finite and new.strong):
        return False
    if not new.unchecked:
        return True
    alike = (old.dim, len(old.shows)) == (new.dim, len(new.shows))
    looked_at = [new.shows[part] for part in range(len(new.shows)) if not (alike and old.shows[part])]
    return 2 * sum(looked_at) >= len(looked_at)


def _session_of(model: Any) -> Any:
    """A session of a model that is in no file of its own; onnxruntime's error where it cannot load it."""
    if needs_two_files(model):
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "model.onnx", external=True)
            return session_of(Path(folder) / "model.onnx", slim=True)
    ir = require("onnx_ir")
    return session_of(bytes(ir.to_proto(ir.external_data.load_to_model(model)).SerializeToString()))


def _take(judged: Sequence[Judged], found: Verification) -> None:
    closest = max(judged, key=lambda each: each.difference / each.tolerance if each.tolerance else -1.0)
    found.max_abs_diff, found.tolerance = closest.difference, closest.tolerance
    for each in judged:
        found.unchecked += each.unchecked
    plain = [each.name for each in judged if each.exact_only and not each.strong and not each.unchecked]
    if plain and not any(each.strong for each in judged):
        found.unchecked.append(f"outputs of integers, which small errors leave as they are: {_listed(plain)}")


def _take_calls(runs: Sequence[Run], captured: Captured, found: Verification) -> None:
    shapes = dict.fromkeys(run.case.shapes for run in runs)
    found.shapes = tuple(dict(zip(captured.inputs, each, strict=True)) for each in shapes)
    found.batches = tuple(sorted({run.case.batch for run in runs if run.case.batch is not None}))


def _refuses(session: Any, refusal: Refusal) -> bool:
    """Whether the file does not take the inputs that the module does not take."""
    if refusal.case is None:
        return False
    try:
        run_session(session, Run(refusal.kind, refusal.case, []), "")
    except VerificationError:
        return True
    return False


def _take_refusal(refusal: Refusal, captured: Captured, found: Verification, *, refused: bool) -> None:
    names = {"batch": captured.sizes.batches, "sizes": captured.sizes.others}.get(refusal.kind, [])
    free = ", ".join(captured.symbols[str(symbol)] for symbol in names)
    sentence = {
        "values": f"the module takes no other values than the example's: {refusal.reason}",
        "one": f"the module takes no batch of one ({refusal.reason}); "
        f"{'the file refuses it, too' if refused else 'the file cannot refuse it'}",
    }.get(
        refusal.kind, f"{free} is free in the file, but the module takes no other size that was tried: {refusal.reason}"
    )
    (found.notes if refusal.kind == "one" else found.unchecked).append(sentence)
