"""The command line: `graphzip inspect`, `graphzip plan`, `graphzip compile`, `graphzip demo`.

stdout carries data, stderr carries progress, logs and errors. Exit codes: 0 done, 1 failure, 2 wrong usage or plan,
3 the exported file failed its verification, 4 the plan changed nothing, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from graphzip.errors import (
    ArchiveError,
    ExampleInputError,
    ExportError,
    GraphZipError,
    MissingDependencyError,
    PlanError,
    VerificationError,
)
from graphzip.files import check_target
from graphzip.tables import closest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graphzip.models import InputShape, ModelSpec

__all__ = ["ExitCode", "app", "main"]


class ExitCode(IntEnum):
    """What a command's exit status says."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    VERIFICATION = 3
    UNCHANGED = 4
    INTERRUPTED = 130


_BAR = 30  # characters


class UsageError(GraphZipError):
    """A command line that asks for what does not exist."""


_USAGE_ERRORS = (PlanError, ExampleInputError, UsageError)

app = typer.Typer(
    name="graphzip",
    help="Make trained PyTorch models slimmer without changing what they compute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="torchvision:NAME, timm:NAME or path/to/file.py:factory")
]
InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", help="shape of an input, such as 1x3x224x224 or 1x16:int64; once per input"),
]
WeightsOption = Annotated[Path | None, typer.Option("--weights", help="state dict to load: .pt, .pth or .safetensors")]
WeightsKeyOption = Annotated[
    str | None, typer.Option("--weights-key", help="which of several state dicts of a checkpoint, such as ema")
]
StripPrefixOption = Annotated[
    str | None, typer.Option("--strip-prefix", help="what all names of the weights begin with and the model's do not")
]
ScopeOption = Annotated[str | None, typer.Option("--scope", help="name of the submodule to look at, the rest stays")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
SeedOption = Annotated[int, typer.Option("--seed", help="seed of everything random")]
MacsOption = Annotated[
    float | None, typer.Option("--macs", help="budget of multiply-accumulates: up to 1 a share, above it a number")
]
ParamsOption = Annotated[float | None, typer.Option("--params", help="budget of parameters, likewise")]
BytesOption = Annotated[float | None, typer.Option("--bytes", help="budget of bytes of parameters and buffers")]
LatencyOption = Annotated[
    float | None,
    typer.Option("--latency", help="budget of onnxruntime's time for one sample here: share or milliseconds"),
]
CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help=".npz file with one array of samples per input; no labels needed")
]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="file that keeps measurements, so that a stopped run goes on")
]
VerboseOption = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="logs on stderr, and where an error came from; -vv: more")
]


