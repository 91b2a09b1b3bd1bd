"""Write several models that share weights: as one graph, or as one graph each with one file of weights.

Every tensor is stored once: tensors of equal type, shape and content are one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphzip.errors import ExportError
from graphzip.export.onnx import Built, ExportReport, build, export_mode, export_onnx
from graphzip.export.verify import Example, require
from graphzip.files import check_target, staged
from graphzip.graph.tasks import common_module

__all__ = ["export_joint", "export_tasks"]

WEIGHTS = "weights.data"

_INLINE = 256
"""Bytes of a tensor that stays in the graph: shapes and scalars, which runtimes read while they load it."""

_ALIGNMENT = 64


def export_joint(
    module: nn.Module,
    inputs: Mapping[str, tuple[Any, ...]],
    path: str | os.PathLike[str],
    *,
    opset: int | None,
    dynamic_batch: bool,
    verify: bool,
    same_input: bool,
) -> ExportReport:
    """One graph of all tasks, whose inputs and outputs begin with the names of the tasks.

    Every task has a batch of its own, free with `dynamic_batch`. With `same_input` there is one input for all, under
    the name that the first task has for it, and what the tasks compute alike is computed once. Errors are those of
    `export_onnx`; `ExportError` too where the tasks' inputs differ in shape or type.
    """
    if same_input:
        return _export_common(module, inputs, path, opset=opset, dynamic_batch=dynamic_batch, verify=verify)
    rows = max(2, *(_rows(given) for given in inputs.values()))
    given = tuple(_with_rows(each, rows) for each in inputs.values())
    return export_onnx(
        module,
        tuple(each[0] if len(each) == 1 else each for each in given),
        path,
        opset=opset,
        dynamic_batch=dynamic_batch,
        verify=verify,
        by_task=True,
    )


def _export_common(
    module: nn.Module, inputs: Mapping[str, tuple[Any, ...]], path: str | os.PathLike[str], **options: Any
) -> ExportReport:
    kinds = {task: _kinds(given) for task, given in inputs.items()}
    first = next(iter(inputs))
    for task, kind in kinds.items():
        if kind != kinds[first]:
            raise ExportError(
                f"same_input: task {task!r} takes {_described(kind)}, task {first!r} takes {_described(kinds[first])}; "
                "export them with inputs of their own"
            )
    common = common_module({task: module.get_submodule(task) for task in inputs}, len(inputs[first]))
    return export_onnx(common, inputs[first], path, by_task=True, same_input=True, **options)


def _kinds(inputs: tuple[Any, ...]) -> list[Any]:
    """Shape without the batch, and type, of every input."""
    return [
        (tuple(leaf.shape[1:]), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in pytree.tree_leaves(inputs)
    ]


def _described(kinds: list[Any]) -> str:
    return ", ".join("x".join(["N", *map(str, each[0])]) if isinstance(each, tuple) else repr(each) for each in kinds)


def export_tasks(
    tasks: Mapping[str, tuple[nn.Module, tuple[Any, ...]]],
    folder: str | os.PathLike[str],
    *,
    opset: int | None,
    dynamic_batch: bool,
    verify: bool,
) -> ExportReport:
    """`<task>.onnx` for every task in `folder`, and one `weights.data` that they point into.

    All files are written or none. The report is of all of them together: `path` is the folder, `tasks` has a report for
    each, and the difference is that of the task that came closest to its tolerance.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file; with per_task give the name of a directory")
    check_target(target / WEIGHTS if target.is_dir() else target, ExportError)
    reports = []
    with export_mode(verify=verify):
        built = {
            name: build(
                module,
                Example.of(inputs, {}),
                opset=opset,
                dynamic_batch=dynamic_batch,
                shared=_shared(module, [other for other, _ in tasks.values() if other is not module]),
            )
            for name, (module, inputs) in tasks.items()
        }
        existed = target.is_dir()
        target.mkdir(exist_ok=True)
        try:
            with staged(target / WEIGHTS, ExportError) as temporary:
                _write_weights([each.model for each in built.values()], temporary)
                for name, each in built.items():
                    reports.append(_write_graph(each, temporary.parent / f"{name}.onnx", target, verify=verify))
                size = sum(file.stat().st_size for file in temporary.parent.iterdir())
        except BaseException:
            if not existed:
                with suppress(OSError):
                    target.rmdir()
            raise
    worst = max(reports, key=lambda report: (report.max_abs_diff or 0.0) / (report.tolerance or 1.0))
    dynamic = all(report.dynamic_batch for report in reports)
    return replace(worst, path=target, bytes=size, dynamic_batch=dynamic, tasks=tuple(reports))


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


def _rows(inputs: tuple[Any, ...]) -> int:
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    return int(sizes[0]) if sizes else 0


def _with_rows(inputs: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The inputs with that many rows in every tensor that has the batch first: all tasks are traced with one number."""
    batch = _rows(inputs)

    def resize(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == batch:
            return leaf[torch.arange(rows, device=leaf.device) % batch]
        return leaf

    resized: tuple[Any, ...] = pytree.tree_map(resize, inputs)
    return resized
