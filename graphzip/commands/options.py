"""The options of the commands: each stands here once, in a group with those that come with it.

A command takes groups as arguments, `def inspect(model: ModelArgument, source: SourceOptions, ...)`; `command` makes of
them the flat list of options that typer reads. `--config FILE` holds any option of a command, under its long name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from graphzip.commands.config import read_config
from graphzip.commands.usage import amount
from graphzip.limits import SEEDS

__all__ = [
    "BudgetOptions",
    "CardOption",
    "DataOptions",
    "DeviceOption",
    "EffortLevel",
    "Mode",
    "ModelArgument",
    "OpsetOptions",
    "OutputOption",
    "RunOptions",
    "Runtime",
    "SaveOptions",
    "SourceOptions",
    "ViewOptions",
    "WidthRuleOptions",
    "command",
]


class Mode(str, Enum):
    """Which form of a model is looked at."""

    EVAL = "eval"
    TRAIN = "train"


class EffortLevel(str, Enum):
    """What finding the widths for a budget may cost."""

    FAST = "fast"
    NORMAL = "normal"
    THOROUGH = "thorough"


class Runtime(str, Enum):
    """Where the model is to run: widths are multiples of what it computes at once."""

    ONNXRUNTIME = "onnxruntime-cpu"
    TENSORRT = "tensorrt"
    ARM = "arm"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, hf:FOLDER, model.onnx, program.pt2 or path/to/file.py:factory",
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write")]
CardOption = Annotated[
    bool, typer.Option("--card/--no-card", help="measure latency and memory in onnxruntime, before and after")
]


DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="where --calibration is run: cuda, cuda:1; under torchrun cuda is each rank's own"),
]


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """Where weights and inputs of a model come from."""

    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="shape of an input: 1x3x224x224, 1x16:int64 or ids=1x16:int64; once per input"),
    ] = None
    weights: Annotated[Path | None, typer.Option("--weights", help="state dict to load: .pt, .pth or .safetensors")] = (
        None
    )
    weights_key: Annotated[
        str | None, typer.Option("--weights-key", help="which of several state dicts of a checkpoint, such as ema")
    ] = None
    strip_prefix: Annotated[
        str | None,
        typer.Option("--strip-prefix", help="what all names of the weights begin with and the model's do not"),
    ] = None
    task: Annotated[
        str | None, typer.Option("--task", help="of hf:FOLDER: what the model is for, such as text-generation")
    ] = None


@dataclasses.dataclass(frozen=True)
class ViewOptions:
    """Which part and which form of a model is worked on."""

    scope: Annotated[str | None, typer.Option("--scope", help="name of the submodule to look at, the rest stays")] = (
        None
    )
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            "--outputs", metavar="NAMES", help="results that matter, such as logits or 0,1; the others are left out"
        ),
    ] = None
    dynamic: Annotated[
        str | None,
        typer.Option(
            "--dynamic", metavar="SIZES", help="sizes to leave open: height,width or length or 2,3; any batch is"
        ),
    ] = None
    mode: Annotated[
        Mode, typer.Option("--mode", help="eval, or train: the form that the model has in training, too")
    ] = Mode.EVAL


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Data to fit to, and how the result is judged."""

    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help=".npz file with an array of samples per input, or .npy; no labels"),
    ] = None
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help=".npy of class indices in the order of --calibration: the card shows accuracy"),
    ] = None
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--evaluate",
            metavar="MODULE:FUNCTION",
            help="your score of a module, higher is better; or file.py:function",
        ),
    ] = None
    card: CardOption = True


@dataclasses.dataclass(frozen=True)
class BudgetOptions:
    """What the model may cost, and what finding the widths for that may."""

    macs: Annotated[
        float | None,
        typer.Option(
            "--macs", callback=amount, help="budget of multiply-accumulates: up to 1 a share, above it a number"
        ),
    ] = None
    params: Annotated[
        float | None, typer.Option("--params", callback=amount, help="budget of parameters, likewise")
    ] = None
    bytes: Annotated[
        float | None, typer.Option("--bytes", callback=amount, help="budget of bytes of parameters and buffers")
    ] = None
    latency: Annotated[
        float | None,
        typer.Option(
            "--latency", callback=amount, help="budget of onnxruntime's time for one sample here: share or milliseconds"
        ),
    ] = None
    cache: Annotated[
        Path | None, typer.Option("--cache", help="file that keeps measurements, so that a stopped run goes on")
    ] = None
    effort: Annotated[
        EffortLevel,
        typer.Option(
            "--effort", help="what finding the widths may cost; 'thorough' grows with the square of the depth"
        ),
    ] = EffortLevel.NORMAL
    target: Annotated[
        Runtime | None, typer.Option("--target", help="widths are multiples of what this runtime computes at once")
    ] = None
    uniform: Annotated[
        bool, typer.Option("--uniform", help="layers of the same kind keep the same number of channels")
    ] = False

    @property
    def amounts(self) -> dict[str, float | None]:
        """Each budget, `None` where it is not given."""
        return {"macs": self.macs, "params": self.params, "bytes": self.bytes, "latency": self.latency}


@dataclasses.dataclass(frozen=True)
class WidthRuleOptions:
    """What widths have to keep to."""

    round_to: Annotated[
        int | None, typer.Option("--round-to", min=1, help="widths are multiples of so many channels")
    ] = None
    min_width: Annotated[
        int | None, typer.Option("--min-width", min=1, help="channels that a group which shrinks keeps at least")
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="GLOB", help="groups that stay whole, such as 'stem*'; once per pattern"),
    ] = None


@dataclasses.dataclass(frozen=True)
class OpsetOptions:
    """How the ONNX file is written."""

    ir_version: Annotated[
        int | None, typer.Option("--ir-version", help="version of ONNX's format; lower for an old runtime")
    ] = None
    opset: Annotated[int | None, typer.Option("--opset", help="ONNX opset; default: what the exporter advises")] = None


@dataclasses.dataclass(frozen=True)
class SaveOptions(OpsetOptions):
    """What is written beside the ONNX file, too."""

    save: Annotated[
        Path | None, typer.Option("--save", help="also save the trainable module: a file, or for hf: a new folder")
    ] = None


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What every command takes."""

    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            callback=read_config,
            is_eager=True,
            help="YAML file with any of these options: {macs: 0.5}",
        ),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEEDS - 1, help="seed of everything random")] = 0
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, help="logs on stderr, and where an error came from; -vv: more"),
    ] = 0


# ------------------------------------------------------------------------------------------------- commands

_Command = Callable[..., None]


def command(app: typer.Typer, name: str, *examples: str) -> Callable[[_Command], _Command]:
    """Register a function whose arguments may be groups of options, with examples below its help."""

    def register(function: _Command) -> _Command:
        lines = "\n\n".join(f"  {example}" for example in examples)
        app.command(name=name, epilog=f"Examples:\n\n{lines}" if examples else None)(flat(function))
        return function

    return register


def flat(function: _Command) -> _Command:
    """The function with an argument for each option of its groups, in their order."""
    hints = get_type_hints(function, include_extras=True)
    plain: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            options = _options(hint)
            groups[parameter.name] = (hint, [each.name for each in options])
            plain += options
        else:
            plain.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def called(**given: Any) -> None:
        made = {name: kind(**{each: given.pop(each) for each in names}) for name, (kind, names) in groups.items()}
        function(**given, **made)

    del called.__wrapped__
    called.__signature__ = inspect.Signature(plain)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in plain}
    return called


def _options(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(group)
    ]