def _version(wanted: bool) -> None:
    if wanted:
        import graphzip

        typer.echo(f"graphzip {graphzip.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Make trained PyTorch models slimmer without changing what they compute."""


@app.command()
def inspect(
    model: ModelArgument,
    inputs: InputOption = None,
    weights: WeightsOption = None,
    weights_key: WeightsKeyOption = None,
    strip_prefix: StripPrefixOption = None,
    scope: ScopeOption = None,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="GROUP", help="say which operators a group runs through")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--graph", metavar="FILE", help="also draw the groups: .svg, .png or .pdf")
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Print the channel groups of a model: what is coupled, and what can shrink."""
    with _at_work(verbose) as tell:
        import graphzip as gz

        spec = _find(model)
        shapes = _shapes(inputs)
        tell(f"building {model}")
        module = _build(spec, Weights(weights, weights_key, strip_prefix))
        example = _example_inputs(spec, module, shapes)
        _check_scope(model, module, scope)
        tell(f"tracing {model}")
        groups = gz.channel_groups(module, example, scope=scope)
        if explain is not None and explain not in groups.names:
            raise UsageError(f"--explain: there is no channel group {explain!r}; {closest(explain, groups.names)}")
        if picture is not None:
            gz.draw_groups(groups, picture)
        shown = groups if explain is None else groups.explain(explain)
        text = _json(shown.to_dict()) if as_json else str(shown)
    typer.echo(text)


@app.command(name="plan")
def plan_(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="plan file to write (YAML)")],
    macs: MacsOption = None,
    params: ParamsOption = None,
    bytes_: BytesOption = None,
    latency: LatencyOption = None,
    calibration: CalibrationOption = None,
    cache: CacheOption = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="also draw sensitivities and frontier: .svg, .png, .pdf"),
    ] = None,
    inputs: InputOption = None,
    weights: WeightsOption = None,
    weights_key: WeightsKeyOption = None,
    strip_prefix: StripPrefixOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    verbose: VerboseOption = 0,
) -> None:
    """Find the widths that meet a budget and move the outputs least, and write them as a plan."""
    with _at_work(verbose) as tell:
        import graphzip as gz

        budget = _budget(macs, params, bytes_, latency)
        check_target(output, PlanError)
        spec = _find(model)
        shapes = _shapes(inputs)
        tell(f"building {model}")
        module = _build(spec, Weights(weights, weights_key, strip_prefix), seed)
        example = _example_inputs(spec, module, shapes, seed)
        tell(f"tracing {model}")
        study = gz.WidthStudy(module, example, calibration=_calibration(calibration), cache=cache, seed=seed)
        study.check(**budget)
        study.measure(tell.bar)
        tell("splitting the budget")
        plan = study.plan(**budget)
        plan.save(output)
        if plot is not None:
            gz.draw_study(study, plot)
        text = _json(plan.to_dict()) if as_json else output.read_text(encoding="utf-8").rstrip()
    typer.echo(text)


@app.command(name="compile")
def compile_(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write")],
    plan_file: Annotated[Path | None, typer.Option("--plan", help="plan file (YAML), or give a budget")] = None,
    macs: MacsOption = None,
    params: ParamsOption = None,
    bytes_: BytesOption = None,
    latency: LatencyOption = None,
    calibration: CalibrationOption = None,
    cache: CacheOption = None,
    save: Annotated[Path | None, typer.Option("--save", help="also save the trainable module to this file")] = None,
    inputs: InputOption = None,
    weights: WeightsOption = None,
    weights_key: WeightsKeyOption = None,
    strip_prefix: StripPrefixOption = None,
    scope: ScopeOption = None,
    opset: Annotated[int | None, typer.Option("--opset", help="ONNX opset; default: what the exporter advises")] = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    verbose: VerboseOption = 0,
) -> None:
    """Carry out a plan, or the best one for a budget, and export the slim model as verified ONNX."""
    with _at_work(verbose) as tell:
        import graphzip as gz
        from graphzip.report import compile_dict, compile_text

        budget = {} if plan_file else _budget(macs, params, bytes_, latency)
        if plan_file is not None and any(each is not None for each in (macs, params, bytes_, latency)):
            raise UsageError("--plan and a budget are both given; a plan has its widths already, so leave one out")
        plan = gz.Plan.load(plan_file) if plan_file is not None else gz.Plan([])
        _check_targets(output, save)
        spec = _find(model)
        shapes = _shapes(inputs)
        tell(f"building {model}")
        module = _build(spec, Weights(weights, weights_key, strip_prefix), seed)
        example = None if plan.inputs and not shapes else _example_inputs(spec, module, shapes, seed)
        _check_scope(model, module, scope)
        data = _calibration(calibration)
        if budget:
            if scope is not None:
                raise UsageError("--scope goes with --plan; a budget is split over the whole model")
            assert example is not None
            study = gz.WidthStudy(module, example, calibration=data, cache=cache, seed=seed)
            study.check(**budget)
            study.measure(tell.bar)
            plan = study.plan(**budget)
        tell(f"compiling {model}")
        compiled = gz.compile(module, plan, example, calibration=data, seed=seed, scope=scope)
        exported = saved = None
        if compiled.report.changed:
            tell(f"exporting {output} and verifying it")
            exported = compiled.export(output, opset=opset)
            if save is not None:
                compiled.save(save)
                saved = save
        text = _json(compile_dict(compiled, exported, saved)) if as_json else compile_text(compiled, exported, saved)
    typer.echo(text)
    if exported is None:
        _say(f"the plan changes nothing in {model}; nothing was written")
        raise typer.Exit(ExitCode.UNCHANGED)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="directory to keep both ONNX files in")] = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    verbose: VerboseOption = 0,
) -> None:
    """Train a small network, halve it, export and verify it, and compare before and after. Takes under a minute."""
    with _at_work(verbose) as tell:
        from graphzip.demo import run
        from graphzip.report import demo_dict, demo_text

        result = run(seed=seed, out=out, tell=tell)
        text = _json(demo_dict(result)) if as_json else demo_text(result)
    typer.echo(text)


def main() -> None:
    """Entry point of the `graphzip` script."""
    try:
        app()
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(ExitCode.INTERRUPTED)


# ------------------------------------------------------------------------------------------------- while working


class _Progress:
    """Says on stderr what is being done: a spinner on a terminal, nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        self._status = console.status("starting")

    def __enter__(self) -> _Progress:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, text: str) -> None:
        logging.getLogger(__name__).info(text)
        self._status.update(text)

    def bar(self, done: int, total: int, text: str) -> None:
        """How much of many alike things is done, and what comes next."""
        full = _BAR * done // max(total, 1)
        self(f"{'━' * full}{'╌' * (_BAR - full)} {done}/{total} {text}")


