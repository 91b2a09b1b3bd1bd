"""Write a module as ONNX: whole, verified, and without traces of the machine it was made on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from graphzip.errors import ExportError
from graphzip.export.verify import Example, Verification, make_cases, require, tensor_leaves, verify_onnx
from graphzip.files import check_target, staged
from graphzip.graph.copies import share_copy

__all__ = ["Built", "ExportReport", "build", "export_mode", "export_onnx"]

SINGLE_FILE_LIMIT = 2**31 - 2**26
"""Bytes of weights up to which one file is written: protobuf ends at 2 GiB, and the graph itself needs some room."""

_SMALL = 256
"""Bytes of a constant that is computed wherever possible: shapes and scalars."""

_BATCH = "batch"
_LOUD = ("torch.onnx", "torch.export", "torch.fx", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked.

    `bytes` counts every file; with `external_data` the weights lie in `<name>.data` beside the model.
    `max_abs_diff` and its `tolerance` are those of the output that came closest to its tolerance, over the batch
    sizes in `batches`; `None` and empty where verification was turned off. Where every task has a file of its own,
    `tasks` has the report of each and `path` is their directory.
    """

    path: Path
    bytes: int
    opset: int
    external_data: bool
    max_abs_diff: float | None
    tolerance: float | None
    batches: tuple[int, ...]
    dynamic_batch: bool
    tasks: tuple[ExportReport, ...] = ()

    @property
    def verified(self) -> bool:
        return self.max_abs_diff is not None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        own = {name: value for name, value in vars(self).items() if name != "tasks" or value}
        return {
            **own,
            "path": str(self.path),
            "batches": list(self.batches),
            **({"tasks": [report.to_dict() for report in self.tasks]} if self.tasks else {}),
        }

    def __str__(self) -> str:
        files = f" in {len(self.tasks) + 1} files" if self.tasks else " in two files" if self.external_data else ""
        size = f"{self.bytes / 1e6:.2f} MB{files}"
        batch = "any batch" if self.dynamic_batch else "a fixed batch"
        if self.max_abs_diff is None:
            checked = "not verified"
        else:
            sizes = ", ".join(str(size) for size in self.batches)
            checked = (
                f"verified in onnxruntime at batch {sizes}: largest difference {self.max_abs_diff:.2g} "
                f"(tolerance {self.tolerance:.2g})"
            )
        return f"{self.path}: {size}, opset {self.opset}, {batch}, {checked}"


def export_onnx(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    example_kwargs: dict[str, Any] | None = None,
    opset: int | None = None,
    dynamic_batch: bool = True,
    verify: bool = True,
    by_task: bool = False,
    same_input: bool = False,
) -> ExportReport:
    """Export `module` in eval form; the module itself stays as it is, its mode included.

    Inputs keep the names of `forward`'s arguments, outputs are `output`, `output_1`, ... or the keys of a dict. With
    `dynamic_batch` the first dimension of every input that has the example's batch size is named `batch` and free.
    `opset=None` takes what the exporter recommends. With `verify` the file is compared with the module in onnxruntime
    before it is put in place.

    Raises `ExportError` where the module cannot be exported as asked or the place cannot be written to,
    `VerificationError` where the file computes something else; either way nothing is written.
    """
    target = check_target(path, ExportError)
    if not isinstance(example_inputs, tuple):
        raise ExportError(
            f"example_inputs must be a tuple of positional arguments, got {type(example_inputs).__name__}; "
            "for a single input write (x,)"
        )
    with export_mode(verify=verify):
        built = build(
            module,
            Example.of(example_inputs, example_kwargs or {}),
            opset=opset,
            dynamic_batch=dynamic_batch,
            by_task=by_task,
            same_input=same_input,
        )
        external = _weight_bytes(built.model) > SINGLE_FILE_LIMIT
        found: Verification | None = None
        with staged(target, ExportError) as temporary:
            _save(built.model, temporary, external=external)
            if verify:
                found = built.verified(temporary)
            size = sum(file.stat().st_size for file in temporary.parent.iterdir())
    return built.report(target, size, external=external, found=found)


