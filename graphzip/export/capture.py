"""`torch.export` a module for ONNX: with the sizes free that tracing left free, and names for what goes in and out."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, TensorArgument

from graphzip.errors import ExportError
from graphzip.export.example import Example, OpenSizes, Size
from graphzip.graph.guards import asked_of_sizes
from graphzip.graph.torch_private import pytree
from graphzip.tracing.results import Way, leaves_with_ways

__all__ = ["Captured", "capture", "first_line", "renamed"]

logger = logging.getLogger(__name__)

_BATCH = "batch"


@dataclass(frozen=True)
class Captured:
    """A program, the example that it was captured with, and how to call what it takes and gives.

    `symbols` has a name for every free size, by the name that the program has for it. `conditions` are those on sizes
    that the module checks, in words and as expressions of the program. `notes` are sentences on sizes that had to be
    fixed, and on results that are no tensors.
    """

    program: ExportedProgram
    example: Example
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: OpenSizes
    symbols: Mapping[str, str]
    conditions: tuple[tuple[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """The shape of every input, where free sizes have their names."""
        return {
            name: tuple(size if isinstance(size, int) else renamed(str(size), self.symbols) for size in sizes)
            for name, sizes in zip(self.inputs, self.sizes.leaves, strict=True)
        }


def capture(skeleton: nn.Module, example: Example, *, by_task: bool = False, same_input: bool = False) -> Captured:
    """Trace `skeleton` with the free sizes of the example free; where its graph fixes the batch, with that fixed.

    Names of a joint module begin with the task's, those of inputs only where each task has inputs of its own. Raises
    `ExportError` where the module does not run on the example, cannot be traced, or returns nothing to export.
    """
    results = leaves_with_ways(_run(skeleton, example))
    outputs = _output_names(skeleton, example, results, by_task=by_task)
    with asked_of_sizes() as asked:
        program, example, notes = _program(skeleton, example, asked)
    values = _input_values(program)
    if by_task and not same_input:
        joint = _joint_inputs(skeleton, example)
        inputs, batches = [f"{task}_{name}" for task, name in joint], [f"{task}_{_BATCH}" for task, _ in joint]
    else:
        inputs, batches = [name for name, _ in values], [_BATCH] * len(values)
    sizes = _sizes(program)
    conditions = tuple((text, _replaced(program, expression)) for text, expression in dict.fromkeys(asked))
    limited = set().union(*(expression.free_symbols for _, expression in conditions))
    symbols = _symbol_names(sizes, inputs, batches, set(map(str, limited)))
    inputs = _apart(inputs)
    notes += tuple(
        f"dimension {dim} of input {name!r} is fixed at {leaf[dim]} in the file: the model computes with this number"
        for name, leaf, dims in zip(inputs, sizes.leaves, example.free, strict=True)
        for dim in dims
        if isinstance(leaf[dim], int)
    )
    numbers = [_output_name(keys) for keys, leaf in results if not isinstance(leaf, torch.Tensor | None)]
    if numbers:
        notes += (f"not in the file, which gives tensors alone: {', '.join(numbers)}",)
    return Captured(program, example, tuple(inputs), tuple(outputs), sizes, symbols, conditions, notes)


def _program(
    skeleton: nn.Module, example: Example, asked: list[Any]
) -> tuple[ExportedProgram, Example, tuple[str, ...]]:
    """The program with as much free as can be, the example for it, and a note where the batch had to be fixed.

    What an attempt that is given up has `asked` is forgotten.
    """
    wanted = any(0 in dims for dims in example.free)
    without_batch = replace(example.fixed(), free=tuple(tuple(dim for dim in dims if dim) for dims in example.free))
    reason = "the model computes with this number"
    if wanted:
        try:
            program = _traced(skeleton, example)
            if _sizes(program).batches:
                return program, example, ()
        except Exception as error:
            logger.debug("no trace with a free batch", exc_info=True)
            reason = first_line(error)
    asked.clear()
    try:
        program = _traced(skeleton, without_batch)
    except Exception as error:
        raise ExportError(
            f"{type(skeleton).__name__} cannot be traced for export: {first_line(error)}; make its control flow "
            "independent of the values of tensors"
        ) from error
    fixed = example.asked and without_batch.batch is not None
    note = f"the batch is fixed at {without_batch.batch} in the file: {reason}"
    return program, without_batch, (note,) if fixed else ()


def _traced(skeleton: nn.Module, example: Example) -> ExportedProgram:
    shapes = _dynamic_shapes(skeleton, example) if any(example.free) else None
    program = torch.export.export(skeleton, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
    _leave_out_numbers(program)
    return program


def _dynamic_shapes(skeleton: nn.Module, example: Example) -> dict[str, Any]:
    """Every free size by itself: which of them are equal, the trace finds out."""
    free = iter(example.free)

    def dims(leaf: Any) -> Any:
        return dict.fromkeys(next(free), Dim.AUTO) if isinstance(leaf, torch.Tensor) else None

    args, kwargs = pytree.tree_map(dims, (example.args, example.kwargs))
    return dict(inspect.signature(skeleton.forward).bind(*args, **kwargs).arguments)


def _leave_out_numbers(program: ExportedProgram) -> None:
    """ONNX has tensors alone: numbers among the results become `None`, which the exporter passes over."""
    node = program.graph.output_node()
    results = list(node.args[0])
    for place, spec in enumerate(program.graph_signature.output_specs):
        if not isinstance(spec.arg, TensorArgument):
            spec.arg, results[place] = ConstantArgument(name="", value=None), None
    node.args = (tuple(results),)


def _input_values(program: ExportedProgram) -> list[tuple[str, torch.Tensor]]:
    """Name and fake value of the tensor inputs: the arguments of `forward`, `argument_key` for what lies in a dict."""
    user = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in user]
    return [(node.name, node.meta["val"]) for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def _sizes(program: ExportedProgram) -> OpenSizes:
    leaves: list[tuple[Size, ...]] = []
    known: dict[sympy.Symbol, int] = {}
    for _, value in _input_values(program):
        sizes: list[Size] = []
        for size in value.shape:
            fixed = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
            sizes.append(size.node.expr if fixed is None else int(fixed))
            if fixed is None:
                known.update(_hints(size))
        leaves.append(tuple(sizes))
    return OpenSizes(tuple(leaves), known)


def _replaced(program: ExportedProgram, expression: Any) -> Any:
    """The expression by symbols that the inputs show: of sizes that are equal only one is left."""
    shapes: list[Any] = [size for _, value in _input_values(program) for size in value.shape]
    environment = next((size.node.shape_env for size in shapes if isinstance(size, torch.SymInt)), None)
    return expression if environment is None else environment.replace(expression)


def _hints(size: torch.SymInt) -> dict[sympy.Symbol, int]:
    """The sizes that the symbols in an expression had in the example."""
    expression = size.node.expr
    if isinstance(expression, sympy.Symbol):
        known: Any = size.node.hint
        return {expression: int(known)}
    environment: Any = size.node.shape_env
    hints = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    return {symbol: int(hints[symbol]) for symbol in sorted(expression.free_symbols, key=str)}


def _symbol_names(
    sizes: OpenSizes, inputs: Sequence[str], batches: Sequence[str], limited: Collection[str]
) -> dict[str, str]:
    """`batch` for the first free batch, `y_batch` for that of another input, `x_2` for another free size.

    A batch that is `limited`, because the model does not take every one, is a size like others: `x_0`.
    """
    names: dict[str, str] = {}
    for leaf, name, batch in zip(sizes.leaves, inputs, batches, strict=True):
        for dim, size in enumerate(leaf):
            for symbol in [] if isinstance(size, int) else sorted(map(str, size.free_symbols)):
                if symbol not in names:
                    is_batch = dim == 0 and symbol not in limited
                    wanted = batch if is_batch else f"{name}_{dim}"
                    taken = wanted in names.values()
                    names[symbol] = f"{name}_{_BATCH}" if is_batch and taken else wanted
    return dict(zip(names, _apart(names.values()), strict=True))


def renamed(text: str, symbols: Mapping[str, str]) -> str:
    """The text with other names for the symbols in it."""
    named = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols))
    return named.sub(lambda match: symbols[match[0]], text) if symbols else text


def _apart(names: Iterable[str]) -> list[str]:
    """The names with a number behind those that occurred before."""
    taken: dict[str, None] = {}
    for name in names:
        unique, count = name, 1
        while unique in taken:
            unique, count = f"{name}_{count}", count + 1
        taken[unique] = None
    return list(taken)


def _output_names(
    skeleton: nn.Module, example: Example, results: Sequence[tuple[Way, Any]], *, by_task: bool
) -> list[str]:
    """The names of the tensors among the results; of a joint model the key of the task comes first."""
    tensors = [(keys, leaf) for keys, leaf in results if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise ExportError(
            f"{type(skeleton).__name__} returns no tensor, so there is nothing to export; return its result"
        )
    for leaf in [*example.leaves, *(leaf for _, leaf in tensors)]:
        if leaf.is_complex():
            raise ExportError("ONNX runtimes have no complex numbers; pass and return torch.view_as_real(...) instead")
    if by_task:
        return [f"{_output_name(keys[:1])}_{_output_name(keys[1:])}" for keys, _ in tensors]
    return [_output_name(keys) for keys, _ in tensors]


def _run(skeleton: nn.Module, example: Example) -> Any:
    """What the module returns on the example, or, where it takes no batch of two, on the example as it was given."""
    try:
        return skeleton(*example.args, **example.kwargs)
    except Exception as error:
        if example.given is not None:
            return _run(skeleton, example.given)
        raise ExportError(
            f"{type(skeleton).__name__} fails on the example inputs: {first_line(error)}; pass inputs it accepts"
        ) from error


def _output_name(keys: Way) -> str:
    """`output`, `output_1` by position, or the key in a dict, nested ones joined by underscores."""
    parts = [str(key) for key in keys]
    if not keys or isinstance(keys[0], int):
        parts = ["output", *parts]
        if parts[1:] == ["0"]:
            parts.pop()
    return re.sub(r"\W", "_", "_".join(parts))


def _joint_inputs(skeleton: nn.Module, example: Example) -> list[tuple[str, str]]:
    """The task of every tensor input of a joint module, and the argument of the task's own module that it is."""
    found = []
    for name, given in inspect.signature(skeleton.forward).bind(*example.args).arguments.items():
        child: Any = skeleton.get_submodule(name)
        several = isinstance(given, tuple) and len(inspect.signature(child.forward).parameters) > 1
        arguments = inspect.signature(child.forward).bind(*(given if several else (given,))).arguments
        for keys, leaf in leaves_with_ways(dict(arguments)):
            if isinstance(leaf, torch.Tensor):
                found.append((name, _output_name(keys)))
    return found


def first_line(error: BaseException) -> str:
    """The first line that says something; the headline of a violated constraint does not."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    details = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    if lines and lines[0].startswith("Constraints violated") and details:
        return details[0].partition(". If you")[0]
    return lines[0] if lines else type(error).__name__
