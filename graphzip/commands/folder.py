"""`graphzip compile-folder`: a model of `transformers` that is larger than the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graphzip.commands.options import RunOptions, command
from graphzip.commands.subject import as_json_text
from graphzip.commands.terminal import UsageError, at_work, show
from graphzip.commands.usage import amounts_of, by_name, option, outputs_of

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        "compile-folder",
        "graphzip compile-folder llama-7b --plan plan.yaml -o llama-7b-slim",
        "graphzip compile-folder llama-7b --prune '*mlp*=0.5' -o llama-7b-slim",
        "graphzip compile-folder chat=llama-chat code=llama-code --plan zip.yaml -o both.graphzip",
    )(compile_folder)


def compile_folder(
    folder: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER...",
            help="config.json and safetensors, as transformers writes; several by name: chat=FOLDER",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="new folder to write, or a file.graphzip")],
    run: RunOptions,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="plan file (YAML), or give --prune")] = None,
    prune: Annotated[
        list[str] | None,
        typer.Option("--prune", metavar="GLOB=AMOUNT", help="drop the channels with the smallest weights: '*mlp*=0.5'"),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help=".npz file with an array of samples per input (input_ids), or .npy; of several models chat=FILE",
        ),
    ] = None,
    spill: Annotated[
        Path | None,
        typer.Option("--spill", metavar="FOLDER", help="keep what layers give on --calibration in files there"),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            "--outputs",
            metavar="NAMES",
            help="results that matter, such as logits; the others are left out, caches too",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="what the model is for, such as text-generation; default: its config's")
    ] = None,
) -> None:
    """Carry out a plan on a folder of transformers with weights that are read and written one at a time.

    For models that are larger than the memory. The new folder is loaded by transformers. With --calibration layers are
    re-fitted one after the other. Several folders are zipped into one file.
    """
    with at_work(run.verbose):
        import graphzip as gz
        from graphzip.commands.models import load_calibration

        plan = _plan(plan_file, prune or [])
        folders, data = _sources(folder, calibration or [])
        with option("--calibration"):
            batches: Any = {name: load_calibration(file, by_name=True) for name, file in data.items()} or None
        source: Any = folders
        if len(folder) == 1:
            source, batches = folders[""], batches and batches[""]
        given: Any = {"task": task, "outputs": outputs_of(outputs), "calibration": batches, "spill": spill}
        report = gz.compile_folder(source, plan, output, seed=run.seed, **given)
        text = as_json_text({"report": report.to_dict(), "folder": str(output)}) if run.as_json else str(report)
    show(text, str(output))


def _plan(file: Path | None, prune: list[str]) -> Any:
    """What `--plan` or `--prune` says. Raises `UsageError` for neither, and for both."""
    import graphzip as gz

    if (file is None) == (not prune):
        raise UsageError("give a plan file with --plan, or widths with --prune GLOB=AMOUNT: one of them")
    if file is not None:
        return gz.Plan.load(file)
    with option("--prune"):
        return gz.Plan([gz.PruneChannels(keep=amounts_of(prune, "--prune"))])


def _sources(folders: list[str], calibration: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Folders and files of data by name, those of one model under an empty name. Raises `UsageError`."""
    if len(folders) == 1:
        if len(calibration) > 1:
            raise UsageError("--calibration: one folder has one file of data; give it once")
        return {"": folders[0]}, {"": calibration[0]} if calibration else {}
    named = by_name(folders, "FOLDER")
    return named, by_name(calibration, "--calibration", named, all_or_none=True)