@dataclass(frozen=True)
class Built:
    """An ONNX model before it is written, the module that it must agree with, and what it was traced with."""

    model: Any
    skeleton: nn.Module
    example: Example
    dynamic: bool

    def verified(self, path: Path) -> Verification:
        """Compare the file at `path` with the module."""
        return verify_onnx(path, self.skeleton, make_cases(self.example, dynamic=self.dynamic))

    def report(self, path: Path, size: int, *, external: bool, found: Verification | None) -> ExportReport:
        return ExportReport(
            path=path,
            bytes=size,
            opset=int(self.model.opset_imports[""]),
            external_data=external,
            max_abs_diff=found.max_abs_diff if found else None,
            tolerance=found.tolerance if found else None,
            batches=found.batches if found else (),
            dynamic_batch=self.dynamic,
        )


def build(
    module: nn.Module,
    example: Example,
    *,
    opset: int | None,
    dynamic_batch: bool,
    by_task: bool = False,
    same_input: bool = False,
    shared: Collection[str] = (),
) -> Built:
    """Convert `module` inside `export_mode`. Tensors with the names `shared` stay as they are, for others read them.

    A module of several tasks gives a dictionary `by_task`; each has inputs of its own unless it is the `same_input`.
    """
    skeleton = share_copy(module).eval()
    outputs = _output_names(skeleton, example, by_task=by_task)
    dynamic = dynamic_batch and example.batch is not None
    apart = by_task and not same_input
    program = _capture(skeleton, example, dynamic=dynamic, by_task=apart)
    model = _convert(program, opset, shared)
    inputs, batches = _input_names(program), [_BATCH] * len(_input_names(program))
    if apart:
        joint = _joint_inputs(skeleton, example)
        inputs, batches = [f"{task}_{name}" for task, name in joint], [_batch_name(task) for task, _ in joint]
    _tidy(model, inputs, outputs, _batch_symbols(program, batches))
    return Built(model, skeleton, example, dynamic)


@contextlib.contextmanager
def export_mode(*, verify: bool) -> Iterator[None]:
    """Independent of the caller's grad mode, without fused attention, with nothing on stdout."""
    for package in ("onnx", "onnxscript", "onnx_ir", *(("onnxruntime",) if verify else ())):
        require(package)
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            contextlib.redirect_stdout(sys.stderr),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _output_names(skeleton: nn.Module, example: Example, *, by_task: bool) -> list[str]:
    """Run once and name the tensors that come out; of a joint model the key of the task comes first."""
    try:
        result = skeleton(*example.args, **example.kwargs)
    except Exception as error:
        raise ExportError(
            f"{type(skeleton).__name__} fails on the example inputs: {_first_line(error)}; pass inputs it accepts"
        ) from error
    leaves, _ = pytree.tree_flatten_with_path(result)
    tensors = [(keys, leaf) for keys, leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise ExportError(
            f"{type(skeleton).__name__} returns no tensor, so there is nothing to export; return its result"
        )
    for leaf in [*tensor_leaves((example.args, example.kwargs)), *(leaf for _, leaf in tensors)]:
        if leaf.is_complex():
            raise ExportError("ONNX runtimes have no complex numbers; pass and return torch.view_as_real(...) instead")
    if by_task:
        return [f"{_output_name(keys[:1])}_{_output_name(keys[1:])}" for keys, _ in tensors]
    return [_output_name(keys) for keys, _ in tensors]


def _output_name(keys: tuple[Any, ...]) -> str:
    """`output`, `output_1` by position, or the key in a dict, nested ones joined by underscores."""
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys]
    if not keys or isinstance(keys[0], pytree.SequenceKey):
        parts = ["output", *parts]
        if parts[1:] == ["0"]:
            parts.pop()
    return re.sub(r"\W", "_", "_".join(parts))


