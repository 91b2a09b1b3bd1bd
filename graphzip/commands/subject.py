"""The model that a command works on, and what it writes of the result: what several commands do alike."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from graphzip.commands.judging import Judge
from graphzip.commands.ranks import leads
from graphzip.commands.terminal import ExitCode, Tell, say, show
from graphzip.commands.usage import (
    Weights,
    build,
    calibration_of,
    check_files,
    check_opset,
    check_scope,
    check_writable,
    example_inputs,
    find,
    of_inputs,
    own_share,
    shapes_of,
    view_of,
)

if TYPE_CHECKING:
    from graphzip import Compiled
    from graphzip.commands.models import ModelSpec
    from graphzip.commands.options import DataOptions, SaveOptions, SourceOptions, ViewOptions

__all__ = ["BuiltModel", "Finished", "as_json_text", "built", "checked", "data_of", "finish", "view"]


@dataclass(frozen=True)
class BuiltModel:
    """A model that was built: how it is called, its inputs, and where those come from."""

    name: str
    module: Any
    example: Any
    source: str | None

    @contextlib.contextmanager
    def inputs_told(self) -> Iterator[None]:
        """Example inputs that are refused in here are spoken of as the option or file that gave them."""
        with of_inputs(self.source):
            yield


def built(
    model: str,
    source: SourceOptions,
    scope: str | None,
    seed: int,
    tell: Tell,
    *,
    spec: ModelSpec | None = None,
    plan_inputs: str | None = None,
) -> BuiltModel:
    """Build the model with its weights, which `spec` is where it was found before.

    Its example inputs are those of a plan where `plan_inputs` names its file.
    """
    shapes = shapes_of(source.inputs)
    spec = (spec or find(model)).asked(shapes, source.task)
    tell(f"building {spec.name}")
    module = build(spec, Weights(source.weights, source.weights_key, source.strip_prefix), seed)
    wanted = plan_inputs is None or bool(shapes)
    example = example_inputs(spec, module, shapes, seed) if wanted else None
    check_scope(model, module, scope)
    return BuiltModel(model, module, example, "--input" if shapes else plan_inputs)


def view(options: ViewOptions) -> dict[str, Any]:
    """The arguments of the library for which part and form of a model is worked on."""
    return view_of(options.scope, options.outputs, options.dynamic, options.mode.value)


def checked(
    model: str,
    source: SourceOptions,
    output: Path,
    saved: SaveOptions,
    data: DataOptions | None = None,
    *,
    plan: Path | None = None,
    cache: Path | None = None,
) -> None:
    """Refuse files that cannot be read or written before the work starts."""
    reads = {"--plan": plan, "--weights": source.weights}
    if data is not None:
        reads |= {"--calibration": data.calibration, "--labels": data.labels}
    check_files(model, reads, {"--output": output, "--save": saved.save, "--cache": cache})
    check_writable(output=output, save=saved.save, cache=cache)
    check_opset(saved.opset)


def data_of(data: DataOptions, source: SourceOptions) -> tuple[Any, Judge]:
    """The batches of the calibration data that this process reads, and what judges a model, on all of them."""
    batches = calibration_of(data.calibration, shapes_of(source.inputs))
    return own_share(batches), Judge.of(data.labels, data.evaluate, batches)


@dataclass(frozen=True)
class Finished:
    """What a command has to say in the end; `written` tells whether files are."""

    text: str
    model: str
    output: Path
    written: bool

    def show(self) -> None:
        """Print it. A plan that changed nothing ends the command with `ExitCode.UNCHANGED`."""
        show(self.text, str(self.output) if self.written else "")
        if not self.written:
            if leads():
                say(f"the plan changes nothing in {self.model}; nothing was written")
            raise typer.Exit(ExitCode.UNCHANGED)


def finish(
    compiled: Compiled,
    subject: BuiltModel,
    output: Path,
    saved: SaveOptions,
    tell: Tell,
    *,
    judge: Judge | None = None,
    card: bool = True,
    as_json: bool = False,
    packed: bool = False,
    per_task: bool = False,
) -> Finished:
    """Export and save what has changed or was `packed`, and measure it."""
    from graphzip.commands.text import compile_dict, compile_text

    (judge or Judge()).entitle(compiled)
    if not leads():
        return Finished("", subject.name, output, compiled.report.changed or packed)
    written = compiled.report.changed or packed
    exported = None
    if written:
        tell(f"exporting {output} and verifying it")
        exported = compiled.export(output, opset=saved.opset, ir_version=saved.ir_version, per_task=per_task)
        if card:
            tell("measuring before and after in onnxruntime")
            compiled.measure(subject.module)
    stored = _saved(compiled, saved.save, subject.module) if written else None
    told = as_json_text(compile_dict(compiled, exported, stored)) if as_json else None
    return Finished(told or compile_text(compiled, exported, stored), subject.name, output, written)


def _saved(compiled: Compiled, path: Path | None, model: Any) -> Path | None:
    """Save the module; where. What is of transformers goes into a folder, unless a file is named."""
    import graphzip as gz

    if path is None:
        return None
    model = getattr(model, "model", model) if isinstance(model, gz.Trace) else model
    if hasattr(model, "save_pretrained") and not path.suffix:
        gz.save_pretrained(compiled, model, path)
    else:
        compiled.save(path)
    return path


def as_json_text(data: dict[str, Any]) -> str:
    """JSON as it is printed."""
    return json.dumps(data, indent=2)
