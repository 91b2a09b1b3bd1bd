"""One file that holds a traced model: a safetensors file whose metadata is a JSON document.

The tensors are the parameters and buffers, each once, and the example inputs that are not floating point. The document
holds everything else: the graph (see `graph_json`), the call signature, names of tied tensors, and the report. It loads
in a fresh process without the model's source, on the CPU, and nothing in it is unpickled or evaluated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from graphzip.errors import ArchiveError
from graphzip.export.graph_json import (
    GraphFormatError,
    check_state_name,
    graph_from_json,
    graph_to_json,
    spec_from_json,
    spec_to_json,
)
from graphzip.files import check_target, staged
from graphzip.graph.inputs import InputSpec, fake_input
from graphzip.graph.state import attach, get_tensor
from graphzip.graph.tasks import Task, check_task_names
from graphzip.graph.trace import Traced
from graphzip.rewrite.shrink import refresh

__all__ = ["FORMAT", "VERSION", "load_archive", "save_archive"]

FORMAT = "graphzip"
VERSION = 1

_EXAMPLE = "example.."
"""Prefix of the example inputs among the tensors; no parameter has a name with two dots in a row."""


def save_archive(traced: Traced, path: str | os.PathLike[str], *, report: dict[str, Any]) -> None:
    """Write `traced` and a JSON-ready `report` into one file, whole or not at all.

    Raises `ArchiveError` where the place cannot be written to, or where the model holds something that a file cannot
    name: an operator that is not PyTorch's own, a result type that is not registered.
    """
    target = check_target(path, ArchiveError)
    tensors: dict[str, torch.Tensor] = {}
    try:
        document: dict[str, Any] = {
            "graph": graph_to_json(traced.graph),
            "numbers": [node.name for node in traced.graph.nodes if "numbers" in node.meta],
            "state": _state_to_json(traced.module, tensors),
            "class_name": type(traced.module).__name__,
            "inputs": [[spec.name, spec.shape, _dtype_name(spec.dtype)] for spec in traced.inputs],
            "example": _example_to_json(traced, tensors),
            "aliases": traced.aliases,
            "module_types": traced.module_types,
            "scope": traced.scope,
            "training_only": traced.notes,
            "conditions": traced.conditions,
            "batch_dynamic": traced.batch_dynamic,
            "report": report,
            "tasks": [_task_to_json(task) for task in traced.tasks],
        }
        graph_from_json(document["graph"])
        text = json.dumps(document, allow_nan=False)
    except GraphFormatError as error:
        raise ArchiveError(f"the model cannot be saved: {error}") from error
    except (TypeError, ValueError) as error:
        raise ArchiveError(
            f"the model cannot be saved: its report or options are not plain JSON data ({error})"
        ) from error
    metadata = {"format": FORMAT, "version": str(VERSION), "torch": torch.__version__, "document": text}
    with staged(target, ArchiveError) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise ArchiveError(f"cannot write {target}: {error}; free some space or choose another place") from error


def load_archive(path: str | os.PathLike[str]) -> tuple[Traced, dict[str, Any]]:
    """What `save_archive` wrote: the model on the CPU, and the report.

    Integer example inputs come back as they were, floating-point ones as random numbers of the same mean, spread and
    range. Raises `ArchiveError` for a file that is missing, damaged, of another format, or of a newer version.
    """
    source = Path(path)
    document, tensors = _read(source)
    try:
        traced = _traced_from_json(document, tensors)
        report = document["report"]
        if not isinstance(report, dict):
            raise GraphFormatError("the report is not an object")
    except GraphFormatError as error:
        raise ArchiveError(f"{source} cannot be loaded: {error}") from error
    except Exception as error:
        raise ArchiveError(
            f"{source} is damaged ({type(error).__name__}: {error}); save the model again from where it was made"
        ) from error
    return traced, report


def _read(source: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not source.is_file():
        raise ArchiveError(f"there is no file {source}; pass the path that the model was saved to")
    try:
        with safetensors.safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_version(source, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = json.loads(metadata["document"])
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise ArchiveError(
            f"{source} is not a model that graphzip saved, or it is damaged ({error}); save it again, and copy it as a "
            "binary file"
        ) from error
    return document, tensors


def _check_version(source: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ArchiveError(
            f"{source} is a safetensors file, but not a model that graphzip saved; pass weights alone where a model is "
            "asked for together with its weights"
        )
    version = metadata.get("version", "")
    if not version.isdigit() or int(version) > VERSION:
        raise ArchiveError(
            f"{source} has format version {version or 'unknown'}, newer than the {VERSION} that this graphzip reads; "
            "run: pip install --upgrade graphzip"
        )


def _state_to_json(module: nn.Module, tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Every name of every parameter and buffer, in the order of `state_dict`; `tensors` gets each tensor once."""
    entries: list[dict[str, Any]] = []
    first: dict[int, str] = {}
    for name, tensor, persistent in _state(module):
        check_state_name(name)
        entry: dict[str, Any] = {"name": name, "parameter": isinstance(tensor, nn.Parameter)}
        if not persistent:
            entry["persistent"] = False
        if id(tensor) in first:
            entry["same_as"] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            entry["requires_grad"] = tensor.requires_grad
            if not tensor.is_contiguous() and _is_dense(tensor):
                entry["strides"] = list(tensor.stride())
            tensors[name] = tensor.detach().cpu().contiguous().clone()
        entries.append(entry)
    return entries


