"""Inputs to export with, and variations of them to compare with: other values, and other sizes where these are free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch

from graphzip.graph.sizes import value_at
from graphzip.graph.torch_private import pytree
from graphzip.graph.traced import Traced

__all__ = [
    "Case",
    "Example",
    "Free",
    "OpenSizes",
    "Size",
    "Wish",
    "free_sizes",
    "make_case",
    "tensor_leaves",
    "wishes",
]

Free = Sequence[Sequence[int]]
"""For every tensor among the inputs, in order, the dimensions that may have another size."""

Size: TypeAlias = "int | sympy.Expr"
"""A size of an input: fixed, or an expression in the symbols of free sizes."""

_SEED = 0
_STEPS = (1, 2, 4, 8, 16, 32, 64)
_NOISE = 0.1


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def free_sizes(traced: Traced) -> list[tuple[int, ...]]:
    """The dimensions of the inputs that a traced graph leaves free."""
    leaves = pytree.tree_leaves((traced.example_inputs, traced.example_kwargs))
    return [
        tuple(dim for dim, size in enumerate(spec.shape) if size is None)
        for leaf, spec in zip(leaves, traced.inputs, strict=True)
        if isinstance(leaf, torch.Tensor)
    ]


@dataclass(frozen=True)
class Case:
    """One call of the module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[torch.Tensor]:
        return tensor_leaves((self.args, self.kwargs))

    @property
    def batch(self) -> int | None:
        """Size of the first dimension of the first tensor that has one."""
        return next((int(leaf.shape[0]) for leaf in self.leaves if leaf.dim()), None)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(leaf.shape) for leaf in self.leaves)


@dataclass(frozen=True)
class Example(Case):
    """The inputs to export with: detached copies of what the user gave.

    For every tensor in order, `free` holds the dimensions that may have another size, and `batched` tells whether its
    first dimension is the batch. A free batch of one is repeated to two, because `torch.export` bakes a batch of one
    into the graph; `given` is the example before that. A free batch was `asked` for, though it may be none of `free`.
    """

    free: tuple[tuple[int, ...], ...] = ()
    batched: tuple[bool, ...] = ()
    given: Example | None = None
    asked: bool = True

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], *, free: Free | None = None, dynamic_batch: bool = True
    ) -> Example:
        """Without `free`, the first dimension is free of every tensor that has there what the first tensor has.

        Without `dynamic_batch` no first dimension is. Every tensor becomes one of its own: `torch.export` takes a
        tensor that is given twice for one input.
        """
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
        )
        leaves = tensor_leaves((args, kwargs))
        rows = next((leaf.shape[0] for leaf in leaves if leaf.dim()), None)
        batched = tuple(bool(leaf.dim()) and leaf.shape[0] == rows for leaf in leaves)
        if free is None:
            free = [(0,) if each else () for each in batched]
        elif any(0 in dims for dims in free):
            batched = tuple(0 in dims for dims in free)
        kept = tuple(tuple(dim for dim in dims if dim or dynamic_batch) for dims in free)
        example = cls(args, kwargs, kept, batched, asked=dynamic_batch)
        single = [0 in dims and leaf.shape[0] == 1 for dims, leaf in zip(kept, leaves, strict=True)]
        if not any(single):
            return example
        shapes = [(2, *leaf.shape[1:]) if one else leaf.shape for one, leaf in zip(single, leaves, strict=True)]
        return replace(example.resized(shapes), given=example)

    def fixed(self) -> Example:
        """What the user gave, with no size free."""
        example = self.given or self
        return replace(example, free=tuple(() for _ in example.free))

    def resized(self, shapes: Sequence[Sequence[int]]) -> Example:
        """The inputs with these shapes: values are repeated, or cut off, at the end of each dimension."""
        fresh = [_resized(leaf, shape) for leaf, shape in zip(self.leaves, shapes, strict=True)]
        args, kwargs = _with_leaves((self.args, self.kwargs), iter(fresh))
        return replace(self, args=args, kwargs=kwargs, given=None)


def _with_leaves(tree: Any, fresh: Iterator[torch.Tensor]) -> Any:
    return pytree.tree_map(lambda leaf: next(fresh) if isinstance(leaf, torch.Tensor) else leaf, tree)


