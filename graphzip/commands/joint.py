"""`graphzip zip` and `graphzip share`: several models in one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from graphzip.commands.judging import Judge
from graphzip.commands.options import CardOption, DeviceOption, RunOptions, SaveOptions, command
from graphzip.commands.ranks import device_here
from graphzip.commands.subject import BuiltModel, finish
from graphzip.commands.terminal import Tell, UsageError, at_work
from graphzip.commands.usage import (
    Weights,
    build,
    by_name,
    calibration_of,
    check_files,
    check_opset,
    check_writable,
    example_inputs,
    find,
    of_inputs,
    option,
    own_share,
    shapes_of,
)

__all__ = ["register"]

ModelsArgument = Annotated[
    list[str], typer.Argument(metavar="NAME=MODEL...", help="models by names of yours: cars=net.py:cars dogs=timm:NAME")
]
JointOutput = Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write, or with --per-task a folder")]


@dataclasses.dataclass(frozen=True)
class JointOptions:
    """Where the weights, inputs and data of each model come from, and what becomes of them together."""

    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=SHAPE", help="shape of an input: cars=1x3x224x224; once per input"),
    ] = None
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="NAME=FILE", help="state dict of a model: cars=cars.pt; once per model"),
    ] = None
    weights_key: Annotated[
        list[str] | None,
        typer.Option(
            "--weights-key", metavar="NAME=KEY", help="which of several state dicts of a model's checkpoint: cars=ema"
        ),
    ] = None
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration", metavar="NAME=FILE", help="samples of a model, .npz or .npy: cars=images.npy; no labels"
        ),
    ] = None
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels",
            metavar="NAME=FILE",
            help="class indices of a model's samples, .npy: the card shows accuracy",
        ),
    ] = None
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluate", metavar="NAME=MODULE:FUNCTION", help="your score of a model's module, higher is better"
        ),
    ] = None
    card: CardOption = True
    device: DeviceOption = None
    per_task: Annotated[
        bool, typer.Option("--per-task", help="a file for each model, and one file of weights that all read")
    ] = False


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        app,
        "zip",
        "graphzip zip cars=net.py:cars dogs=net.py:dogs --input cars=1x3x64x64 --input dogs=1x3x64x64 --share 0.9 "
        "--calibration cars=cars.npy --calibration dogs=dogs.npy -o joint.onnx",
        "graphzip zip a=torchvision:resnet18 b=torchvision:mobilenet_v2 --share 0 -o both.onnx",
    )(zip_)
    command(
        app,
        "share",
        "graphzip share rgb=net.py:rgb depth=net.py:depth --input rgb=1x3x32x32 --input depth=1x1x32x32 "
        "--calibration rgb=rgb.npy --calibration depth=depth.npy --clusters 0.25 -o scenes.onnx",
    )(share_)


def zip_(
    models: ModelsArgument,
    output: JointOutput,
    given: JointOptions,
    saved: SaveOptions,
    run: RunOptions,
    share: Annotated[
        float, typer.Option("--share", help="share of every layer's channels that is one; 0 packs side by side")
    ] = 1.0,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="layers that nothing is shared of")
    ] = None,
) -> None:
    """Pack several models into one file and let them share neurons (MTZ), or with --share 0 nothing at all."""
    with at_work(run.verbose, "join") as tell:
        import graphzip as gz

        with option("--share"):
            passes = [gz.Zip(share=share, exclude=tuple(exclude or ()))] if share else []
        done = _joined(models, output, gz.Plan(passes), given, saved, run, tell)
    done.show()


def share_(
    models: ModelsArgument,
    output: JointOutput,
    given: JointOptions,
    saved: SaveOptions,
    run: RunOptions,
    clusters: Annotated[
        float, typer.Option("--clusters", help="clusters of a layer's input channels, a share of them or a number")
    ] = 0.5,
) -> None:
    """Let two models of one architecture read clusters of channels by the same weights, and pack them into one file."""
    with at_work(run.verbose, "join") as tell:
        import graphzip as gz

        with option("--clusters"):
            amount: Any = int(clusters) if clusters.is_integer() and clusters > 1 else clusters
            plan = gz.Plan([gz.CrossDomainShare(clusters=amount)])
        done = _joined(models, output, plan, given, saved, run, tell)
    done.show()


def _joined(
    models: Sequence[str],
    output: Path,
    plan: Any,
    given: JointOptions,
    saved: SaveOptions,
    run: RunOptions,
    tell: Tell,
) -> Any:
    import graphzip as gz

    specs = by_name(models, "MODEL")
    if len(specs) < 2:
        raise UsageError(f"give several models by name, a=MODEL b=MODEL; got {len(specs)}")
    weights = {name: Path(path) for name, path in by_name(given.weights, "--weights", specs).items()}
    keys = by_name(given.weights_key, "--weights-key", specs)
    calibration = by_name(given.calibration, "--calibration", specs, all_or_none=True)
    data = {name: Path(path) for name, path in calibration.items()}
    labels = {name: Path(path) for name, path in by_name(given.labels, "--labels", specs).items()}
    reads = {f"--weights {name}": path for name, path in weights.items()}
    reads |= {f"--calibration {name}": path for name, path in data.items()}
    reads |= {f"--labels {name}": path for name, path in labels.items()}
    check_files("", reads, {"--output": None if given.per_task else output, "--save": saved.save})
    if not given.per_task:
        check_writable(output=output)
    check_writable(save=saved.save)
    check_opset(saved.opset)
    shapes = _shapes(given.inputs, specs)
    modules, examples = {}, {}
    for name, spec in specs.items():
        found = find(spec)
        tell(f"building {name}, {spec}")
        modules[name] = build(found, Weights(weights.get(name), keys.get(name), None), run.seed)
        examples[name] = example_inputs(found, modules[name], shapes_of(shapes.get(name)), run.seed)
    batches = {name: calibration_of(path) for name, path in data.items()} or None
    judge = Judge.of_several(labels, by_name(given.evaluate, "--evaluate", specs), batches)
    batches = None if batches is None else {name: own_share(each, f" {name}") for name, each in batches.items()}
    tell(f"joining {', '.join(specs)}")
    with of_inputs("--input" if given.inputs else None):
        compiled = gz.compile(
            modules, plan, examples, calibration=batches, evaluate=judge.here, seed=run.seed,
            device=device_here(given.device),
        )  # fmt: skip
    subject = BuiltModel(", ".join(specs), modules, examples, None)
    return finish(
        compiled,
        subject,
        output,
        saved,
        tell,
        judge=judge,
        card=given.card,
        as_json=run.as_json,
        packed=True,
        per_task=given.per_task,
    )


def _shapes(texts: Sequence[str] | None, known: dict[str, str]) -> dict[str, list[str]]:
    """Shapes of the inputs of each model; one that takes several has its name in front of each."""
    found: dict[str, list[str]] = {}
    for text in texts or ():
        for name, shape in by_name([text], "--input", known).items():
            found.setdefault(name, []).append(shape)
    return found
