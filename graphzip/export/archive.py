"""One file that holds a traced model: a safetensors file whose metadata is a JSON document.

The tensors are the parameters and buffers, each once, and the example inputs that are not floating point. The document
holds everything else: the graph (see `graph_json`), the call signature, names of tied tensors, and the report. It loads
in a fresh process without the model's source, on the CPU.

Reading it is safe with a file from a stranger. Nothing in it is unpickled, imported, evaluated or run, operators come
from a list, what is read has the shape that `_Document` gives, and memory is taken for the tensors that the file holds
and no others. Floating-point example inputs, which the file only describes, are made when they are asked for.

Format version 2 has checksums: of each tensor (its dtype, shape and bytes) in the document, of the document and the
versions in the metadata. They guard against accidents; whoever crafts a file can compute them. Version 1 had none and
is still read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic
import safetensors
import safetensors.torch
import torch
from torch import fx, nn

from graphzip.errors import ArchiveError, GraphZipError
from graphzip.export.archive_schema import Described, Document, State, TaskEntry
from graphzip.export.graph_json import check_state_name, dtype_named, graph_from_json, graph_to_json, identifier
from graphzip.export.tree_json import GraphFormatError, spec_from_json, spec_to_json
from graphzip.files import as_path, check_target, is_file, staged
from graphzip.graph.dual_mode import Forms, splits
from graphzip.graph.guards import parse, sizes_of, tie_sizes
from graphzip.graph.inputs import InputSpec, fake_input
from graphzip.graph.meta import meta_of
from graphzip.graph.state import attach, get_tensor
from graphzip.graph.tasks import Task, check_task_names
from graphzip.graph.torch_private import FakeTensorMode, ShapeEnv, pytree
from graphzip.graph.traced import Traced
from graphzip.graph.unmarked_kernels import mark_unmarked
from graphzip.limits import MOST_EXAMPLE_NUMBERS
from graphzip.mapped import STORED, raw_bytes
from graphzip.progress import counted
from graphzip.version import __version__

__all__ = ["FORMAT", "VERSION", "Archive", "load_archive", "save_archive", "sealed"]

logger = logging.getLogger(__name__)

FORMAT = "graphzip"
VERSION = 2

_EXAMPLE = "example.."
"""Prefix of the example inputs among the tensors; no parameter has a name with two dots in a row."""

Read = Callable[[str], torch.Tensor]

_MOST_VALUES = 2_000_000
"""Values in a document, each of which takes memory that the file itself hardly has."""


@dataclass(frozen=True)
class Archive:
    """What a file holds: the model, on the CPU, and the report.

    In `traced` the floating-point example inputs have the right shape and no memory of their own.
    """

    traced: Traced
    report: dict[str, Any]
    described: Mapping[int, Described]

    def fill_example(self, traced: Traced) -> None:
        """Give `traced`, this model, example inputs of the mean, spread and range of those it was saved with."""
        leaves, spec = pytree.tree_flatten((traced.example_inputs, traced.example_kwargs))
        generator = torch.Generator().manual_seed(0)
        for number, like in self.described.items():
            leaves[number] = _random(like, generator).to(leaves[number].device, leaves[number].dtype)
        traced.example_inputs, traced.example_kwargs = pytree.tree_unflatten(leaves, spec)


def save_archive(
    traced: Traced, path: str | os.PathLike[str], *, report: dict[str, Any], read: Read | None = None
) -> None:
    """Write `traced` and a JSON-ready `report` into one file, whole or not at all.

    Of a model on the meta device `read` gives the tensors, one at a time and each of them twice.

    Raises `ArchiveError` where the place cannot be written to, or where the model holds something that a file cannot
    name: an operator that is not a function of tensors of PyTorch's own, a result type that is not registered.
    """
    target = check_target(path, ArchiveError)
    tensors: dict[str, torch.Tensor] = {}
    try:
        document: dict[str, Any] = {
            "graph": graph_to_json(traced.graph),
            "numbers": [node.name for node in traced.graph.nodes if "numbers" in meta_of(node)],
            "state": _state_to_json(traced.module, tensors, read),
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
            "forms": None if traced.forms is None else asdict(traced.forms),
        }
        text = json.dumps(document, allow_nan=False)
        graph_from_json(_document(text).graph)
    except GraphFormatError as error:
        raise ArchiveError(f"the model cannot be saved: {error}") from error
    except (TypeError, ValueError) as error:
        raise ArchiveError(
            f"the model cannot be saved: its report or options are not plain JSON data ({error})"
        ) from error
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "torch": torch.__version__,
        "graphzip": __version__,
        "document": text,
    }
    with staged(target, ArchiveError) as temporary:
        try:
            if read is None:
                safetensors.torch.save_file(tensors, temporary, metadata=sealed(metadata))
            else:
                _write(temporary, tensors, sealed(metadata), read)
        except safetensors.SafetensorError as error:
            raise ArchiveError(f"cannot write {target}: {error}; free some space or choose another place") from error


def _write(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], read: Read) -> None:
    """A safetensors file (its length, a header in JSON, and the bytes of all tensors), a tensor at a time.

    The widest numbers come first, so that all of them are aligned.
    """
    ordered = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    header, end = dict[str, Any]({"__metadata__": metadata}), 0
    for name in ordered:
        value = tensors[name]
        place = [end, end := end + value.nbytes]
        header[name] = {"dtype": STORED[value.dtype], "shape": list(value.shape), "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in counted(ordered, "writing", ordered):
            opened.write(raw_bytes(read(name) if tensors[name].is_meta else tensors[name]))


def load_archive(path: str | os.PathLike[str]) -> Archive:
    """What `save_archive` wrote.

    Raises `ArchiveError` for a file that is missing, damaged, of another format, of a newer version, or that holds
    what a saved model does not.
    """
    source = as_path(path, ArchiveError)
    try:
        document, tensors, made_by = _read(source)
    except RecursionError as error:
        raise ArchiveError(f"{source} cannot be loaded: its document is nested too deep") from error
    try:
        return _archive(document, tensors)
    except (GraphFormatError, GraphZipError) as error:
        raise ArchiveError(f"{source} cannot be loaded: {error}{made_by}") from error
    except Exception as error:
        raise ArchiveError(
            f"{source} is damaged ({type(error).__name__}: {error}){made_by}; save the model again from where it was "
            "made"
        ) from error


def _read(source: Path) -> tuple[Document, dict[str, torch.Tensor], str]:
    """The document, the tensors, and what to add to an error where another version wrote the file."""
    if not is_file(source):
        raise ArchiveError(f"there is no file {source}; pass the path that the model was saved to")
    try:
        with safetensors.safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_version(source, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = _document(metadata["document"])
        _check_sums(metadata, document, tensors)
    except GraphFormatError as error:
        raise ArchiveError(
            f"{source} is damaged: {error}; copy it again, as a binary file, or save it again"
        ) from error
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise ArchiveError(
            f"{source} is not a model that graphzip saved, or it is damaged ({error}); save it again, and copy it as a "
            "binary file"
        ) from error
    return document, tensors, _made_by(metadata)


def _document(text: str) -> Document:
    """The document, once its form has been checked."""
    if sum(map(text.count, ",[{")) > _MOST_VALUES:
        raise GraphFormatError(f"the document holds more than {_MOST_VALUES:,} values")
    try:
        return Document.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise GraphFormatError(f"{place[:200]}: {first['msg'][:200]}") from error


def _check_version(source: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ArchiveError(
            f"{source} is a safetensors file, but not a model that graphzip saved; pass weights alone where a model is "
            "asked for together with its weights"
        )
    version = metadata.get("version", "")
    if version not in {str(number) for number in range(1, VERSION + 1)}:
        raise ArchiveError(
            f"{source} has format version {version[:20] or 'unknown'}, newer than the {VERSION} that this graphzip "
            "reads; run: pip install --upgrade graphzip"
        )


def _made_by(metadata: Mapping[str, str]) -> str:
    """` (it was written by ...)` where the versions differ from those at hand; told to the log as well."""
    here = {"graphzip": __version__, "torch": torch.__version__}
    other = [f"{name} {metadata.get(name, 'unknown')[:40]}" for name in here if metadata.get(name) != here[name]]
    if not other:
        return ""
    logger.info("the file was written by %s; here are graphzip %s and torch %s", " and ".join(other), *here.values())
    return f" (it was written by {' and '.join(other)}; here are graphzip {__version__} and torch {torch.__version__})"


def _check_sums(metadata: Mapping[str, str], document: Document, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises `GraphFormatError` where a part of the file is not what was written; version 1 cannot tell."""
    if metadata["version"] == "1":
        return
    if metadata != sealed(metadata):
        raise GraphFormatError("its description does not match its checksum")
    named = {entry.name: entry.sha256 for entry in document.state if entry.same_as is None}
    named |= {leaf.tensor: leaf.sha256 for leaf in document.example.leaves if leaf.tensor is not None}
    if set(named) != set(tensors):
        raise GraphFormatError("it holds other tensors than its description says")
    for name, tensor in tensors.items():
        if named[name] != _sum_of(tensor):
            raise GraphFormatError(f"the tensor {name!r} does not match its checksum")


