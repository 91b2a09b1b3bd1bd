"""Leave out residual branches: `x + f(x)` becomes `x`, or `a x + b` with a scale and a shift per channel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from graphzip.graph.meta import owner_name
from graphzip.graph.state import attach, joined, named_state
from graphzip.graph.traced import Traced
from graphzip.rewrite.edit import Edit, before

__all__ = ["Affine", "Bypass", "bypass"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Affine:
    """A scale and a shift, of a shape that broadcasts to the value: `(C, 1, 1)` or `(C,)`."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.scale.to(value) + self.shift.to(value)


@dataclass(frozen=True)
class Bypass:
    """A sum that becomes what it adds to, or an affine map of that."""

    sum: fx.Node
    skip: fx.Node
    affine: Affine | None = None


def bypass(traced: Traced, bypasses: Iterable[Bypass]) -> Traced:
    """A graph without the branches of these sums, and without the parameters that only they read.

    An affine map is two parameters, `bypass_scale` and `bypass_shift`, of the module that added.
    """
    edit = Edit(traced)
    twins = edit.twins
    for each in bypasses:
        end, skip = twins[each.sum], twins[each.skip]
        if each.affine is not None:
            build, like = before(end), end.meta["val"]
            for target, kind, value in (
                (aten.mul.Tensor, "scale", each.affine.scale),
                (aten.add.Tensor, "shift", each.affine.shift),
            ):
                name = _free_name(edit, joined(owner_name(end), f"bypass_{kind}"))
                own = nn.Parameter(value.detach().to(like.device, like.dtype), requires_grad=True)
                attach(edit.module, name, own)
                skip = build(target, skip, build.fetch(name))
        end.replace_all_uses_with(skip)
        edit.graph.erase_node(end)
        twins[each.sum] = skip
    return edit.done(unread=True)


def _free_name(edit: Edit, name: str) -> str:
    taken = {known for known, _ in named_state(edit.module)}
    while name in taken:
        name = f"{name}_"
    return name