def _state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for leaf, tensor in (owner._parameters | owner._buffers).items():
            if tensor is not None:
                yield f"{dot}{leaf}", tensor, leaf not in owner._non_persistent_buffers_set


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the strides only order the dimensions (channels last), without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _attach_state(module: nn.Module, entries: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> None:
    made: dict[str, torch.Tensor] = {}
    for entry in entries:
        name = check_state_name(entry["name"])
        if "same_as" in entry:
            value = made[entry["same_as"]]
        else:
            value = _with_strides(tensors[name], entry.get("strides"))
            if entry["parameter"]:
                value = nn.Parameter(value, requires_grad=bool(entry["requires_grad"]))
        made[name] = value
        attach(module, name, value, persistent=bool(entry.get("persistent", True)))


def _with_strides(value: torch.Tensor, strides: list[int] | None) -> torch.Tensor:
    if strides is None:
        return value
    return torch.empty_strided(tuple(value.shape), tuple(strides), dtype=value.dtype).copy_(value)


def _traced_from_json(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Traced:
    module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=_class_name(document["class_name"]))
    _attach_state(module, document["state"], tensors)
    module.graph = graph_from_json(document["graph"])
    args, kwargs = _example_from_json(document["example"], tensors)
    traced = Traced(
        module=module,
        inputs=tuple(
            InputSpec(name, tuple(shape), None if dtype is None else _dtype(dtype))
            for name, shape, dtype in document["inputs"]
        ),
        example_inputs=args,
        example_kwargs=kwargs,
        aliases=dict(document["aliases"]),
        module_types=dict(document["module_types"]),
        scope=str(document["scope"]),
        notes=tuple(document["training_only"]),
        batch_dynamic=bool(document["batch_dynamic"]),
        conditions=tuple(document["conditions"]),
        tasks=tuple(_task_from_json(task) for task in document.get("tasks", ())),
    )
    _restore_metadata(traced, set(document["numbers"]))
    return traced


def _task_to_json(task: Task) -> dict[str, Any]:
    outputs = None if task.out_spec is None else spec_to_json(task.out_spec)
    return {
        "name": task.name,
        "arguments": list(task.arguments),
        "inputs": spec_to_json(task.in_spec),
        "outputs": outputs,
    }


def _task_from_json(data: dict[str, Any]) -> Task:
    check_task_names([data["name"]])
    if not all(isinstance(name, str) and name.isidentifier() for name in data["arguments"]):
        raise GraphFormatError(f"{data['arguments']!r} are not names of arguments")
    outputs = None if data["outputs"] is None else spec_from_json(data["outputs"])
    return Task(data["name"], tuple(data["arguments"]), spec_from_json(data["inputs"]), outputs)


def _class_name(name: Any) -> str:
    return name if isinstance(name, str) and name.isidentifier() else "GraphModule"


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise GraphFormatError(f"torch has no dtype {name!r}")
    return found


def _restore_metadata(traced: Traced, numbers: set[str]) -> None:
    """Fake values of every node, with the dimensions that `inputs` leaves open symbolic, and constant indices."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves((traced.example_inputs, traced.example_kwargs))
    for node, spec, leaf in zip(placeholders, traced.inputs, leaves, strict=True):
        node.meta["val"] = fake_input(mode, leaf, spec)
    for node in traced.graph.nodes:
        if node.name in numbers:
            node.meta["numbers"] = get_tensor(traced.module, str(node.target)).numpy()
    refresh(traced)


def _example_to_json(traced: Traced, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    leaves, spec = pytree.tree_flatten((traced.example_inputs, traced.example_kwargs))
    described: list[dict[str, Any]] = []
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            if leaf is not None and not isinstance(leaf, bool | int | float | str):
                raise GraphFormatError(f"the example input {leaf!r} is neither a tensor nor a plain value")
            described.append({"value": leaf})
        elif leaf.is_floating_point():
            described.append({"random": _describe(leaf)})
        else:
            tensors[f"{_EXAMPLE}{number}"] = leaf.detach().cpu().contiguous().clone()
            described.append({"tensor": f"{_EXAMPLE}{number}"})
    return {"structure": spec_to_json(spec), "leaves": described}


def _describe(leaf: torch.Tensor) -> dict[str, Any]:
    values = leaf.detach().double()
    values = values[values.isfinite()]
    values = values if values.numel() else torch.zeros(1, dtype=torch.float64)
    return {
        "shape": list(leaf.shape),
        "dtype": _dtype_name(leaf.dtype),
        "mean": float(values.mean()),
        "spread": float(values.std(correction=0)),
        "range": [float(values.min()), float(values.max())],
    }


def _example_from_json(
    data: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    leaves: list[Any] = []
    for leaf in data["leaves"]:
        if "tensor" in leaf:
            leaves.append(tensors[leaf["tensor"]])
        elif "random" in leaf:
            leaves.append(_random(leaf["random"], generator))
        else:
            leaves.append(leaf["value"])
    args, kwargs = pytree.tree_unflatten(leaves, spec_from_json(data["structure"]))
    return args, kwargs


def _random(like: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(like["shape"], generator=generator, dtype=torch.float64) * like["spread"] + like["mean"]
    low, high = like["range"]
    clamped: torch.Tensor = values.clamp(low, high)
    return clamped.to(_dtype(like["dtype"]))
