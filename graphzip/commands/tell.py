"""`graphzip inspect`, `report`, `bench`, `doctor`, `schema`, `demo`: what tells and changes nothing."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from graphzip.commands.options import ModelArgument, RunOptions, SourceOptions, ViewOptions, command
from graphzip.commands.subject import as_json_text, built, view
from graphzip.commands.terminal import UsageError, at_work, show
from graphzip.commands.usage import check_files, check_writable, option
from graphzip.files import write_text
from graphzip.report.tables import Column, closest, table

__all__ = ["register"]

_NEEDED = ("torch", "onnx", "onnxruntime", "onnxscript", "onnx-ir", "numpy", "scipy", "scikit-learn", "safetensors")
_EXTRAS = {
    "torchvision": 'models named torchvision:NAME; pip install "graphzip[models]"',
    "timm": 'models named timm:NAME; pip install "graphzip[models]"',
    "transformers": 'models named hf:FOLDER; pip install "graphzip[huggingface]"',
    "matplotlib": 'pictures; pip install "graphzip[plot]"',
    "jinja2": 'reports as a page; pip install "graphzip[report]"',
    "onnxslim": 'export(simplify=True); pip install "graphzip[simplify]"',
}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        app,
        "inspect",
        "graphzip inspect torchvision:resnet18",
        "graphzip inspect net.py:net --input 1x3x32x32 --explain layer1.0.conv1 --graph groups.svg",
    )(inspect)
    command(app, "report", "graphzip report slim.graphzip", "graphzip report slim.graphzip -o report.html")(report)
    command(
        app,
        "bench",
        "graphzip bench slim.graphzip",
        "graphzip bench torchvision:resnet18 slim.graphzip --batch 1 --batch 16",
    )(bench)
    command(app, "doctor", "graphzip doctor")(doctor)
    command(app, "schema", "graphzip schema > plan.schema.json")(schema)
    command(app, "demo", "graphzip demo --out kept")(demo)


def inspect(
    model: ModelArgument,
    source: SourceOptions,
    shown: ViewOptions,
    run: RunOptions,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="GROUP", help="say which operators a group runs through")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--graph", metavar="FILE", help="also draw the groups: .svg, .png or .pdf")
    ] = None,
) -> None:
    """Print the channel groups of a model: what is coupled, and what can shrink."""
    with at_work(run.verbose) as tell:
        import graphzip as gz

        check_files(model, {"--weights": source.weights}, {"--graph": picture})
        check_writable(graph=picture)
        subject = built(model, source, shown.scope, run.seed, tell)
        tell(f"tracing {model}")
        with subject.inputs_told():
            groups = gz.channel_groups(subject.module, subject.example, **view(shown))
        if explain is not None and explain not in groups.names:
            raise UsageError(f"--explain: there is no channel group {explain!r}; {closest(explain, groups.names)}")
        if picture is not None:
            gz.draw_groups(groups, picture)
        told = groups if explain is None else groups.explain(explain)
        text = as_json_text(told.to_dict()) if run.as_json else str(told)
    show(text)


def report(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="what --save or Compiled.save wrote: slim.graphzip")],
    run: RunOptions,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="write one page that needs nothing else: report.html")
    ] = None,
) -> None:
    """Say what was done to a model that was saved: the card, widths, and how to reproduce it."""
    with at_work(run.verbose) as tell:
        import graphzip as gz

        check_files("", {"FILE": file}, {"--output": output})
        check_writable(output=output)
        tell(f"loading {file}")
        found = gz.load(file).report
        if output is not None:
            with option("--output"):
                found.save(output)
        text = as_json_text(found.to_dict()) if run.as_json else str(found)
    show(text, "" if output is None else str(output))


def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="models as of the other commands, or files of --save")
    ],
    source: SourceOptions,
    shown: ViewOptions,
    run: RunOptions,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="samples of a run; default 1 and 8")
    ] = None,
) -> None:
    """Measure models in onnxruntime on this machine: latency, its spread, and memory."""
    with at_work(run.verbose) as tell:
        import graphzip as gz

        card: Any = None
        for model in models:
            if model.endswith(".graphzip"):
                tell(f"loading {model}")
                compiled = gz.load(model)
            else:
                subject = built(model, source, shown.scope, run.seed, tell)
                with subject.inputs_told():
                    compiled = gz.compile(subject.module, gz.Plan([]), subject.example, **view(shown))
            tell(f"measuring {model}")
            compiled.report = gz.Report(compiled.report.before, compiled.report.after)
            found = compiled.measure(name=model, batches=batches or (1, 8))
            card = found if card is None else card.with_states(found)
        text = as_json_text(card.to_dict()) if run.as_json else str(card)
    show(text)


def doctor(run: RunOptions) -> None:
    """Print the versions of everything, what onnxruntime runs on, and what is missing."""
    with at_work(run.verbose):
        import onnxruntime
        import torch

        import graphzip

        found: dict[str, Any] = {"graphzip": graphzip.__version__, "Python": platform.python_version()}
        found |= {name: _version(name) or "missing" for name in _NEEDED}
        found["CUDA in torch"] = torch.version.cuda if torch.cuda.is_available() else "none"
        found["providers of onnxruntime"] = ", ".join(onnxruntime.get_available_providers())
        found |= {name: _version(name) or f"not installed: {what}" for name, what in _EXTRAS.items()}
        rows = [(name, str(value)) for name, value in found.items()]
        text = as_json_text(found) if run.as_json else table([Column("what"), Column("version")], rows, width=100)
    show(text)


def _version(distribution: str) -> str | None:
    names = ("onnxruntime-gpu", "onnxruntime") if distribution == "onnxruntime" else (distribution,)
    for name in names:
        try:
            return f"{importlib.metadata.version(name)}{' (GPU build)' if name.endswith('-gpu') else ''}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def schema(
    run: RunOptions,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file to write instead of stdout")] = None,
) -> None:
    """Print the JSON Schema of plan files, which editors check and complete them by."""
    with at_work(run.verbose):
        import graphzip as gz

        text = as_json_text(gz.Plan.json_schema())
        if output is not None:
            write_text(output, text + "\n", UsageError)
    show(text if output is None else f"wrote {output}")


def demo(
    run: RunOptions,
    out: Annotated[Path | None, typer.Option("--out", help="directory to keep both ONNX files in")] = None,
) -> None:
    """Train a small network, halve it, export and verify it, and compare before and after. Takes under a minute."""
    with at_work(run.verbose) as tell:
        from graphzip.commands.demo import check_folder
        from graphzip.commands.demo import run as run_demo
        from graphzip.commands.text import demo_dict, demo_text

        with option("--out"):
            check_folder(out)
        result = run_demo(seed=run.seed, out=out, tell=tell)
        text = as_json_text(demo_dict(result)) if run.as_json else demo_text(result)
    show(text)
