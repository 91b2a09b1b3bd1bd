"""The result of a compilation: a module, its report, its files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphzip.errors import GraphZipError
from graphzip.export.archive import load_archive, save_archive
from graphzip.export.onnx import ExportReport, export_onnx
from graphzip.graph.modules import to_module
from graphzip.graph.trace import Traced
from graphzip.results import Report

__all__ = ["Compiled", "load"]


@dataclass
class Compiled:
    """A slimmer model.

    `module` is an ordinary `nn.Module` with the call signature and the parameter names of the original. With a `scope`
    it is the whole model with that submodule replaced.
    """

    module: nn.Module
    report: Report
    traced: Traced
    example_inputs: tuple[Any, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks of a joint model; none for a single model."""
        return ()

    def task(self, name: str) -> nn.Module:
        """The module of one task. Raises `GraphZipError` for a single model, whose module is `module`."""
        raise GraphZipError(f"no task {name!r}: a single model was compiled; use `.module`")

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        opset: int | None = None,
        dynamic_batch: bool = True,
        verify: bool = True,
        per_task: bool = False,
    ) -> ExportReport:
        """Write an ONNX file and check it against `module` in onnxruntime.

        Raises `ExportError` where it cannot be written and `VerificationError` where it computes something else; then
        no file is left.
        """
        if per_task:
            raise GraphZipError("per_task is for joint models; a single model was compiled: export to a file")
        return export_onnx(
            self.module,
            self.example_inputs,
            path,
            example_kwargs={} if self.traced.scope else self.traced.example_kwargs,
            opset=opset,
            dynamic_batch=dynamic_batch,
            verify=verify,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write graph, weights and report to one file that `graphzip.load` reads without the model's source.

        With a `scope`, the file holds that submodule. Raises `ArchiveError` where it cannot be written.
        """
        self.traced.adopt_state(self.module.get_submodule(self.traced.scope))
        save_archive(self.traced, path, report=self.report.to_dict())


def load(path: str | os.PathLike[str]) -> Compiled:
    """Read what `Compiled.save` wrote; nothing is unpickled and the original model's source is not needed.

    The module is in eval mode. Raises `ArchiveError` for a file that is missing, damaged or of another format.
    """
    with torch.inference_mode(False):
        traced, report = load_archive(path)
        module = to_module(traced).eval()
    return Compiled(module, Report.from_dict(report), traced, traced.example_inputs)
