"""Write several models that share weights: as one graph, or as one graph each with one file of weights.

Every tensor is stored once: tensors of equal type, shape and content are one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphzip.errors import ExportError, VerificationError
from graphzip.export.convert import FileVersion, external_files
from graphzip.export.example import Example, Free, tensor_leaves
from graphzip.export.onnx import Built, build, check_onnx, export_mode, export_onnx
from graphzip.export.optional_packages import require
from graphzip.export.report import ExportReport
from graphzip.export.verify import read_model
from graphzip.files import check_target
from graphzip.folders import staged_folder
from graphzip.graph.copies import share_copy
from graphzip.graph.randomness import is_random
from graphzip.graph.restore_modules import to_module
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced
from graphzip.rewrite.one_input import one_input

__all__ = ["TaskModel", "check_joint", "check_tasks", "export_joint", "export_tasks"]

_INLINE = 256
"""Bytes of a tensor that stays in the graph: shapes and scalars, which runtimes read while they load it."""

_ALIGNMENT = 64

_ROUNDING = 1e-4
"""How far outputs may be apart, of the largest, when what they are added up from is added in another order; in types of
fewer digits as many roundings as that is in float32.
"""


def export_joint(
    module: nn.Module,
    inputs: Mapping[str, tuple[Any, ...]],
    path: str | os.PathLike[str],
    *,
    free: Mapping[str, Free],
    version: FileVersion | None,
    dynamic_batch: bool,
    verify: bool,
    same_input: Traced | None = None,
) -> ExportReport:
    """One graph of all tasks, whose inputs and outputs begin with the names of the tasks.

    Every task has a batch of its own, free with `dynamic_batch`. With `same_input`, the graph of the tasks with
    the tensors of `module`, there is one input for all, under the name that the first task has for it, and what the
    tasks compute alike is computed once. Errors are those of `export_onnx`; `ExportError` too where the tasks' inputs
    differ in shape or type.
    """
    if same_input is not None:
        _check_alike(inputs)
    joint, given = _joint(module, inputs, same_input)
    return export_onnx(
        joint,
        given,
        path,
        free=[dims for each in free.values() for dims in each] if same_input is None else _common(free),
        version=version,
        dynamic_batch=dynamic_batch,
        verify=verify,
        by_task=True,
        same_input=same_input is not None,
    )


def check_joint(
    module: nn.Module,
    traced: Traced,
    inputs: Mapping[str, tuple[Any, ...]],
    path: str | os.PathLike[str],
) -> ExportReport:
    """Compare a file that `export_joint` wrote, with inputs of their own or with one for all tasks."""
    there = read_model(Path(path))
    prefixes = tuple(f"{task}_" for task in inputs)
    apart = all(value.name.startswith(prefixes) for value in there.graph.inputs)
    leaves = sum(len(tensor_leaves(each)) for each in inputs.values())
    same_input = not (apart and leaves == len(there.graph.inputs))
    joint, given = _joint(module, inputs, traced if same_input else None)
    return check_onnx(joint, given, path, by_task=True, same_input=same_input)


def _joint(
    module: nn.Module, inputs: Mapping[str, tuple[Any, ...]], same_input: Traced | None
) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module of all tasks and its positional inputs; with the graph of the tasks that of one input for all."""
    if same_input is None:
        return module, tuple(each[0] if len(each) == 1 else each for each in inputs.values())
    given = next(iter(inputs.values()))
    one = one_input(same_input)
    joint = to_module(one).eval()
    if not any(map(is_random, one.graph.nodes)):
        _check_outputs(joint, share_copy(module).eval(), given, tuple(inputs))
    return joint, given


@torch.no_grad()
def _check_outputs(joint: nn.Module, apart: nn.Module, given: tuple[Any, ...], tasks: Iterable[str]) -> None:
    """Raises `VerificationError` where tasks computed together are not the tasks computed apart."""
    found = joint(*given)
    for task in tasks:
        expected = apart.get_submodule(task)(*given)
        for one, two in zip(tensor_leaves(found[task]), tensor_leaves(expected), strict=True):
            near = _ROUNDING * _digits(two) if two.is_floating_point() else 0.0
            scale = float(two.abs().max()) if near and two.numel() else 0.0
            if not torch.allclose(one, two, rtol=near, atol=near * scale, equal_nan=True):
                raise VerificationError(
                    f"same_input: task {task!r} computed with the others gives something else; nothing was written. "
                    "Please report it; without same_input every task is computed by itself"
                )


def _digits(value: torch.Tensor) -> float:
    """How much coarser numbers are than those of float32; one where they are finer."""
    return max(1.0, torch.finfo(value.dtype).eps / torch.finfo(torch.float32).eps)


def _common(free: Mapping[str, Free]) -> Free:
    """The dimensions that all tasks leave free."""
    return [[dim for dim in dims[0] if all(dim in each for each in dims)] for dims in zip(*free.values(), strict=True)]


def _check_alike(inputs: Mapping[str, tuple[Any, ...]]) -> None:
    kinds = {task: _kinds(given) for task, given in inputs.items()}
    first = next(iter(inputs))
    for task, kind in kinds.items():
        if kind != kinds[first]:
            raise ExportError(
                f"same_input: task {task!r} takes {_described(kind)}, task {first!r} takes {_described(kinds[first])}; "
                "export them with inputs of their own"
            )


