"""The command line: `graphzip inspect`, `graphzip plan`, `graphzip compile`, `graphzip demo`.

stdout carries data, stderr carries progress, logs and errors. Exit codes: 0 done, 1 failure, 2 wrong usage or plan,
3 the exported file failed its verification, 4 the plan changed nothing, 130 interrupted.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from graphzip.tables import closest
from graphzip.terminal import ExitCode, UsageError, at_work, own_process, say, show
from graphzip.usage import (
    Weights,
    amount,
    budget_of,
    build,
    calibration_of,
    check_files,
    check_opset,
    check_scope,
    check_writable,
    example_inputs,
    find,
    of_inputs,
    option,
    shapes_of,
)

__all__ = ["ExitCode", "app", "main"]

_SEEDS = 1 << 32  # what every random source takes


class Mode(str, Enum):
    """Which form of a model is looked at."""

    EVAL = "eval"
    TRAIN = "train"


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
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=_SEEDS - 1, help="seed of everything random")]
MacsOption = Annotated[
    float | None,
    typer.Option("--macs", callback=amount, help="budget of multiply-accumulates: up to 1 a share, above it a number"),
]
ParamsOption = Annotated[float | None, typer.Option("--params", callback=amount, help="budget of parameters, likewise")]
BytesOption = Annotated[
    float | None, typer.Option("--bytes", callback=amount, help="budget of bytes of parameters and buffers")
]
LatencyOption = Annotated[
    float | None,
    typer.Option(
        "--latency", callback=amount, help="budget of onnxruntime's time for one sample here: share or milliseconds"
    ),
]
CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help=".npz file with an array of samples per input, or .npy; no labels")
]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="file that keeps measurements, so that a stopped run goes on")
]
ModeOption = Annotated[
    Mode, typer.Option("--mode", help="eval, or train: the form that the model has in training, too")
]
VerboseOption = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="logs on stderr, and where an error came from; -vv: more")
]


def _version(wanted: bool) -> None:
    if wanted:
        import graphzip

        show(f"graphzip {graphzip.__version__}")
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
    mode: ModeOption = Mode.EVAL,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Print the channel groups of a model: what is coupled, and what can shrink."""
    with at_work(verbose) as tell:
        import graphzip as gz

        check_files(model, {"--weights": weights}, {"--graph": picture})
        check_writable(graph=picture)
        shapes = shapes_of(inputs)
        spec = find(model)
        tell(f"building {model}")
        module = build(spec, Weights(weights, weights_key, strip_prefix))
        example = example_inputs(spec, module, shapes)
        check_scope(model, module, scope)
        tell(f"tracing {model}")
        with of_inputs("--input" if shapes else None):
            groups = gz.channel_groups(module, example, scope=scope, mode=mode.value)
        if explain is not None and explain not in groups.names:
            raise UsageError(f"--explain: there is no channel group {explain!r}; {closest(explain, groups.names)}")
        if picture is not None:
            gz.draw_groups(groups, picture)
        shown = groups if explain is None else groups.explain(explain)
        text = _json(shown.to_dict()) if as_json else str(shown)
    show(text)


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
    mode: ModeOption = Mode.EVAL,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    verbose: VerboseOption = 0,
) -> None:
    """Find the widths that meet a budget and move the outputs least, and write them as a plan."""
    with at_work(verbose) as tell:
        import graphzip as gz

        budget = budget_of(macs=macs, params=params, bytes=bytes_, latency=latency)
        writes = {"--output": output, "--cache": cache, "--plot": plot}
        check_files(model, {"--weights": weights, "--calibration": calibration}, writes)
        check_writable(output=output, cache=cache, plot=plot)
        shapes = shapes_of(inputs)
        data = calibration_of(calibration)
        spec = find(model)
        tell(f"building {model}")
        module = build(spec, Weights(weights, weights_key, strip_prefix), seed)
        example = example_inputs(spec, module, shapes, seed)
        tell(f"tracing {model}")
        with of_inputs("--input" if shapes else None):
            study = gz.WidthStudy(module, example, calibration=data, cache=cache, seed=seed, mode=mode.value)
        study.check(**budget)
        study.measure(tell.bar)
        tell("splitting the budget")
        plan = study.plan(**budget)
        plan.save(output)
        if plot is not None:
            gz.draw_study(study, plot)
        text = _json(plan.to_dict()) if as_json else output.read_text(encoding="utf-8").rstrip()
    show(text, str(output))


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
    mode: ModeOption = Mode.EVAL,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    verbose: VerboseOption = 0,
) -> None:
    """Carry out a plan, or the best one for a budget, and export the slim model as verified ONNX."""
    with at_work(verbose) as tell:
        import graphzip as gz
        from graphzip.report import compile_dict, compile_text

        amounts = {"macs": macs, "params": params, "bytes": bytes_, "latency": latency}
        if plan_file is not None and any(each is not None for each in amounts.values()):
            raise UsageError("--plan and a budget are both given; a plan has its widths already, so leave one out")
        budget = {} if plan_file is not None else budget_of(**amounts)
        if budget and scope is not None:
            raise UsageError("--scope goes with --plan; a budget is split over the whole model")
        reads = {"--plan": plan_file, "--weights": weights, "--calibration": calibration}
        check_files(model, reads, {"--output": output, "--save": save, "--cache": cache})
        check_writable(output=output, save=save, cache=cache)
        shapes = shapes_of(inputs)
        plan = gz.Plan.load(plan_file) if plan_file is not None else gz.Plan([])
        data = calibration_of(calibration)
        check_opset(opset)
        spec = find(model)
        tell(f"building {model}")
        module = build(spec, Weights(weights, weights_key, strip_prefix), seed)
        example = None if plan.inputs and not shapes else example_inputs(spec, module, shapes, seed)
        check_scope(model, module, scope)
        source = "--input" if shapes else f"{plan_file}: inputs" if plan.inputs else None
        if budget:
            assert example is not None
            with of_inputs(source):
                study = gz.WidthStudy(module, example, calibration=data, cache=cache, seed=seed, mode=mode.value)
            study.check(**budget)
            study.measure(tell.bar)
            plan = study.plan(**budget)
        tell(f"compiling {model}")
        with of_inputs(source):
            compiled = gz.compile(module, plan, example, calibration=data, seed=seed, scope=scope, mode=mode.value)
        exported = saved = None
        if compiled.report.changed:
            tell(f"exporting {output} and verifying it")
            exported = compiled.export(output, opset=opset)
            if save is not None:
                compiled.save(save)
                saved = save
        text = _json(compile_dict(compiled, exported, saved)) if as_json else compile_text(compiled, exported, saved)
    show(text, str(output) if exported is not None else "")
    if exported is None:
        say(f"the plan changes nothing in {model}; nothing was written")
        raise typer.Exit(ExitCode.UNCHANGED)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="directory to keep both ONNX files in")] = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    verbose: VerboseOption = 0,
) -> None:
    """Train a small network, halve it, export and verify it, and compare before and after. Takes under a minute."""
    with at_work(verbose) as tell:
        from graphzip.demo import check_folder, run
        from graphzip.report import demo_dict, demo_text

        with option("--out"):
            check_folder(out)
        result = run(seed=seed, out=out, tell=tell)
        text = _json(demo_dict(result)) if as_json else demo_text(result)
    show(text)


def main() -> None:
    """Entry point of the `graphzip` script: one command, to which this process belongs."""
    with own_process():
        app()


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2)
