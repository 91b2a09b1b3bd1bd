"""`graphzip compile-folder`: a model of `transformers` that is larger than the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphzip.commands.options import RunOptions, command
from graphzip.commands.subject import as_json_text
from graphzip.commands.terminal import UsageError, at_work, show
from graphzip.commands.usage import amounts_of, option

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        "compile-folder",
        "graphzip compile-folder llama-7b --plan plan.yaml -o llama-7b-slim",
        "graphzip compile-folder llama-7b --prune '*mlp*=0.5' -o llama-7b-slim",
    )(compile_folder)


def compile_folder(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="config.json and safetensors, as transformers writes")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="new folder to write, or a file.graphzip")],
    run: RunOptions,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="plan file (YAML), or give --prune")] = None,
    prune: Annotated[
        list[str] | None,
        typer.Option("--prune", metavar="GLOB=AMOUNT", help="drop the channels with the smallest weights: '*mlp*=0.5'"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help=".npz file with an array of samples per input (input_ids), or .npy"),
    ] = None,
    spill: Annotated[
        Path | None,
        typer.Option("--spill", metavar="FOLDER", help="keep what layers give on --calibration in files there"),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="what the model is for, such as text-generation; default: its config's")
    ] = None,
) -> None:
    """Carry out a plan on a folder of transformers with weights that are read and written one at a time.

    For models that are larger than the memory. The new folder is loaded by transformers. With --calibration layers are
    re-fitted one after the other.
    """
    with at_work(run.verbose):
        import graphzip as gz
        from graphzip.commands.models import load_calibration

        if (plan_file is None) == (not prune):
            raise UsageError("give a plan file with --plan, or widths with --prune GLOB=AMOUNT: one of them")
        if plan_file is not None:
            plan = gz.Plan.load(plan_file)
        else:
            with option("--prune"):
                plan = gz.Plan([gz.PruneChannels(keep=amounts_of(prune or [], "--prune"))])
        with option("--calibration"):
            batches = None if calibration is None else load_calibration(calibration, by_name=True)
        report = gz.compile_folder(folder, plan, output, task=task, calibration=batches, spill=spill, seed=run.seed)
        text = as_json_text({"report": report.to_dict(), "folder": str(output)}) if run.as_json else str(report)
    show(text, str(output))