@contextlib.contextmanager
def _tensors_only(module: nn.Module) -> Iterator[None]:
    """Inside, `forward` returns a flat tuple of tensors: ONNX has no dicts, no None and no Python numbers."""
    forward, own = module.forward, vars(module).get("forward")

    @functools.wraps(forward)
    def tensors(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(tensor_leaves(forward(*args, **kwargs)))

    vars(module)["forward"] = tensors
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def _capture(skeleton: nn.Module, example: Example, *, dynamic: bool, by_task: bool) -> ExportedProgram:
    """Trace with the first dimension of batched inputs free, or with every size fixed."""
    name = type(skeleton).__name__
    try:
        with _tensors_only(skeleton):
            shapes = _dynamic_shapes(skeleton, example, by_task=by_task) if dynamic else None
            return torch.export.export(skeleton, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if not dynamic:
            raise ExportError(
                f"{name} cannot be traced for export: {_first_line(error)}; make its control flow independent of "
                "the values of tensors"
            ) from error
        _capture(skeleton, example, dynamic=False, by_task=by_task)
        raise ExportError(
            f"{name} cannot be exported with a dynamic batch: {_first_line(error)}; pass dynamic_batch=False to fix "
            f"the batch at {example.batch}, or let the model use x.shape[0] where it holds that number"
        ) from error


def _dynamic_shapes(skeleton: nn.Module, example: Example, *, by_task: bool) -> dict[str, Any]:
    """The batch of every input is free; each task of a joint model has one of its own."""
    arguments = dict(inspect.signature(skeleton.forward).bind(*example.args, **example.kwargs).arguments)
    one = Dim(_BATCH)
    dims = {name: Dim(_batch_name(name)) if by_task else one for name in arguments}
    return {
        name: pytree.tree_map(lambda leaf, dim=dims[name]: {0: dim} if example.is_batched(leaf) else None, argument)
        for name, argument in arguments.items()
    }


def _batch_name(task: str) -> str:
    return f"{task}_{_BATCH}"


def _convert(program: ExportedProgram, opset: int | None, shared: Collection[str]) -> Any:
    try:
        converted = torch.onnx.export(program, (), opset_version=opset, verbose=False, dynamo=True, optimize=False)
        assert converted is not None
        _optimize(converted.model, shared)
    except Exception as error:
        raise ExportError(
            f"the ONNX exporter of PyTorch cannot convert the model: {_summary(error)}; replace that part of the model"
        ) from error
    model = converted.model
    written = model.opset_imports.get("")
    if opset is not None and written != opset:
        raise ExportError(
            f"this model cannot be written in ONNX opset {opset}; the exporter can write opset {_possible_opsets()}: "
            "pass one of these, or opset=None for the recommended one"
        )
    return model


def _optimize(model: Any, shared: Collection[str]) -> None:
    """What `torch.onnx.export` does by default, but no constant is computed that makes the file bigger."""

    def should_fold(node: Any) -> bool | None:
        reads_shared = any(value is not None and value.name in shared for value in node.inputs)
        return False if reads_shared else _stays_slim(node)

    require("onnxscript.optimizer").optimize_ir(model, should_fold=should_fold)
    require("onnxscript.rewriter.onnx_fusions").fuse(model)


def _stays_slim(node: Any) -> bool | None:
    """False for an operator on constants whose results take more room than the constants that it makes superfluous.

    A kernel that is built from shared factors would be stored in full otherwise. `None` leaves it to the optimizer.
    """
    inputs = {id(value): value for value in node.inputs if value is not None}.values()
    gone = sum(
        value.const_value.nbytes for value in inputs if len(value.consumers()) == 1 and value.const_value is not None
    )
    made = 0
    for value in node.outputs:
        sizes = value.shape.dims if value.shape is not None else None
        if sizes is None or value.dtype is None or not all(isinstance(size, int) for size in sizes):
            return None if all(each.const_value.size <= _SMALL for each in inputs) else False
        made += math.prod(sizes) * value.dtype.itemsize
    return None if made <= max(gone, _SMALL) else False


def _possible_opsets() -> str:
    """The range that the version converter handles for every operator: `18 to 25`."""
    ir, onnx, converter = require("onnx_ir"), require("onnx"), require("onnxscript.version_converter")
    possible = []
    for version in range(7, onnx.defs.onnx_opset_version() + 1):
        empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="empty"), ir_version=10)
        with contextlib.suppress(Exception):
            converter.convert_version(empty, version)
            possible.append(version)
    return f"{possible[0]} to {possible[-1]}" if possible else "18"


def _tidy(model: Any, inputs: list[str], outputs: list[str], symbols: Mapping[str, str]) -> None:
    """One copy of equal weights, the names of `forward`, `batch` for the batch, and no metadata."""
    for graph in model.graphs():
        _share_equal_weights(graph)
    _rename(model, inputs, outputs)
    require("onnx_ir.passes.common").NameFixPass()(model)
    for value in _values(model):
        value.metadata_props.clear()
        value.meta.clear()
        value.doc_string = None
        if value.const_value is not None:
            value.const_value.doc_string = None
            value.const_value.metadata_props.clear()
        if symbols and value.shape is not None:
            value.shape = _with_named_batch(value.shape, symbols)
    for graph in (*model.graphs(), *model.functions.values()):
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None


