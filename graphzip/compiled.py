"""The result of a compilation: a module, its report, its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from graphzip.arguments import check_flag, check_name, whole
from graphzip.errors import ArchiveError, ExportError, GraphZipError, VerificationError
from graphzip.export.archive import Archive, load_archive, save_archive
from graphzip.export.example import Free, free_sizes, tensor_leaves
from graphzip.export.joint import TaskModel, check_joint, check_tasks, export_joint, export_tasks
from graphzip.export.onnx import ExportReport, check_onnx, export_onnx
from graphzip.files import as_path
from graphzip.graph.torch_private import pytree
from graphzip.graph.trace import Traced
from graphzip.graph.two_forms import eval_form
from graphzip.guard import public
from graphzip.results import Report
from graphzip.rewrite.join import inputs_of, module_of
from graphzip.tables import closest

__all__ = ["Compiled", "load", "task_module"]


@dataclass
class Compiled:
    """A slimmer model.

    `module` is an ordinary `nn.Module` with the call signature and the parameter names of the original. With a `scope`
    it is the whole model with that submodule replaced. Of several models it is `module(a=xa, b=xb)`, which gives a
    dictionary by task, and `example_inputs` is a mapping.
    """

    module: nn.Module
    report: Report
    traced: Traced
    given: Any = field(default=None, repr=False)
    archive: Archive | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._sync()

    @cached_property
    def example_inputs(self) -> Any:
        """The inputs to export with: those of the compilation, or ones like them where the model was loaded."""
        if self.archive is None:
            return self.given
        self.archive.fill_example(self.traced)
        return inputs_of(self.traced)

    def _sync(self) -> None:
        """Let the graph hold the very tensors of the module."""
        self.traced.adopt_state(self.module.get_submodule(self.traced.scope), copies=False)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks of a joint model; none for a single model."""
        return tuple(task.name for task in self.traced.tasks)

    @public
    def task(self, name: str) -> nn.Module:
        """The module of one task alone; what it shares with others are the same `Parameter` objects.

        Raises `GraphZipError` for an unknown task, and for a single model, whose module is `module`.
        """
        return task_module(self.module, self.tasks, name)

    @public
    def export(
        self,
        path: str | os.PathLike[str],
        *,
        opset: int | None = None,
        dynamic_batch: bool = True,
        verify: bool = True,
        per_task: bool = False,
        same_input: bool = False,
    ) -> ExportReport:
        """Write an ONNX file and check it against `module`: graph, weights, and outputs in onnxruntime.

        The batch and the sizes that were asked to be dynamic are free in the file. Where the graph fixes the batch, the
        file has it fixed and the report says so; with `dynamic_batch=False` it is that of the example. What could not
        be checked is in the report, too, whose `verified` is then false.

        Of several models it is one graph that stores what they share once; inputs and outputs are named after the
        tasks, `a_x` and `a_output`. With `per_task` the path is a directory, made if its parent exists, with
        `<task>.onnx` for each and one `weights.data` that all of them point into; in a directory that holds other files
        it has a name of its own. With `same_input` the joint graph has one input for all tasks, and what they compute
        alike, from the input on, is computed once.

        Raises `ExportError` where it cannot be written and `VerificationError` where it is something else; then no file
        is left.
        """
        flags = {"dynamic_batch": dynamic_batch, "verify": verify, "per_task": per_task, "same_input": same_input}
        for name, flag in flags.items():
            check_flag(flag, name)
        if opset is not None:
            whole(opset, "opset", least=1)
        for name, given in (("per_task", per_task), ("same_input", same_input)):
            if given and not self.tasks:
                raise GraphZipError(f"{name} is for joint models; a single model was compiled: export to a file")
        if per_task and same_input:
            raise GraphZipError("per_task and same_input exclude each other: one input for all needs one file")
        options: dict[str, Any] = {"opset": opset, "dynamic_batch": dynamic_batch, "verify": verify}
        if per_task:
            return export_tasks(self._task_models(), as_path(path, ExportError), **options)
        if self.tasks:
            return export_joint(
                self.module,
                self.example_inputs,
                path,
                free=self._free_by_task(),
                same_input=same_input,
                **options,
            )
        return export_onnx(
            eval_form(self.module),
            self.example_inputs,
            path,
            free=None if self.traced.scope else free_sizes(self.traced),
            **self._call(),
            **options,
        )

    @public
    def verify(self, path: str | os.PathLike[str]) -> ExportReport:
        """Check a file that `export` wrote, or a directory that it wrote `per_task`, against `module` as it is now.

        The check is that of `export`, at sizes that are free in the file. Raises `VerificationError` where the file is
        not this model: a weight, an operator or an output differs, or it cannot be read. The file stays as it is.
        """
        if as_path(path, VerificationError).is_dir():
            if not self.tasks:
                raise VerificationError(f"{path} is a directory, and a single model was compiled; give the file")
            return check_tasks(self._task_models(), path)
        if self.tasks:
            return check_joint(self.module, self.example_inputs, path)
        return check_onnx(self.module, self.example_inputs, path, **self._call())

    def _call(self) -> dict[str, Any]:
        """Keyword arguments; with a `scope` the graph does not know them for the whole model."""
        return {} if self.traced.scope else {"example_kwargs": self.traced.example_kwargs}

    def _task_models(self) -> dict[str, TaskModel]:
        free = self._free_by_task()
        return {name: TaskModel(self.task(name), self.example_inputs[name], free[name]) for name in self.tasks}

    def _free_by_task(self) -> dict[str, Free]:
        free = free_sizes(self.traced)
        found: dict[str, Free] = {}
        for name in self.tasks:
            count = len(tensor_leaves(self.example_inputs[name]))
            found[name], free = free[:count], free[count:]
        return found

    @public
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write graph, weights and report to one file that `graphzip.load` reads without the model's source.

        With a `scope`, the file holds that submodule. Raises `ArchiveError` where it cannot be written.
        """
        self._sync()
        save_archive(self._with_rows_given(), path, report=self.report.to_dict())

    def _with_rows_given(self) -> Traced:
        """The graph with an example of as many rows as the user's, which was traced with two where it had one."""
        given = self.given
        if self.tasks:
            given = [given[name] for name in self.tasks] if isinstance(given, Mapping) else None
        rows = pytree.tree_leaves(given)
        leaves, spec = pytree.tree_flatten(self.traced.example_inputs)
        if self.traced.scope or len(rows) != len(leaves):
            return self.traced
        cut = [
            leaf[:1] if isinstance(own, torch.Tensor) and own.shape[:1] == (1,) != leaf.shape[:1] else leaf
            for leaf, own in zip(leaves, rows, strict=True)
        ]
        return replace(self.traced, example_inputs=pytree.tree_unflatten(cut, spec))


@public
def load(path: str | os.PathLike[str]) -> Compiled:
    """Read what `Compiled.save` wrote; nothing is unpickled and the original model's source is not needed.

    The module is in eval mode. Raises `ArchiveError` for a file that is missing, damaged or of another format.
    """
    with torch.inference_mode(False):
        archive = load_archive(path)
        traced = replace(archive.traced, scope="")  # what was a submodule is the whole model here
        try:
            module, report = module_of(traced).eval(), Report.from_dict(archive.report)
        except Exception as error:
            raise ArchiveError(
                f"{path} cannot be loaded: its graph or its report is not that of a compiled model "
                f"({type(error).__name__}: {str(error)[:200]}); save the model again"
            ) from error
        return Compiled(module, report, traced, archive=archive)


def task_module(module: nn.Module, tasks: tuple[str, ...], name: str) -> nn.Module:
    """The child of a joint module that is task `name`. Raises `GraphZipError` where there is none."""
    if not tasks:
        raise GraphZipError(f"no task {name!r}: a single model was compiled; use `.module`")
    check_name(name, "task")
    if name not in tasks:
        raise GraphZipError(f"no task {name!r}; {closest(name, tasks)}")
    return module.get_submodule(name)