def sealed(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of an archive with its checksum."""
    parts = {name: text for name, text in metadata.items() if name != "sha256"}
    return {**parts, "sha256": hashlib.sha256(json.dumps(sorted(parts.items())).encode()).hexdigest()}


def _sum_of(tensor: torch.Tensor) -> str:
    """The checksum of a contiguous tensor: of its dtype, its shape and its bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(raw_bytes(tensor))
    return found.hexdigest()


def _state_to_json(module: nn.Module, tensors: dict[str, torch.Tensor], read: Read | None) -> list[dict[str, Any]]:
    """Every name of every parameter and buffer, in the order of `state_dict`; `tensors` gets each tensor once, without
    memory where `read` gives it.
    """
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
            if not tensor.is_contiguous() and _is_dense(tensor.shape, tensor.stride()):
                entry["strides"] = list(tensor.stride())
            if read is None:
                tensors[name] = tensor.detach().cpu().contiguous().clone()
                entry["sha256"] = _sum_of(tensors[name])
            else:
                value = read(name).contiguous()
                tensors[name], entry["sha256"] = value.to("meta"), _sum_of(value)
        entries.append(entry)
    return entries


def _state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for leaf, tensor in (owner._parameters | owner._buffers).items():
            if tensor is not None:
                yield f"{dot}{leaf}", tensor, leaf not in owner._non_persistent_buffers_set


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the strides only order the dimensions (channels last), without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _attach_state(module: nn.Module, entries: Sequence[State], tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Put the tensors under their names; all those names."""
    made: dict[str, torch.Tensor] = {}
    for entry in entries:
        name = check_state_name(entry.name)
        if name in made or (entry.same_as is None and name not in tensors):
            raise GraphFormatError(f"the parameter or buffer {name!r} is there twice, or without its tensor")
        if entry.same_as is not None:
            if entry.same_as not in made:
                raise GraphFormatError(f"{name!r} is tied to {entry.same_as!r}, which does not come before it")
            value = made[entry.same_as]
        else:
            value = _with_strides(name, tensors[name], entry.strides)
            if entry.parameter:
                value = nn.Parameter(value, requires_grad=entry.requires_grad)
        made[name] = value
        try:
            attach(module, name, value, persistent=entry.persistent)
        except (AttributeError, KeyError, TypeError) as error:
            raise GraphFormatError(f"{name!r} cannot name a parameter or buffer ({error})") from error
    return set(made)


def _with_strides(name: str, value: torch.Tensor, strides: Sequence[int] | None) -> torch.Tensor:
    if strides is None:
        return value
    if len(strides) != value.dim() or not _is_dense(value.shape, strides):
        raise GraphFormatError(f"{name!r} has strides that leave gaps or overlap")
    return torch.empty_strided(tuple(value.shape), tuple(strides), dtype=value.dtype).copy_(value)


def _archive(document: Document, tensors: Mapping[str, torch.Tensor]) -> Archive:
    module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=_class_name(document.class_name))
    state = _attach_state(module, document.state, tensors)
    module.graph = graph_from_json(document.graph, state)
    args, kwargs, described = _example(document, tensors)
    _check_conditions(document)
    traced = Traced(
        module=module,
        inputs=tuple(
            InputSpec(identifier(name), tuple(shape), None if dtype is None else dtype_named(dtype))
            for name, shape, dtype in document.inputs
        ),
        example_inputs=args,
        example_kwargs=kwargs,
        aliases=dict(document.aliases),
        module_types=dict(document.module_types),
        scope=document.scope,
        notes=tuple(document.training_only),
        batch_dynamic=document.batch_dynamic,
        conditions=tuple(document.conditions),
        tasks=tuple(_task(task) for task in document.tasks),
        forms=_forms(document, module.graph),
    )
    _restore_metadata(traced, set(document.numbers))
    mark_unmarked(traced)
    return Archive(traced, document.report, described)


def _forms(document: Document, graph: fx.Graph) -> Forms | None:
    if document.forms is None:
        return None
    forms = Forms(document.forms.evaluated, tuple(document.forms.conditions))
    if not splits(graph, forms):
        raise GraphFormatError(f"the outputs are not those of two forms of which the first has {forms.evaluated}")
    return forms


def _check_conditions(document: Document) -> None:
    ranks = {name: len(shape) for name, shape, _ in document.inputs}
    for text in (*document.conditions, *(document.forms.conditions if document.forms else ())):
        for name, dim in sizes_of(parse(text)):
            known = -ranks.get(name, 0) <= dim < ranks.get(name, 0) if isinstance(dim, int) else dim is None
            if not known or name not in ranks:
                raise GraphFormatError(f"the condition {text[:80]!r} reads a size that no input has")


def _task_to_json(task: Task) -> dict[str, Any]:
    outputs = None if task.out_spec is None else spec_to_json(task.out_spec)
    return {
        "name": task.name,
        "arguments": list(task.arguments),
        "inputs": spec_to_json(task.in_spec),
        "outputs": outputs,
    }


def _task(entry: TaskEntry) -> Task:
    check_task_names([entry.name])
    arguments = tuple(identifier(name) for name in entry.arguments)
    outputs = None if entry.outputs is None else spec_from_json(entry.outputs)
    return Task(entry.name, arguments, spec_from_json(entry.inputs), outputs)


def _class_name(name: str) -> str:
    return name if name.isidentifier() else "GraphModule"


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _restore_metadata(traced: Traced, numbers: set[str]) -> None:
    """Fake values of the inputs, with the dimensions that `inputs` leaves open symbolic, and constant indices.

    Those of the other nodes would take running the operators, and nobody asks for them.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves((traced.example_inputs, traced.example_kwargs))
    if not len(placeholders) == len(traced.inputs) == len(leaves):
        raise GraphFormatError("the graph, its inputs and the example inputs differ in number")
    for node, spec, leaf in zip(placeholders, traced.inputs, leaves, strict=True):
        if isinstance(leaf, torch.Tensor) != (spec.dtype is not None) or not _fits(leaf, spec):
            raise GraphFormatError(f"the example input {spec.name!r} is not what the graph was made for")
        node.meta["val"] = fake_input(mode, leaf, spec)
    tie_sizes(
        traced.conditions, {spec.name: node.meta["val"] for node, spec in zip(placeholders, traced.inputs, strict=True)}
    )
    for node in traced.graph.nodes:
        if node.name in numbers:
            if node.op != "get_attr":
                raise GraphFormatError(f"node {node.name!r} is no constant")
            meta_of(node)["numbers"] = get_tensor(traced.module, str(node.target)).numpy()


def _fits(leaf: Any, spec: InputSpec) -> bool:
    if not isinstance(leaf, torch.Tensor):
        return True
    return leaf.dim() == len(spec.shape) and all(
        want in (None, size) for want, size in zip(spec.shape, leaf.shape, strict=True)
    )


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
            name = f"{_EXAMPLE}{number}"
            tensors[name] = leaf.detach().cpu().contiguous().clone()
            described.append({"tensor": name, "sha256": _sum_of(tensors[name])})
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


def _example(
    document: Document, tensors: Mapping[str, torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, Described]]:
    """Arguments of the right structure, and which of them are only described."""
    leaves: list[Any] = []
    described: dict[int, Described] = {}
    for number, leaf in enumerate(document.example.leaves):
        if leaf.random is not None:
            dtype = dtype_named(leaf.random.dtype)
            if math.prod(leaf.random.shape) > MOST_EXAMPLE_NUMBERS or not dtype.is_floating_point:
                raise GraphFormatError(
                    f"an example input is {leaf.random.dtype}{leaf.random.shape}, which it cannot be"
                )
            described[number] = leaf.random
            leaves.append(torch.zeros((), dtype=dtype).expand(leaf.random.shape))
        else:
            leaves.append(leaf.value if leaf.tensor is None else tensors[leaf.tensor])
    spec = spec_from_json(document.example.structure)
    if spec.num_leaves != len(leaves) or spec.type is not tuple or spec.num_children != 2:
        raise GraphFormatError("the example inputs do not fit their structure")
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise GraphFormatError("the example inputs are not positional and keyword arguments")
    return args, kwargs, described


def _random(like: Described, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(like.shape, generator=generator, dtype=torch.float64) * like.spread + like.mean
    clamped: torch.Tensor = values.clamp(*like.range)
    return clamped.to(dtype_named(like.dtype))