def _resized(leaf: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    for dim, size in enumerate(shape):
        if leaf.shape[dim] != size:
            leaf = leaf.index_select(dim, torch.arange(size, device=leaf.device) % leaf.shape[dim])
    return leaf


@dataclass(frozen=True)
class OpenSizes:
    """The shapes that a captured program takes: for every tensor among the inputs its sizes.

    `known` has the size that every symbol had in the example.
    """

    leaves: tuple[tuple[Size, ...], ...]
    known: Mapping[sympy.Symbol, int] = field(default_factory=dict)

    @property
    def batches(self) -> list[sympy.Symbol]:
        """Symbols in the first size of an input."""
        return [symbol for symbol in self.known if any(sizes and _has(sizes[0], symbol) for sizes in self.leaves)]

    @property
    def others(self) -> list[sympy.Symbol]:
        return [symbol for symbol in self.known if symbol not in self.batches]

    def at(self, chosen: Mapping[sympy.Symbol, int]) -> list[tuple[int, ...]] | None:
        """The shapes where symbols have the `chosen` sizes; `None` where these are no sizes."""
        values = {symbol: sympy.Integer(size) for symbol, size in {**self.known, **chosen}.items()}
        shapes = []
        for sizes in self.leaves:
            numbers = [value_at(sympy.sympify(size), values) for size in sizes]
            if not all(number is not None and number.is_Integer and number >= 0 for number in numbers):
                return None
            shapes.append(tuple(int(number) for number in numbers))
        return shapes


def _has(size: Size, symbol: sympy.Symbol) -> bool:
    return not isinstance(size, int) and symbol in size.free_symbols


@dataclass(frozen=True)
class Wish:
    """A case that is wanted: with the first of the `choices` of sizes that the module takes.

    `kind` is `example` (the example itself), `values`, `batch`, `one` (a batch of one) or `sizes`.
    """

    kind: str
    choices: tuple[Mapping[sympy.Symbol, int], ...] = ({},)


def wishes(sizes: OpenSizes) -> list[Wish]:
    """The example itself and other values of its sizes; another batch and a batch of one; other free sizes."""
    found = [Wish("example"), Wish("values")]
    batches, others = sizes.batches, sizes.others
    if batches:
        first = sizes.known[batches[0]]
        more = [first + 1, first + 2, 2 * first, 3 * first, first + 4, first + 8]
        apart = {symbol: first + 1 + place for place, symbol in enumerate(batches)}
        found.append(Wish("batch", (apart, *(dict.fromkeys(batches, rows) for rows in more))))
        found.append(Wish("one", (dict.fromkeys(batches, 1),)))
    if others:
        known = sizes.known
        apart_by = [{each: known[each] + step * (1 + at) for at, each in enumerate(others)} for step in _STEPS]
        alike_by = [{each: known[each] + step for each in others} for step in _STEPS]
        found.append(Wish("sizes", (*apart_by, *alike_by, {each: 2 * known[each] for each in others})))
    return found


def make_case(
    example: Example, sizes: OpenSizes, chosen: Mapping[sympy.Symbol, int], *, varied: bool = True
) -> Case | None:
    """A call with the `chosen` sizes; `None` where these do not fit together.

    Where values are `varied`, rows of floats are mixtures of the example's rows plus a little noise, inside the range
    of the example's values; rows of integers and booleans are rows of the example, or, where it has but one, that one
    in another order. Inputs without a batch keep their values, unless there is no other input.
    """
    shapes = sizes.at(chosen)
    if shapes is None:
        return None
    generator = torch.Generator().manual_seed(_SEED + sum(sum(shape) for shape in shapes))
    fresh = []
    for leaf, shape, batched in zip(example.leaves, shapes, example.batched, strict=True):
        if not varied or not (batched or not any(example.batched)):
            fresh.append(_resized(leaf, shape))
        elif not leaf.dim():
            fresh.append(_noisy(leaf, generator) if leaf.is_floating_point() else leaf)
        else:
            fresh.append(_varied(_resized(leaf, (leaf.shape[0], *shape[1:])), shape[0], generator))
    return Case(*_with_leaves((example.args, example.kwargs), iter(fresh)))


def _varied(leaf: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    first = torch.randint(leaf.shape[0], (rows,), generator=generator).to(leaf.device)
    if leaf.numel() == 0:
        return leaf[first]
    if not leaf.is_floating_point():
        if leaf.shape[0] == 1 and leaf.dim() > 1:
            order = torch.randperm(leaf.shape[-1], generator=generator).to(leaf.device)
            leaf = leaf.index_select(-1, order)
        return leaf[first]
    second = torch.randint(leaf.shape[0], (rows,), generator=generator).to(leaf.device)
    weight = torch.rand(rows, *[1] * (leaf.dim() - 1), generator=generator).to(leaf.device)
    values = leaf.double()
    one, other = values[first], values[second]
    mixed = one * weight + other * (1 - weight)
    finite = values[values.isfinite()]
    if finite.numel() == 0 or finite.min() == finite.max():
        mixed = _noisy(mixed, generator)
    else:
        noise = _NOISE * finite.std() * torch.randn(mixed.shape, generator=generator).to(mixed)
        mixed = (mixed + noise).clamp(finite.min(), finite.max())
    return torch.where(one.isfinite() & other.isfinite(), mixed, one).to(leaf.dtype)


def _noisy(leaf: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    values = leaf.double()
    noise = torch.randn(values.shape, generator=generator).to(values)
    return (values + _NOISE * noise * values.abs().clamp(min=1.0)).to(leaf.dtype)
