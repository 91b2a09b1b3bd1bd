"""What an operator's row may do to its node when channels have gone: `ops.spec.Patch` on a copy of the graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import fx

from graphzip.errors import RewriteError
from graphzip.graph.inputs import concrete_shape
from graphzip.graph.operators import argument_of, set_argument
from graphzip.graph.sizes import content, is_open, number, open_dims
from graphzip.labels import IntArray, lies_outside
from graphzip.ops.site import describe
from graphzip.ops.spec import FloatArray
from graphzip.rewrite.edit import before, behind
from graphzip.rewrite.layout import Layout

__all__ = ["NodePatch"]

aten = torch.ops.aten


@dataclass
class NodePatch:
    """One node of the copy; `node` and `args` are those of the original graph, and so are layouts."""

    node: fx.Node
    args: Mapping[str, Any]
    layout: Layout
    copy: fx.Node
    to_copy: dict[fx.Node, fx.Node]
    vanished: list[fx.Node] = field(default_factory=list)
    _made: int = field(default=0)

    def size(self, value: Any, dim: int) -> int:
        self.before(value, dim)
        return self.layout.size(value, dim)

    def before(self, value: Any, dim: int) -> int:
        size = value.meta["val"].shape[dim]
        if is_open(size):
            raise RewriteError(f"dimension {dim} has a size that the inputs decide; nothing was changed")
        return number(size)

    def fraction(self, value: Any, dims: Sequence[int]) -> Fraction:
        shape = concrete_shape(value.meta["val"])
        fraction = Fraction(1)
        for dim in dims:
            if self.shrinks(value, dim):
                fraction *= Fraction(self.layout.size(value, dim), shape[dim])
        return fraction

    def count(self, value: Any, dims: Sequence[int]) -> Any:
        held = [dim for dim in dims if is_open(value.meta["val"].shape[dim])]
        fixed = math.prod(self.before(value, dim) for dim in dims if dim not in held)
        if not held:
            return fixed
        grown = fixed / self.fraction(value, held)
        found = self._size_of(value, held[0])
        for dim in held[1:]:
            found = self.call(operator.mul, found, self._size_of(value, dim))
        found = self.call(operator.mul, found, grown.numerator)
        return found if grown.denominator == 1 else self.call(operator.floordiv, found, grown.denominator)

    def _size_of(self, value: fx.Node, dim: int) -> fx.Node:
        """The size after the rewrite, when the graph runs."""
        return self.call(aten.sym_size.int, self.copied(value), dim)

    def shrinks(self, value: Any, dim: int) -> bool:
        return self.layout.shrinks(value, dim)

    def kept(self, value: Any, dim: int) -> IntArray:
        return self.layout.kept(value, dim)

    def kept_numbers(self, value: Any) -> IntArray | None:
        return self.layout.kept_numbers(value)

    def vanish(self, value: fx.Node) -> None:
        self.vanished.append(value)

    def multiplicity(self, value: Any, dims: Sequence[int], blocks: int = 1) -> FloatArray | None:
        return self.layout.multiplicity(value, dims, blocks)

    def lost(self, value: Any, dims: Sequence[int]) -> float:
        if not self.layout.drops or self.layout.plain_norms:
            return 0.0
        return float(1 - self.fraction(value, dims))

    def may_stay_plain(self) -> bool:
        if self.layout.plain_norms:
            self.layout.left_plain.append(describe(self.node))
        return self.layout.plain_norms

    def consumes(self, value: Any, dim: int) -> bool:
        return self.layout.consumes(value, dim % len(value.meta["val"].shape))

    def is_raw(self, value: Any) -> bool:
        return value in self.layout.analysis.propagation.raw

    def operand(self, name: str) -> Any:
        return argument_of(self.copy, name)

    def copied(self, value: Any) -> fx.Node:
        return self.to_copy[value]

    def set(self, name: str, value: Any) -> None:
        self.set_node(name, fx.node.map_arg(value, lambda found: self.to_copy.get(found, found)))

    def set_node(self, name: str, value: Any) -> None:
        set_argument(self.copy, name, value)

    def replace(self, target: Any, args: tuple[Any, ...]) -> None:
        self.copy.target = target
        self.copy.args = fx.node.map_arg(args, lambda found: self.to_copy.get(found, found))
        self.copy.kwargs = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return before(self.copy)(target, *args, **kwargs)

    def then(self, target: Any, *args: Any) -> fx.Node:
        made = behind(self.copy)(target, self.copy, *args)
        made.meta["val"] = self.copy.meta.get("val")
        self.copy.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        self.to_copy[self.node] = made
        return made

    def become(self, value: fx.Node) -> None:
        value.meta["val"] = self.copy.meta.get("val")
        self.copy.replace_all_uses_with(value)
        self.to_copy[self.node] = value
        self.copy.graph.erase_node(self.copy)

    def values(self, value: FloatArray, like: Any, kind: Any = None) -> fx.Node:
        """Along a dimension whose size the inputs decide the numbers are repeated as often as the graph's run needs."""
        fake = like.meta["val"]
        repeated: list[tuple[int, int, bool]] = []
        for dim in sorted(open_dims(fake)) if value.ndim == fake.dim() else ():
            if value.shape[dim] > 1:
                width = int(content(fake.shape[dim]) * self.fraction(like, [dim]))
                outside = lies_outside(value, dim, width)
                if outside is None:
                    raise RewriteError(
                        f"channels lie along dimension {dim} together with a size that the inputs decide"
                    )
                step = 1 if outside else value.shape[dim] // width
                value = np.take(value, np.arange(width) * step, axis=dim)
                repeated.append((dim, width, outside))
        place = (kind if kind is not None else like).meta["val"]
        made = self._numbers(torch.as_tensor(value, dtype=place.dtype, device=place.device))
        for dim, width, outside in repeated:
            times = self.call(operator.floordiv, self._size_of(like, dim), width)
            if outside:
                made = self.call(aten.repeat.default, made, [times if d == dim else 1 for d in range(value.ndim)])
            else:
                made = self.call(aten.repeat_interleave.self_int, made, times, dim)
        return made

    def _numbers(self, tensor: torch.Tensor) -> fx.Node:
        if sum(size > 1 for size in tensor.shape) < 2:
            return before(self.copy).constant(self._free_name("multiplicity"), tensor)
        # channels of their own in every line, not the same in all
        flat = before(self.copy).constant(self._free_name("multiplicity"), tensor.flatten())
        return self.call(aten.view.default, flat, list(tensor.shape))

    def constant(self, value: IntArray) -> fx.Node:
        found = self.node.meta["val"]
        device = (found[0] if isinstance(found, (tuple, list)) else found).device
        return before(self.copy).index(self._free_name("positions"), value, device)

    def _free_name(self, kind: str) -> str:
        name = f"{self.node.name}_{kind}{self._made or ''}"
        self._made += 1
        while hasattr(self.copy.graph.owning_module, name):
            name += "_"
        return name
