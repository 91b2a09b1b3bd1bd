"""Example inputs and the shapes that a traced graph accepts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from graphzip.errors import InputShapeError
from graphzip.graph.proxies import as_call, is_proxy
from graphzip.graph.torch_private import DimDynamic, FakeTensorMode, PyTreeCodeGen, StatelessSymbolicContext, pytree

__all__ = [
    "CallCode",
    "InputSpec",
    "check_constant",
    "check_input",
    "concrete_shape",
    "fake_input",
    "has_batch_of_one",
    "hint",
    "input_specs",
    "is_data_dependent",
    "with_batch_of_two",
]


@dataclass(frozen=True)
class InputSpec:
    """One tensor input: its name, its shape (`None` where any size is accepted) and its dtype.

    `shape` is `()` and `dtype` is `None` for an argument that is not a tensor.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype | None


class CallCode(PyTreeCodeGen):
    """Writes the `forward` of a graph, which takes by name alone what the model it is from was given by name.

    What was given by name may stand behind arguments that were not given, so it has no position that counts.
    """

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        """The first lines of the function."""
        text: str = super().gen_fn_def(free_vars, maybe_return_annotation, expanded_def=expanded_def)
        info = self.pytree_info
        given = info.in_spec.children()
        by_name = info.orig_args[given[0].num_children :] if len(given) == 2 and given[1].type is dict else []
        if not by_name or expanded_def:
            return text
        first = ", ".join(by_name) + ")"
        return text.replace(first, f"*, {first}", 1)


def has_batch_of_one(inputs: Any) -> bool:
    """Whether the batch, the first dimension of the first tensor that has one, is of one row."""
    tensors = _with_dimensions(inputs)
    return bool(tensors) and tensors[0].shape[0] == 1


def with_batch_of_two(inputs: Any, *, only_first: bool = False) -> Any:
    """Repeat a batch of one: `torch.export` would bake it into the graph as a constant.

    With `only_first` other tensors that begin with a one keep it. The inputs themselves where there is nothing to
    repeat.
    """
    if not has_batch_of_one(inputs):
        return inputs
    first = _with_dimensions(inputs)[0]

    def repeat(leaf: Any) -> Any:
        batched = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == 1
        return torch.cat([leaf, leaf]) if batched and (leaf is first or not only_first) else leaf

    return pytree.tree_map(repeat, inputs)


def _with_dimensions(inputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]


def concrete_shape(value: Any) -> tuple[int, ...]:
    """The shape of a fake tensor on the example inputs: symbolic sizes are replaced by the sizes traced with."""
    return tuple(hint(size) for size in value.shape)


def fake_input(mode: FakeTensorMode, leaf: Any, spec: InputSpec) -> Any:
    """A fake tensor like `leaf` whose dimensions that `spec` leaves open are symbolic; what is no tensor as it is.

    Each has a symbol of its own, whatever size it has in `leaf`; one of size one is taken for two.
    """
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape = zip(spec.shape, leaf.shape, strict=True)
    leaf = leaf.expand([2 if want is None and size == 1 else size for want, size in shape])
    sizes = [DimDynamic.DYNAMIC if size is None else DimDynamic.STATIC for size in spec.shape]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(leaf, symbolic_context=context)


def hint(size: Any) -> int:
    """The size that a possibly symbolic dimension had while tracing; a stand-in where only the data decide it."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    known: Any = size.node.hint
    return int(known) if known is not None else _stand_in(size)


def is_data_dependent(size: Any) -> bool:
    """Whether the values of tensors decide a size."""
    return isinstance(size, torch.SymInt) and size.node.hint is None


_FIRST_STAND_IN = 5003


def _stand_in(size: torch.SymInt) -> int:
    """A number for a size that the data decide: large, and a prime for every symbol, so that it is equal to no other.

    It is the same whenever it is asked for.
    """
    environment: Any = size.node.shape_env
    expression = environment.replace(size.node.expr)
    values = {
        symbol: environment.backed_var_to_val.get(symbol) or sympy.Integer(_prime(str(symbol)))
        for symbol in expression.free_symbols
    }
    return max(int(expression.xreplace(values)), 0)


@cache
def _prime(symbol: str) -> int:
    number = int("".join(filter(str.isdigit, symbol)) or 0)
    found = _FIRST_STAND_IN
    for _ in range(number):
        found = int(sympy.nextprime(found))
    return found


def input_specs(graph: fx.Graph) -> tuple[InputSpec, ...]:
    specs = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shape = tuple(_fixed(size) for size in value.shape)
            specs.append(InputSpec(str(node.target), shape, value.dtype))
        else:
            specs.append(InputSpec(str(node.target), (), None))
    return tuple(specs)


def _fixed(size: Any) -> int | None:
    """The size, or `None` where it is not fixed."""
    if isinstance(size, torch.SymInt):
        known: int | None = size.node.maybe_as_int()
        return known
    return int(size)


def check_input(
    value: torch.Tensor, name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Hand `value` on if it has the shape the graph was made for, or raise `InputShapeError`.

    Where `dtype` is given `value` must be of the same kind: floating, complex, bool or another integer.
    """
    if is_proxy(value):
        return as_call(check_input, value, name, shape, dtype)  # type: ignore[no-any-return]
    if not isinstance(value, torch.Tensor):
        raise InputShapeError(
            f"input {name!r} is a {type(value).__name__}, but the model was compiled for a tensor of {_text(shape)}"
        )
    fits = value.dim() == len(shape) and all(
        want is None or size == want for size, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise InputShapeError(
            f"input {name!r} has shape {tuple(value.shape)}, but the model was compiled for {_text(shape)}; "
            "compile it with example_inputs of the new shape, or with dynamic_shapes"
        )
    if dtype is not None and _kind(value.dtype) != _kind(dtype):
        raise InputShapeError(
            f"input {name!r} is {_name(value.dtype)}, but the model was compiled for {_name(dtype)}; convert it, or "
            "compile with example_inputs of the new dtype"
        )
    return value


def _text(shape: tuple[int | None, ...]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape)


def check_constant(value: Any, name: str, expected: Any) -> None:
    """Raises `InputShapeError` unless an argument that is not a tensor has the value the graph was made for."""
    if is_proxy(value):
        as_call(check_constant, value, name, expected)
    elif type(value) is not type(expected) or value != expected:
        given = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
        raise InputShapeError(
            f"argument {name!r} is {given}, but the model was compiled for {expected!r}, which is part of the graph; "
            "compile it with example_inputs that have the new value"
        )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating"
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