@contextlib.contextmanager
def _at_work(verbose: int) -> Iterator[_Progress]:
    """Logs and whatever the work prints go to stderr; an error becomes one line there and an exit code."""
    console = Console(stderr=True)
    try:
        with contextlib.redirect_stdout(sys.stderr), _logging(console, verbose), _Progress(console) as progress:
            yield progress
    except (KeyboardInterrupt, Exception) as error:
        if verbose:
            console.print_exception()
        _say(_message(error))
        raise typer.Exit(_exit_code(error)) from None


@contextlib.contextmanager
def _logging(console: Console, verbose: int) -> Iterator[None]:
    root = logging.getLogger()
    handler = RichHandler(console=console, show_path=False, markup=False)
    level = root.level
    root.addHandler(handler)
    root.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if verbose else "ignore")
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def _exit_code(error: BaseException) -> ExitCode:
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, VerificationError):
        return ExitCode.VERIFICATION
    return ExitCode.USAGE if isinstance(error, _USAGE_ERRORS) else ExitCode.FAILURE


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, GraphZipError):
        return f"error: {error}"
    return f"error: unexpected {type(error).__name__}: {error}; a fault of graphzip, run again with -v to see where"


def _say(text: str) -> None:
    typer.echo(f"graphzip: {text}", err=True)


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2)


# ------------------------------------------------------------------------------------------------- arguments


def _find(model: str) -> ModelSpec:
    from graphzip.models import find_model

    try:
        return find_model(model)
    except MissingDependencyError:
        raise
    except GraphZipError as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True)
class Weights:
    """What the options on weights say."""

    path: Path | None
    key: str | None
    strip_prefix: str | None


def _build(spec: ModelSpec, weights: Weights, seed: int = 0) -> nn.Module:
    import torch

    from graphzip.weights import load_weights

    torch.manual_seed(seed)
    module = spec.build()
    if weights.path is not None:
        for sentence in load_weights(module, weights.path, key=weights.key, strip_prefix=weights.strip_prefix):
            _say(f"{weights.path}: {sentence}")
    elif weights.key is not None or weights.strip_prefix is not None:
        raise UsageError("--weights-key and --strip-prefix say how to read --weights, which is not given")
    return module


def _shapes(inputs: list[str] | None) -> tuple[InputShape, ...]:
    from graphzip.models import parse_shape

    return tuple(parse_shape(text) for text in inputs or ())


def _example_inputs(
    spec: ModelSpec, module: nn.Module, shapes: tuple[InputShape, ...], seed: int = 0
) -> tuple[Tensor, ...]:
    from graphzip.models import make_inputs

    known = shapes or spec.inputs(module)
    if not known:
        raise ExampleInputError(
            f"what {spec.name} takes is not known; give the shape of every input: --input 1x3x224x224"
        )
    return make_inputs(module, known, seed=seed)


def _budget(macs: float | None, params: float | None, bytes_: float | None, latency: float | None) -> dict[str, float]:
    amounts = {"macs": macs, "params": params, "bytes": bytes_, "latency": latency}
    given = {what: amount for what, amount in amounts.items() if amount is not None}
    if len(given) != 1:
        named = " and ".join(f"--{what}" for what in given) or "none"
        raise UsageError(f"give one budget, --macs, --params, --bytes or --latency; got {named}")
    return given


def _calibration(path: Path | None) -> list[tuple[Tensor, ...]] | None:
    from graphzip.models import load_calibration

    return None if path is None else load_calibration(path)


def _check_scope(model: str, module: nn.Module, scope: str | None) -> None:
    known = [name for name, _ in module.named_modules() if name]
    if scope is not None and scope not in known:
        raise UsageError(f"{model} has no submodule {scope!r}; {closest(scope, known)}")


def _check_targets(output: Path, save: Path | None) -> None:
    check_target(output, ExportError)
    if save is not None:
        check_target(save, ArchiveError)
        if save.resolve() == output.resolve():
            raise UsageError(f"--output and --save both name {output}; give the saved module another name")