def _share_equal_weights(graph: Any) -> None:
    """Keep one of several initializers of the same type, shape and content, under its first name.

    (`onnx_ir`'s hashing pass of the same purpose fails on tensors that are not contiguous, such as LSTM weights.)
    """
    alike: dict[Any, list[Any]] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not tensor.dtype.is_string() and not value.is_graph_output():
            alike.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    for values in alike.values():
        first: dict[bytes, Any] = {}
        for value in values if len(values) > 1 else ():
            content = hashlib.sha256(value.const_value.tobytes()).digest()
            kept = first.setdefault(content, value)
            if kept is not value:
                value.replace_all_uses_with(kept)
                del graph.initializers[value.name]


def _rename(model: Any, inputs: list[str], outputs: list[str]) -> None:
    taken: set[str] = set()
    for value, name in zip((*model.graph.inputs, *model.graph.outputs), (*inputs, *outputs), strict=True):
        unique, count = name, 1
        while unique in taken:
            unique, count = f"{name}_{count}", count + 1
        taken.add(unique)
        value.name = unique


def _input_names(program: ExportedProgram) -> list[str]:
    """Names of the tensor inputs: the arguments of `forward`, `argument_key` for what lies in a dict or a list."""
    specs = program.graph_signature.input_specs
    return [
        spec.arg.name
        for spec in specs
        if spec.kind.name == "USER_INPUT" and isinstance(spec.arg, torch.export.graph_signature.TensorArgument)
    ]


def _joint_inputs(skeleton: nn.Module, example: Example) -> list[tuple[str, str]]:
    """The task of every tensor input of a joint module, and the argument of the task's own module that it is."""
    found = []
    for name, given in inspect.signature(skeleton.forward).bind(*example.args).arguments.items():
        child: Any = skeleton.get_submodule(name)
        several = isinstance(given, tuple) and len(inspect.signature(child.forward).parameters) > 1
        arguments = inspect.signature(child.forward).bind(*(given if several else (given,))).arguments
        for keys, leaf in pytree.tree_flatten_with_path(arguments)[0]:
            if isinstance(leaf, torch.Tensor):
                found.append((name, _output_name(keys)))
    return found


def _batch_symbols(program: ExportedProgram, names: Sequence[str]) -> dict[str, str]:
    """The first free size of every tensor input, and how to call it."""
    symbols: dict[str, str] = {}
    inputs = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    values = [node.meta.get("val") for node in nodes]
    for value, name in zip([each for each in values if isinstance(each, torch.Tensor)], names, strict=True):
        free = [str(size) for size in value.shape if isinstance(size, torch.SymInt)]
        if free:
            symbols.setdefault(free[0], name)
    return symbols


def _with_named_batch(shape: Any, symbols: Mapping[str, str]) -> Any:
    named = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols))
    sizes = [size if isinstance(size, int) else size.value for size in shape]
    return require("onnx_ir").Shape(
        [named.sub(lambda match: symbols[match[0]], size) if isinstance(size, str) else size for size in sizes]
    )


def _values(model: Any) -> Iterator[Any]:
    for graph in (*model.graphs(), *model.functions.values()):
        yield from graph.inputs
        yield from getattr(graph, "initializers", {}).values()
        for node in graph:
            yield from node.outputs


def _weight_bytes(model: Any) -> int:
    """Bytes of all stored tensors: initializers, and constants that are attributes of nodes."""
    return sum(value.const_value.nbytes for value in _values(model) if value.const_value is not None)


def _save(model: Any, path: Path, *, external: bool) -> None:
    ir = require("onnx_ir")
    ir.save(model, path, format="protobuf", external_data=f"{path.name}.data" if external else None)


def _summary(error: Exception) -> str:
    """What the exporter says below its advice on how to report a bug to PyTorch."""
    _, found, below = str(error).partition("## Exception summary")
    text = below if found else str(error)
    causes = re.findall(r"<class '[^']*'>: (.*)", text)
    return str(causes[0]).partition(". Failure message")[0] if causes else _first_line(error)


def _first_line(error: BaseException) -> str:
    """The first line that says something; the headline of a violated constraint does not."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    details = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    if lines and lines[0].startswith("Constraints violated") and details:
        return details[0].partition(". If you")[0]
    return lines[0] if lines else type(error).__name__
