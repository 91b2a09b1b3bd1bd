"""The result of a compilation: a module, its report, its files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphzip.arguments import check_flag, check_module, check_name, re_iterable, whole
from graphzip.boundary import public
from graphzip.calibration import place_of, placed, with_submodule
from graphzip.calls import Call, Signature, example_of
from graphzip.errors import ArchiveError, ExportError, GraphZipError, NotFoundError, VerificationError
from graphzip.export.archive import Archive, load_archive, save_archive
from graphzip.export.convert import FileVersion, weight_bytes
from graphzip.export.example import Free, free_sizes, tensor_leaves
from graphzip.export.joint import TaskModel, check_joint, check_tasks, export_joint, export_tasks
from graphzip.export.onnx import ExportReport, check_onnx, export_onnx
from graphzip.export.optional_packages import require
from graphzip.export.verify import read_model
from graphzip.files import as_path
from graphzip.graph.batches import each_batch, run_batch
from graphzip.graph.copies import eval_copy
from graphzip.graph.dual_mode import eval_form
from graphzip.graph.state import bytes_of
from graphzip.graph.tasks import joined_module
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.measuring import MeasuredState, measured
from graphzip.numeric.sharded import check_whole
from graphzip.progress import Progress, watched
from graphzip.report.card import AFTER, BEFORE, Card, Scores
from graphzip.report.report import Report
from graphzip.report.tables import change, closest, quantity
from graphzip.rewrite.join_models import inputs_of, module_of
from graphzip.rewrite.refresh import refresh
from graphzip.runtime.quantize import export_reworked, rework_of

__all__ = ["Compiled", "load", "task_module"]


@dataclass
class Compiled:
    """A slimmer model.

    `module` is an ordinary `nn.Module` with the call signature and the parameter names of the original. With a `scope`
    it is the whole model with that submodule replaced. `report` says what became of it, and `traced` is its graph. Of
    several models it is `module(a=xa, b=xb)`, which gives a dictionary by task, and `example_inputs` is a mapping.
    """

    module: nn.Module
    report: Report
    traced: Traced
    given: Any = field(default=None, repr=False)
    archive: Archive | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """A few lines: what it is and what it costs; `module` and `traced` are far longer."""
        before, after = self.report.before, self.report.after
        kind = f"tasks {', '.join(self.tasks)}" if self.tasks else type(self.module).__name__
        counted = [
            f"{what} {quantity(old)} -> {quantity(new)} ({change(old, new)})"
            for what, old, new in (("parameters", before.params, after.params), ("MACs", before.macs, after.macs))
        ]
        kept = "lossless" if self.report.lossless else "not lossless"
        return f"Compiled({kind}: {', '.join([*counted, kept])}; .report tells more)"

    def _repr_html_(self) -> str:
        """What a notebook shows: the report."""
        return self.report._repr_html_()

    def __post_init__(self) -> None:
        self._place = place_of(self.module)
        self._sync()

    @property
    def example_inputs(self) -> Any:
        """The inputs to export with: those of the compilation, or ones like them where the model was loaded.

        A tuple where all of them have positions, else a mapping by name; of several models a mapping of tuples by task.
        """
        call = self._example()
        return example_of(self.module, call) if isinstance(call, Call) else call

    def _example(self) -> Any:
        """The call of the example, or arguments by task, in the dtype and on the device that the module has now."""
        if self._place != (place := place_of(self.module)):
            self.given, self._place = placed(self._given, self._place, place), place
        return self._given

    @property
    def _given(self) -> Any:
        if self.archive is not None and self.given is None:
            self.archive.fill_example(self.traced)
            example = Call(self.traced.example_inputs, self.traced.example_kwargs)
            self.given = inputs_of(self.traced) if self.tasks else example
        return self.given

    def _sync(self) -> bool:
        """Let the graph hold the very tensors of the module; whether its constants and inputs followed them elsewhere.

        Raises `GraphZipError` where these are not whole.
        """
        check_whole(self.module)
        return self.traced.adopt_state(self.module.get_submodule(self.traced.scope), copies=False)

    @public
    def move(self, device: torch.device) -> None:
        """Let the module, its graph and the example inputs be on `device`; the module stays the same object.

        Raises what `module.to(device)` does for a device that there is not, and `GraphZipError` for a module that is
        spread over processes.
        """
        self.module.to(device)
        self._graph()

    def _graph(self) -> Traced:
        """The graph with the very tensors that the module has now."""
        if self._sync():
            refresh(self.traced)
        return self.traced

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
        ir_version: int | None = None,
        dynamic_batch: bool = True,
        verify: bool = True,
        per_task: bool = False,
        same_input: bool = False,
        quantize: str | None = None,
        calibration: Iterable[Any] | None = None,
        error: float | None = None,
        simplify: bool = False,
        progress: Progress = None,
    ) -> ExportReport:
        """Write an ONNX file to `path` and check it against `module`: graph, weights, and outputs in onnxruntime.

        With a `scope` it is the whole model, or, where that cannot be exported, the scope alone. The batch and sizes
        that were asked to be dynamic are free in the file. Where the graph fixes the batch, the file has it fixed, too;
        with `dynamic_batch=False` it is that of the example. `opset` is by default what the exporter recommends, and so
        is `ir_version`, that of ONNX's format, which old runtimes may need lower; `verify=False` writes without a
        check. All this is in the report, and what could not be checked, of which `verified` is false.

        Of several models it is one graph that stores what they share once; inputs and outputs are named after the
        tasks, `a_x` and `a_output`. With `per_task` the path is a directory, made if its parent exists, with
        `<task>.onnx` for each and one `weights.data` that all of them point into; in a directory that holds other files
        it has a name of its own. With `same_input` the joint graph has one input for all tasks, and what they compute
        alike, from the input on, is computed once.

        `quantize` asks for smaller numbers in the file, of a single model: `"int8"` (onnxruntime's static quantizer:
        QDQ, weights per channel, ranges of activations that hold all but a few values of the `calibration` data,
        batches as for `compile`; `"int8-entropy"` and `"int8-minmax"` find the ranges otherwise) or `"fp16"`. The file
        is verified in float first; then outputs on the calibration data (for fp16 by default the example inputs) may be
        off by `error` of the largest output: 0.1 for int8, 0.01 for fp16. `simplify` has onnxslim simplify the graph
        (`pip install "graphzip[simplify]"`), which may move outputs by 1e-4.

        `progress` is told how far it is, as that of `compile`.

        Raises `ExportError` where it cannot be written and `VerificationError` where it is something else; then no file
        is left.
        """
        flags = {"dynamic_batch": dynamic_batch, "verify": verify, "per_task": per_task, "same_input": same_input}
        self._check_export(opset, ir_version, {**flags, "simplify": simplify})
        options = {"version": FileVersion(opset, ir_version), "dynamic_batch": dynamic_batch, "verify": verify}
        with watched(progress):
            if quantize is None and not simplify:
                found = self._exported(path, options, per_task=per_task, same_input=same_input)
            else:
                given = {"simplify": simplify, "several": bool(self.tasks), "has_data": calibration is not None}
                found = export_reworked(
                    as_path(path, ExportError),
                    rework_of(quantize, error, **given),
                    lambda file: self._exported(file, options, per_task=False, same_input=False),
                    lambda: self._answers(calibration, doubled=simplify and quantize is None and dynamic_batch),
                )
        if verify:
            self.report = replace(self.report, verification=tuple(str(found).splitlines()))
        return found

    def _check_export(self, opset: int | None, ir_version: int | None, flags: Mapping[str, Any]) -> None:
        """Raises `GraphZipError` for arguments of `export` that are none, or do not fit this result."""
        for name, flag in flags.items():
            check_flag(flag, name)
        for name, number in (("opset", opset), ("ir_version", ir_version)):
            if number is not None:
                whole(number, name, least=1)
        for name in ("per_task", "same_input"):
            if flags[name] and not self.tasks:
                raise GraphZipError(f"{name} is for joint models; a single model was compiled: export to a file")
        if flags["per_task"] and flags["same_input"]:
            raise GraphZipError("per_task and same_input exclude each other: one input for all needs one file")

    @torch.no_grad()
    def _answers(
        self, calibration: Iterable[Any] | None, *, doubled: bool
    ) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Inputs and outputs of the module in eval mode on every batch, or on the example.

        With `doubled` the first one comes with twice its samples, too, where the batch is free.
        """
        check_whole(self.module)
        example = self._example()
        signature = Signature.of(self.module, example)
        module = eval_copy(eval_form(self.module))
        batches = [example_of(self.module, example)] if calibration is None else re_iterable(calibration, "calibration")
        calls = [signature.call(batch) for batch in each_batch(batches)]
        if doubled and not self.traced.scope and all(0 in dims for dims in free_sizes(self.traced)):
            calls.append(pytree.tree_map_only(torch.Tensor, lambda leaf: torch.cat([leaf, leaf]), calls[0]))
        return [(tensor_leaves(call), tensor_leaves(run_batch(module, *call))) for call in calls]

    def _exported(self, path: Any, options: dict[str, Any], *, per_task: bool, same_input: bool) -> ExportReport:
        check_whole(self.module)
        example = self._example()
        if per_task:
            return export_tasks(self._task_models(), as_path(path, ExportError), **options)
        if self.tasks:
            return export_joint(
                self.module,
                self.example_inputs,
                path,
                free=self._free_by_task(),
                same_input=self._graph() if same_input else None,
                **options,
            )
        free = None if self.traced.scope else free_sizes(self.traced)
        try:
            return export_onnx(
                eval_form(self.module), example.args, path, example_kwargs=example.kwargs, free=free, **options
            )
        except ExportError as error:
            if not self.traced.scope:
                raise
            found = self._part()._exported(path, options, per_task=False, same_input=False)
            note = f"the file holds {self.traced.scope!r} alone, for the whole model cannot be exported: {error}"
            return replace(found, notes=(*found.notes, note))

    def _part(self) -> Compiled:
        """What is in the scope, as if it alone had been compiled."""
        traced = replace(self._graph(), scope="")
        example = Call(traced.example_inputs, traced.example_kwargs)
        return Compiled(self.module.get_submodule(self.traced.scope), self.report, traced, example)

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
            return check_joint(self.module, self._graph(), self.example_inputs, path)
        example = self._example()
        try:
            return check_onnx(self.module, example.args, path, example_kwargs=example.kwargs)
        except ExportError:
            if not self.traced.scope:
                raise
            return self._part().verify(path)

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
    def measure(
        self,
        original: nn.Module | Mapping[str, nn.Module] | None = None,
        *,
        batches: Sequence[int] = (1, 8),
        name: str = AFTER,
        score: float | Mapping[str, float] | None = None,
        file: str | os.PathLike[str] | None = None,
    ) -> Card:
        """Measure the model in onnxruntime, by turns with the `original` where it is given: `report.card` from then on.

        The card has for each: the latency of one run on this machine, median and quartiles, at these `batches`; peak
        memory of a run in a process of its own; bytes of weights and of the file; parameters and MACs. Where the module
        was trained further, `measure(name="after distilling")` adds a state to the card that is there; `score` is what
        `evaluate` gives of it (by task where it is a mapping), and `file` is measured in place of the module where it
        is given, such as a quantized one. It takes some seconds, and nothing of it is verified: `export` does that.

        Raises `GraphZipError` where the `original` is none of this result.
        """
        known = self.report.card
        check_name(name, "name")
        for batch in batches:
            whole(batch, "batches", least=1)
        states = [] if original is None else [self._original(original)]
        drift = self.report.drift if name == AFTER else None
        if file is None:
            states.append(MeasuredState(name, bytes_of(self.module), self.report.after, self._unverified, drift))
        else:
            there = as_path(file, VerificationError)
            states.append(
                MeasuredState(name, weight_bytes(read_model(there)), self.report.after, partial(_copied, there))
            )
        example = self.example_inputs if self.tasks else self._example()
        card = measured(states, tensor_leaves(example), tuple(batches))
        if known is not None:
            card = known.with_states(card)
        scores = self.report.scores
        if score is not None:
            scores = (scores or Scores("score", {})).with_value(name, score)
        self.report = replace(self.report, card=card, scores=scores)
        return card

    def _unverified(self, file: Path) -> int:
        return self.export(file, verify=False).bytes

    def _original(self, model: nn.Module | Mapping[str, nn.Module]) -> MeasuredState:
        """The model that was given, or several of them, as a state before."""
        if isinstance(model, Mapping) != bool(self.tasks) or (self.tasks and set(model) != set(self.tasks)):  # type: ignore[arg-type]
            wanted = f"a mapping with the keys {', '.join(self.tasks)}" if self.tasks else "one model"
            raise GraphZipError(f"measure: the original of this result is {wanted}; pass what was compiled")
        if isinstance(model, Mapping):
            arity = {name: len(self.example_inputs[name]) for name in self.tasks}
            joint = joined_module({name: eval_copy(model[name]) for name in self.tasks}, arity)
            free = self._free_by_task()
            options: dict[str, Any] = {"version": None, "dynamic_batch": True, "verify": False}
            return MeasuredState(
                BEFORE,
                bytes_of(joint),
                self.report.before,
                lambda file: export_joint(joint, self.example_inputs, file, free=free, **options).bytes,
            )
        check_module(model)
        call, alone = self._example(), eval_copy(model)
        open_ = None if self.traced.scope else free_sizes(self.traced)
        return MeasuredState(
            BEFORE,
            bytes_of(alone),
            self.report.before,
            lambda file: (
                export_onnx(alone, call.args, file, example_kwargs=call.kwargs, free=open_, verify=False).bytes
            ),
        )

    @public
    def put_back(self, model: nn.Module, scope: str | None = None) -> nn.Module:
        """A copy of `model` whose submodule `scope` is the slim one; all around it stays as it is.

        The scope is by default the one that was compiled, also of a model that was loaded; where a submodule was
        compiled by itself, its name has to be given. The slim part is not copied: it is the one in `module`.

        Raises `NotFoundError` where the model has no such submodule, `GraphZipError` where no scope is known, or where
        several models were compiled.
        """
        check_module(model)
        if self.tasks:
            raise GraphZipError("put_back is for a single model, but several were compiled; put back `task(name)`")
        own = self.traced.scope or (self.archive.traced.scope if self.archive is not None else "")
        scope = own if scope is None else scope
        check_name(scope, "scope")
        known = [name for name, _ in model.named_modules() if name]
        if not scope:
            raise GraphZipError("put_back needs the scope: the whole model was compiled; name the submodule that it is")
        if scope not in known:
            raise NotFoundError(f"scope: {type(model).__name__} has no submodule {scope!r}; {closest(scope, known)}")
        slim = self.module.get_submodule(self.traced.scope) if self.traced.scope else self.module
        return with_submodule(model, scope, slim)

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
        leaves, spec = pytree.tree_flatten((self.traced.example_inputs, self.traced.example_kwargs))
        if self.traced.scope or len(rows) != len(leaves):
            return self.traced
        cut = [
            leaf[:1] if isinstance(own, torch.Tensor) and own.shape[:1] == (1,) != leaf.shape[:1] else leaf
            for leaf, own in zip(leaves, rows, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(cut, spec)
        return replace(self.traced, example_inputs=args, example_kwargs=kwargs)


@public
def load(path: str | os.PathLike[str]) -> Compiled:
    """Read what `Compiled.save` wrote to `path`; nothing is unpickled and the original model's source is not needed.

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


def _copied(source: Path, target: Path) -> int:
    """Let a file be at another place, with the weights that lie beside it; its bytes."""
    onnx = require("onnx")
    onnx.save(onnx.load(source), target)
    return target.stat().st_size


def task_module(module: nn.Module, tasks: tuple[str, ...], name: str) -> nn.Module:
    """The child of a joint module that is task `name`. Raises `GraphZipError` where there is none."""
    if not tasks:
        raise GraphZipError(f"no task {name!r}: a single model was compiled; use `.module`")
    check_name(name, "task")
    if name not in tasks:
        raise GraphZipError(f"no task {name!r}; {closest(name, tasks)}")
    return module.get_submodule(name)