def _kinds(inputs: tuple[Any, ...]) -> list[Any]:
    """Shape without the batch, and type, of every input."""
    return [
        (tuple(leaf.shape[1:]), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in pytree.tree_leaves(inputs)
    ]


def _described(kinds: list[Any]) -> str:
    return ", ".join("x".join(["N", *map(str, each[0])]) if isinstance(each, tuple) else repr(each) for each in kinds)


@dataclass(frozen=True)
class TaskModel:
    """The module of one task, its inputs, and their free dimensions (see `Free`)."""

    module: nn.Module
    inputs: tuple[Any, ...]
    free: Free


def export_tasks(
    tasks: Mapping[str, TaskModel],
    folder: str | os.PathLike[str],
    *,
    version: FileVersion | None,
    dynamic_batch: bool,
    verify: bool,
) -> ExportReport:
    """`<task>.onnx` for every task in `folder`, and one file of weights that they point into.

    All files are written or none; where the folder holds others, or cannot be exchanged for a new one, they are put in
    place one after the other, each with data of its own. The report is of all of them together: `path` is the folder,
    `tasks` has a report for each, and the difference is that of the task that came closest to its tolerance.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file; with per_task give the name of a directory")
    check_target(target / "weights.data" if target.is_dir() else target, ExportError)
    reports = []
    with export_mode(verify=verify):
        built = {
            name: build(
                each.module,
                Example.of(each.inputs, {}, free=each.free, dynamic_batch=dynamic_batch),
                version=version,
                shared=_shared(each.module, [other.module for other in tasks.values() if other is not each]),
            )
            for name, each in tasks.items()
        }
        with staged_folder(target, [f"{name}.onnx" for name in tasks], ExportError) as (fresh, data):
            _write_weights([each.model for each in built.values()], fresh / data)
            for name, each in built.items():
                reports.append(_write_graph(each, fresh / f"{name}.onnx", target, verify=verify))
            size = sum(file.stat().st_size for file in fresh.iterdir())
    return _together(dict(zip(tasks, reports, strict=True)), target, size)


def check_tasks(tasks: Mapping[str, TaskModel], folder: str | os.PathLike[str]) -> ExportReport:
    """Compare the files that `export_tasks` wrote. Raises `VerificationError`, which names the task."""
    target = Path(folder)
    reports = {}
    for name, each in tasks.items():
        shared = _shared(each.module, [other.module for other in tasks.values() if other is not each])
        try:
            reports[name] = check_onnx(each.module, each.inputs, target / f"{name}.onnx", shared=shared)
        except VerificationError as error:
            raise VerificationError(f"task {name!r}: {error}") from error
    graphs = {report.path for report in reports.values()}
    files = graphs.union(*(external_files(read_model(path), target) for path in graphs))
    return _together(reports, target, sum(file.stat().st_size for file in files))


def _together(reports: Mapping[str, ExportReport], folder: Path, size: int) -> ExportReport:
    worst = max(reports.values(), key=lambda report: (report.max_abs_diff or 0.0) / (report.tolerance or 1.0))
    compared = all(report.max_abs_diff is not None for report in reports.values())
    return replace(
        worst,
        path=folder,
        bytes=size,
        max_abs_diff=worst.max_abs_diff if compared else None,
        tolerance=worst.tolerance if compared else None,
        batches=tuple(sorted({size for report in reports.values() for size in report.batches})),
        dynamic_batch=all(report.dynamic_batch for report in reports.values()),
        tasks=tuple(reports.values()),
        inputs={f"{task}_{name}": sizes for task, report in reports.items() for name, sizes in report.inputs.items()},
        shapes=tuple(
            {f"{task}_{name}": sizes for name, sizes in shapes.items()}
            for task, report in reports.items()
            for shapes in report.shapes
        ),
        unchecked=tuple(f"{task}: {sentence}" for task, report in reports.items() for sentence in report.unchecked),
        notes=tuple(f"{task}: {sentence}" for task, report in reports.items() for sentence in report.notes),
    )


def _shared(module: nn.Module, others: Iterable[nn.Module]) -> set[str]:
    """Names of the parameters that other modules have, too."""
    theirs = {id(parameter) for other in others for parameter in other.parameters()}
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if id(parameter) in theirs}


def _write_graph(built: Built, path: Path, folder: Path, *, verify: bool) -> ExportReport:
    require("onnx_ir").save(built.model, path, format="protobuf")
    found = built.verified(path) if verify else None
    return built.report(folder / path.name, path.stat().st_size, external=True, found=found)


def _write_weights(models: list[Any], path: Path) -> None:
    """Move the tensors of the models into one file, each once; the models then point into it."""
    ir = require("onnx_ir")
    places: dict[Any, tuple[int, int]] = {}
    with path.open("wb") as file:
        for graph in (graph for model in models for graph in model.graphs()):
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes <= _INLINE or tensor.dtype.is_string():
                    continue
                content = tensor.tobytes()
                key = hashlib.sha256(content).digest()
                if key not in places:
                    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                    places[key] = file.tell(), len(content)
                    file.write(content)
                offset, length = places[key]
                value.const_value = ir.ExternalTensor(
                    path.name, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=path.parent
                )
