"""One operator call as its rule sees it: operands, shapes, labels, and what the rule may say about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx

from graphzip.graph.inputs import concrete_shape, hint
from graphzip.graph.sizes import is_open, open_dims
from graphzip.graph.source import describe
from graphzip.labels import IntArray, Reason, collapse
from graphzip.ops.spec import Axes

__all__ = ["Move", "Site", "Space", "describe"]


class Space(Protocol):
    """What a rule says about labels: recorded while analysing, checked after a rewrite."""

    def fresh(self, count: int) -> IntArray: ...
    def unify(self, left: IntArray, right: IntArray) -> None: ...
    def tie_blocks(self, one: IntArray, every: IntArray) -> None: ...
    def pin(self, labels: IntArray, reason: Reason) -> None: ...
    def pick(self, labels: IntArray, count: int) -> None: ...
    def contain(self, outer: IntArray, inner: IntArray) -> None: ...


class _NoSpace:
    def fresh(self, count: int) -> IntArray:
        return np.zeros(count, dtype=np.int64)

    def unify(self, left: IntArray, right: IntArray) -> None: ...
    def tie_blocks(self, one: IntArray, every: IntArray) -> None: ...
    def pin(self, labels: IntArray, reason: Reason) -> None: ...
    def pick(self, labels: IntArray, count: int) -> None: ...
    def contain(self, outer: IntArray, inner: IntArray) -> None: ...


_NO_SPACE = _NoSpace()


@dataclass
class Move:
    """Data movement: output position `p` holds what stood at `origin[p]` of the sources laid end to end."""

    sources: tuple[IntArray, ...]
    origin: IntArray
    result: IntArray


@dataclass
class Site:
    """One call in the graph.

    What a rule says about labels is collected here as well: which of them `met`, and which stand for `holes`. Whole
    numbers in a tensor may be places in a row of labels (`numbered`), as those of experts that were picked are.
    """

    node: fx.Node
    args: Mapping[str, Any]
    space: Space
    known: Mapping[fx.Node, Any]
    raw_nodes: frozenset[fx.Node] | set[fx.Node]
    grouped: Mapping[fx.Node, IntArray]
    derived: set[int] = field(default_factory=set)
    moves: list[Move] = field(default_factory=list)
    consumed: list[IntArray] = field(default_factory=list)
    produced: list[IntArray] = field(default_factory=list)
    blocks: list[IntArray] = field(default_factory=list)
    normed: list[IntArray] = field(default_factory=list)
    met: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    holes: list[IntArray] = field(default_factory=list)
    numbered: Mapping[fx.Node, dict[int, IntArray]] = field(default_factory=dict)
    followed: set[Any] = field(default_factory=set)
    numbers: dict[int, IntArray] = field(default_factory=dict)

    @classmethod
    def of(cls, node: fx.Node, args: Mapping[str, Any]) -> Site:
        """A call without labels, for what needs shapes only."""
        return cls(node, args, _NO_SPACE, {}, frozenset(), {})

    def axes(self, value: Any) -> Axes:
        """Labelled axes of an operand; none for a scalar or a missing operand."""
        found = self.known.get(value, ()) if isinstance(value, fx.Node) else ()
        return found if isinstance(found, tuple) else ()

    def shape(self, value: Any = None) -> tuple[int, ...]:
        """Shape of an operand (of the result, without argument) on the example inputs."""
        tensor = (self.node if value is None else value).meta["val"]
        return concrete_shape(tensor)

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)

    def tensors(self) -> list[fx.Node]:
        """Every tensor operand, lists included, in order."""
        return [value for value in self.node.all_input_nodes if self.is_tensor(value)]

    def is_raw(self, value: Any) -> bool:
        """Whether an operand is a parameter or buffer itself, at most rearranged."""
        return value in self.raw_nodes

    def size(self, value: Any) -> int:
        """A possibly symbolic integer argument as a number."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        return hint(value)

    def open(self, value: Any = None) -> frozenset[int]:
        """Dimensions of an operand (of the result, without argument) whose sizes the inputs decide."""
        return open_dims((self.node if value is None else value).meta["val"])

    def extent(self, value: Any = None) -> tuple[int, ...]:
        """A shape for telling sizes of one from others: an open size is not one, whatever the example has."""
        held = self.open(value)
        return tuple(max(2, size) if dim in held else size for dim, size in enumerate(self.shape(value)))

    def is_open(self, value: Any) -> bool:
        """Whether the inputs decide an integer argument."""
        return is_open(value.meta["val"] if isinstance(value, fx.Node) else value)

    def dim(self, value: int, rank: int | None = None) -> int:
        rank = len(self.shape()) if rank is None else rank
        return value % max(rank, 1)

    def pin(self, axis: IntArray, why: str) -> None:
        self.space.pin(axis, Reason(self.node.name, f"{describe(self.node)} {why}"))

    def unify(self, left: IntArray, right: IntArray) -> None:
        self.met.append((left, right))
        self.space.unify(left, right)

    def tie_blocks(self, one: IntArray, every: IntArray) -> None:
        self.met.append((one, every))
        self.space.tie_blocks(one, every)

    def contain(self, outer: IntArray, inner: IntArray) -> None:
        self.met.append((outer, inner))
        self.space.contain(outer, inner)

    def fresh(self, shape: Sequence[int]) -> IntArray:
        return self.space.fresh(int(np.prod(shape, dtype=np.int64))).reshape(shape)

    def derive(self, shape: Sequence[int]) -> IntArray:
        """Fresh labels of positions that no parameter makes: copies, or what is left of a block that was summed up."""
        labels = self.fresh(shape)
        self.derived.update(labels.ravel().tolist())
        return labels

    def is_derived(self, axis: IntArray) -> bool:
        return int(axis.flat[0]) in self.derived

    def consume(self, labels: IntArray) -> None:
        """These labels of a weight are summed over: merged channels add up their slices."""
        self.consumed.append(labels)

    def produce(self, labels: IntArray) -> None:
        """These labels of a weight make channels: one slice is kept of merged ones."""
        self.produced.append(labels)

    def block(self, labels: IntArray) -> None:
        """Rows of a 2-D array of labels: each row must keep the same number of channels."""
        self.blocks.append(labels)

    def norm(self, labels: IntArray) -> None:
        """Rows of a 2-D array of labels with statistics of their own: no cluster reaches over two of them."""
        self.normed.append(labels)

    def pick(self, axis: IntArray, count: int) -> None:
        """The data pick `count` of these labels, all of which are treated alike."""
        self.space.pick(axis, count)

    def labels_numbered(self, value: Any) -> IntArray | None:
        """The labels that the numbers in an operand are places of; a rule that asks says what becomes of them."""
        self.followed.add(value)
        return self.numbered.get(value, {}).get(0)

    def carry(self, value: Any, output: int = 0) -> None:
        """The numbers of an operand are those of an output, wherever each one stands in it."""
        labels = self.labels_numbered(value)
        if labels is not None:
            self.numbers[output] = labels

    def tie(self, axis: IntArray, dims: Sequence[int]) -> IntArray:
        """Make the labels along `dims` the same, and give the axis without them."""
        first = axis
        for dim in dims:
            first = np.take(first, [0], axis=dim)
        self.unify(np.broadcast_to(first, axis.shape), axis)
        return first

    def move(self, sources: Sequence[IntArray], run: Callable[[list[IntArray]], IntArray]) -> IntArray:
        """Rearrange axes: `run` gets numbered positions and returns them where they end up, -1 where nothing is."""
        offset, numbered = 0, []
        for source in sources:
            numbered.append(np.arange(offset, offset + source.size, dtype=np.int64).reshape(source.shape))
            offset += source.size
        origin = run(numbered)
        labels = np.concatenate([source.ravel() for source in sources])
        holes = origin < 0
        result = labels[np.where(holes, 0, origin)]
        if holes.any():
            result[holes] = self.space.fresh(int(holes.sum()))
            self.holes.append(result[holes])
        small = collapse(result)
        if small.shape != result.shape:
            cut = tuple(slice(0, size) for size in small.shape)
            origin = origin[cut]
        self.moves.append(Move(tuple(sources), origin, small))
        return small
