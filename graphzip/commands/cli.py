"""The command line: `graphzip inspect`, `plan`, `compile`, `report`, `zip` and more.

stdout carries data, stderr carries progress, logs and errors. Exit codes: 0 done, 1 failure, 2 wrong usage or plan,
3 the exported file failed its verification, 4 the plan changed nothing, 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated

import typer

from graphzip.commands import folder, job, joint, slim, tell
from graphzip.commands.terminal import ExitCode, own_process, show

__all__ = ["ExitCode", "app", "main"]

app = typer.Typer(
    name="graphzip",
    help="Make trained PyTorch models slimmer without changing what they compute.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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


for _commands in (tell, slim, joint, folder, job):
    _commands.register(app)


def main() -> None:
    """Entry point of the `graphzip` script: one command, to which this process belongs."""
    with own_process():
        app()
